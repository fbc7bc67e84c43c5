// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// eager adds connections without measuring, for blobs that are not so large.
func eager(ws *widths) *widths {
	ws.from, ws.part = 1<<20, 64<<10
	ws.pace = func(w *width) sample { // each brings the same
		runtime.Gosched()
		n := float64(w.conns())
		return sample{n, n}
	}
	ws.stall = time.Hour
	return ws
}

// stutter gives a few bytes at a time, and an error after some of them.
type stutter struct {
	r     io.Reader
	rng   *rand.Rand
	left  int
	err   error
	alive *atomic.Int64
	once  sync.Once
}

func (s *stutter) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, s.err
	}
	n, err := s.r.Read(p[:min(len(p), 1+s.rng.IntN(1<<14), s.left)])
	s.left -= n
	return n, err
}

func (s *stutter) Close() error {
	s.once.Do(func() { s.alive.Add(-1) })
	return nil
}

// Random stories: connections that break off, are refused, or give what they give in
// pieces. What is read is the blob, or the beginning of it and an error, never
// anything else; and nothing stays behind.
func TestParallelStories(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	blob := make([]byte, 3<<20+12345)
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range blob {
		blob[i] = byte(i>>12) ^ byte(i)
	}
	var whole int
	var mu sync.Mutex
	roll := func(n int) int { // what is asked for in the last story may be under way still
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n)
	}
	for story := range 200 {
		size := int64(1<<20 + roll(len(blob)-1<<20))
		want := blob[:size]
		faulty := roll(2) == 0
		ws := eager(newWidths(1 + roll(8)))
		var alive, most atomic.Int64
		body := func(part store.Span, err error) io.ReadCloser {
			n := alive.Add(1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			left := int(part.To - part.From)
			if err != nil {
				left = roll(left)
			} else {
				err = io.EOF
			}
			return &stutter{r: bytes.NewReader(want[part.From:part.To]), rng: rand.New(rand.NewPCG(seed, uint64(roll(1<<30)))), left: left, err: err, alive: &alive}
		}
		breaks := func() error {
			if faulty && roll(6) == 0 {
				return io.ErrUnexpectedEOF
			}
			return nil
		}
		has := store.Span{To: size}
		if roll(2) == 0 { // all of it in parts
			has.To = ws.part
		}
		p := ws.parallel("registry", body(has, breaks()), has, size, func(ctx context.Context, _ *url.URL, part store.Span) (io.ReadCloser, *url.URL, error) {
			if faulty && roll(12) == 0 {
				return nil, nil, errors.New("429 Too Many Requests")
			}
			if part.From < 0 || part.To > size || part.From >= part.To || ctx.Err() != nil {
				return nil, nil, fmt.Errorf("asked for %v of %d", part, size)
			}
			return body(part, breaks()), nil, nil
		})
		var got bytes.Buffer
		buf := make([]byte, 1+roll(1<<17))
		leaves := int64(-1)
		if roll(4) == 0 {
			leaves = int64(roll(int(size)))
		}
		var err error
		if leaves >= 0 && roll(2) == 0 { // while it is read
			go p.Close()
		}
		for err == nil && (leaves < 0 || int64(got.Len()) < leaves) {
			var n int
			n, err = p.Read(buf)
			got.Write(buf[:n])
		}
		if !bytes.HasPrefix(want, got.Bytes()) {
			t.Fatalf("story %d: other bytes", story)
		}
		switch {
		case errors.Is(err, io.EOF) && int64(got.Len()) != size:
			t.Errorf("story %d: an end after %d of %d bytes", story, got.Len(), size)
		case err != nil && !errors.Is(err, io.EOF) && !faulty && leaves < 0:
			t.Errorf("story %d: %v", story, err)
		case errors.Is(err, io.EOF):
			whole++
		}
		p.Close()
		eventually(t, "connections are closed, and memory is given back", func() bool { return alive.Load() == 0 && len(ws.parts) == 0 })
		if n := most.Load(); n > int64(ws.most)+2 {
			t.Errorf("story %d: %d connections, of %d at most", story, n, ws.most)
		}
	}
	if whole == 0 {
		t.Error("no story came to its end")
	}
}

