// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// On loopback, only requests for loopback are answered: a browser may be made
// to ask for another name there.
func TestGuarded(t *testing.T) {
	srv := httptest.NewServer(guarded(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	defer srv.Close()
	_, port, _ := net.SplitHostPort(srv.Listener.Addr().String())
	for host, want := range map[string]int{"127.0.0.1:" + port: 200, "localhost:" + port: 200, "[::1]:" + port: 200,
		"evil.example:" + port: 421, "10.0.0.1": 421, "evil-localhost:" + port: 421, "evil.localhost": 421, "127.0.0.1.evil.example": 421, "0.0.0.0:" + port: 421} {
		req, err := http.NewRequest(http.MethodGet, srv.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%q: %s, want %d", host, resp.Status, want)
		}
		if want == 200 && !strings.Contains(resp.Header.Get("Content-Security-Policy"), "default-src 'none'") {
			t.Errorf("%v", resp.Header)
		}
	}
}

// Programs on the node ask an agent that listens on all addresses by loopback.
func TestURL(t *testing.T) {
	for addr, want := range map[string]string{"127.0.0.1:5050": "http://127.0.0.1:5050/x", ":5050": "http://127.0.0.1:5050/x", "0.0.0.0:80": "http://127.0.0.1:80/x",
		"[::]:5050": "http://[::1]:5050/x", "10.0.0.1:5050": "http://10.0.0.1:5050/x", "node:5050": "http://node:5050/x", "nothing": "http://nothing/x"} {
		if got := URL(addr, "/x"); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}
