// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/rights"
	"weir/proxy/store"
)

// proven waits until it is known that a blob is in the repository a.
func (s *side) proven(d digest.Digest) {
	s.t.Helper()
	eventually(s.t, "it is known to be there", func() bool {
		return s.h.rights.Contains(rights.Vantage{Repository: rights.Repository{Registry: strings.TrimPrefix(s.up.srv.URL, "https://"), Name: "a"}}, d)
	})
}

// countSent has the registry count the bytes that it sends of blobs, at the place where they are.
func (u *scripted) countSent(content []byte) *atomic.Int64 {
	sent := new(atomic.Int64)
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		own := parsePath(r.URL.Path).kind == blob
		u.mu.Lock()
		reads := u.readers["a"][r.Header.Get("Authorization")] && strings.HasPrefix(r.URL.Path, "/v2/a/")
		u.mu.Unlock()
		if u.redirect == own || own && !reads || !own && !strings.HasPrefix(r.URL.Path, "/cdn/") {
			return false
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, &sentReader{bytes.NewReader(content), sent})
		return true
	}
	return sent
}

type sentReader struct {
	io.ReadSeeker
	n *atomic.Int64
}

func (r *sentReader) Read(p []byte) (int, error) {
	n, err := r.ReadSeeker.Read(p)
	r.n.Add(int64(n))
	return n, err
}

// pieces are the ranges of an answer.
func (a answer) pieces() (all [][]byte, err error) {
	if a.err != nil {
		return nil, a.err
	}
	parts, end := partsOf(a.Header, a.body)
	if a.StatusCode != 206 || end == nil {
		return nil, fmt.Errorf("%s, %q", a.Status, a.Header.Get("Content-Type"))
	}
	for _, part := range parts {
		all = append(all, part.bytes)
	}
	if !errors.Is(end, io.EOF) {
		err = end
	}
	return all, err
}

// have says whether an answer has ranges of a blob, each as a part, in order.
func (a answer) have(content []byte, ranges []store.Span) error {
	got, err := a.pieces()
	if err == nil && len(got) != len(ranges) {
		err = fmt.Errorf("%d ranges", len(got))
	}
	for i := range got {
		if err == nil && !bytes.Equal(got[i], content[ranges[i].From:ranges[i].To]) {
			err = fmt.Errorf("range %d has %d other bytes", i, len(got[i]))
		}
	}
	return err
}

// Twenty clients ask for ranges of one blob, which overlap, in any order, some of them for several at a time: each has its bytes, the
// registry sends each byte once, and the blob is stored. Who may not read it is given nothing.
func TestRangesOfOneBlob(t *testing.T) {
	content := bytesOf(70, 3<<20)
	for seed := range uint64(6) {
		for _, redirect := range []bool{false, true} {
			t.Run(fmt.Sprint(seed, redirect), func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 1))
				u := newUpstream(t)
				u.redirect = redirect
				u.allow("a", "Bearer 1")
				d := u.put("a", content)
				_, manifest := u.putManifest("a", "latest", docker2, d)
				path := "/v2/a/blobs/" + d.String()
				s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
				sent := u.countSent(content)
				s.want(s.do("GET", "/v2/a/manifests/latest", "Bearer 1"), 200, manifest, "GET /v2/a/manifests/latest")
				const clients = 20
				var wg sync.WaitGroup
				for i := range clients { // all of it together
					part := len(content) / clients
					first, last := i*part, (i+1)*part-1+r.IntN(part)
					if i == clients-1 || last >= len(content) {
						last = len(content) - 1
					}
					if i%3 == 1 { // half of that, and a little of the whole
						var several []store.Span
						for at := range 20 {
							from := int64(first + at*(last-first)/20)
							several = append(several, store.Span{From: from, To: from + int64(last-first)/40})
						}
						end := several[len(several)-1].To
						for at := end + 1 + r.Int64N(1<<16); at+1000 < int64(len(content)) && r.IntN(10) > 0; at += 1000 + r.Int64N(1<<16) {
							several = append(several, store.Span{From: at, To: at + 1000})
						}
						wg.Go(func() {
							if err := s.do("GET", path, "Bearer 1", "Range", formatRanges(several)).have(content, several); err != nil {
								t.Errorf("%v: %v", several, err)
							}
							if a := s.do("GET", path, "Bearer 2", "Range", formatRanges(several)); a.err != nil || a.StatusCode != 401 {
								t.Errorf("who may not read it: %v, %v", a.Response, a.err)
							}
						})
						continue
					}
					wg.Go(func() {
						a := s.do("GET", path, "Bearer 1", "Range", fmt.Sprintf("bytes=%d-%d", first, last))
						if a.err != nil || a.StatusCode != 206 || !bytes.Equal(a.body, content[first:last+1]) ||
							a.Header.Get("Content-Range") != fmt.Sprintf("bytes %d-%d/%d", first, last, len(content)) {
							t.Errorf("%d-%d: %v, %d bytes, %v", first, last, a.Response, len(a.body), a.err)
						}
					})
					if i%5 == 0 {
						wg.Go(func() {
							if a := s.do("GET", path, "Bearer 2", "Range", fmt.Sprintf("bytes=%d-%d", first, last)); a.err != nil || a.StatusCode != 401 {
								t.Errorf("who may not read it: %v, %v", a.Response, a.err)
							}
							if a := s.do("GET", "/v2/b/blobs/"+d.String(), "Bearer 1", "Range", fmt.Sprintf("bytes=%d-%d", first, last)); a.err != nil || a.StatusCode != 401 {
								t.Errorf("elsewhere: %v, %v", a.Response, a.err)
							}
						})
					}
				}
				wg.Wait()
				eventually(t, "it is stored", func() bool { return s.store.Has(d) })
				if n := sent.Load(); n != int64(len(content)) {
					t.Errorf("the registry has sent %d bytes of %d", n, len(content))
				}
				s.proven(d)
				a := s.do("GET", path, "Bearer 1")
				if a.err != nil || !bytes.Equal(a.body, content) || sent.Load() != int64(len(content)) {
					t.Errorf("then %v, %d bytes, %v; sent %d", a.Response, len(a.body), a.err, sent.Load())
				}
			})
		}
	}
}

