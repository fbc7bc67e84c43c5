// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
	t   *testing.T
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

func newUpstream(t *testing.T) *scripted {
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
	defer u.mu.Unlock()
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
	t       *testing.T
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

func newSide(t *testing.T, u *scripted, o store.Options) *side {
	s := &side{t: t, up: u, dir: t.TempDir()}
	var err error
	if s.store, err = store.Open(s.dir, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.h.Close(); s.store.Close() })
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

func TestBlobIsKeptAndServed(t *testing.T) {
	for _, redirect := range []bool{false, true} {
		u := newUpstream(t)
		u.redirect = redirect
		u.allow("a/b", "Bearer 1")
		want := bytesOf(1, 700_000)
		path := "/v2/a/b/blobs/" + u.put("a/b", want).String()
		s := newSide(t, u, store.Options{})

		cold := []string{"GET " + path}
		if redirect {
			cold = append(cold, "GET /cdn"+path)
		}
		a := s.do("GET", path, "Bearer 1")
		s.want(a, 200, want, cold...)
		if a.ContentLength != int64(len(want)) || a.Header.Get("Docker-Content-Digest") == "" || a.Header.Get("Cache-Status") != "weir; fwd=miss; stored" {
			t.Errorf("%d %v", a.ContentLength, a.Header)
		}
		a = s.do("GET", path, "Bearer 1")
		s.want(a, 200, want)
		if a.ContentLength != int64(len(want)) || a.Header.Get("Cache-Status") != "weir; hit" {
			t.Errorf("%d %v", a.ContentLength, a.Header)
		}
		code := map[bool]int{false: 200, true: 307}[redirect]
		s.want(s.do("HEAD", path, "Bearer 1"), code, []byte{}, "HEAD "+path)
		a = s.do("GET", path, "Bearer 1", "Range", "bytes=699000-")
		s.want(a, 206, want[699_000:])
		if a.Header.Get("Content-Range") != "bytes 699000-699999/700000" {
			t.Error(a.Header)
		}
		s.want(s.do("GET", path, "Bearer 1", "Range", "bytes=700000-"), 416, nil)
		s.want(s.do("GET", path, "Bearer 1", "If-None-Match", a.Header.Get("Etag")), 304, nil)
	}
}

// Who may get what, by which credentials and through which repository.
func TestRights(t *testing.T) {
	u := newUpstream(t)
	u.allow("team/private", "Bearer alice")
	u.allow("team/other", "Bearer bob")
	u.allow("library/public", "", "Bearer alice", "Bearer bob")
	shared := bytesOf(2, 10_000)
	d := u.put("team/private", shared)
	u.put("library/public", shared)
	secret := u.put("team/private", bytesOf(3, 5000))
	s := newSide(t, u, store.Options{})
	path := func(repo string, d digest.Digest) string { return "/v2/" + repo + "/blobs/" + d.String() }

	s.want(s.do("GET", path("team/private", d), "Bearer alice"), 200, shared, "GET "+path("team/private", d))
	s.want(s.do("GET", path("team/private", secret), "Bearer alice"), 200, nil, "GET "+path("team/private", secret))

	unauthorized := []byte(`{"errors":[{"code":"UNAUTHORIZED"}]}`)
	for _, auth := range []string{"", "Bearer bob", "Bearer alicE"} {
		for _, method := range []string{"GET", "HEAD"} {
			// The upstream's own refusal, though the blob is here.
			a := s.do(method, path("team/private", d), auth)
			if a.StatusCode != 401 || a.Header.Get("Www-Authenticate") == "" || method == "GET" && !bytes.Equal(a.body, unauthorized) {
				t.Errorf("%s as %q: %s %q", method, auth, a.Status, a.body)
			}
		}
		if a := s.do("GET", path("team/private", d), auth, "Range", "bytes=0-9"); a.StatusCode != 401 {
			t.Errorf("range as %q: %s", auth, a.Status)
		}
	}
	u.requests()

	// A right to one repository is none to what is only in another.
	s.want(s.do("GET", path("team/other", secret), "Bearer bob"), 404, nil, "GET "+path("team/other", secret))
	s.want(s.do("GET", path("library/public", secret), ""), 404, nil, "GET "+path("library/public", secret))
	// A manifest that names it doesn't make it a member.
	m, _ := u.putManifest("team/other", "trap", docker2, secret)
	s.want(s.do("GET", "/v2/team/other/manifests/"+m.String(), "Bearer bob"), 200, nil, "GET /v2/team/other/manifests/"+m.String())
	s.want(s.do("GET", path("team/other", secret), "Bearer bob"), 404, nil, "GET "+path("team/other", secret))

	// What is in a public repository too costs one question, once.
	s.want(s.do("GET", path("library/public", d), ""), 200, shared, "GET "+path("library/public", d))
	s.want(s.do("GET", path("library/public", d), ""), 200, shared)
	s.want(s.do("GET", path("library/public", d), "Bearer bob"), 200, shared, "GET "+path("library/public", d))

	// A refusal takes the right away at once.
	u.allow("team/private")
	s.want(s.do("GET", "/v2/team/private/manifests/none", "Bearer alice"), 401, nil, "GET /v2/team/private/manifests/none")
	s.want(s.do("GET", path("team/private", d), "Bearer alice"), 401, nil, "GET "+path("team/private", d))
	// And gives it back when the upstream does.
	u.allow("team/private", "Bearer alice")
	s.want(s.do("GET", path("team/private", d), "Bearer alice"), 200, shared, "GET "+path("team/private", d))
	s.want(s.do("GET", path("team/private", d), "Bearer alice"), 200, shared)
}

func TestManifests(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	d, body := u.putManifest("a", "v1", docker2)
	s := newSide(t, u, store.Options{})
	byTag, byDigest := "/v2/a/manifests/v1", "/v2/a/manifests/"+d.String()

	a := s.do("GET", byTag, "", "Accept", docker2)
	s.want(a, 200, body, "GET "+byTag)
	// From now on the tag costs a HEAD, and the digest nothing.
	for range 2 {
		a = s.do("GET", byTag, "", "Accept", docker2)
		s.want(a, 200, body, "HEAD "+byTag)
		if a.Header.Get("Content-Type") != docker2 || a.Header.Get("Docker-Content-Digest") != d.String() || a.ContentLength != int64(len(body)) {
			t.Error(a.Header)
		}
	}
	a = s.do("GET", byDigest, "", "Accept", docker2+", */*;q=0.1")
	s.want(a, 200, body)
	if a.Header.Get("Content-Type") != docker2 {
		t.Error(a.Header)
	}
	s.want(s.do("HEAD", byDigest, ""), 200, []byte{})
	s.want(s.do("HEAD", byTag, ""), 200, []byte{}, "HEAD "+byTag)
	// A client that doesn't take this type gets the upstream's answer.
	s.want(s.do("GET", byDigest, "", "Accept", "application/vnd.oci.image.index.v1+json"), 200, body, "GET "+byDigest)

	// A moved tag is seen at once.
	_, body2 := u.putManifest("a", "v1", docker2, digest.FromString("new"))
	s.want(s.do("GET", byTag, "", "Accept", docker2), 200, body2, "HEAD "+byTag, "GET "+byTag)
	s.want(s.do("GET", byTag, "", "Accept", docker2), 200, body2, "HEAD "+byTag)
}

func TestManifestCompressed(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	d, body := u.putManifest("a", "v1", docker2)
	var z bytes.Buffer
	zw := gzip.NewWriter(&z)
	_, _ = zw.Write(body)
	zw.Close()
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || r.Header.Get("Accept-Encoding") != "gzip" {
			return false
		}
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Content-Type", docker2)
		w.Header().Set("Docker-Content-Digest", d.String())
		_, _ = w.Write(z.Bytes())
		return true
	}
	s := newSide(t, u, store.Options{})
	path := "/v2/a/manifests/" + d.String()
	a := s.do("GET", path, "", "Accept-Encoding", "gzip")
	s.want(a, 200, z.Bytes(), "GET "+path)
	s.want(s.do("GET", path, ""), 200, body)
}

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

