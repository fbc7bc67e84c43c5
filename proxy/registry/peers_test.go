// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/rights"
	"weir/proxy/store"
)

// neighbours are peers that give what they are told to.
type neighbours struct {
	mu       sync.Mutex
	give     map[digest.Digest][][]byte // one after the other
	cut      bool                       // each breaks off in the middle
	known    [][]byte                   // of every name
	recalled func()                     // may be nil
	names    []string
	believed bool          // the first of give
	shows    []byte        // in ranges, if it isn't what is opened
	pause    chan struct{} // in the middle of each, if it isn't nil
	wrong    int
	ranges   int
	ended    []bool
}

func (n *neighbours) Ready() bool { return true }

func (n *neighbours) Want(_ context.Context, d digest.Digest, _ int64) Share {
	return &neighboursShare{n: n, d: d}
}

func (n *neighbours) Get(_ context.Context, d digest.Digest, limit int64) ([]byte, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if bs := n.give[d]; len(bs) > 0 && int64(len(bs[0])) <= limit {
		return bs[0], nil
	}
	return nil, errors.New("no peer has it")
}

func (n *neighbours) ProvideName(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.names = append(n.names, name)
}

func (n *neighbours) LoadName(context.Context, string) [][]byte {
	if n.recalled != nil {
		n.recalled()
	}
	return n.known
}

type neighboursShare struct {
	n     *neighbours
	d     digest.Digest
	whole []byte // what was opened last
	// believed is whether that was to be.
	believed bool
}

func (s *neighboursShare) Mine() bool {
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	return len(s.n.give[s.d]) == 0
}

func (s *neighboursShare) Open(_ context.Context, offset, _ int64) (io.ReadCloser, int64, error) {
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	bs := s.n.give[s.d]
	if len(bs) == 0 {
		return nil, 0, errors.New("no peer has it")
	}
	s.n.give[s.d] = bs[1:]
	s.whole, s.believed, s.n.believed = bs[0], s.n.believed, false
	rest := bs[0][offset:]
	if pause := s.n.pause; pause != nil {
		return io.NopCloser(io.MultiReader(bytes.NewReader(rest[:len(rest)/2]), &paused{pause, bytes.NewReader(rest[len(rest)/2:])})), int64(len(bs[0])), nil
	}
	if s.n.cut {
		return io.NopCloser(io.MultiReader(bytes.NewReader(rest[:len(rest)/2]), failing{})), int64(len(bs[0])), nil
	}
	return io.NopCloser(bytes.NewReader(rest)), int64(len(bs[0])), nil
}

// paused is a reader that waits first.
type paused struct {
	until chan struct{}
	io.Reader
}