// take asks for a range, reads so many bytes of the answer, and leaves. It calls begun once there
// is an answer.
func (s *side) take(path, auth, rng string, n int, begun func()) ([]byte, error) {
	req, err := http.NewRequestWithContext(s.t.Context(), "GET", s.srv.URL+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", auth)
	req.Header.Set("Range", rng)
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	begun()
	if resp.StatusCode != 206 {
		return nil, fmt.Errorf("%s", resp.Status)
	}
	b := make([]byte, n)
	k, err := io.ReadFull(resp.Body, b)
	return b[:k], err
}

// A client fetches as containerd does with concurrent_layer_fetch_buffer: ranges without an end, of
// each of which it reads a chunk, three at a time once the first one was answered. Then a second one
// does the same.
func TestChunks(t *testing.T) {
	content := bytesOf(71, 44<<20)
	for _, chunk := range []int{store.PieceSize, 3 << 20} {
		u := newUpstream(t)
		u.allow("a", "Bearer 1")
		d := u.put("a", content)
		path := "/v2/a/blobs/" + d.String()
		s := newSide(t, u, store.Options{})
		sent := u.countSent(content)
		// What has come, and not what was sent: what was on its way when a client left is
		// as much as a connection's buffers take.
		came := func() (n int64) {
			for _, st := range s.h.Stats() {
				n += st.BytesFromUpstream
			}
			return n
		}
		pull := func() {
			work := make(chan int)
			first := make(chan struct{})
			begun := sync.OnceFunc(func() { close(first) })
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					for at := range work {
						n := min(chunk, len(content)-at)
						b, err := s.take(path, "Bearer 1", fmt.Sprintf("bytes=%d-", at), n, begun)
						begun()
						if err != nil || !bytes.Equal(b, content[at:at+n]) {
							t.Errorf("at %d: %d bytes, %v", at, len(b), err)
						}
					}
				})
			}
			for at := 0; at < len(content); at += chunk {
				work <- at
				<-first
			}
			close(work)
			wg.Wait()
		}
		// The right to read is there, as when the manifest was pulled.
		_, manifest := u.putManifest("a", "latest", docker2, d)
		s.want(s.do("GET", "/v2/a/manifests/latest", "Bearer 1"), 200, manifest, "GET /v2/a/manifests/latest")
		pull()
		eventually(t, "it is stored", func() bool { return s.store.Has(d) })
		s.proven(d)
		n := came()
		t.Logf("chunks of %d: %.3f of it has come, and the registry has sent %.3f", chunk, float64(n)/float64(len(content)), float64(sent.Load())/float64(len(content)))
		if n > int64(len(content))*105/100 {
			t.Errorf("%d bytes of %d have come", n, len(content))
		}
		pull()
		if came() != n {
			t.Errorf("the second one cost %d bytes", came()-n)
		}
	}
}

