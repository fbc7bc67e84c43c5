// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// server gives ranges of a blob, and counts how often it gives each byte.
type server struct {
	want []byte
	mu   sync.Mutex
	r    *rand.Rand
	sent []uint8
	cuts int // how many bodies break off
}

func newServer(seed uint64, want []byte) *server {
	return &server{want: want, r: rand.New(rand.NewPCG(seed, 11)), sent: make([]uint8, len(want))}
}

// open gives some of the ranges that are asked for, from the first one on.
func (s *server) open(_ context.Context, missing []Span) (io.ReadCloser, int, error) {
	s.mu.Lock()
	n := 1 + s.r.IntN(len(missing))
	s.mu.Unlock()
	return s.ranges(missing[:n]...), n, nil
}

// ranges gives ranges, one after another.
func (s *server) ranges(given ...Span) io.ReadCloser {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := &served{s: s, cut: math.MaxInt64}
	for _, e := range given {
		if e.To = min(e.To, int64(len(s.want))); e.From < e.To {
			b.rest = append(b.rest, e)
		}
	}
	if n := spans(b.rest).bytes(); s.cuts > 0 && n > 0 {
		s.cuts--
		b.cut = s.r.Int64N(n)
	}
	return b
}

func (s *server) source(_ context.Context, first int64) (io.ReadCloser, error) {
	return s.ranges(Span{first, math.MaxInt64}), nil
}

// most says how often the byte was given that was given most often, and how many were in all.
func (s *server) most() (most uint8, all int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.sent {
		most = max(most, n)
		all += int64(n)
	}
	return most, all
}

type served struct {
	s      *server
	rest   []Span
	cut    int64 // after how many bytes more it breaks off
	closed bool
}

func (b *served) Read(p []byte) (int, error) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	switch {
	case b.closed:
		return 0, os.ErrClosed
	case len(b.rest) == 0:
		return 0, io.EOF
	case b.cut == 0:
		return 0, errors.New("reset")
	}
	at := b.rest[0].From
	n := copy(p[:min(len(p), 1+b.s.r.IntN(2*chunkSize))], b.s.want[at:min(b.rest[0].To, at+min(b.cut, int64(len(b.s.want))))])
	for i := range n {
		b.s.sent[int(at)+i]++
	}
	b.cut -= int64(n)
	if b.rest[0].From += int64(n); b.rest[0].From == b.rest[0].To {
		b.rest = b.rest[1:]
	}
	return n, nil
}

func (b *served) Close() error {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.closed = true
	return nil
}

// get reads ranges as a client does, which are in order: it asks itself for what is missing first. It reads no more
// than n bytes of each.
func (s *server) get(t *testing.T, st *Store, from Origin, n int, wanted ...Span) {
	t.Helper()
	d, size := digest.FromBytes(s.want), int64(len(s.want))
	r := st.Ranges(t.Context(), d, from)
	if r == nil {
		return // it follows the transfer, or asks on its own
	}
	defer r.Close()
	r.With(t.Context(), s.open)
	missing := r.Missing(wanted...)
	if r.Size() < 0 && len(missing) == 0 {
		missing = []Span{{wanted[0].From, size}}
	}
	if len(missing) > 0 {
		last := &missing[len(missing)-1]
		last.To = min(last.To, size)
		if body := s.ranges(missing...); !r.Fill(body, missing, size) {
			body.Close()
			t.Error("another size was said")
			return
		}
	}
	for _, w := range wanted {
		if _, err := r.Seek(w.From, io.SeekStart); err != nil {
			t.Error(err)
		}
		if w.To < 0 {
			w.To = size
		}
		got, err := io.ReadAll(io.LimitReader(r, min(w.To-w.From, int64(n))))
		if want := s.want[w.From:min(w.To, w.From+int64(n))]; err != nil || !bytes.Equal(got, want) {
			t.Errorf("of %d to %d %d bytes of %d, right: %v, %v", w.From, w.To, len(got), len(want), bytes.HasPrefix(want, got), err)
		}
	}
}