// A client never completes a blob whose bytes aren't the digest's.
func TestWrongBytes(t *testing.T) {
	want := bytesOf(4, 300_000)
	d := digest.FromBytes(want)
	path := "/v2/a/blobs/" + d.String()
	forged := append(bytes.Clone(want[:299_999]), want[299_999]^1)
	for name, script := range map[string]func(w http.ResponseWriter){
		"forged": func(w http.ResponseWriter) { _, _ = w.Write(forged) },
		"forged, of known length": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "300000")
			_, _ = w.Write(forged)
		},
		"short":   func(w http.ResponseWriter) { _, _ = w.Write(want[:200_000]) },
		"long":    func(w http.ResponseWriter) { _, _ = w.Write(append(bytes.Clone(want), "more"...)) },
		"chunked": func(w http.ResponseWriter) { w.(http.Flusher).Flush(); _, _ = w.Write(forged) },
		"cut": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "300000")
			_, _ = w.Write(want[:100_000])
			panic(http.ErrAbortHandler)
		},
		"no bytes": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "300000")
			w.WriteHeader(200)
			panic(http.ErrAbortHandler)
		},
	} {
		for _, o := range []store.Options{{}, {MaxBytes: 1}} { // kept, and streamed without being kept
			t.Run(fmt.Sprint(name, o.MaxBytes), func(t *testing.T) {
				u := newUpstream(t)
				u.fault = func(w http.ResponseWriter, r *http.Request) bool { script(w); return true }
				s := newSide(t, u, o)
				a := s.do("GET", path, "")
				if a.err == nil && a.StatusCode == 200 && a.ContentLength < 0 || a.err == nil && a.StatusCode == 200 && int64(len(a.body)) == a.ContentLength {
					t.Errorf("the client completed %d bytes (%s)", len(a.body), a.Status)
				}
				if s.store.Has(d) {
					t.Error("it was kept")
				}
			})
		}
	}
	u := newUpstream(t)
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		_, _ = w.Write([]byte(`{"schemaVersion":2}`))
		return true
	}
	s := newSide(t, u, store.Options{})
	if a := s.do("GET", "/v2/a/manifests/"+d.String(), ""); a.StatusCode != http.StatusBadGateway {
		t.Errorf("another manifest than asked for: %s %q", a.Status, a.body)
	}
}

