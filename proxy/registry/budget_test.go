// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// networks serves requests to a plain registry from any number of networks:
// path begins with the network's name.
func (s *side) networks(registry http.Handler) (url string) {
	lan := httptest.NewServer(registry)
	addr := strings.TrimPrefix(lan.URL, "http://")
	rt := &http.Transport{DisableCompression: true}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		network, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		r.URL.Path, r.Host = "/"+path, "registry.lan:5000"
		s.h.Serve(w, r, Upstream{Host: "registry.lan:5000", Plain: addr, NetworkID: network, Transport: rt})
	}))
	s.t.Cleanup(func() {
		srv.CloseClientConnections()
		lan.CloseClientConnections()
		srv.Close()
		lan.Close()
		rt.CloseIdleConnections()
	})
	return srv.URL
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

func (q *quota) used(owner string) (all, own int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.all, q.owners[owner]
}

func TestQuota(t *testing.T) {
	q := newQuota(100, 20)
	for i, step := range []struct {
		owner string
		n     int64
		ok    bool
	}{
		{"a", 15, true}, {"a", 6, false}, {"a", 5, true}, {"b", 20, true}, {"c", 11, false}, {"c", 10, true}, {"d", 1, false},
		{"", 51, false}, {"", 50, true}, {"", 1, false}, {"a", -20, true}, {"d", 20, true}, {"d", 1, false}, {"", 1, false},
		{"b", -20, true}, {"c", -10, true}, {"d", -20, true}, {"", 51, false}, {"", 50, true}, {"", -100, true},
	} {
		ok := true
		if step.n < 0 {
			q.give(step.owner, -step.n)
		} else {
			ok = q.take(step.owner, step.n)
		}
		if ok != step.ok {
			t.Errorf("step %d: %v, %+v", i, ok, q)
		}
	}
	if q.all != 0 || q.named != 0 || len(q.owners) != 0 {
		t.Errorf("%+v", q)
	}
}

// A buffer holds what a manifest may have, and nothing when it is more.
func TestBuffer(t *testing.T) {
	q := newQuota(manifestMemory, ownerMemory)
	for _, n := range []int{0, 1, firstBuffer, firstBuffer + 1, 100_000, maxManifest, maxManifest + 1, maxManifest + 100_000} {
		want := bytesOf(1, n)
		for _, way := range []string{"fill", "write"} {
			b := &buffer{quota: q, owner: "x"}
			if way == "fill" {
				if err := b.fill(bytes.NewReader(want)); err != nil {
					t.Fatal(err)
				}
			} else {
				_, _ = io.Copy(struct{ io.Writer }{b}, bytes.NewReader(want))
			}
			got, whole := b.whole()
			if whole != (n <= maxManifest) || whole && !bytes.Equal(got, want) {
				t.Errorf("%s of %d bytes: %d, %v", way, n, len(got), whole)
			}
			b.release()
			_, _ = b.Write(want) // as an upstream may read on
			if all, _ := q.used("x"); all != 0 {
				t.Errorf("%s of %d bytes: %d are still counted", way, n, all)
			}
		}
	}
}