// finish has what is there verified, and kept.
func (s *server) finish(t *testing.T, st *Store, from Origin) {
	t.Helper()
	tr, leader := st.Claim(digest.FromBytes(s.want), from)
	if !leader {
		return
	}
	first, to, size, ok := tr.Missing()
	if !ok {
		tr.Abandon(errors.New("nothing is there"))
		return
	}
	rest := Rest{Size: size, First: first, To: to, Gap: s.open, More: s.source}
	if first < size {
		rest.Body = s.ranges(Span{first, to})
	}
	r, err := tr.Resume(rest)
	if err != nil {
		t.Error(err)
		return
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, s.want) {
		t.Errorf("all of it: %d bytes, %v", len(got), err)
	}
	if err := r.Ended(t.Context()); err != nil {
		t.Error(err)
	}
}

// someSpans are ranges of a blob, in order. Some touch each other.
func someSpans(r *rand.Rand, size int64) (some []Span) {
	to := int64(0)
	for range 1 + r.IntN(300) {
		from := to
		if r.IntN(4) > 0 {
			from += r.Int64N(size / 50)
		}
		if to = from + 1 + r.Int64N(size/50); to > size {
			break
		}
		some = append(some, Span{from, to})
	}
	if len(some) == 0 {
		return []Span{{0, size}}
	}
	return some
}

// Twenty clients ask for ranges, in any order, which overlap; some leave in the middle; sources
// break off; one client asks for all of it in the middle of that; the store is opened anew. What
// each is given is right. Some ask for several ranges at a time. When nobody leaves and nothing breaks off, the registry
// gives each byte once, but for what somebody takes over of what another has asked for with what comes before it.
func TestRangeStories(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 12))
			dir := t.TempDir()
			from := Origin{Name: "a"}
			want := random(seed+900, 100_000+r.IntN(4<<20))
			several := r.IntN(2) == 0
			size := int64(len(want))
			d := digest.FromBytes(want)
			s := open(t, dir, Options{MaxBytes: 256 << 20})
			srv := newServer(seed, want)
			calm := r.IntN(2) == 0
			if !calm {
				srv.cuts = r.IntN(5)
			}
			for range 1 + r.IntN(3) {
				var wg sync.WaitGroup
				whole := r.IntN(30)
				for i := range 20 {
					first := r.Int64N(size)
					end, n := first+1+r.Int64N(size-first), len(want)
					switch {
					case r.IntN(4) == 0:
						end = -1
						if !calm {
							n = 1 + r.IntN(n)
						}
					case !calm && r.IntN(3) == 0:
						n = r.IntN(int(end - first))
					}
					if i == whole {
						wg.Go(func() { srv.finish(t, s, from) })
					}
					wanted := []Span{{first, end}}
					if several && r.IntN(2) == 0 {
						wanted = someSpans(r, size)
					}
					wg.Go(func() { srv.get(t, s, from, n, wanted...) })
				}
				wg.Wait()
				if s.Has(d) {
					break
				}
				switch r.IntN(4) {
				case 0:
					s.Close()
					s = open(t, dir, Options{MaxBytes: 256 << 20})
				case 1:
					killed := copyDir(t, dir)
					if calm {
						s.Close()
						killed = copyDir(t, dir) // or what isn't written down is asked for again
					}
					dir, s = killed, open(t, killed, Options{MaxBytes: 256 << 20})
				}
			}
			if !s.Has(d) {
				srv.finish(t, s, from)
			}
			if most, all := srv.most(); calm && most > 1 && (!several || size <= nearSpan) {
				t.Errorf("a byte was given %d times, and %d bytes of %d", most, all, size)
			}
			if got, err := read(s, d); err != nil || !bytes.Equal(got, want) {
				t.Errorf("kept: %d bytes, %v", len(got), err)
			}
			if n, st := files(t, s.dir), s.Stats(); n != 3 || st.Bytes != size || st.Partial != 0 || s.promised != 0 {
				t.Errorf("%d files, %+v, promised %d", n, st, s.promised)
			}
		})
	}
}