// In place of a small blob, such as an image's configuration, the registry sends
// something else. The client is told at once, and has nothing to try again.
func TestWrongSmallBlob(t *testing.T) {
	want := bytesOf(4, 3000)
	u := newUpstream(t)
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", "3000")
		_, _ = w.Write(append(bytes.Clone(want[1:]), want[0]))
		return true
	}
	s := newSide(t, u, store.Options{})
	path := "/v2/a/blobs/" + digest.FromBytes(want).String()
	a := s.do("GET", path, "")
	s.want(a, http.StatusNotFound, nil, "GET "+path)
	if !strings.Contains(string(a.body), "BLOB_UNKNOWN") {
		t.Errorf("%s", a.body)
	}
}

// A blob that breaks off is continued by Range, and the client doesn't notice.
func TestCutIsResumed(t *testing.T) {
	want := bytesOf(5, 600_000)
	for _, o := range []store.Options{{}, {MaxBytes: 1}} {
		for _, refusal := range []int{0, http.StatusRequestedRangeNotSatisfiable, http.StatusBadRequest} { // of a range without an end
			u := newUpstream(t)
			u.allow("a", "")
			d := u.put("a", want)
			var ranges []string
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				ranges = append(ranges, r.Header.Get("Range"))
				if len(ranges) > 1 {
					if refusal != 0 && r.Header.Get("Range") != "" {
						w.WriteHeader(refusal)
						return true
					}
					return false
				}
				w.Header().Set("Content-Length", "600000")
				_, _ = w.Write(want[:250_000])
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			}
			s := newSide(t, u, o)
			a := s.do("GET", "/v2/a/blobs/"+d.String(), "")
			if a.err != nil || !bytes.Equal(a.body, want) {
				t.Errorf("%d: %d bytes, err %v", refusal, len(a.body), a.err)
			}
			if n := len(ranges); n != map[bool]int{true: 2, false: 3}[refusal == 0] || !strings.HasPrefix(ranges[1], "bytes=2") {
				t.Errorf("%d: ranges asked for: %q", refusal, ranges)
			}
		}
	}
}

