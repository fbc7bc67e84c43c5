// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"weir/proxy/store"
)

// scripted is a registry that a test scripts. It is told apart from a real one
// only by keeping everything in memory.
type scripted struct {
	t   testing.TB
	srv *httptest.Server

	mu       sync.Mutex
	readers  map[string]map[string]bool          // repository → Authorization values that may read
	blobs    map[string]map[digest.Digest][]byte // repository → content
	types    map[digest.Digest]string            // media types of manifests
	tags     map[string]digest.Digest            // repository:tag
	redirect bool                                // blobs are at /cdn/
	fault    func(http.ResponseWriter, *http.Request) bool
	log      []string
}

func newUpstream(t testing.TB) *scripted {
	u := &scripted{t: t, readers: map[string]map[string]bool{}, blobs: map[string]map[digest.Digest][]byte{}, types: map[digest.Digest]string{}, tags: map[string]digest.Digest{}}
	u.srv = httptest.NewTLSServer(u)
	t.Cleanup(u.srv.Close)
	return u
}

func (u *scripted) allow(repo string, auth ...string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.readers[repo] = map[string]bool{}
	for _, a := range auth {
		u.readers[repo][a] = true
	}
}

func (u *scripted) put(repo string, content []byte) digest.Digest {
	u.mu.Lock()
	defer u.mu.Unlock()
	d := digest.FromBytes(content)
	if u.blobs[repo] == nil {
		u.blobs[repo] = map[digest.Digest][]byte{}
	}
	u.blobs[repo][d] = content
	return d
}

func (u *scripted) putManifest(repo, tag, mediaType string, layers ...digest.Digest) (digest.Digest, []byte) {
	m := map[string]any{"schemaVersion": 2, "mediaType": mediaType, "config": map[string]any{"digest": digest.FromString("config")}}
	var ls []any
	for _, l := range layers {
		ls = append(ls, map[string]any{"digest": l})
	}
	m["layers"] = ls
	b, _ := json.Marshal(m)
	d := u.put(repo, b)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.types[d] = mediaType
	u.tags[repo+":"+tag] = d
	return d, b
}