// Somebody who asks for a range and stands still holds up nobody for long, and writes nothing over
// what others have brought instead.
func TestRangeStandsStill(t *testing.T) {
	defer func(was time.Duration) { stallTime = was }(stallTime)
	stallTime = 50 * time.Millisecond
	want := random(990, 3<<20)
	size, d := int64(len(want)), digest.FromBytes(want)
	s := open(t, t.TempDir(), Options{})
	srv := newServer(1, want)
	lies := bytes.Repeat([]byte("x"), len(want))
	slow := s.Ranges(t.Context(), d, Origin{}).With(t.Context(), srv.open)
	defer slow.Close()
	if missing := slow.Missing(Span{1 << 20, 2 << 20}); !slices.Equal(missing, []Span{{1 << 20, 2 << 20}}) {
		t.Fatal(missing)
	}
	pr, pw := io.Pipe()
	slow.Fill(pr, []Span{{1 << 20, 2 << 20}}, size)
	go func() { _, _ = pw.Write(lies[:flushSize]) }()
	if _, err := io.ReadFull(slow, make([]byte, flushSize)); err != nil {
		t.Fatal(err)
	}
	// What has come is wrong, as it turns out, and the blob isn't kept.
	tr, _ := s.Claim(d, Origin{})
	first, to, _, ok := tr.Missing()
	if !ok || first != 0 || to != 1<<20 {
		t.Fatal(first, to, ok)
	}
	b := srv.ranges(Span{first, to})
	r, err := tr.Resume(Rest{Size: size, Body: b, First: first, To: to, Gap: srv.open, More: srv.source})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); !errors.Is(err, ErrCorrupt) || int64(len(got)) >= size {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	r.Close()
	go func(pw *io.PipeWriter) { _, _ = pw.Write(lies[:1<<20-flushSize]); pw.Close() }(pw) // there is another later
	if _, err := io.CopyN(io.Discard, slow, 1<<20-flushSize); err != nil {
		t.Error(err)
	}
	slow.Close()
	if s.Has(d) || files(t, s.dir) != 1 || s.Stats().Bytes != 0 {
		t.Errorf("left: %d files, %+v", files(t, s.dir), s.Stats())
	}

	// Nothing of it has come, and all is right.
	slow = s.Ranges(t.Context(), d, Origin{}).With(t.Context(), srv.open)
	defer slow.Close()
	slow.Missing(Span{1 << 20, 2 << 20})
	pr, pw = io.Pipe()
	slow.Fill(pr, []Span{{1 << 20, 2 << 20}}, size)
	srv.get(t, s, Origin{}, len(want), Span{0, 1 << 20})
	srv.finish(t, s, Origin{})
	go func() { _, _ = pw.Write(lies[:1<<20]); pw.Close() }()
	_, _ = io.CopyN(io.Discard, slow, 1<<20)
	slow.Close()
	if got, err := read(s, d); err != nil || !bytes.Equal(got, want) {
		t.Errorf("kept: %d bytes, %v", len(got), err)
	}
}