// A large blob comes over several connections, no byte is asked for twice, and is
// kept. A registry that doesn't give the parts that it is asked for is asked for the
// next blob over one connection.
func TestSeveralConnections(t *testing.T) {
	blob := bytesOf(1, 4<<20)
	etag := `"` + digest.FromBytes(blob).String() + `"`
	ok := func(http.ResponseWriter, *http.Request) bool { return false }
	var asked atomic.Int64
	for _, tt := range []struct {
		name     string
		part     func(http.ResponseWriter, *http.Request) (answered bool)
		redirect bool
		alone    bool // afterwards
	}{
		{name: "parts", part: ok},
		{name: "redirected", part: ok, redirect: true},
		{name: "Range ignored", part: func(_ http.ResponseWriter, r *http.Request) bool { r.Header.Del("Range"); return false }, alone: true},
		{name: "429", part: func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}, alone: true},
		{name: "429 after some", part: func(w http.ResponseWriter, _ *http.Request) bool {
			if asked.Add(1) < 6 {
				return false
			}
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}, alone: true},
		{name: "stall", part: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Range", strings.Replace(r.Header.Get("Range"), "=", " ", 1)+"/"+strconv.Itoa(len(blob)))
			w.WriteHeader(http.StatusPartialContent)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return true
		}, alone: true},
		{name: "another ETag", part: func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Etag", `"another"`)
			return false
		}, alone: true},
		{name: "reset", part: func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }, alone: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			u.redirect = tt.redirect
			u.allow("a/b", "Bearer 1")
			path := "/v2/a/b/blobs/" + u.put("a/b", blob).String()
			s := newSide(t, u, store.Options{})
			eager(s.h.widths)
			if tt.name == "stall" {
				s.h.widths.stall = 300 * time.Millisecond
			}
			var mu sync.Mutex
			var ranges [][2]int64
			var firsts, registry int
			begun := make(chan struct{}) // a part was asked for
			var once sync.Once
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == path {
					mu.Lock()
					registry++
					mu.Unlock()
				}
				if tt.redirect && r.URL.Path == path {
					return false
				}
				w.Header().Set("Etag", etag)
				rng := r.Header.Get("Range")
				mu.Lock()
				first := rng == ""
				if first {
					firsts++
				} else {
					var b [2]int64
					if _, err := fmt.Sscanf(rng, "bytes=%d-%d", &b[0], &b[1]); err != nil {
						b[1] = int64(len(blob)) - 1 // to the end
					}
					ranges = append(ranges, b)
				}
				mu.Unlock()
				if first {
					w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
					_, _ = w.Write(blob[:64<<10])
					w.(http.Flusher).Flush()
					select {
					case <-begun:
					case <-r.Context().Done():
					}
					_, _ = w.Write(blob[64<<10:])
					return true
				}
				once.Do(func() { close(begun) })
				if !tt.part(w, r) {
					http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
				}
				return true
			}
			a := s.do("GET", path, "Bearer 1")
			if a.err != nil || !bytes.Equal(a.body, blob) {
				t.Fatalf("%d bytes, %v", len(a.body), a.err)
			}
			eventually(t, "it is kept", func() bool { return s.store.Has(digest.FromBytes(blob)) })
			mu.Lock()
			defer mu.Unlock()
			if firsts != 1 || len(ranges) == 0 {
				t.Errorf("%d times all, %v", firsts, ranges)
			}
			if !tt.alone {
				slices.SortFunc(ranges, func(a, b [2]int64) int { return cmp.Compare(a[0], b[0]) })
				for i, r := range ranges[1:] {
					if r[0] != ranges[i][1]+1 {
						t.Errorf("parts %v", ranges)
						break
					}
				}
				if last := ranges[len(ranges)-1][1]; last != int64(len(blob))-1 {
					t.Errorf("the last part ends at %d", last)
				}
				if tt.redirect && registry > s.h.widths.most+1 {
					t.Errorf("the registry was asked %d times where its blob is", registry)
				}
			}
			if got := s.h.widths.registry(strings.TrimPrefix(u.srv.URL, "https://")).refuses(); got != tt.alone {
				t.Errorf("it is asked over one connection alone: %v", got)
			}
			eventually(t, "memory is given back", func() bool { return len(s.h.widths.parts) == 0 })
		})
	}
}