// What a client asks for in ranges costs no more than that, until more than half is there: then the
// rest is fetched, and the blob is stored.
func TestLazyClient(t *testing.T) {
	content := bytesOf(72, 2<<20)
	size := len(content)
	u := newUpstream(t)
	u.allow("a", "Bearer 1", "Bearer 2")
	d := u.put("a", content)
	path := "/v2/a/blobs/" + d.String()
	s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
	sent := u.countSent(content)
	get := func(first, last int) {
		t.Helper()
		a := s.do("GET", path, "Bearer 1", "Range", fmt.Sprintf("bytes=%d-%d", first, last))
		if a.err != nil || a.StatusCode != 206 || !bytes.Equal(a.body, content[first:last+1]) {
			t.Fatalf("%d-%d: %v, %d bytes, %v", first, last, a.Response, len(a.body), a.err)
		}
	}
	get(size-100, size-1) // as of eStargz, whose index is there
	get(size-5000, size-101)
	get(1000, 1999)
	for range 3 {
		get(1200, 1300) // is there
		get(0, size/4)
	}
	want := int64(5000 + size/4 + 1)
	eventually(t, "it has sent what was asked for", func() bool { return sent.Load() == want }) // it counts later
	if st := s.store.Stats(); st.Running != 0 || st.Partial != want {
		t.Errorf("%+v, want %d bytes", st, want)
	}
	get(size/4+1, size/2+1)
	eventually(t, "it is stored", func() bool { return s.store.Has(d) })
	if n := sent.Load(); n != int64(size) {
		t.Errorf("the registry has sent %d bytes of %d", n, size)
	}
	if st := s.store.Stats(); st.Partial != 0 || st.Blobs != 1 {
		t.Errorf("%+v", st)
	}
}