// Clients who ask for ranges and take hardly anything of them, or whose way to the registry is held up, hold
// up nobody for long, however many they are: neither who asks for ranges, nor who wants all of the blob.
func TestRangesThatLag(t *testing.T) {
	defer func(was time.Duration) { stallTime = was }(stallTime)
	stallTime = 100 * time.Millisecond
	want := random(995, 6<<20)
	size, d := int64(len(want)), digest.FromBytes(want)
	for _, whole := range []bool{false, true} {
		s, srv := open(t, t.TempDir(), Options{}), newServer(3, want)
		const lagging = 10
		var slow [lagging]*Ranges
		for i := range slow {
			first, end := size*int64(i)/lagging, size*int64(i+1)/lagging
			slow[i] = s.Ranges(t.Context(), d, Origin{}).With(t.Context(), srv.open)
			if missing := slow[i].Missing(Span{first, end}); !slices.Equal(missing, []Span{{first, end}}) {
				t.Fatal(missing)
			}
			slow[i].Fill(body(want[first:end]), []Span{{first, end}}, size)
		}
		done := make(chan struct{})
		var wg sync.WaitGroup
		for _, r := range slow { // until who waits for them has all
			wg.Go(func() {
				defer r.Close()
				tick := time.NewTicker(10 * time.Millisecond)
				defer tick.Stop()
				for {
					select {
					case <-done:
						return
					case <-tick.C:
					}
					if n, err := r.Read(make([]byte, 1)); n != 1 {
						t.Error(n, err)
						return
					}
				}
			})
		}
		if whole {
			srv.finish(t, s, Origin{})
		} else {
			srv.get(t, s, Origin{}, len(want), Span{0, -1})
			srv.get(t, s, Origin{}, len(want), Span{size/2 + 1, size - 5})
		}
		close(done)
		wg.Wait()
		if whole && !s.Has(d) {
			t.Error("it isn't kept")
		}
	}
}

// What has arrived of a blob and isn't in its file yet is not read there, where zeros are in its place if
// something that follows is there already.
func TestArrivedBeforeRanges(t *testing.T) {
	want := random(998, 8<<20)
	size, d := int64(len(want)), digest.FromBytes(want)
	s := open(t, t.TempDir(), Options{})
	s.disk.timeout = time.Hour
	srv := newServer(6, want)
	srv.get(t, s, Origin{}, len(want), Span{size - chunkSize, size})
	g := &gate{}
	g.open()
	s.disk.hold = g.hold
	tr, _ := s.Claim(d, Origin{})
	first, to, _, ok := tr.Missing()
	if !ok || first != 0 || to != size-chunkSize {
		t.Fatal(first, to, ok)
	}
	pr, pw := io.Pipe()
	r, err := tr.Resume(Rest{Size: size, Body: pr, First: 0, To: to, Gap: srv.open, More: srv.source})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const begun, arrived = 2 << 20, 9 << 19
	give := func(from, to int64, is func() bool) {
		t.Helper()
		if _, err := pw.Write(want[from:to]); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "it is there", func() bool {
			tr.mu.Lock()
			defer tr.mu.Unlock()
			return tr.arrived == to && is()
		})
	}
	give(0, begun, func() bool { return min(tr.stored, tr.hashed) > 3<<19 }) // what is less than a batch waits
	g.close()
	defer g.open()
	give(begun, arrived, func() bool { return tr.base > 0 })
	got := make([]byte, size)
	for n := 0; n < arrived-1; {
		k, err := r.Read(got[n:])
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[n:n+k], want[n:n+k]) {
			t.Fatalf("wrong bytes from %d to %d", n, n+k)
		}
		n += k
	}
	g.open()
	go func() { _, _ = pw.Write(want[arrived:to]) }()
	if rest, err := io.ReadAll(r); err != nil || !bytes.Equal(rest, want[arrived-1:]) {
		t.Errorf("then %d bytes, %v", len(rest), err)
	}
}