// Manifests that are held up take as much memory as they may, and no more: they
// pass by, and those of other registries are kept.
func TestManifestsHeldUp(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	m, manifest := u.putManifest("a", "1", docker2)
	s := newSide(t, u, store.Options{})
	const networks, each = 4, 10
	var stopped sync.WaitGroup
	stopped.Add(networks * each)
	url := s.networks(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.UserAgent() == "weir" { // whether it is public
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(maxManifest))
		_, _ = w.Write(bytes.Repeat([]byte(" "), maxManifest-10))
		_ = http.NewResponseController(w).Flush()
		stopped.Done()
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients sync.WaitGroup
	for n := range networks {
		for i := range each {
			clients.Go(func() {
				req, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("%s/%d/v2/x/manifests/%d", url, n, i), nil)
				if err != nil {
					t.Error(err)
					return
				}
				if resp, err := http.DefaultClient.Do(req); err == nil {
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			})
		}
	}
	stopped.Wait()
	all, _ := s.h.memory.used("")
	if all == 0 || all > manifestMemory/2 {
		t.Errorf("%d bytes are held", all)
	}
	for n := range networks {
		if _, own := s.h.memory.used("network " + strconv.Itoa(n)); own > ownerMemory {
			t.Errorf("network %d has %d bytes held", n, own)
		}
	}
	path := "/v2/a/manifests/" + m.String()
	s.want(s.do("GET", path, "", "Accept", docker2), 200, manifest, "GET "+path)
	s.want(s.do("GET", path, "", "Accept", docker2), 200, manifest)
	// With the clients all of it goes.
	cancel()
	clients.Wait()
	eventually(t, "memory is counted for ever", func() bool { all, _ := s.h.memory.used(""); return all == 0 })
}

// Clients that read a kept manifest slowly hold its file, and no memory for it; those
// that hold up manifests at an authenticated registry use up what their own network
// may have, and no other's.
func TestManifestsReadSlowly(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	padded := func(n int) []byte {
		return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{},"layers":[]%s}`, docker2, strings.Repeat(" ", n))
	}
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/a/manifests/held") && r.Method == http.MethodGet {
			w.Header().Set("Content-Type", docker2)
			w.Header().Set("Content-Length", strconv.Itoa(maxManifest))
			_, _ = w.Write(bytes.Repeat([]byte(" "), maxManifest-10))
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return true
		}
		return false
	}
	m := u.put("a", padded(maxManifest-200))
	u.mu.Lock()
	u.types[m], u.tags["a:1"] = docker2, m
	u.mu.Unlock()
	s := newSide(t, u, store.Options{})
	host := strings.TrimPrefix(u.srv.URL, "https://")
	rt := u.srv.Client().Transport
	serve := func(network, path string, w http.ResponseWriter, ctx context.Context) {
		r := httptest.NewRequestWithContext(ctx, http.MethodGet, path, nil)
		r.Host = host
		s.h.Serve(w, r, Upstream{Host: host, NetworkID: network, Transport: rt})
	}
	for range 2 {
		w := httptest.NewRecorder()
		serve("", "/v2/a/manifests/1", w, t.Context())
		if w.Code != 200 || w.Body.Len() < maxManifest-300 {
			t.Fatal(w.Code, w.Body.Len())
		}
	}
	s.settle()

	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	const slow = 100
	started := make(chan struct{}, slow)
	var before, during runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range slow {
		clients.Go(func() {
			serve("pod", "/v2/a/manifests/1", &stuck{ResponseRecorder: httptest.NewRecorder(), started: started, ctx: ctx}, ctx)
		})
	}
	for range slow {
		<-started
	}
	runtime.GC()
	runtime.ReadMemStats(&during)
	if grown := int64(during.HeapAlloc) - int64(before.HeapAlloc); grown > slow*(1<<20)/2 {
		t.Errorf("%d clients have %d MiB held", slow, grown>>20)
	}

	for i := range 10 {
		clients.Go(func() {
			defer func() { _ = recover() }() // it is broken off
			serve("pod", fmt.Sprintf("/v2/a/manifests/held%d", i), httptest.NewRecorder(), ctx)
		})
	}
	eventually(t, "nothing is held", func() bool { _, own := s.h.memory.used("network pod"); return own > ownerMemory/2 })
	if all, own := s.h.memory.used("network pod"); own > ownerMemory || all != own {
		t.Errorf("%d bytes of %d are the network's", own, all)
	}
}

// stuck is a client that reads nothing.
type stuck struct {
	*httptest.ResponseRecorder
	started chan struct{}
	ctx     context.Context
	once    sync.Once
}

func (s *stuck) Write(p []byte) (int, error) {
	s.once.Do(func() { s.started <- struct{}{} })
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

// A body without a length doesn't grow beyond the store, and the client gets all
// of it.
func TestBodyWithoutLengthIsBounded(t *testing.T) {
	const size = 10 << 20
	content := bytesOf(2, 3*size)
	u := newUpstream(t)
	u.allow("a", "")
	d := u.put("a", content)
	s := newSide(t, u, store.Options{MaxBytes: size})
	var most int64
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		var from int64
		if at := parseRanges(r.Header.Get("Range")); at != nil {
			from = at[0].From
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(content)-1, len(content)))
			w.WriteHeader(http.StatusPartialContent)
		}
		_ = http.NewResponseController(w).Flush() // so that it has no length
		for part := content[from:]; len(part) > 0; {
			n := min(len(part), 1<<20)
			if _, err := w.Write(part[:n]); err != nil {
				return true
			}
			part = part[n:]
			var disk int64
			for _, f := range s.left() {
				if info, err := os.Stat(f); err == nil {
					disk += info.Size()
				}
			}
			u.mu.Lock()
			most = max(most, disk)
			u.mu.Unlock()
		}
		return true
	}
	a := s.do("GET", "/v2/a/blobs/"+d.String(), "")
	if a.err != nil || !bytes.Equal(a.body, content) {
		t.Errorf("%d bytes, %v", len(a.body), a.err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if most > size || s.store.Has(d) {
		t.Errorf("%d bytes were on the disk; kept: %v", most, s.store.Has(d))
	}
}

// A push that is never finished, to a registry of a pod's own, evicts nothing and
// keeps nothing out.
func TestPushEvictsNothing(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	s := newSide(t, u, store.Options{MaxBytes: 20 << 20})
	var kept []digest.Digest
	for i := range 10 {
		content := bytesOf(uint64(10+i), 1<<20)
		kept = append(kept, u.put("a", content))
		s.do("GET", "/v2/a/blobs/"+kept[i].String(), "")
	}
	url := s.networks(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Location", "/v2/x/blobs/uploads/1")
		w.WriteHeader(http.StatusAccepted)
	}))
	for _, step := range []struct {
		method string
		size   int
	}{{"POST", 0}, {"PATCH", 18 << 20}} {
		path := map[string]string{"POST": "", "PATCH": "1"}[step.method]
		req, err := http.NewRequest(step.method, url+"/pod/v2/x/blobs/uploads/"+path, bytes.NewReader(make([]byte, step.size)))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil || resp.StatusCode != http.StatusAccepted {
			t.Fatal(resp, err)
		}
		resp.Body.Close()
	}
	for i, d := range kept {
		if !s.store.Has(d) {
			t.Errorf("blob %d was evicted", i)
		}
	}
	another := bytesOf(30, 9<<20)
	d := u.put("a", another)
	s.do("GET", "/v2/a/blobs/"+d.String(), "")
	eventually(t, "it isn't kept", func() bool { return s.store.Has(d) })
	if st := s.store.Stats(); st.Bytes > st.MaxBytes {
		t.Errorf("%+v", st)
	}
}

// One network's pushes that are begun and never ended leave room for others'.
func TestPushesOfOne(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	var mu sync.Mutex
	n := 0
	url := s.networks(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		n++
		w.Header().Set("Location", fmt.Sprintf("/v2/x/blobs/uploads/%d", n))
		mu.Unlock()
		w.WriteHeader(http.StatusAccepted)
	}))
	for network := range 6 {
		for range maxSessions {
			resp, err := http.Post(fmt.Sprintf("%s/%d/v2/x/blobs/uploads/", url, network), "", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
		}
	}
	for network := range 6 {
		want := int64(ownerSessions)
		if network >= maxSessions/2/ownerSessions {
			want = 0
		}
		if _, own := s.h.sessions.quota.used("network " + strconv.Itoa(network)); own != want {
			t.Errorf("network %d has %d sessions", network, own)
		}
	}
	uploading(u, nil)
	for range maxSessions / 2 {
		s.send("POST", "/v2/a/blobs/uploads/", nil)
	}
	if all, _ := s.h.sessions.quota.used(""); all != maxSessions || len(s.h.sessions.all) != maxSessions {
		t.Errorf("%d sessions", all)
	}
	s.h.sessions.close()
	if all, _ := s.h.sessions.quota.used(""); all != 0 {
		t.Errorf("%d sessions", all)
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "ingest", "*")); len(left) > 0 {
		t.Error(left)
	}
}