// A registry that answers a range in its own way is the client's to deal with.
func TestRangesThatAreNone(t *testing.T) {
	content := bytesOf(73, 300_000)
	for name, tt := range map[string]struct {
		script func(w http.ResponseWriter, r *http.Request) bool
		status int
		body   []byte
	}{
		"ignored": {func(_ http.ResponseWriter, r *http.Request) bool { r.Header.Del("Range"); return false }, 200, content},
		"416":     {func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(416); return true }, 416, nil},
		"503":     {func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(503); return true }, 503, nil},
		"no size": {func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Range", "bytes 1000-1999/*")
			w.WriteHeader(206)
			_, _ = w.Write(content[1000:2000])
			return true
		}, 206, content[1000:2000]},
	} {
		u := newUpstream(t)
		u.allow("a", "")
		d := u.put("a", content)
		u.fault = tt.script
		s := newSide(t, u, store.Options{})
		a := s.do("GET", "/v2/a/blobs/"+d.String(), "", "Range", "bytes=1000-1999")
		if a.err != nil || a.StatusCode != tt.status || tt.body != nil && !bytes.Equal(a.body, tt.body) {
			t.Errorf("%s: %v, %d bytes, %v", name, a.Response, len(a.body), a.err)
		}
		if st := s.store.Stats(); st.Partial != 0 || st.Bytes != 0 {
			t.Errorf("%s: %+v", name, st)
		}
	}
	// Bytes that are wrong are never the whole of a blob, nor stored.
	u := newUpstream(t)
	u.allow("a", "")
	d := u.put("a", content)
	wrong := bytes.Clone(content)
	wrong[150_000] ^= 1
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(wrong))
		return true
	}
	s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
	path := "/v2/a/blobs/" + d.String()
	s.do("GET", path, "", "Range", "bytes=0-999")
	s.do("GET", path, "", "Range", "bytes=1000-299999")
	eventually(t, "it is looked at", func() bool { return s.store.Stats().Running == 0 && s.store.Stats().Partial == 0 })
	if a := s.do("GET", path, ""); a.err == nil && len(a.body) == len(content) {
		t.Error("a client has the whole of wrong bytes")
	}
	if s.store.Has(d) || d != digest.FromBytes(content) {
		t.Error("it is stored")
	}
}

// A registry, or what is on the way there, that refuses ranges which a client hasn't asked for gives
// the client the blob all the same: for the rest of what broke off, and as the first of several parts.
func TestRangesThatAreRefused(t *testing.T) {
	content := bytesOf(74, 1<<20)
	for _, status := range []int{400, 403, 405, 416, 429, 500, 501, 503} {
		for _, wide := range []bool{false, true} {
			t.Run(fmt.Sprint(status, wide), func(t *testing.T) {
				t.Parallel()
				u := newUpstream(t)
				u.allow("a", "Bearer 1")
				d := u.put("a", content)
				path := "/v2/a/blobs/" + d.String()
				s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
				if wide {
					eager(s.h.widths)
					w := s.h.widths.registry(strings.TrimPrefix(u.srv.URL, "https://"))
					w.each, w.least, w.settled, w.until = 4, 1, true, time.Now().Add(time.Hour)
				} else {
					c := &cuts{after: 600_000, part: func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(503); return true }}
					u.fault = func(w http.ResponseWriter, r *http.Request) bool { return c.fault(content, w, r) }
					if a := s.do("GET", path, "Bearer 1"); a.err == nil {
						t.Fatal("it did not break off")
					}
					eventually(t, "it has ended", func() bool { return s.store.Stats().Running == 0 })
					if s.store.Stats().Partial == 0 {
						t.Fatal("nothing is there")
					}
				}
				u.mu.Lock()
				u.fault = func(w http.ResponseWriter, r *http.Request) bool {
					if r.Header.Get("Range") == "" {
						return false
					}
					w.WriteHeader(status)
					return true
				}
				u.mu.Unlock()
				if a := s.do("GET", path, "Bearer 1"); a.err != nil || a.StatusCode != 200 || !bytes.Equal(a.body, content) {
					t.Errorf("%v, %d bytes, %v", a.Response, len(a.body), a.err)
				}
			})
		}
	}
}

// Who is given the beginning of a range, as it is there, and then brings its rest, has the blob stored as well.
func TestRangeThatGoesOn(t *testing.T) {
	content := bytesOf(76, 1<<20)
	u := newUpstream(t)
	u.allow("a", "Bearer 1")
	d := u.put("a", content)
	s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
	for _, last := range []int{99_999, len(content) - 1} {
		a := s.do("GET", "/v2/a/blobs/"+d.String(), "Bearer 1", "Range", fmt.Sprintf("bytes=0-%d", last))
		if a.err != nil || a.StatusCode != 206 || !bytes.Equal(a.body, content[:last+1]) {
			t.Fatalf("%v, %d bytes, %v", a.Response, len(a.body), a.err)
		}
	}
	eventually(t, "it is stored", func() bool { return s.store.Has(d) })
}

// What a registry says of a blob's size may be wrong once, or missing: who asks for a range is given all of
// it, and what was said wrongly is forgotten.
func TestRangesOfAnotherSize(t *testing.T) {
	content := bytesOf(75, 1<<20)
	size := len(content)
	for name, total := range map[string]string{"less": "800000", "more": "2000000", "none": "*"} {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			u.allow("a", "Bearer 1")
			d := u.put("a", content)
			path := "/v2/a/blobs/" + d.String()
			s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
			var lie atomic.Bool
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				asked := parseRanges(r.Header.Get("Range"))
				if asked == nil || !lie.Load() {
					return false
				}
				first, end := asked[0].From, asked[0].To
				if end < 0 {
					end = int64(size)
				}
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%s", first, end-1, total))
				w.WriteHeader(206)
				_, _ = w.Write(content[first:end])
				return true
			}
			lied := false
			get := func(first, last int) {
				t.Helper()
				a := s.do("GET", path, "Bearer 1", "Range", fmt.Sprintf("bytes=%d-%d", first, last))
				if a.err != nil && lied { // the second size was found out after the head was sent: it asks again
					lied = false
					a = s.do("GET", path, "Bearer 1", "Range", fmt.Sprintf("bytes=%d-%d", first, last))
				}
				if a.err != nil || a.StatusCode != 206 || !bytes.Equal(a.body, content[first:min(size, last+1)]) {
					t.Errorf("%d-%d: %v, %d bytes, %v", first, last, a.Response, len(a.body), a.err)
				}
			}
			lie.Store(name != "none")
			get(300_000, 399_999)
			lie.Store(name == "none")
			get(200_000, 899_999)
			lie.Store(name != "none")
			get(0, 300_000)
			lie.Store(false)
			lied = name != "none"
			get(100_000, 999_999)
			get(600_000, size-1)
			get(50_000, size-1) // of which the end is there
			get(0, 100_000)
			eventually(t, "it is stored", func() bool { return s.store.Has(d) })
		})
	}
}

// Registries answer a request for several ranges in their ways, and hostile ones in theirs. Each time the client has what
// it asked for, or the registry's answer as it came; and what is stored of it is right.
func TestSeveralRanges(t *testing.T) {
	content := bytesOf(79, 1<<20)
	size := int64(len(content))
	asked := []store.Span{{From: 1000, To: 2000}, {From: 300_000, To: 400_000}, {From: 400_000, To: 400_500}, {From: 900_000, To: 900_001}, {From: 1_000_000, To: size}}
	bytesAsked := int64(0)
	for _, e := range asked {
		bytesAsked += e.To - e.From
	}
	type answers struct {
		several func(w http.ResponseWriter, ranges []store.Span) // what it answers to several
		status  int                                              // that the client sees; 0 is that of its ranges
		sent    int64                                            // of the blob, by those that net/http makes
		stored  bool
	}
	parts := func(w http.ResponseWriter, of []store.Span, edit func(string) string) {
		body, contentType := severalOf(content, of)
		if edit != nil {
			body = []byte(edit(string(body)))
		}
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(206)
		_, _ = w.Write(body)
	}
	edited := func(old, by string) func(http.ResponseWriter, []store.Span) {
		return func(w http.ResponseWriter, of []store.Span) {
			parts(w, of, func(s string) string { return strings.ReplaceAll(s, old, by) })
		}
	}
	for name, tt := range map[string]answers{
		"as net/http does": {nil, 0, bytesAsked, false},
		"all of it": {func(w http.ResponseWriter, _ []store.Span) {
			w.Header().Set("Content-Length", strconv.Itoa(len(content)))
			_, _ = w.Write(content)
		}, 0, 0, true},
		"all of it, without a length": {func(w http.ResponseWriter, _ []store.Span) { _, _ = w.Write(content) }, 200, 0, true},
		"one range around them": {func(w http.ResponseWriter, of []store.Span) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 500-%d/%d", size-1, size))
			w.WriteHeader(206)
			_, _ = w.Write(content[500:])
		}, 0, 0, false},
		"some merged": {func(w http.ResponseWriter, of []store.Span) {
			parts(w, []store.Span{{From: 1000, To: 400_500}, {From: 900_000, To: size}}, nil)
		}, 0, 0, false},
		"not at all": {func(w http.ResponseWriter, _ []store.Span) { w.WriteHeader(400) }, 400, 0, false},
		"in another order": {func(w http.ResponseWriter, of []store.Span) {
			of = slices.Clone(of)
			slices.Reverse(of)
			parts(w, of, nil)
		}, 206, 0, false},
		"the last ones first":       {func(w http.ResponseWriter, of []store.Span) { parts(w, append(of[:1:1], of[2:]...), nil) }, 0, size - 1_000_000, false},
		"without a boundary":        {edited("\r\n--", "\r\n-x"), 0, size - 1_000_000, false},
		"with an endless line":      {edited("Content-Type", strings.Repeat("x", 1<<20)), 206, 0, false},
		"overlapping":               {edited("bytes 300000-399999", "bytes 1999-101998"), 0, 0, false},
		"out of bounds":             {edited("bytes 1000000-1048575", "bytes 1000000-1048576"), 0, size - 1_000_000, false},
		"of another size in one":    {edited("399999/1048576", "399999/1048577"), 0, 0, false},
		"of another size in all":    {edited("/1048576", "/1048577"), 0, -1, false},
		"with ends of parts sooner": {edited("bytes 300000-399999", "bytes 300000-349999"), 0, -1, false},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			u.allow("a", "Bearer 1")
			d := u.put("a", content)
			path := "/v2/a/blobs/" + d.String()
			s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
			var sent atomic.Int64
			var came atomic.Pointer[[]byte] // last
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				ranges := parseRanges(r.Header.Get("Range"))
				if r.Header.Get("Authorization") != "Bearer 1" {
					return false
				}
				if len(ranges) > 1 && tt.several != nil {
					b := &both{ResponseWriter: w}
					tt.several(b, ranges)
					came.Store(&b.body)
				} else {
					w.Header().Set("Content-Type", "application/octet-stream")
					http.ServeContent(w, r, "", time.Time{}, &sentReader{bytes.NewReader(content), &sent})
				}
				return true
			}
			a := s.do("GET", path, "Bearer 1", "Range", formatRanges(asked))
			switch {
			case tt.status == 0:
				if err := a.have(content, asked); err != nil {
					t.Error(err)
				}
			case a.err != nil || a.StatusCode != tt.status || !bytes.Equal(a.body, *came.Load()):
				t.Errorf("%v, %d bytes, %v", a.Response, len(a.body), a.err)
			}
			if n := sent.Load(); tt.sent >= 0 && n != tt.sent {
				t.Errorf("then the registry has sent %d bytes, want %d", n, tt.sent)
			}
			if tt.stored {
				eventually(t, "it is stored", func() bool { return s.store.Has(d) })
			} else if st := s.store.Stats(); st.Blobs != 0 || st.Partial > bytesAsked || tt.status > 0 && st.Partial > 0 {
				t.Errorf("%+v", st)
			}
			a = s.do("GET", path, "Bearer 1")
			if a.err != nil || a.StatusCode != 200 || !bytes.Equal(a.body, content) {
				t.Errorf("all of it: %v, %d bytes, %v", a.Response, len(a.body), a.err)
			}
		})
	}
}

type both struct {
	http.ResponseWriter
	body []byte
}

func (b *both) Write(p []byte) (int, error) {
	b.body = append(b.body, p...)
	return b.ResponseWriter.Write(p)
}

// Several ranges of what is stored are given from there: to who may have it, while they stay.
func TestSeveralRangesOfWhatIsStored(t *testing.T) {
	content := bytesOf(80, 40<<20)
	u := newUpstream(t)
	u.allow("a", "Bearer 1")
	d := u.put("a", content)
	path := "/v2/a/blobs/" + d.String()
	s := newSide(t, u, store.Options{})
	sent := u.countSent(content)
	s.do("GET", path, "Bearer 1")
	eventually(t, "it is stored", func() bool { return s.store.Has(d) })
	s.proven(d)
	was := sent.Load()
	asked := []store.Span{{From: 0, To: 1}, {From: 5, To: 20 << 20}, {From: 39 << 20, To: 40 << 20}}
	if err := s.do("GET", path, "Bearer 1", "Range", formatRanges(asked)).have(content, asked); err != nil {
		t.Error(err)
	}
	if a := s.do("GET", path, "Bearer 2", "Range", formatRanges(asked)); a.err != nil || a.StatusCode != 401 {
		t.Errorf("who may not read it: %v, %v", a.Response, a.err)
	}
	for range 20 { // leave in the middle
		if b, err := s.take(path, "Bearer 1", formatRanges(asked), 1<<20, func() {}); err != nil || len(b) != 1<<20 {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	}
	if n := sent.Load(); n != was {
		t.Errorf("the registry has sent %d bytes more", n-was)
	}
}

// Very many ranges are asked for by few requests, whose fields servers take.
func TestVeryManyRanges(t *testing.T) {
	content := bytesOf(81, 1<<20)
	u := newUpstream(t)
	u.allow("a", "Bearer 1")
	d := u.put("a", content)
	s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
	var asked []store.Span
	for at := int64(5); len(asked) < maxRanges; at += 1000 {
		asked = append(asked, store.Span{From: at, To: at + 900})
	}
	var requests atomic.Int64
	u.fault = func(_ http.ResponseWriter, r *http.Request) bool {
		requests.Add(1)
		if n := len(r.Header.Get("Range")); n > 4<<10 {
			t.Errorf("a field has %d bytes", n)
		}
		return false
	}
	if err := s.do("GET", "/v2/a/blobs/"+d.String(), "Bearer 1", "Range", formatRanges(asked)).have(content, asked); err != nil {
		t.Error(err)
	}
	eventually(t, "it is stored", func() bool { return s.store.Has(d) })
	if n := requests.Load(); n > 20 {
		t.Errorf("%d requests", n)
	}
	if err := s.do("GET", "/v2/a/blobs/"+d.String(), "Bearer 1", "Range", formatRanges(asked)).have(content, asked); err != nil {
		t.Errorf("from the store: %v", err)
	}
}