// Of a blob that is shorter than was announced the rest isn't asked for again and
// again: the client sees what it would see without.
func TestShorterThanAnnounced(t *testing.T) {
	for _, n := range []int{600_000, 3000} {
		shorterThanAnnounced(t, bytesOf(5, n))
	}
}

func shorterThanAnnounced(t *testing.T, want []byte) {
	for _, o := range []store.Options{{}, {MaxBytes: 1}} {
		u := newUpstream(t)
		u.allow("a", "")
		d := u.put("a", want)
		u.fault = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") != "" {
				return false
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(want)+len(want)/100))
			_, _ = w.Write(want)
			return true
		}
		s := newSide(t, u, o)
		path := "/v2/a/blobs/" + d.String()
		if a := s.do("GET", path, ""); !errors.Is(a.err, io.ErrUnexpectedEOF) || o.MaxBytes == 0 && len(a.body) < len(want)-1 {
			t.Errorf("%d bytes, err %v", len(a.body), a.err)
		}
		if got := u.requests(); !slices.Equal(got, []string{"GET " + path, "GET " + path}) {
			t.Errorf("the upstream was asked %q, want the blob and its rest", got)
		}
	}
}

// A damaged file in the store is noticed and fetched again in mid-answer.
func TestDamagedWhileServed(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	want := bytesOf(6, 1_500_000)
	d := u.put("a", want)
	s := newSide(t, u, store.Options{})
	path := "/v2/a/blobs/" + d.String()
	s.want(s.do("GET", path, ""), 200, want, "GET "+path)
	f, err := os.OpenFile(filepath.Join(s.dir, "blobs", "sha256", d.Encoded()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteAt([]byte("damage"), 1_000_000)
	f.Close()
	s.want(s.do("GET", path, ""), 200, want, "GET "+path)
	s.want(s.do("GET", path, ""), 200, want)
}

// Many clients at once cost the upstream one blob.
func TestTogether(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	want := bytesOf(7, 2_000_000)
	d := u.put("a", want)
	s := newSide(t, u, store.Options{})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			a := s.do("GET", "/v2/a/blobs/"+d.String(), "")
			if a.err != nil || !bytes.Equal(a.body, want) {
				t.Errorf("%d bytes, err %v", len(a.body), a.err)
			}
		})
	}
	wg.Wait()
	gets := 0
	for _, r := range u.requests() {
		if strings.HasPrefix(r, "GET ") {
			gets++
		}
	}
	if gets != 1 {
		t.Errorf("%d GETs", gets)
	}
}

// holdsBack has the upstream stop in the middle of a blob that one client gets:
// begun is closed there, and the rest is sent when rest is closed.
func (u *scripted) holdsBack(auth string, blob []byte) (begun <-chan struct{}, rest chan<- struct{}) {
	there, onward := make(chan struct{}), make(chan struct{})
	var once sync.Once
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") != auth {
			return false
		}
		middle := len(blob) * 2 / 3
		w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
		_, _ = w.Write(blob[:middle])
		w.(http.Flusher).Flush()
		once.Do(func() { close(there) })
		<-onward
		_, _ = w.Write(blob[middle:])
		return true
	}
	return there, onward
}

// While a blob arrives for one client, another that may not read it gets the upstream's
// refusal, and at once.
func TestArrivingForAnother(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Bearer alice")
	u.allow("b", "Bearer bob")
	want := bytesOf(8, 300_000)
	d := u.put("a", want)
	begun, refused := u.holdsBack("Bearer alice", want)
	s := newSide(t, u, store.Options{})
	led := make(chan answer)
	go func() { led <- s.do("GET", "/v2/a/blobs/"+d.String(), "Bearer alice") }()
	<-begun
	for auth, path := range map[string]string{"": "/v2/a/blobs/", "Bearer bob": "/v2/a/blobs/", "Bearer bob ": "/v2/b/blobs/"} {
		for _, rng := range []string{"", "bytes=0-9"} {
			if a := s.do("GET", path+d.String(), strings.TrimSpace(auth), "Range", rng); a.err != nil || a.StatusCode != 401 && a.StatusCode != 404 {
				t.Errorf("%s as %q: %v with %d bytes, %v", path, auth, a.Response, len(a.body), a.err)
			}
		}
	}
	close(refused)
	if a := <-led; a.err != nil || !bytes.Equal(a.body, want) {
		t.Errorf("who may read it got %d bytes, %v", len(a.body), a.err)
	}
}

