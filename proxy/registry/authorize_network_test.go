// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// lure is a registry with a good certificate that redirects its clients to a host
// which authorizes them by their address: it gives content to those in the network
// "trusted" alone.
type lure struct {
	*side
	secret []byte
	path   string // of the secret, in a repository of the registry's
	// evil answers for the registry instead, if it returns true.
	evil atomic.Pointer[func(network string, w http.ResponseWriter, r *http.Request) bool]
	// held, if it isn't nil, holds the end of what the other host sends.
	held chan struct{}
	url  string // the client's network is the first part of the path
}

func newLure(t *testing.T) *lure {
	l := &lure{secret: bytesOf(7, 300_000), side: newSide(t, newUpstream(t), store.Options{})}
	l.path = "/v2/a/blobs/" + digest.FromBytes(l.secret).String()
	// The network of who asks is in a field that weir's transport adds.
	hosts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		network := r.Header.Get("Test-Network")
		switch evil := l.evil.Load(); {
		case r.Host == "guarded.corp" && network != "trusted":
			w.WriteHeader(http.StatusForbidden)
		case r.Host == "guarded.corp":
			http.ServeContent(w, r, "", time.Time{}, &heldUp{bytes.NewReader(l.secret), l.held})
		case evil != nil && (*evil)(network, w, r):
		case strings.Contains(r.URL.Path, "/manifests/"):
			w.Header().Set("Content-Type", docker2)
			fmt.Fprintf(w, `{"schemaVersion":2,"mediaType":%q,"config":{},"layers":[]}`, docker2)
		default:
			http.Redirect(w, r, "https://guarded.corp"+r.URL.Path, http.StatusTemporaryRedirect)
		}
	}))
	rt := &http.Transport{DisableCompression: true}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		network, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		r.URL.Path, r.Host = "/"+path, "evil.example"
		l.h.Serve(w, r, Upstream{Host: "evil.example", NetworkID: network, Transport: transport(func(r *http.Request) (*http.Response, error) {
			to := r.Clone(r.Context())
			to.Host, to.URL.Scheme, to.URL.Host = r.URL.Host, "http", strings.TrimPrefix(hosts.URL, "http://")
			to.Header.Set("Test-Network", network)
			resp, err := rt.RoundTrip(to)
			if err == nil {
				resp.Request = r
			}
			return resp, err
		})})
	}))
	t.Cleanup(func() {
		srv.CloseClientConnections()
		hosts.CloseClientConnections()
		srv.Close()
		hosts.Close()
		rt.CloseIdleConnections()
	})
	l.url = srv.URL
	return l
}

// heldUp is content whose second half comes when it is released.
type heldUp struct {
	io.ReadSeeker
	held chan struct{}
}

func (h *heldUp) Read(p []byte) (int, error) {
	if at, _ := h.Seek(0, io.SeekCurrent); h.held != nil && at >= 100_000 {
		<-h.held
	}
	return h.ReadSeeker.Read(p[:min(len(p), 50_000)])
}

// get asks as a client in a network, which follows no redirects.
func (l *lure) get(network, path string) answer {
	l.t.Helper()
	req, _ := http.NewRequestWithContext(l.t.Context(), http.MethodGet, l.url+"/"+network+path, nil)
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp, b, err}
}

// refused asks as a client in a network that has no access, though the registry has
// given it something of the same repository.
func (l *lure) refused(network string) {
	l.t.Helper()
	if a := l.get(network, "/v2/a/manifests/1"); a.err != nil || a.StatusCode != http.StatusOK {
		l.t.Fatal(a.Response, a.err)
	}
	if a := l.get(network, l.path); a.err != nil || a.StatusCode != http.StatusTemporaryRedirect || bytes.Contains(a.body, l.secret[:1000]) {
		l.t.Errorf("a client in the network %q is answered with %v, %d bytes, %v", network, a.Response, len(a.body), a.err)
	}
}

// What one network's clients are given by a host that authorizes by address, through
// a redirect of any registry, is given to no other network's.
func TestRedirectedByAddress(t *testing.T) {
	l := newLure(t)
	for range 3 {
		if a := l.get("trusted", l.path); a.err != nil || !bytes.Equal(a.body, l.secret) {
			t.Fatal(a.Response, a.err)
		}
		l.refused("other")
	}
	// Nor after it was shown to be there, by a range.
	l.h.rights.Remove(Upstream{Host: "evil.example"}.repository("a"), digest.FromBytes(l.secret))
	if a := l.get("trusted", l.path); a.err != nil || !bytes.Equal(a.body, l.secret) || a.Header.Get("Cache-Status") != "weir; hit" {
		t.Fatal(a.Response, a.err)
	}
	l.refused("other")
}

// Nor while it is arriving for a client that it is given to.
func TestRedirectedByAddressArriving(t *testing.T) {
	l := newLure(t)
	l.held = make(chan struct{})
	done := make(chan answer)
	go func() { done <- l.get("trusted", l.path) }()
	eventually(t, "nothing arrives", func() bool { return l.store.Stats().Running > 0 })
	l.refused("other")
	close(l.held)
	if a := <-done; a.err != nil || !bytes.Equal(a.body, l.secret) {
		t.Error(a.Response, a.err)
	}
}

// The registry begins to send to a client of its own what it knows of the secret,
// and breaks off when a client that has access follows: that client's request gets
// the rest, and the first one gets none of it.
func TestRedirectedByAddressOfAFollower(t *testing.T) {
	l := newLure(t)
	l.h.lagTime = 100 * time.Millisecond
	cut := make(chan struct{})
	evil := func(network string, w http.ResponseWriter, r *http.Request) bool {
		if network != "other" || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		if r.Header.Get("Range") != "" {
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(l.secret)))
		_, _ = w.Write(l.secret[:1000])
		_ = http.NewResponseController(w).Flush()
		<-cut
		panic(http.ErrAbortHandler)
	}
	l.evil.Store(&evil)
	done := make(chan answer)
	go func() { done <- l.get("other", l.path) }()
	eventually(t, "nothing arrives", func() bool { return l.store.Stats().Running > 0 })
	follower := make(chan answer)
	go func() { follower <- l.get("trusted", l.path) }()
	// It has asked when both are delivered, or when it was answered without.
	var trusted answer
	select {
	case trusted = <-follower:
		close(cut)
	case <-l.following():
		close(cut)
		trusted = <-follower
	}
	if a := <-done; len(a.body) > 1000 {
		t.Errorf("the registry's own client has got %d bytes, %v", len(a.body), a.err)
	}
	if trusted.err != nil || !bytes.Equal(trusted.body, l.secret) {
		t.Error(trusted.Response, trusted.err)
	}
}

// following is closed when a second client reads what arrives.
func (l *lure) following() <-chan struct{} {
	c := make(chan struct{})
	go func() {
		defer close(c)
		for l.t.Context().Err() == nil && l.h.Stats()[0].Hits == 0 {
			time.Sleep(time.Millisecond)
		}
	}()
	return c
}