func (p *paused) Read(b []byte) (int, error) {
	<-p.until
	return p.Reader.Read(b)
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the peer is gone") }

func (s *neighboursShare) Believed() bool { return s.believed }

func (s *neighboursShare) Range(_ context.Context, offset int64, p []byte) error {
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	s.n.ranges++
	whole := s.n.shows
	if whole == nil {
		whole = s.whole
	}
	if copy(p, whole[offset:]) < len(p) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

func (s *neighboursShare) Wrong() {
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	s.n.wrong++
}

func (s *neighboursShare) Close(kept bool) {
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	s.n.ended = append(s.n.ended, kept)
}

func TestPeersGiveBlobs(t *testing.T) {
	right := bytesOf(1, 600_000)
	wrong := bytesOf(2, 600_000)
	for _, tt := range []struct {
		name  string
		give  [][]byte
		cut   bool
		auth  string
		code  int
		asked []string // upstream, METHOD
		wrong int
	}{
		{"right", [][]byte{right}, false, "Bearer 1", 200, []string{"GET"}, 0},
		{"no peer", nil, false, "Bearer 1", 200, []string{"GET"}, 0},
		{"wrong, then right", [][]byte{wrong, right}, false, "Bearer 1", 200, []string{"GET"}, 1},
		{"wrong, then the upstream", [][]byte{wrong}, false, "Bearer 1", 200, []string{"GET", "GET"}, 1},
		{"shorter", [][]byte{wrong[:5000]}, false, "Bearer 1", 200, []string{"GET", "GET"}, 0},
		{"cut, then the upstream", [][]byte{right}, true, "Bearer 1", 200, []string{"GET", "GET"}, 0},
		{"cut, and another", [][]byte{right, right}, true, "Bearer 1", 200, []string{"GET", "GET"}, 0},
		{"no right", [][]byte{right}, false, "Bearer 2", 401, []string{"GET", "GET"}, 0},
		{"none is right", [][]byte{right}, false, "", 401, []string{"GET", "GET"}, 0},
	} {
		for _, redirect := range []bool{false, true} {
			t.Run(tt.name, func(t *testing.T) {
				u := newUpstream(t)
				u.redirect = redirect
				u.allow("a/b", "Bearer 1")
				d := u.put("a/b", right)
				path := "/v2/a/b/blobs/" + d.String()
				s := newSide(t, u, store.Options{})
				n := &neighbours{give: map[digest.Digest][][]byte{d: tt.give}, cut: tt.cut}
				s.peers = n
				s.restart()
				a := s.do("GET", path, tt.auth)
				if a.err != nil {
					t.Fatal(a.err)
				}
				if a.StatusCode != tt.code || a.StatusCode == 200 && !bytes.Equal(a.body, right) || a.StatusCode != 200 && bytes.Contains(a.body, right[:100]) {
					t.Errorf("%s with %d bytes", a.Status, len(a.body))
				}
				var asked []string
				for _, r := range u.requests() {
					if method, p, _ := strings.Cut(r, " "); p == path {
						asked = append(asked, method)
					}
				}
				if !slices.Equal(asked, tt.asked) {
					t.Errorf("the upstream was asked %q, want %q", asked, tt.asked)
				}
				n.mu.Lock()
				defer n.mu.Unlock()
				if n.wrong != tt.wrong {
					t.Errorf("%d times wrong, want %d", n.wrong, tt.wrong)
				}
				if len(n.ended) != 1 || n.ended[0] != (tt.code == 200) {
					t.Errorf("ended with %v", n.ended)
				}
			})
		}
	}
}

// What a peer sends that is believed is passed on as it comes, to a client for which the
// registry shows a range that the peer agrees about. When it is wrong after all the
// client's transfer breaks off, nothing is kept, and the next try comes from elsewhere.
func TestBelievedPeer(t *testing.T) {
	right := bytesOf(1, 600_000)
	wrong := bytesOf(2, 600_000)
	turned := bytes.Clone(right)
	turned[len(right)/2+5000] ^= 1
	for _, tt := range []struct {
		name          string
		sent, shows   []byte
		early, breaks bool
		wrong         int
	}{
		{"right", right, nil, true, false, 0},
		{"wrong at the end", turned, nil, true, true, 1},
		{"other bytes than it agrees about", wrong, right, true, true, 1},
		{"it doesn't agree", right, wrong, false, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u := newUpstream(t)
			u.allow("a/b", "Bearer 1")
			d := u.put("a/b", right)
			path := "/v2/a/b/blobs/" + d.String()
			s := newSide(t, u, store.Options{})
			n := &neighbours{give: map[digest.Digest][][]byte{d: {tt.sent}}, believed: true, shows: tt.shows, pause: make(chan struct{})}
			s.peers = n
			s.restart()
			resp, c := s.raw("GET " + path + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer 1\r\n\r\n")
			if resp.StatusCode != http.StatusOK || resp.ContentLength != int64(len(right)) {
				t.Fatalf("%s, %d bytes", resp.Status, resp.ContentLength)
			}
			lift := sync.OnceFunc(func() { close(n.pause) })
			defer lift()
			var got []byte
			if tt.early && !tt.breaks {
				// Where the range lies can't be foreseen, but not beyond the half.
				got = make([]byte, len(right)/2-2*proofSize)
				_ = c.SetReadDeadline(time.Now().Add(time.Minute))
				if _, err := io.ReadFull(resp.Body, got); err != nil {
					t.Fatalf("it is held back: %v", err)
				}
			}
			lift()
			rest, err := io.ReadAll(resp.Body)
			got = append(got, rest...)
			if tt.breaks && (err == nil || len(got) >= len(right)) || !tt.breaks && (err != nil || !bytes.Equal(got, right)) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			n.mu.Lock()
			if n.ranges != 1 {
				t.Errorf("the peer was asked for %d ranges", n.ranges)
			}
			n.mu.Unlock()
			if a := s.do("GET", path, "Bearer 1"); a.err != nil || !bytes.Equal(a.body, right) {
				t.Errorf("the next try: %v, %d bytes", a.err, len(a.body))
			}
			n.mu.Lock()
			defer n.mu.Unlock()
			if n.wrong != tt.wrong || n.ended[0] == tt.breaks {
				t.Errorf("%d times wrong, ended with %v", n.wrong, n.ended)
			}
		})
	}
}

// What a believed peer has begun is not gone on with by one that isn't.
func TestBelievedPeerBreaksOff(t *testing.T) {
	right, wrong := bytesOf(1, 600_000), bytesOf(2, 600_000)
	u := newUpstream(t)
	u.allow("a/b", "Bearer 1")
	d := u.put("a/b", right)
	s := newSide(t, u, store.Options{})
	n := &neighbours{give: map[digest.Digest][][]byte{d: {right, wrong}}, cut: true, believed: true}
	s.peers = n
	s.restart()
	if a := s.do("GET", "/v2/a/b/blobs/"+d.String(), "Bearer 1"); a.err != nil || !bytes.Equal(a.body, right) || n.wrong != 0 || len(n.give[d]) > 0 {
		t.Errorf("%v, %d bytes; wrong: %d", a.err, len(a.body), n.wrong)
	}
}

// All peers are wrong: the client gets an error, and not the upstream's bytes.
func TestAllAreWrong(t *testing.T) {
	right, wrong := bytesOf(1, 100_000), bytesOf(2, 100_000)
	u := newUpstream(t)
	u.allow("a/b", "Bearer 1")
	d := u.put("a/b", right)
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			w.(http.Flusher).Flush() // chunked
			_, _ = w.Write(wrong)
		}
		return r.Method == http.MethodGet
	}
	s := newSide(t, u, store.Options{})
	s.peers = &neighbours{give: map[digest.Digest][][]byte{d: {wrong}}}
	s.restart()
	if a := s.do("GET", "/v2/a/b/blobs/"+d.String(), "Bearer 1"); a.err == nil && a.StatusCode == 200 {
		t.Errorf("the client completed %d bytes", len(a.body))
	}
}

