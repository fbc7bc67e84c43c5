// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"weir/agent/runtimes"
	"weir/p2p"
	"weir/proxy"
	"weir/proxy/registry"
)

func TestHistory(t *testing.T) {
	var h history
	if steps := h.list(); steps != nil {
		t.Errorf("an empty history has %v", steps)
	}
	now := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	h.add(now, traffic{10, 0, 5})
	h.add(now.Add(time.Minute), traffic{30, 0, 5})
	h.add(now.Add(historyStep), traffic{30, 100, 5})
	want := []Step{{now, traffic{30, 0, 5}}, {now.Add(historyStep), traffic{0, 100, 0}}}
	if steps := h.list(); !slices.Equal(steps, want) {
		t.Errorf("%v, want %v", steps, want)
	}
	drawn, highest := bars(h.list(), now.Add(historyStep))
	if highest != 100 || len(drawn) != 3 || drawn[2].X != 10*(historySteps-1)+1 || drawn[0].X != drawn[2].X-10 {
		t.Errorf("%v, %d", drawn, highest)
	}
	// After a long pause nothing of before is left, and a clock that goes
	// backwards loses nothing.
	h.add(now.Add(30*time.Hour), traffic{31, 100, 5})
	h.add(now, traffic{33, 100, 5})
	if steps := h.list(); len(steps) != 1 || steps[0].All() != 3 {
		t.Errorf("%v, want one of 3 bytes", steps)
	}
}

func TestTexts(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 5 << 30: "5.0 GiB"} {
		if got := BytesText(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
	for want, n := range map[string][2]int64{"–": {0, 0}, "0 %": {0, 3}, "33 %": {1, 3}, "<1 %": {1, 1000}, ">99 %": {999, 1000}, "99 %": {99, 100}, "100 %": {3, 3}} {
		if got := PercentText(n[0], n[1]); got != want {
			t.Errorf("%v is %q, want %q", n, got, want)
		}
	}
	for s, want := range map[float64]string{0: "–", 0.01: "<0.1 s", 0.25: "0.2 s", 99: "99.0 s", 754.6: "12m34s"} {
		if got := SecondsText(s); got != want {
			t.Errorf("%v is %q, want %q", s, got, want)
		}
	}
	for want, p := range map[string]registry.Pull{"": {UpstreamSeconds: 2, BytesFromUpstream: 9}, "about 2.0 s": {UpstreamSeconds: 2, BytesFromPeers: 1, BytesFromUpstream: 9}} {
		if got := AloneText(p); got != want {
			t.Errorf("%q, want %q", got, want)
		}
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
	d := pageData{Host: evil, Version: evil, Peers: &p2p.Status{},
		Node: &pageNode{Status: Status{Runtimes: []runtimes.Status{{Kind: evil, Reason: evil, Step: evil, Except: map[string]string{evil: evil}}},
			UnknownHosts: []proxy.Unknown{{Host: evil, Registry: true}}, Peers: &p2p.Status{Peers: []p2p.Peer{{Address: evil}}}},
			Pulls: []pagePull{{registry.Pull{Registry: evil, Repository: evil, Reference: evil, Client: evil}}}},
		Cluster:    &Cluster{Nodes: []NodeFigures{{Address: evil, Version: evil}}},
		Registries: []pageRegistry{{registry.Stats{Registry: evil}}},
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