// At a registry whose blobs have several connections from their beginning, a blob is
// asked for by its first part, whatever its size, and each byte is sent once. One that doesn't
// give that is asked for all of it, and one that gives no more of it for the rest.
func TestFirstPart(t *testing.T) {
	answer := func(status int, contentRange string) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Header.Get("Range") == "" {
				return false
			}
			if contentRange != "" {
				w.Header().Set("Content-Range", contentRange)
			}
			w.WriteHeader(status)
			return true
		}
	}
	for _, tt := range []struct {
		name  string
		size  int
		fault func(w http.ResponseWriter, r *http.Request, asked int) (answered bool)
		once  bool // each byte is sent once
	}{
		{"large", 4<<20 + 77, nil, true},
		{"a part", 64 << 10, nil, true},
		{"less than a part", 1000, nil, true},
		{"more than a part", 64<<10 + 1, nil, true},
		{"Range ignored", 1 << 20, func(_ http.ResponseWriter, r *http.Request, _ int) bool { r.Header.Del("Range"); return false }, true},
		{"416", 1 << 20, answer(http.StatusRequestedRangeNotSatisfiable, ""), true},
		{"400", 1 << 20, answer(http.StatusBadRequest, ""), true},
		{"another range", 1 << 20, answer(http.StatusPartialContent, "bytes 5-9/1048576"), true},
		{"429 after some", 1 << 20, func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n <= 4 || n > 8 {
				return false
			}
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}, false},
		{"breaks off", 1 << 20, func(http.ResponseWriter, *http.Request, int) bool {
			return false
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			u.allow("a/b", "Bearer 1")
			blob := bytesOf(9, tt.size)
			d := u.put("a/b", blob)
			s := newSide(t, u, store.Options{})
			eager(s.h.widths)
			w := s.h.widths.registry(strings.TrimPrefix(u.srv.URL, "https://"))
			w.each, w.least, w.settled, w.until = 4, 1, true, time.Now().Add(time.Hour)
			var asked, sent, breaks atomic.Int64
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/blobs/") {
					return false
				}
				n := asked.Add(1)
				if tt.fault != nil && tt.fault(w, r, int(n)) {
					return true
				}
				var first, last int64 = 0, int64(tt.size) - 1
				if rng := r.Header.Get("Range"); rng != "" {
					if _, err := fmt.Sscanf(rng, "bytes=%d-%d", &first, &last); err != nil {
						last = int64(tt.size) - 1
					}
				}
				if tt.name == "breaks off" && n%3 == 2 && breaks.Add(1) <= 4 {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, tt.size))
					w.WriteHeader(http.StatusPartialContent)
					_, _ = w.Write(blob[first : first+(last-first)/2])
					panic(http.ErrAbortHandler)
				}
				sent.Add(min(last, int64(tt.size)-1) - first + 1)
				return false
			}
			got := s.do("GET", "/v2/a/b/blobs/"+d.String(), "Bearer 1")
			if got.err != nil || got.StatusCode != http.StatusOK || !bytes.Equal(got.body, blob) {
				t.Fatalf("%v, %d bytes, err %v", got.Response, len(got.body), got.err)
			}
			if got.ContentLength != int64(tt.size) || got.Header.Get("Content-Range") != "" {
				t.Errorf("the head is %v", got.Header)
			}
			eventually(t, "it is kept", func() bool { return s.store.Has(d) })
			if tt.once && sent.Load() != int64(tt.size) {
				t.Errorf("%d of %d bytes were sent, in %d answers", sent.Load(), tt.size, asked.Load())
			}
		})
	}
}

// Where all that is asked for beside a blob's first connection breaks off, that gives
// the blob.
func TestPartsThatBreakOff(t *testing.T) {
	t.Parallel()
	want := bytesOf(4, 2<<20)
	ws := eager(newWidths(4))
	var parts atomic.Int64
	begun := make(chan struct{})
	first := io.MultiReader(bytes.NewReader(want[:1<<10]), after{begun}, bytes.NewReader(want[1<<10:]))
	p := ws.parallel("registry", io.NopCloser(first), store.Span{To: int64(len(want))}, int64(len(want)), func(_ context.Context, _ *url.URL, part store.Span) (io.ReadCloser, *url.URL, error) {
		if parts.Add(1) == 1 {
			close(begun)
		}
		cut := io.MultiReader(bytes.NewReader(want[part.From:part.From+1<<10]), iotest.ErrReader(io.ErrUnexpectedEOF))
		return io.NopCloser(cut), nil, nil
	})
	defer p.Close()
	if got, err := io.ReadAll(p); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
	}
}

// drip gives a byte at a time, slowly, and counts what it has given.
type drip struct {
	io.ReadCloser
	done <-chan struct{}
}

func (d drip) Read(p []byte) (int, error) {
	select {
	case <-time.After(20 * time.Millisecond): // that is what it is
		return d.ReadCloser.Read(p[:1])
	case <-d.done:
		return 0, context.Canceled
	}
}