// A client whose own way is slow, or who makes it so, doesn't hold up those who
// want the same blob.
func TestLaggingIsLeft(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Bearer slow", "Bearer fast")
	want := bytesOf(8, 300_000)
	d := u.put("a", want)
	begun, done := u.holdsBack("Bearer slow", want)
	s := newSide(t, u, store.Options{})
	s.h.lagTime = 10 * time.Millisecond
	path := "/v2/a/blobs/" + d.String()
	led := make(chan answer)
	go func() { led <- s.do("GET", path, "Bearer slow") }()
	<-begun
	for _, rng := range []string{"", "bytes=100000-"} {
		a := s.do("GET", path, "Bearer fast", "Range", rng)
		if a.err != nil || !bytes.Equal(a.body, want[300_000-len(a.body):]) || len(a.body) < 200_000 || !strings.Contains(a.Header.Get("Cache-Status"), "following") {
			t.Errorf("range %q: %d bytes, %v", rng, len(a.body), a.err)
		}
	}
	close(done)
	if a := <-led; a.err != nil || !bytes.Equal(a.body, want) {
		t.Errorf("the slow one got %d bytes, %v", len(a.body), a.err)
	}
	s.want(s.do("GET", path, "Bearer fast"), 200, want, "GET "+path, "GET "+path, "GET "+path, "GET "+path)
}

// A transfer lags when the registry gives more, and the node gets less.
func TestLags(t *testing.T) {
	const mib = 1 << 20
	many := func(n int, each int64) []int64 { return slices.Repeat([]int64{each}, n) }
	for _, c := range []struct {
		got  int64
		each []int64
		pace int64
		lags bool
	}{
		{0, many(1, 0), 0, true}, {100 << 10, many(1, 100<<10), 0, true}, {mib, many(1, mib), 0, false}, // it isn't known what it gives
		{10 * mib, many(1, 10*mib), 10 * mib, true}, {13 * mib, many(1, 13*mib), 10 * mib, false},
		{mib, many(30, mib), 10 * mib, false},                             // one of many
		{0, many(30, mib), 10 * mib, true},                                // that gets nothing, unlike the others
		{mib, append(many(1, 60*mib), many(99, 1000)...), 10 * mib, true}, // one is fast, and many stand still on purpose
		{mib, many(20, mib), 10 * mib, true},                              // less than it gives to one, in all
	} {
		if got := lags(c.got, c.each, c.pace, 5*time.Second); got != c.lags {
			t.Errorf("%d of %v: %v", c.got, c.each, got)
		}
	}
}