// Who wants all of a blob of which others ask for small ranges has it by few requests.
func TestWholeAmongRanges(t *testing.T) {
	want := random(997, 24<<20)
	size, d := int64(len(want)), digest.FromBytes(want)
	for _, follows := range []bool{true, false} {
		s, srv := open(t, t.TempDir(), Options{}), newServer(5, want)
		var asked atomic.Int64
		gap := func(ctx context.Context, missing []Span) (io.ReadCloser, int, error) {
			asked.Add(1)
			return srv.open(ctx, missing)
		}
		rest := Rest{Size: size, Body: body(want[:PieceSize]), To: PieceSize, Pieces: true, Gap: gap, More: srv.source}
		if !follows {
			rest.Body, _ = io.Pipe() // the first client leaves before anything comes
		}
		tr, _ := s.Claim(d, Origin{})
		begun := make(chan struct{})
		go func() { // a client that asks for ranges, each of which takes the last one over
			defer close(begun)
			for off := int64(3 << 20); off < 8<<20; off += 3 << 19 {
				r := s.Ranges(t.Context(), d, Origin{})
				if r == nil {
					return
				}
				r.With(t.Context(), srv.open)
				if missing := r.Missing(Span{off, -1}); len(missing) > 0 && r.Size() >= 0 {
					missing[0].To = min(missing[0].To, off+chunkSize)
					r.Fill(srv.ranges(missing...), missing, size)
					_, _ = io.CopyN(io.Discard, r, chunkSize)
				}
				r.Close()
			}
		}()
		r, err := tr.Resume(rest)
		if err != nil {
			t.Fatal(err)
		}
		<-begun
		if !follows {
			r.Close()
			tr.cancel(nil)
			waitFor(t, "it has ended", func() bool { return s.Stats().Running == 0 })
			asked.Store(0)
			tr, _ = s.Claim(d, Origin{})
			first, to, _, ok := tr.Missing()
			if !ok {
				t.Fatal("nothing is there")
			}
			b := srv.ranges(Span{first, to})
			if r, err = tr.Resume(Rest{Size: size, Body: b, First: first, To: to, Gap: gap, More: srv.source}); err != nil {
				t.Fatal(err)
			}
		} else {
			r.Whole()
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		r.Close()
		if n := asked.Load(); n > 4 {
			t.Errorf("follows: %v, asked %d times", follows, n)
		}
	}
}

// Any number of clients that read a little of a range and stay have a bounded part of the memory.
func TestRangesInMemory(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	const clients, n = 400, 100 << 10
	want := random(996, n*clients)
	srv := newServer(4, want)
	var inMemory int
	for i := range int64(clients) {
		r := s.Ranges(t.Context(), digest.FromBytes(want), Origin{}).With(t.Context(), srv.open)
		defer r.Close()
		first, end := i*n, (i+1)*n
		r.Missing(Span{first, end})
		r.Fill(body(want[first:end]), []Span{{first, end}}, int64(len(want)))
		if got := make([]byte, n-1); len(r.ahead) == 0 {
			t.Fatal("it isn't put with what is there")
		} else if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want[first:end-1]) {
			t.Fatal(err)
		}
		inMemory += len(r.buf)
	}
	if inMemory > gatherSize || s.gathered.Load() != int64(inMemory) {
		t.Errorf("%d bytes are in memory, and %d counted", inMemory, s.gathered.Load())
	}
	t.Cleanup(func() {
		if n := s.gathered.Load(); n != 0 {
			t.Errorf("%d bytes are counted in the end", n)
		}
	})
}

// Who asks for a range in the middle of what another brings takes over the rest of that.
func TestRangeIsTakenOver(t *testing.T) {
	want := random(991, 8<<20)
	size, d := int64(len(want)), digest.FromBytes(want)
	s := open(t, t.TempDir(), Options{})
	a, b := s.Ranges(t.Context(), d, Origin{}), s.Ranges(t.Context(), d, Origin{})
	defer a.Close()
	defer b.Close()
	if missing := a.Missing(Span{0, -1}); !slices.Equal(missing, []Span{{0, math.MaxInt64}}) {
		t.Fatal(missing)
	}
	a.Fill(body(want), []Span{{0, size}}, size)
	if missing := b.Missing(Span{1 << 19, 1 << 20}); len(missing) > 0 {
		t.Errorf("what comes soon is asked for again: %v", missing)
	}
	if missing := b.Missing(Span{4 << 20, -1}); !slices.Equal(missing, []Span{{4 << 20, size}}) {
		t.Errorf("what comes late isn't asked for: %v", missing)
	}
	b.Fill(body(want[4<<20:]), []Span{{4 << 20, size}}, size)
	var wg sync.WaitGroup
	for _, r := range []*Ranges{a, b} {
		wg.Go(func() {
			r.With(t.Context(), func(context.Context, []Span) (io.ReadCloser, int, error) { return nil, 0, errors.New("asked again") })
			at := r.off
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want[at:]) {
				t.Errorf("from %d: %d bytes, %v", at, len(got), err)
			}
		})
	}
	wg.Wait()
	if n, idle := a.There(); n != size || !idle {
		t.Errorf("%d bytes, %v", n, idle)
	}
}