// A registry that gives parts far slower than the connection that there was is read
// over that.
func TestPartsThatDrip(t *testing.T) {
	t.Parallel()
	want := bytesOf(2, 2<<20)
	size := int64(len(want))
	ws := eager(newWidths(4))
	ws.stall = 200 * time.Millisecond
	ws.pace = func(w *width) sample {
		for w.received.Load() == 0 {
			time.Sleep(time.Millisecond)
		}
		n := float64(w.conns())
		return sample{n * float64(size), n}
	}
	p := ws.parallel("registry", io.NopCloser(bytes.NewReader(want)), store.Span{To: size}, size, func(ctx context.Context, _ *url.URL, part store.Span) (io.ReadCloser, *url.URL, error) {
		return drip{io.NopCloser(bytes.NewReader(want[part.From:part.To])), ctx.Done()}, nil, nil
	})
	defer p.Close()
	// What comes without parts is as much as a part has, so that they begin soon.
	time.AfterFunc(30*time.Second, func() { p.Close() })
	var got bytes.Buffer
	buf := make([]byte, 4<<10)
	for {
		n, err := p.Read(buf)
		got.Write(buf[:n])
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Errorf("after %d of %d bytes: %v", got.Len(), size, err)
			}
			break
		}
		if got.Len() < 64<<10 {
			time.Sleep(time.Millisecond) // the network's pace
		}
	}
	if !bytes.Equal(got.Bytes(), want) && int64(got.Len()) == size {
		t.Error("other bytes")
	}
	if !ws.registry("registry").refuses() {
		t.Error("parts are still asked for")
	}
}

// silent gives nothing until it is closed.
type silent struct {
	closed chan struct{}
	once   sync.Once
}

func (s *silent) Read([]byte) (int, error) { <-s.closed; return 0, io.EOF }

func (s *silent) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// Blobs get more connections for as long as these bring more, beside each other too,
// and those that come soon afterwards have as many from their beginning.
func TestConnectionsForEach(t *testing.T) {
	for _, of := range []struct{ link, blobs, want int }{ // link is how many connections bring something
		{1, 1, 1}, {2, 1, 2}, {3, 1, 4}, {100, 1, 8}, {3, 3, 1}, {6, 3, 2}, {100, 3, 8},
	} {
		t.Run(fmt.Sprintf("%+v", of), func(t *testing.T) {
			t.Parallel()
			var measured atomic.Int64
			ws := newWidths(8)
			ws.part = 16 // as much memory as it takes
			ws.parts = make(chan struct{}, 1000)
			has := func(p *parallel) int {
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.want
			}
			rests := func(p *parallel) bool { // its first connection, when that comes to the parts
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.next > 0
			}
			asked := func(w *width) bool { // for parts, by all that are to
				w.mu.Lock()
				defer w.mu.Unlock()
				for p := range w.blobs {
					if has(p) > 1 && !rests(p) {
						return false
					}
				}
				return true
			}
			pace := make(chan struct{})
			ws.pace = func(w *width) sample {
				<-pace
				for !asked(w) { // not eventually, whose failure is for the test's own goroutine
					time.Sleep(time.Millisecond)
				}
				measured.Add(1)
				n := float64(w.conns())
				return sample{min(n, float64(of.link)), n}
			}
			nothing := func() io.ReadCloser { return &silent{closed: make(chan struct{})} }
			begin := func() *parallel {
				return ws.parallel("registry", nothing(), store.Span{To: 1 << 30}, 1<<30, func(ctx context.Context, _ *url.URL, part store.Span) (io.ReadCloser, *url.URL, error) {
					return nothing(), nil, nil
				}).(*parallel)
			}
			var all []*parallel
			for range of.blobs {
				all = append(all, begin())
			}
			close(pace)
			w := ws.registry("registry")
			eventually(t, "more bring no more", func() bool {
				w.mu.Lock()
				defer w.mu.Unlock()
				return w.settled && !w.growing
			})
			resting := 0
			for i, p := range all {
				if n := has(p); n != of.want {
					t.Errorf("blob %d has %d connections, want %d", i, n, of.want)
				}
				if rests(p) {
					resting++
				}
			}
			if want := max(1, of.blobs*min(1, of.want-1)); resting != want {
				t.Errorf("the first connections of %d blobs come to rest, want %d", resting, want)
			}
			if of.want == 1 {
				if !w.alone() {
					t.Error("it is measured again at once")
				}
			} else {
				before := measured.Load()
				next := begin()
				if n := has(next); n != of.want || measured.Load() != before {
					t.Errorf("the next blob has %d connections from its beginning, want %d", n, of.want)
				}
				all = append(all, next)
			}
			for _, p := range all {
				p.Close()
			}
			if n := w.conns(); n != 0 {
				t.Errorf("%d connections are left", n)
			}
		})
	}
}