func (u *scripted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	fault := u.fault
	if r.UserAgent() != "weir" { // what is asked in the background has tests of its own
		u.log = append(u.log, r.Method+" "+r.URL.Path)
	}
	u.mu.Unlock()
	if fault != nil && fault(w, r) {
		return
	}
	if r.URL.Path == "/token" && r.URL.Query().Has("scope") { // for those without a name
		_, _ = io.WriteString(w, `{"token":"anonymous"}`)
		return
	}
	cdn := strings.HasPrefix(r.URL.Path, "/cdn/")
	t := parsePath(strings.TrimPrefix(r.URL.Path, "/cdn"))
	u.mu.Lock()
	unlock := sync.OnceFunc(u.mu.Unlock)
	defer unlock()
	if t.kind != blob && t.kind != manifest || r.Method != http.MethodGet && r.Method != http.MethodHead {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Echo", r.Method+" "+r.URL.RequestURI())
		w.WriteHeader(http.StatusAccepted)
		_, _ = w.Write(body)
		return
	}
	if auth := r.Header.Get("Authorization"); cdn {
		if auth != "" {
			u.t.Error("credentials were sent to where blobs are kept")
		}
	} else if !u.readers[t.repo][auth] {
		w.Header().Set("Www-Authenticate", `Bearer realm="`+u.srv.URL+`/token",service="test",scope="repository:`+t.repo+`:pull"`)
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = w.Write([]byte(`{"errors":[{"code":"UNAUTHORIZED"}]}`))
		return
	}
	d := t.digest
	if t.tag != "" {
		d = u.tags[t.repo+":"+t.tag]
	}
	content, ok := u.blobs[t.repo][d]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"errors":[{"code":"UNKNOWN"}]}`))
		return
	}
	if t.kind == blob && u.redirect && !cdn {
		// Another host, as far as a client can tell.
		w.Header().Set("Location", strings.Replace(u.srv.URL, "127.0.0.1", "localhost", 1)+"/cdn"+r.URL.Path)
		w.WriteHeader(http.StatusTemporaryRedirect)
		return
	}
	if !cdn {
		w.Header().Set("Docker-Content-Digest", d.String())
	}
	w.Header().Set("Etag", `"`+d.String()+`"`)
	w.Header().Set("Content-Type", "application/octet-stream")
	if mt := u.types[d]; mt != "" {
		w.Header().Set("Content-Type", mt)
	}
	unlock() // some clients take for ever
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}

// requests returns how many requests begin with a prefix, and forgets them.
func (u *scripted) requests() (log []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	log, u.log = u.log, nil
	return log
}

// side is a proxy in front of an upstream.
type side struct {
	metrics *prometheus.Registry
	t       testing.TB
	up      *scripted
	h       *Handler
	store   *store.Store
	dir     string
	file    string
	peers   Peers
	client  string       // that the requests are of
	hangs   bool         // whether the upstream will
	later   atomic.Int64 // nanoseconds that the clock of rights is ahead
	srv     *httptest.Server
}

// settle waits until nothing is asked in the background.
func (s *side) settle() {
	if err := s.h.asking.all.Acquire(s.t.Context(), maxAskingAll); err != nil {
		s.t.Fatal(err)
	}
	s.h.asking.all.Release(maxAskingAll)
}

// restart begins anew with the same store.
func (s *side) restart() {
	if s.h != nil {
		s.h.Close()
	}
	s.metrics = prometheus.NewRegistry()
	s.h = New(Options{Store: s.store, StaleIfError: time.Hour, File: s.file, Peers: s.peers, Metrics: s.metrics,
		now: func() time.Time { return time.Now().Add(time.Duration(s.later.Load())) }})
	s.h.outages.first, s.h.outages.again = time.Minute, time.Minute // however busy the machine is
	if s.hangs {
		s.h.outages.first, s.h.outages.again = 200*time.Millisecond, 10*time.Millisecond
	}
}

func newSide(t testing.TB, u *scripted, o store.Options) *side {
	s := &side{t: t, up: u, dir: t.TempDir()}
	var err error
	if s.store, err = store.Open(s.dir, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.h.Close()
		s.store.Close()
		s.h.stats.m.Range(func(_, c any) bool {
			eventually(t, "what was measured of transfers is over", func() bool { return len(c.(*counters).arrivals.sample()) == 0 })
			return true
		})
	})
	s.file = filepath.Join(t.TempDir(), "memory.json")
	s.restart()
	tr := u.srv.Client().Transport.(*http.Transport).Clone()
	tr.DisableCompression = true
	tr.TLSClientConfig.InsecureSkipVerify = true // for "localhost"
	t.Cleanup(tr.CloseIdleConnections)
	host := strings.TrimPrefix(u.srv.URL, "https://")
	s.srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Host = host
		s.h.Serve(w, r, Upstream{Host: host, Client: s.client, Transport: tr})
	}))
	t.Cleanup(s.srv.Close)
	return s
}

type answer struct {
	*http.Response
	body []byte
	err  error
}

func (s *side) do(method, path, auth string, header ...string) answer {
	s.t.Helper()
	req, err := http.NewRequest(method, s.srv.URL+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := c.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp, b, err}
}

func (s *side) want(a answer, code int, body []byte, upstream ...string) {
	s.t.Helper()
	if a.err != nil {
		s.t.Fatal(a.err)
	}
	if a.StatusCode != code || body != nil && !bytes.Equal(a.body, body) {
		s.t.Errorf("answer %s with %d bytes, want %d with %d bytes", a.Status, len(a.body), code, len(body))
	}
	if got := s.up.requests(); fmt.Sprint(got) != fmt.Sprint(upstream) {
		s.t.Errorf("the upstream was asked\n  %q, want\n  %q", got, upstream)
	}
}

func bytesOf(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte{byte(seed)})).Read(b)
	return b
}

const docker2 = "application/vnd.docker.distribution.manifest.v2+json"

// A client that connects to one registry and names another is forwarded, and
// nothing is kept or served.
func TestOtherHost(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	d := u.put("a", []byte("content"))
	s := newSide(t, u, store.Options{})
	w := httptest.NewRecorder()
	r := httptest.NewRequest("GET", "/v2/a/blobs/"+d.String(), nil)
	r.Host = "evil.test"
	s.h.Serve(w, r, Upstream{Host: strings.TrimPrefix(u.srv.URL, "https://"), Transport: u.srv.Client().Transport})
	if w.Code != 200 || s.store.Has(d) {
		t.Errorf("%d, kept %v", w.Code, s.store.Has(d))
	}
}