// A partial that gives way while it is read and written is left alone from then on.
func TestRangesGiveWay(t *testing.T) {
	const size = 100 << 20
	want := random(992, 4<<20)
	d := digest.FromBytes(want)
	s := open(t, t.TempDir(), Options{MaxBytes: size})
	srv := newServer(2, want)
	r := s.Ranges(t.Context(), d, Origin{}).With(t.Context(), srv.open)
	defer r.Close()
	r.Missing(Span{0, -1})
	all := Span{0, 4 << 20}
	r.Fill(srv.ranges(all), []Span{all}, all.To)
	if _, err := io.ReadFull(r, make([]byte, 2<<20)); err != nil {
		t.Fatal(err)
	}
	put(t, s, random(993, size-(1<<20)))
	if st := s.Stats(); st.Partial != 0 || st.Blobs != 1 || st.Evicted != 0 {
		t.Errorf("%+v", st)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want[2<<20:]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	r.Close()
	if n := files(t, filepath.Join(s.dir, "ingest")); n != 0 || s.Stats().Bytes != size-(1<<20) {
		t.Errorf("%d files, %+v", n, s.Stats())
	}
	// There is no room for more than a tenth, and the rest passes.
	big := random(994, 16<<20)
	srv = newServer(3, big)
	s = open(t, t.TempDir(), Options{MaxBytes: size})
	srv.get(t, s, Origin{}, len(big), Span{0, -1})
	if st := s.Stats(); st.Partial > size/partialShare || st.Partial < size/partialShare-flushSize {
		t.Errorf("%+v", st)
	}
}

// Who asks for several ranges at a time is given all by one answer. Who asks for one of them that comes late there
// takes it over, and who asks for one that comes soon waits for it.
func TestSeveralRanges(t *testing.T) {
	want := random(989, 8<<20)
	size, d := int64(len(want)), digest.FromBytes(want)
	s, srv := open(t, t.TempDir(), Options{}), newServer(7, want)
	again := func(context.Context, []Span) (io.ReadCloser, int, error) { return nil, 0, errors.New("asked again") }
	wanted := []Span{{100, 1000}, {5000, 3 << 20}, {4 << 20, 5 << 20}, {6 << 20, 6<<20 + 10}, {7 << 20, size}}
	a := s.Ranges(t.Context(), d, Origin{}).With(t.Context(), again)
	defer a.Close()
	if missing := a.Missing(wanted...); !slices.Equal(missing, wanted) {
		t.Fatal(missing)
	}
	a.Fill(srv.ranges(wanted...), wanted, size)
	b := s.Ranges(t.Context(), d, Origin{}).With(t.Context(), again)
	defer b.Close()
	late := []Span{{0, 50}, {200, 300}, {4<<20 + 7, 4<<20 + 9}, {6 << 20, 8 << 20}}
	if missing, want := b.Missing(late...), []Span{{0, 50}, {4<<20 + 7, 4<<20 + 9}, {6 << 20, 8 << 20}}; !slices.Equal(missing, want) {
		t.Errorf("%v is asked for, want %v", missing, want)
	} else {
		b.Fill(srv.ranges(missing...), missing, size)
	}
	var wg sync.WaitGroup
	for r, wanted := range map[*Ranges][]Span{a: wanted, b: late} {
		wg.Go(func() {
			for _, w := range wanted {
				_, _ = r.Seek(w.From, io.SeekStart)
				got := make([]byte, w.To-w.From)
				if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want[w.From:w.To]) {
					t.Errorf("%v: right: %v, %v", w, bytes.Equal(got, want[w.From:w.To]), err)
				}
			}
		})
	}
	wg.Wait()
	a.Close()
	b.Close()
	if len(a.part.coming) > 0 || s.gathered.Load() != 0 {
		t.Errorf("%d ranges are on their way still, %d bytes in memory", len(a.part.coming), s.gathered.Load())
	}
}

