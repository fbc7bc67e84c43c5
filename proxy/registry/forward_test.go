// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"weir/proxy/store"
)

// What isn't a blob or a manifest goes through as it is.
func TestForward(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	for _, path := range []string{"/v2/", "/v2/a/tags/list?n=3&last=x;y", "/v2/a/referrers/sha256:00", "/token?a=b", "/v2/%41/manifests/x", "/v2/a/blobs/uploads/?mount=x"} {
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE"} {
			a := s.do(method, path, "")
			if a.StatusCode != 202 || a.Header.Get("X-Echo") != method+" "+path {
				t.Errorf("%s %s arrived as %q (%s)", method, path, a.Header.Get("X-Echo"), a.Status)
			}
		}
	}
}

func TestUnreachable(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	u.srv.Close()
	a := s.do("GET", "/v2/a/manifests/x", "Bearer secret-token")
	if a.StatusCode != http.StatusBadGateway || !bytes.Contains(a.body, []byte(`"UNAVAILABLE"`)) || bytes.Contains(a.body, []byte("secret-token")) {
		t.Errorf("%s %q", a.Status, a.body)
	}
}

// switching answers a request by changing the protocol to one that echoes.
func switching(w http.ResponseWriter, _ *http.Request) bool {
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	_, _ = io.Copy(c, rw)
	return true
}

// A connection that changes its protocol is passed on, as without weir.
func TestUpgrade(t *testing.T) {
	u := newUpstream(t)
	u.fault = switching
	s := newSide(t, u, store.Options{})
	resp, c := s.raw("GET /v2/a/tags/list HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp.Status)
	}
	if err := echoes(c); err != nil {
		t.Error(err)
	}
}

// A registry that changes the protocol unasked holds no request
// of its clients: what it sends would have no end, nor end with its client's leaving.
func TestUpgradeByItself(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	kept := u.put("a", bytesOf(3, 5000))
	s := newSide(t, u, store.Options{})
	s.want(s.do("GET", "/v2/a/blobs/"+kept.String(), ""), 200, nil, "GET /v2/a/blobs/"+kept.String())
	s.later.Add(int64(2 * DefaultRightsTTL))
	u.fault = switching
	for _, path := range []string{"/v2/a/blobs/" + kept.String(), "/v2/a/blobs/sha256:" + strings.Repeat("0", 64), "/v2/a/manifests/1", "/v2/a/tags/list", "/v2/"} {
		for _, method := range []string{"GET", "HEAD"} {
			if a := s.do(method, path, ""); a.err != nil || a.StatusCode != http.StatusBadGateway {
				t.Errorf("%s %s: %v, %v", method, path, a.Response, a.err)
			}
		}
	}
}

func echoes(c net.Conn) error {
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	b := make([]byte, 5)
	_, err := io.ReadFull(c, b)
	if err == nil && string(b) != "hello" {
		err = fmt.Errorf("%q comes back", b)
	}
	return err
}