// A client can't lower a registry's pace by slow transfers.
func TestPace(t *testing.T) {
	var as arrivals
	var count atomic.Int64
	transfer := func(n int, took time.Duration) {
		body := as.measure(io.NopCloser(bytes.NewReader(make([]byte, n))), &count)
		_, _ = io.Copy(io.Discard, body)
		body.(*arrival).since = time.Now().Add(-took)
		body.Close()
		body.Close()
	}
	transfer(10<<20, 100*time.Millisecond)
	fast := as.pace()
	for range 20 {
		transfer(1<<20, time.Minute)
	}
	if got := as.pace(); got < fast*9/10 || fast < 50<<20 {
		t.Errorf("%d, and %d before", got, fast)
	}
	as.when = as.when.Add(-4 * paceHalfLife)
	if got := as.pace(); got > fast/15 {
		t.Errorf("%d long after", got)
	}
	if len(as.sample()) > 0 || count.Load() != 30<<20 {
		t.Errorf("%d run, %d bytes", len(as.sample()), count.Load())
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

func TestParsePath(t *testing.T) {
	d := digest.FromString("x")
	for path, want := range map[string]target{
		"/v2/library/alpine/manifests/3.20":            {kind: manifest, repo: "library/alpine", tag: "3.20"},
		"/v2/a/manifests/" + d.String():                {kind: manifest, repo: "a", digest: d},
		"/v2/a/b-c/d__e/blobs/" + d.String():           {kind: blob, repo: "a/b-c/d__e", digest: d},
		"/v2/blobs/manifests/manifests/latest":         {kind: manifest, repo: "blobs/manifests", tag: "latest"},
		"/v2/a/manifests/b/blobs/" + d.String():        {kind: blob, repo: "a/manifests/b", digest: d},
		"/v2/a/blobs/uploads/":                         {kind: uploads, repo: "a"},
		"/v2/a/blobs/uploads":                          {kind: uploads, repo: "a"},
		"/v2/a/blobs/uploads/1-2":                      {},
		"/v2":                                          {},
		"/v2/a/blobs/latest":                           {},
		"/v2/":                                         {kind: base},
		"/v2/a/manifests/":                             {},
		"/v2/A/manifests/x":                            {},
		"/v2/../a/manifests/x":                         {},
		"/v2//manifests/x":                             {},
		"/v2/a/manifests/.x":                           {},
		"/v2/a/manifests/" + strings.Repeat("x", 129):  {},
		"/v2/" + strings.Repeat("x", 256) + "/blobs/x": {},
		"/v2/a/blobs/sha256:zz":                        {},
		"/v2/a%2fb/manifests/x":                        {},
		"/v1/a/manifests/x":                            {},
		"/v2/a/manifests/x/y":                          {},
	} {
		if got := parsePath(path); got != want {
			t.Errorf("%s: %+v, want %+v", path, got, want)
		}
	}
}

func TestHosts(t *testing.T) {
	h := NewHosts("Registry.Example.COM:443", "10.0.0.1:5000")
	for host, want := range map[string]bool{
		"registry-1.docker.io": true, "ghcr.io": true, "x.ghcr.io": false, "europe-docker.pkg.dev": true, "pkg.dev.evil.test": false,
		"evilpkg.dev": false, "registry.example.com": true, "10.0.0.1:5000": true, "10.0.0.1": false, "auth.docker.io": false,
	} {
		if _, got := h.Find(Canonical(host)); got != want {
			t.Errorf("%s: %v", host, got)
		}
	}
	if (Upstream{Host: "index.docker.io"}).ID() != DockerHub || (Upstream{Host: "ghcr.io"}).ID() != "ghcr.io" {
		t.Error("Docker Hub has two identities, or others have its")
	}
	for in, want := range map[string]string{"GHCR.io": "ghcr.io", "ghcr.io.": "ghcr.io", "a:443": "a", "a:5000": "a:5000", "[::1]:443": "::1", "[::1]": "::1", "": ""} {
		if got := Canonical(in); got != want {
			t.Errorf("Canonical(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzParsePath(f *testing.F) {
	f.Add("/v2/library/alpine/manifests/3.20")
	f.Add("/v2/a/blobs/" + digest.FromString("x").String())
	f.Add("/v2/manifests/blobs/manifests/blobs/x")
	f.Fuzz(func(t *testing.T, path string) {
		got := parsePath(path)
		switch got.kind {
		case blob:
			if path != "/v2/"+got.repo+"/blobs/"+got.digest.String() || got.digest.Validate() != nil {
				t.Errorf("%q: %+v", path, got)
			}
		case manifest:
			ref := got.tag
			if ref == "" {
				ref = got.digest.String()
			}
			if path != "/v2/"+got.repo+"/manifests/"+ref {
				t.Errorf("%q: %+v", path, got)
			}
		}
	})
}

func FuzzMediaType(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"manifests":[]}`))
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"a/b","config":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if mt := mediaTypeOf(b); strings.ContainsAny(mt, "\r\n") {
			t.Errorf("%q", mt)
		}
	})
}

func FuzzRangeStart(f *testing.F) {
	for _, s := range []string{"", "bytes=0-", "bytes=5-9", "bytes=-5", "bytes=1-2,4-5", "lines=1-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, _ := rangeStart(s); n < 0 {
			t.Error(n)
		}
	})
}

func TestScrub(t *testing.T) {
	c := http.Client{}
	_, err := c.Get("http://127.0.0.1:1/blob?X-Amz-Signature=verysecret")
	if err == nil || strings.Contains(scrub(fmt.Errorf("wrapped: %w", err)).Error(), "verysecret") {
		t.Error(scrub(err))
	}
	if plain := errors.New("plain"); !errors.Is(scrub(plain), plain) {
		t.Error("changed")
	}
}