// after has nothing to give, and that not before something has happened.
type after struct{ is <-chan struct{} }

func (a after) Read([]byte) (int, error) {
	<-a.is
	return 0, io.EOF
}

// The memory of parts that were read is not each blob's until its end: a registry
// that gives some and then keeps many open has no more of it.
func TestMemoryOfParts(t *testing.T) {
	want := bytesOf(3, 4<<20)
	size := int64(len(want))
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	const blobs = 100
	ws := eager(newWidths(8))
	ws.part = 256 << 10
	for i := range blobs {
		var parts atomic.Int64
		begun := make(chan struct{})
		body := io.MultiReader(bytes.NewReader(want[:1<<10]), after{begun}, bytes.NewReader(want[1<<10:]))
		p := ws.parallel(fmt.Sprint(i), io.NopCloser(body), store.Span{To: size}, size, func(_ context.Context, _ *url.URL, part store.Span) (io.ReadCloser, *url.URL, error) {
			if n := parts.Add(1); n > 10 {
				return nil, nil, errors.New("429 Too Many Requests")
			} else if n == 8 {
				close(begun)
			}
			return io.NopCloser(bytes.NewReader(want[part.From:part.To])), nil, nil
		})
		defer p.Close()
		if _, err := io.CopyN(io.Discard, p, size-1); err != nil { // and there it stays
			t.Fatal(i, err)
		}
	}
	if after := heap(); after > before+blobs*256<<10 {
		t.Errorf("%d KiB for each blob", (after-before)>>10/blobs)
	}
}

// A signed URL that is over is asked for anew, however that is said: Amazon S3 and Azure
// answer with 403, Google Cloud Storage, and S3 for temporary keys, with 400.
func TestSignedURLEnds(t *testing.T) {
	for _, status := range []int{http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			t.Parallel()
			blob := bytesOf(5, 4<<20)
			u := newUpstream(t)
			u.redirect = true
			u.allow("a/b", "Bearer 1")
			path := "/v2/a/b/blobs/" + u.put("a/b", blob).String()
			s := newSide(t, u, store.Options{})
			eager(s.h.widths)
			begun := make(chan struct{})
			var parts atomic.Int64
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == path {
					return false
				}
				if r.Header.Get("Range") == "" {
					w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
					_, _ = w.Write(blob[:64<<10])
					w.(http.Flusher).Flush()
					<-begun
					_, _ = w.Write(blob[64<<10:])
					return true
				}
				n := parts.Add(1)
				if n == 1 {
					close(begun)
				}
				// Those of the first requests were redirected just now.
				over := n > 16 && n%32 == 0
				if over {
					w.WriteHeader(status)
				}
				return over
			}
			if a := s.do("GET", path, "Bearer 1"); a.err != nil || !bytes.Equal(a.body, blob) {
				t.Fatalf("%d bytes, %v", len(a.body), a.err)
			}
			if parts.Load() < 32 || s.h.widths.registry(strings.TrimPrefix(u.srv.URL, "https://")).refuses() {
				t.Errorf("of %d parts some were refused for good", parts.Load())
			}
		})
	}
}

// A registry that gives other bytes for a part than the blob has there is asked for blobs
// over one connection.
func TestPartsThatAreWrong(t *testing.T) {
	blob := bytesOf(6, 4<<20)
	u := newUpstream(t)
	u.allow("a/b", "Bearer 1")
	path := "/v2/a/b/blobs/" + u.put("a/b", blob).String()
	s := newSide(t, u, store.Options{})
	eager(s.h.widths)
	var wrong atomic.Bool
	var once sync.Once
	begun := make(chan struct{})
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") == "" {
			w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
			_, _ = w.Write(blob[:64<<10])
			w.(http.Flusher).Flush()
			if !wrong.Load() {
				<-begun
			}
			_, _ = w.Write(blob[64<<10:])
			return true
		}
		once.Do(func() { close(begun) })
		wrong.Store(true)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(make([]byte, len(blob))))
		return true
	}
	if a := s.do("GET", path, "Bearer 1"); bytes.Equal(a.body, blob) || !wrong.Load() {
		t.Fatalf("no part was wrong: %v", a.err)
	}
	w := s.h.widths.registry(strings.TrimPrefix(u.srv.URL, "https://"))
	eventually(t, "it is asked for no more parts", func() bool { return w.refuses() })
	if a := s.do("GET", path, "Bearer 1"); a.err != nil || !bytes.Equal(a.body, blob) {
		t.Errorf("%d bytes, %v", len(a.body), a.err)
	}
}