// A manifest by digest is sent by the registry once, though peers have it: what is
// in a repository is not theirs to say.
func TestPeersGiveManifests(t *testing.T) {
	u := newUpstream(t)
	u.allow("a/b", "Bearer 1")
	d, b := u.putManifest("a/b", "1", docker2, digest.FromString("layer"))
	path := "/v2/a/b/manifests/" + d.String()
	s := newSide(t, u, store.Options{})
	s.peers = &neighbours{give: map[digest.Digest][][]byte{d: {b}}}
	s.restart()
	s.want(s.do("GET", path, "Bearer 2"), 401, nil, "GET "+path)
	s.want(s.do("GET", path, "Bearer 1"), 200, b, "GET "+path)
	s.want(s.do("GET", path, "Bearer 1"), 200, b)
}

// What peers know of a repository counts when the upstream is down, and only
// for a client whose right this node has seen.
func TestPeersKnowTags(t *testing.T) {
	u := newUpstream(t)
	u.allow("a/b", "Bearer 1")
	u.allow("a/c", "Bearer 1")
	layer := bytesOf(5, 1000)
	d, b := u.putManifest("a/b", "new", docker2, u.put("a/b", layer))
	old, _ := u.putManifest("a/b", "old", docker2)
	other := newSide(t, u, store.Options{})
	theirs := &neighbours{}
	other.peers = theirs
	other.restart()
	other.do("GET", "/v2/a/b/manifests/new", "Bearer 1")
	other.do("GET", "/v2/a/b/blobs/"+digest.FromBytes(layer).String(), "Bearer 1")
	if len(theirs.names) != 1 || theirs.names[0] != "repository "+strings.TrimPrefix(u.srv.URL, "https://")+"/a/b" {
		t.Fatalf("they provide %q", theirs.names)
	}
	var hash string
	for _, h := range other.h.names.lru.Keys() {
		hash = h
	}
	known := other.h.Export(hash)
	if known == nil || other.h.Export("00") != nil || bytes.Contains(known, []byte("Bearer")) {
		t.Fatalf("they know %s", known)
	}

	s := newSide(t, u, store.Options{})
	s.peers = &neighbours{known: [][]byte{[]byte("{"), known}, give: map[digest.Digest][][]byte{d: {b}, digest.FromBytes(layer): {layer}}}
	s.restart()
	s.do("GET", "/v2/a/b/manifests/"+old.String(), "Bearer 1")
	u.mu.Lock()
	u.fault = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(503); return true }
	u.mu.Unlock()
	u.requests()
	for _, auth := range []string{"", "Bearer 2"} {
		if a := s.do("GET", "/v2/a/b/manifests/new", auth); a.StatusCode == 200 {
			t.Errorf("%q got the manifest", auth)
		}
	}
	a := s.do("GET", "/v2/a/b/manifests/new", "Bearer 1")
	if a.StatusCode != 200 || !bytes.Equal(a.body, b) {
		t.Errorf("%s: %s", a.Status, a.body)
	}
	if a := s.do("GET", "/v2/a/b/blobs/"+digest.FromBytes(layer).String(), "Bearer 1"); a.StatusCode != 200 || !bytes.Equal(a.body, layer) {
		t.Errorf("the layer: %s", a.Status)
	}
	if a := s.do("GET", "/v2/a/b/blobs/"+digest.FromBytes(layer).String(), "Bearer 2"); a.StatusCode == 200 {
		t.Error("another got the layer")
	}
	s.later.Store(int64(DefaultRightsTTL + time.Minute))
	if a := s.do("GET", "/v2/a/b/manifests/new", "Bearer 1"); a.StatusCode == 200 {
		t.Error("a right that is long past counts")
	}
}

