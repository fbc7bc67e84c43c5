// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	"weir/proxy/store"
)

// What a client gets of a repository is one pull, with where its bytes came
// from; another repository's is another.
func TestPulls(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	u.allow("team/app", "Bearer a")
	u.allow("team/other", "Bearer a")
	layer, other := bytesOf(1, 200_000), bytesOf(2, 70_000)
	d := u.put("team/app", layer)
	_, m := u.putManifest("team/app", "v1", docker2, d)
	od := u.put("team/other", other)

	s.do("HEAD", "/v2/team/secret/manifests/v1", "Bearer a") // it may not
	md := s.do("HEAD", "/v2/team/app/manifests/v1", "Bearer a").Header.Get("Docker-Content-Digest")
	s.do("GET", "/v2/team/app/manifests/"+md, "Bearer a")
	s.do("GET", "/v2/team/app/blobs/"+d.String(), "Bearer a")
	s.do("GET", "/v2/team/app/blobs/"+d.String(), "Bearer a")
	s.do("GET", "/v2/team/app/blobs/"+od.String(), "Bearer a") // it isn't there
	s.do("GET", "/v2/team/other/blobs/"+od.String(), "Bearer a")
	// A pull ends just after its last byte has gone.
	var all []Pull
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if all = s.h.Pulls(); len(all) == 2 && !all[0].Ended.IsZero() && !all[1].Ended.IsZero() {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%+v", all)
		}
	}
	if p := all[0]; p.Repository != "team/other" || p.Bytes != 70_000 || p.BytesFromUpstream != 70_000 || p.Blobs != 1 || p.Reference != "" {
		t.Errorf("%+v", p)
	}
	p := all[1]
	if p.Repository != "team/app" || p.Reference != "v1" || p.Blobs != 2 || p.Manifests != 1 || p.Failed != 0 {
		t.Errorf("%+v", p)
	}
	if want := int64(len(m)) + 400_000; p.Bytes != want || p.Size != want || p.BytesFromStore != 200_000 || p.BytesFromUpstream != int64(len(m))+200_000 {
		t.Errorf("%+v, want %d bytes", p, want)
	}
	if p.Ended.IsZero() || p.Ended.Before(p.Started) || p.Seconds <= 0 {
		t.Errorf("%+v", p)
	}
}

// A running pull is seen as such, and one that breaks off as failed.
func TestRunningPull(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	u.allow("team/app", "")
	d := u.put("team/app", bytesOf(3, 300_000))
	half, more := make(chan struct{}), make(chan struct{})
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		w.Header().Set("Content-Length", "300000")
		_, _ = w.Write(bytesOf(3, 300_000)[:100_000])
		_ = http.NewResponseController(w).Flush()
		close(half)
		<-more
		panic(http.ErrAbortHandler)
	}
	ended := make(chan struct{})
	go func() { s.do("GET", "/v2/team/app/blobs/"+d.String(), ""); close(ended) }()
	<-half
	s.eventually(func(all []Pull) bool {
		return len(all) == 1 && all[0].Ended.IsZero() && all[0].Size == 300_000 && all[0].Bytes > 0
	})
	u.mu.Lock()
	u.fault = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusForbidden); return true }
	u.mu.Unlock()
	close(more)
	<-ended
	s.eventually(func(all []Pull) bool {
		return !all[0].Ended.IsZero() && all[0].Failed == 1 && all[0].Bytes < 300_000
	})
}

// eventually waits for the pulls to be so: there is no event for it.
func (s *side) eventually(so func([]Pull) bool) {
	s.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !so(s.h.Pulls()); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("%+v", s.h.Pulls())
		}
	}
}

// No more than the latest pulls are remembered, and a client that asks without
// end takes no more memory.
func TestPullsAreBounded(t *testing.T) {
	ps := pulls{tracer: noop.Tracer{}}
	x := &exchange{stats: new(counters)}
	for i := range 3 * maxPulls {
		x.target = target{kind: manifest, tag: "a"}
		x.who.Name = strings.Repeat("a", i+1)
		for range 10 {
			x.w = &delivery{manifest: true, head: true}
			x.w.gives.Store(true)
			ps.begin(x)(true)
		}
	}
	if n := len(ps.list()); n != maxPulls {
		t.Errorf("%d pulls are remembered", n)
	}
	if p := ps.all[0]; len(p.running) != 0 || p.Repository != x.who.Name {
		t.Errorf("%+v", p)
	}
}
