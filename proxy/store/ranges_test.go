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

func (s *server) open(_ context.Context, first, to int64) (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := &served{s: s, at: first, to: min(to, int64(len(s.want)))}
	if b.cut = b.to; s.cuts > 0 && b.to > first {
		s.cuts--
		b.cut = first + s.r.Int64N(b.to-first)
	}
	return b, nil
}

func (s *server) source(ctx context.Context, first int64) (io.ReadCloser, error) {
	return s.open(ctx, first, math.MaxInt64)
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
	s           *server
	at, to, cut int64
	closed      bool
}

func (b *served) Read(p []byte) (int, error) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	switch {
	case b.closed:
		return 0, os.ErrClosed
	case b.at == b.to:
		return 0, io.EOF
	case b.at >= b.cut:
		return 0, errors.New("reset")
	}
	n := copy(p[:min(len(p), 1+b.s.r.IntN(2*chunkSize))], b.s.want[b.at:min(b.to, b.cut)])
	for i := range n {
		b.s.sent[int(b.at)+i]++
	}
	b.at += int64(n)
	return n, nil
}

func (b *served) Close() error {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.closed = true
	return nil
}

// get reads a range as a client does: it asks itself for what is missing first. It reads no more
// than n bytes of it.
func (s *server) get(t *testing.T, st *Store, from Origin, first, end int64, n int) {
	t.Helper()
	d, size := digest.FromBytes(s.want), int64(len(s.want))
	r := st.Ranges(t.Context(), d, from)
	if r == nil {
		return // it follows the transfer, or asks on its own
	}
	defer r.Close()
	r.With(t.Context(), s.open)
	if to, is := r.Missing(first, end); is || r.Size() < 0 {
		body, _ := s.open(t.Context(), first, min(to, size))
		if !r.Fill(body, first, min(to, size), size) {
			body.Close()
			t.Error("another size was said")
			return
		}
	}
	if _, err := r.Seek(first, io.SeekStart); err != nil {
		t.Error(err)
	}
	if end < 0 {
		end = size
	}
	got, err := io.ReadAll(io.LimitReader(r, min(end-first, int64(n))))
	if want := s.want[first:min(end, first+int64(n))]; err != nil || !bytes.Equal(got, want) {
		t.Errorf("of %d to %d %d bytes of %d, right: %v, %v", first, end, len(got), len(want), bytes.HasPrefix(want, got), err)
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
		rest.Body, _ = s.open(t.Context(), first, to)
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

// Twenty clients ask for ranges, in any order, which overlap; some leave in the middle; sources
// break off; one client asks for all of it in the middle of that; the store is opened anew. What
// each is given is right. When nobody leaves and nothing breaks off, the registry gives each byte once.
func TestRangeStories(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 12))
			dir := t.TempDir()
			from := Origin{Name: "a"}
			want := random(seed+900, 100_000+r.IntN(4<<20))
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
					wg.Go(func() { srv.get(t, s, from, first, end, n) })
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
			if most, all := srv.most(); calm && most > 1 {
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
	if to, is := slow.Missing(1<<20, 2<<20); !is || to != 2<<20 {
		t.Fatal(to, is)
	}
	pr, pw := io.Pipe()
	slow.Fill(pr, 1<<20, 2<<20, size)
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
	b, _ := srv.open(t.Context(), first, to)
	r, err := tr.Resume(Rest{Size: size, Body: b, First: first, To: to, Gap: srv.open, More: srv.source})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); !errors.Is(err, ErrCorrupt) || int64(len(got)) >= size {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	r.Close()
	go func() { _, _ = pw.Write(lies[:1<<20-flushSize]); pw.Close() }()
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
	slow.Missing(1<<20, 2<<20)
	pr, pw = io.Pipe()
	slow.Fill(pr, 1<<20, 2<<20, size)
	srv.get(t, s, Origin{}, 0, 1<<20, len(want))
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
			if to, is := slow[i].Missing(first, end); !is || to != end {
				t.Fatal(to, is)
			}
			slow[i].Fill(body(want[first:end]), first, end, size)
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
			srv.get(t, s, Origin{}, 0, -1, len(want))
			srv.get(t, s, Origin{}, size/2+1, size-5, len(want))
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
	srv.get(t, s, Origin{}, size-chunkSize, size, len(want))
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
		gap := func(ctx context.Context, first, to int64) (io.ReadCloser, error) {
			asked.Add(1)
			return srv.open(ctx, first, to)
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
				if to, is := r.Missing(off, -1); is && r.Size() >= 0 {
					b, _ := srv.open(t.Context(), off, min(to, off+chunkSize))
					r.Fill(b, off, min(to, off+chunkSize), size)
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
			b, _ := srv.open(t.Context(), first, to)
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
		r.Missing(first, end)
		r.Fill(body(want[first:end]), first, end, int64(len(want)))
		if got := make([]byte, n-1); r.mine == nil {
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
	if to, is := a.Missing(0, -1); !is || to != math.MaxInt64 {
		t.Fatal(to, is)
	}
	a.Fill(body(want), 0, size, size)
	if to, is := b.Missing(1<<19, 1<<20); is {
		t.Errorf("what comes soon is asked for again: to %d", to)
	}
	if to, is := b.Missing(4<<20, -1); !is || to != size {
		t.Errorf("what comes late isn't asked for: to %d, %v", to, is)
	}
	b.Fill(body(want[4<<20:]), 4<<20, size, size)
	var wg sync.WaitGroup
	for _, r := range []*Ranges{a, b} {
		wg.Go(func() {
			r.With(t.Context(), func(context.Context, int64, int64) (io.ReadCloser, error) { return nil, errors.New("asked again") })
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
	r.Missing(0, -1)
	b, _ := srv.open(t.Context(), 0, 4<<20)
	r.Fill(b, 0, 4<<20, 4<<20)
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
	srv.get(t, s, Origin{}, 0, -1, len(big))
	if st := s.Stats(); st.Partial > size/partialShare || st.Partial < size/partialShare-flushSize {
		t.Errorf("%+v", st)
	}
}