// A registry that takes its time over a tag that is new, as one does that has to
// get it from another first, has as long as without weir: that peers are asked
// meanwhile, and know nothing, doesn't end it.
func TestSlowWithPeers(t *testing.T) {
	u := newUpstream(t)
	u.allow("a/b", "Bearer 1")
	u.putManifest("a/b", "old", docker2)
	_, body := u.putManifest("a/b", "new", docker2, digest.FromString("new"))
	s := newSide(t, u, store.Options{})
	asked := make(chan struct{})
	s.peers = &neighbours{recalled: sync.OnceFunc(func() { close(asked) })}
	s.hangs = true
	s.restart()
	s.do("GET", "/v2/a/b/manifests/old", "Bearer 1")
	u.mu.Lock()
	u.fault = func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-asked:
		case <-r.Context().Done():
		}
		return false
	}
	u.mu.Unlock()
	if a := s.do("GET", "/v2/a/b/manifests/new", "Bearer 1"); a.err != nil || a.StatusCode != 200 || !bytes.Equal(a.body, body) {
		t.Errorf("%v, %v: %s", a.Response, a.err, a.body)
	}
}

// What peers say is in a repository, while the registry is down, counts for
// nothing when it is up again.
func TestPeersWordEnds(t *testing.T) {
	u := newUpstream(t)
	u.allow("a/secret", "Bearer alice")
	u.allow("a/b", "Bearer mallory")
	secret := bytesOf(3, 5000)
	d := u.put("a/secret", secret)
	_, good := u.putManifest("a/b", "1", docker2)
	s := newSide(t, u, store.Options{})
	registry := strings.TrimPrefix(u.srv.URL, "https://")
	evil := []byte(`{"schemaVersion":2,"mediaType":"` + docker2 + `","evil":1}`)
	e := digest.FromBytes(evil)
	says, err := json.Marshal(rights.Memory{Repositories: []rights.Known{{Registry: registry, Name: "a/b",
		Tags:    map[string][]rights.Tagged{"1": {{Digest: e, When: time.Now().Add(30 * time.Second)}}},
		Content: map[digest.Digest]time.Time{d: time.Now(), e: time.Now()}}}})
	if err != nil {
		t.Fatal(err)
	}
	s.peers = &neighbours{known: [][]byte{says}, give: map[digest.Digest][][]byte{e: {evil}}}
	s.restart()
	s.do("GET", "/v2/a/secret/blobs/"+d.String(), "Bearer alice")
	s.do("GET", "/v2/a/b/manifests/1", "Bearer mallory")
	down := func(is bool) {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.fault = func(w http.ResponseWriter, _ *http.Request) bool {
			if is {
				w.WriteHeader(503)
			}
			return is
		}
	}
	down(true)
	if a := s.do("GET", "/v2/a/b/manifests/1", "Bearer mallory"); !bytes.Equal(a.body, evil) {
		t.Errorf("while it is down: %s %q", a.Status, a.body)
	}
	mallory := rights.Principal{Repository: rights.Repository{Registry: registry, Name: "a/b"},
		Client: s.h.rights.Client(http.Header{"Authorization": {"Bearer mallory"}, "User-Agent": {"Go-http-client/1.1"}}, "", "")}
	if !s.h.rights.AllowsStale(mallory, "", d) {
		t.Fatal("the test is about what a peer has said")
	}
	down(false)
	for range 2 {
		if a := s.do("GET", "/v2/a/b/manifests/1", "Bearer mallory"); !bytes.Equal(a.body, good) {
			t.Errorf("the tag: %s %q", a.Status, a.body)
		}
	}
	if a := s.do("GET", "/v2/a/b/manifests/"+e.String(), "Bearer mallory"); a.StatusCode != 404 {
		t.Errorf("the peer's manifest: %s", a.Status)
	}
	for _, method := range []string{"GET", "GET"} {
		if a := s.do(method, "/v2/a/b/blobs/"+d.String(), "Bearer mallory"); a.StatusCode != 404 || bytes.Equal(a.body, secret) {
			t.Errorf("%s: %s, because of what a peer said", method, a.Status)
		}
	}
}
