// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"weir/p2p"
	"weir/proxy/registry"
)

func TestHistory(t *testing.T) {
	var h history
	if bars, _ := h.bars(); bars != nil {
		t.Errorf("an empty history has bars: %v", bars)
	}
	now := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	h.add(now, traffic{store: 10, upstream: 5})
	h.add(now.Add(time.Minute), traffic{store: 30, upstream: 5})
	h.add(now.Add(historyStep), traffic{store: 30, peers: 100, upstream: 5})
	steps, since := h.all()
	if n := len(steps); n != historySteps || steps[n-1] != (traffic{peers: 100}) || steps[n-2] != (traffic{store: 30, upstream: 5}) || steps[n-3] != (traffic{}) {
		t.Errorf("%v", steps[len(steps)-3:])
	}
	if want := now.Add(-(historySteps - 2) * historyStep); !since.Equal(want) {
		t.Errorf("it begins at %v, want %v", since, want)
	}
	bars, highest := h.bars()
	if highest != 100 || len(bars) != 3 {
		t.Errorf("%v, %d", bars, highest)
	}
	// After a long pause nothing of before is left, and a clock that goes
	// backwards loses nothing.
	h.add(now.Add(30*time.Hour), traffic{store: 31, peers: 100, upstream: 5})
	h.add(now, traffic{store: 33, peers: 100, upstream: 5})
	if _, highest := h.bars(); highest != 3 {
		t.Errorf("the highest is %d, want 3", highest)
	}
}

func TestTexts(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 5 << 30: "5.0 GiB"} {
		if got := BytesText(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
	if got := percentText(0, 0) + percentText(1, 3); got != "–33 %" {
		t.Errorf("%q", got)
	}
	for want, p := range map[string]registry.Pull{
		"ghcr.io/a/b":                     {Registry: "ghcr.io", Repository: "a/b"},
		"ghcr.io/a/b:1.2":                 {Registry: "ghcr.io", Repository: "a/b", Reference: "1.2"},
		"ghcr.io/a/b@sha256:0123456789ab": {Registry: "ghcr.io", Repository: "a/b", Reference: "sha256:0123456789abcdef"},
	} {
		if got := PullName(p); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// What comes from outside is text on the page, and nothing else.
func TestPageEscapes(t *testing.T) {
	const evil = `<script>alert(1)</script>"'`
	d := pageData{Status: Status{Runtimes: []RuntimeStatus{{Kind: evil, Reason: evil, Step: evil, Except: map[string]string{evil: evil}}},
		Peers: &p2p.Status{Peers: []p2p.Peer{{Address: evil}}}},
		Registries: []pageRegistry{{registry.Stats{Registry: evil}}},
		Pulls:      []pagePull{{registry.Pull{Registry: evil, Repository: evil, Reference: evil, Client: evil}}},
		Bars:       []bar{{Class: "store", Title: evil}}}
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, d); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), "<script>") || !strings.Contains(b.String(), "&lt;script&gt;") {
		t.Error(b.String())
	}
}

// On loopback, only requests for loopback are answered: a browser may be made
// to ask for another name there.
func TestGuarded(t *testing.T) {
	h := guarded(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	srv := httptest.NewServer(h)
	defer srv.Close()
	_, port, _ := net.SplitHostPort(srv.Listener.Addr().String())
	for host, want := range map[string]int{"127.0.0.1:" + port: 200, "localhost:" + port: 200, "[::1]:" + port: 200, "evil.example:" + port: 421, "10.0.0.1": 421} {
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