// Very many small ranges that are missing cost few requests.
func TestManyGaps(t *testing.T) {
	want := random(988, 3<<20)
	size, d := int64(len(want)), digest.FromBytes(want)
	s, srv := open(t, t.TempDir(), Options{}), newServer(8, want)
	var wanted []Span
	for at := int64(0); at < size; at += 4 << 10 {
		wanted = append(wanted, Span{at + 100, at + 4<<10})
	}
	srv.get(t, s, Origin{}, len(want), wanted...)
	asked := 0
	gap := func(_ context.Context, missing []Span) (io.ReadCloser, int, error) {
		asked++
		return srv.ranges(missing...), len(missing), nil
	}
	tr, _ := s.Claim(d, Origin{})
	if first, to, _, ok := tr.Missing(); !ok || first != 0 || to != 100 {
		t.Fatal(first, to, ok)
	}
	r, err := tr.Resume(Rest{Size: size, Gap: gap, More: srv.source})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if most, _ := srv.most(); most != 1 || asked > len(wanted)/maxAsked+1 {
		t.Errorf("asked %d times for %d ranges, and given %d times", asked, len(wanted), most)
	}
}

// A transfer that asks for pieces asks for each of them, and for no more.
func TestPieces(t *testing.T) {
	want := random(987, 3*PieceSize)
	size, d := int64(len(want)), digest.FromBytes(want)
	s, srv := open(t, t.TempDir(), Options{}), newServer(9, want)
	tr, _ := s.Claim(d, Origin{})
	more := func(context.Context, int64) (io.ReadCloser, error) {
		t.Error("all of the rest is asked for")
		return nil, errors.New("no")
	}
	r, err := tr.Resume(Rest{Size: size, Body: srv.ranges(Span{0, PieceSize}), To: PieceSize, Pieces: true, Gap: srv.open, More: more})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if most, _ := srv.most(); most != 1 {
		t.Errorf("a byte was given %d times", most)
	}
}

// Who asks for several ranges, of which others bring some and stand still, asks for these, too, and for no
// byte twice.
func TestSeveralRangesThatLag(t *testing.T) {
	defer func(was time.Duration) { stallTime = was }(stallTime)
	stallTime = 50 * time.Millisecond
	want := random(986, 300_000)
	size, d := int64(len(want)), digest.FromBytes(want)
	for _, broken := range []bool{false, true} { // the answer for the others breaks off at once
		s, srv := open(t, t.TempDir(), Options{}), newServer(10, want)
		for _, e := range []Span{{0, 20_000}, {20_000, 40_000}} {
			still := s.Ranges(t.Context(), d, Origin{})
			defer still.Close()
			still.Missing(e)
			pr, pw := io.Pipe()
			defer pw.Close()
			still.Fill(pr, []Span{e}, size)
		}
		asked := spans(nil)
		r := s.Ranges(t.Context(), d, Origin{}).With(t.Context(), func(_ context.Context, missing []Span) (io.ReadCloser, int, error) {
			if !spans(missing).valid(size) {
				t.Errorf("asks for %v", missing)
			}
			asked = append(asked, missing...)
			return srv.ranges(missing...), len(missing), nil
		})
		defer r.Close()
		wanted := []Span{{0, 100_000}, {200_000, size}}
		missing := r.Missing(wanted...)
		if !slices.Equal(missing, []Span{{40_000, 100_000}, {200_000, size}}) {
			t.Errorf("missing: %v", missing)
		}
		body := srv.ranges(missing...)
		if broken {
			body.Close()
		}
		r.Fill(body, missing, size)
		for _, w := range wanted {
			_, _ = r.Seek(w.From, io.SeekStart)
			got := make([]byte, w.To-w.From)
			if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want[w.From:w.To]) {
				t.Errorf("%v: %v", w, err)
			}
		}
		if n := asked.bytes(); n != 40_000 && !broken || n != 200_000 && broken {
			t.Errorf("asked for %v", asked)
		}
	}
}
