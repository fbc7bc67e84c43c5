// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestTransferManyReaders(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := random(5, 5*chunkSize+123)
	d := digest.FromBytes(want)
	pr, pw := io.Pipe()
	first := begin(t, s, d, int64(len(want)), pr, nil)

	var wg sync.WaitGroup
	follow := func(r *Reader) {
		wg.Go(func() {
			defer r.Close()
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("a reader got %d bytes, err %v", len(got), err)
			}
		})
	}
	follow(first)
	for i := 0; i < len(want); i += 100_000 {
		tr, leader := s.Claim(d, Origin{})
		if leader {
			t.Fatal("two lead")
		}
		r, err := tr.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		follow(r)
		if _, err := pw.Write(want[i:min(i+100_000, len(want))]); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	if got, err := read(s, d); err != nil || !bytes.Equal(got, want) {
		t.Error("kept, but not the same:", err)
	}
	if s.Stats().Running != 0 {
		t.Error("the transfer is still there")
	}
}

// All but the last byte come at once, the last one when the digest is right.
func TestLastByteIsHeldBack(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := random(6, 1000)
	for _, size := range []int64{1000, -1} {
		forged := bytes.Clone(want)
		forged[10] ^= 1
		d := digest.FromBytes(want)
		pr, pw := io.Pipe()
		r := begin(t, s, d, size, pr, nil)
		go func() { pw.Write(forged); pw.Close() }()
		got, err := io.ReadAll(r)
		if !errors.Is(err, ErrCorrupt) || len(got) >= len(want) {
			t.Errorf("size %d: %d bytes of a forged blob, err %v", size, len(got), err)
		}
		r.Close()
		if s.Has(d) {
			t.Errorf("size %d: a forged blob was kept", size)
		}
	}
	if st := s.Stats(); st.Bytes != 0 || files(t, s.dir) != 1 {
		t.Errorf("left behind: %+v, %d files", st, files(t, s.dir))
	}
}

func TestTransferTooLong(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := random(7, 1000)
	r := begin(t, s, digest.FromBytes(want), 1000, body(append(want, 'x')), nil)
	if got, err := io.ReadAll(r); !errors.Is(err, ErrCorrupt) || len(got) >= 1000 {
		t.Errorf("%d bytes, err %v", len(got), err)
	}
}

// A source that breaks off is replaced by another at the same offset.
func TestSourceReplaced(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := random(8, 3*chunkSize)
	var offsets []int64
	more := func(_ context.Context, off int64) (io.ReadCloser, error) {
		offsets = append(offsets, off)
		switch len(offsets) {
		case 1:
			return nil, errors.New("refused")
		case 2:
			return io.NopCloser(io.MultiReader(bytes.NewReader(want[off:off+5000]), iotest.ErrReader(errors.New("reset")))), nil
		}
		return body(want[off:]), nil
	}
	broken := io.NopCloser(io.MultiReader(bytes.NewReader(want[:1000]), iotest.ErrReader(io.ErrUnexpectedEOF)))
	r := begin(t, s, digest.FromBytes(want), int64(len(want)), broken, more)
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, err %v", len(got), err)
	}
	if fmt.Sprint(offsets) != "[1000 1000 6000]" {
		t.Errorf("opened at %v", offsets)
	}
}

func TestSourcesExhausted(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := random(9, 5000)
	calls := 0
	more := func(context.Context, int64) (io.ReadCloser, error) { calls++; return nil, errors.New("refused") }
	r := begin(t, s, digest.FromBytes(want), 5000, body(want[:4000]), more)
	got, err := io.ReadAll(r)
	if err == nil || len(got) != 3999 || calls != attempts {
		t.Errorf("%d bytes, %d calls, err %v", len(got), calls, err)
	}
	if st := s.Stats(); st.Bytes != 0 {
		t.Errorf("%+v", st)
	}
}

func TestAbandon(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	d := digest.FromString("x")
	tr, _ := s.Claim(d, Origin{})
	follower, leader := s.Claim(d, Origin{})
	if leader {
		t.Fatal("two lead")
	}
	why := errors.New("unauthorized")
	go tr.Abandon(why)
	if _, err := follower.Wait(t.Context()); !errors.Is(err, why) {
		t.Error(err)
	}
	tr, leader = s.Claim(d, Origin{})
	if !leader {
		t.Error("an abandoned transfer stays")
	}
	ctx, cancel := context.WithCancel(t.Context())
	go cancel()
	if _, err := tr.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestReaderEndsWithContext(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	pr, _ := io.Pipe()
	r := begin(t, s, digest.FromString("x"), 1, pr, nil)
	ctx, cancel := context.WithCancel(t.Context())
	go cancel()
	if _, err := r.With(ctx, Failover{}).Read(make([]byte, 1)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A transfer without readers goes on for a while, so that who comes back
// finds it.
func TestReaderGoneTransferGoesOn(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := random(13, 2000)
	d := digest.FromBytes(want)
	pr, pw := io.Pipe()
	r := begin(t, s, d, 2000, pr, nil)
	r.Close()
	tr, leader := s.Claim(d, Origin{})
	if leader {
		t.Fatal("the transfer ended with its reader")
	}
	r2, err := tr.Wait(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer r2.Close()
	go pw.Write(want)
	if got, err := io.ReadAll(r2); err != nil || !bytes.Equal(got, want) {
		t.Error("not the same:", err)
	}
}

func BenchmarkTransfer(b *testing.B) {
	s, err := Open(b.TempDir(), Options{MaxBytes: 256 << 20})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data := random(16, 64<<20)
	b.SetBytes(int64(len(data)))
	for i := uint64(0); b.Loop(); i++ {
		b.StopTimer()
		copy(data, random(i, 32))
		d := digest.FromBytes(data)
		b.StartTimer()
		tr, _ := s.Claim(d, Origin{})
		r, err := tr.Begin(int64(len(data)), body(data), nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r); err != nil {
			b.Fatal(err)
		}
		r.Close()
	}
}

// again gives blobs one after the other, as a Refetch.
func againFrom(blobs ...[]byte) Refetch {
	return func(context.Context) (io.ReadCloser, int64, error) {
		if len(blobs) == 0 {
			return nil, 0, errors.New("no more")
		}
		b := blobs[0]
		blobs = blobs[1:]
		return io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
	}
}

// What comes from a peer reaches no client before it is verified, and when it is
// wrong it is fetched again without a client noticing.
func TestUnverified(t *testing.T) {
	right := bytes.Repeat([]byte("right"), 100_000)
	d := digest.FromBytes(right)
	wrong := bytes.Repeat([]byte("wrong"), 100_000)
	for _, tt := range []struct {
		name  string
		first []byte
		again Refetch
		fails bool
		liars int
	}{
		{"right", right, againFrom(), false, 0},
		{"wrong", wrong, againFrom(right), false, 1},
		{"wrong twice", wrong, againFrom(wrong, right), false, 2},
		{"longer", append(bytes.Clone(wrong), wrong...), againFrom(right), false, 1},
		{"shorter", wrong[:1000], againFrom(right), false, 1},
		{"never right", wrong, againFrom(wrong, wrong), true, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			kept := make(map[digest.Digest]bool)
			s := open(t, t.TempDir(), Options{MaxBytes: 10 << 20, Changed: func(d digest.Digest, is bool) { kept[d] = is }})
			tr, _ := s.Claim(d, Origin{})
			ended := make(chan bool, 1)
			tr.OnEnd(func(kept bool) { ended <- kept })
			liars := 0
			// The last byte comes only when a reader waits.
			pr, pw := io.Pipe()
			r, err := tr.BeginUnverified(int64(len(tt.first)), pr, nil, Unverified{Wrong: func() { liars++ }, Refetch: tt.again})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if _, err := pw.Write(tt.first[:len(tt.first)-1]); err != nil {
				t.Fatal(err)
			}
			// One that verifies the digest itself gets what is there; a client nothing.
			raw, err := s.Follow(t.Context(), d)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			if n, err := io.ReadFull(raw, make([]byte, len(tt.first)-2)); err != nil {
				t.Errorf("a peer got %d bytes: %v", n, err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if n, err := r.With(ctx, Failover{}).Read(make([]byte, 10)); n > 0 || err == nil {
				t.Errorf("a client got %d bytes of what isn't verified", n)
			}
			if arrived, size, err := s.Arriving(d); err != nil || arrived != int64(len(tt.first)-1) || size != int64(len(tt.first)) {
				t.Errorf("%d of %d, %v", arrived, size, err)
			}
			go func() { _, _ = pw.Write(tt.first[len(tt.first)-1:]) }()
			err = r.WaitReadable(t.Context())
			if tt.fails {
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("settled with %v", err)
				}
			} else if got, rerr := io.ReadAll(r.With(t.Context(), Failover{})); err != nil || rerr != nil || !bytes.Equal(got, right) || r.Size() != int64(len(right)) {
				t.Errorf("%d bytes of %d, %v, %v", len(got), r.Size(), err, rerr)
			}
			if <-ended == tt.fails || s.Has(d) == tt.fails || kept[d] == tt.fails {
				t.Errorf("kept: %v", s.Has(d))
			}
			if liars != tt.liars {
				t.Errorf("%d times wrong, want %d", liars, tt.liars)
			}
			if !bytes.Equal(tt.first, right) {
				if _, err := io.ReadAll(raw); err == nil {
					t.Error("a peer took the wrong bytes for the whole")
				}
			}
			if want := int64(len(right)); !tt.fails && s.Stats().Bytes != want || tt.fails && s.Stats().Bytes != 0 {
				t.Errorf("the store counts %d bytes", s.Stats().Bytes)
			}
		})
	}
}

// What comes from a source that is believed reaches readers as it comes, but for the
// last byte. When it is wrong, those who have some of it have a broken transfer, and
// never the whole; where none has, it is fetched again, and held back.
func TestBelieved(t *testing.T) {
	right := random(21, 300_000)
	d := digest.FromBytes(right)
	wrong := bytes.Clone(right)
	wrong[len(wrong)/2] ^= 1
	for _, tt := range []struct {
		name   string
		sent   []byte
		read   bool // before the end
		breaks bool
	}{
		{"right", right, true, false},
		{"wrong, and read", wrong, true, true},
		{"wrong, and nobody has read", wrong, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, t.TempDir(), Options{})
			tr, _ := s.Claim(d, Origin{})
			ended := make(chan bool, 1)
			tr.OnEnd(func(kept bool) { ended <- kept })
			pr, pw := io.Pipe()
			held := make(chan struct{})
			var liars atomic.Int32
			r, err := tr.BeginUnverified(int64(len(right)), pr, nil, Unverified{Believed: true, Wrong: func() { liars.Add(1) },
				Refetch: func(context.Context) (io.ReadCloser, int64, error) {
					first, rest := bytes.NewReader(right[:len(right)-1]), bytes.NewReader(right[len(right)-1:])
					return io.NopCloser(io.MultiReader(first, &waits{rest, held})), int64(len(right)), nil
				}})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			r.With(t.Context(), Failover{})
			if _, err := pw.Write(tt.sent[:len(tt.sent)-1]); err != nil {
				t.Fatal(err)
			}
			var got []byte
			if tt.read {
				if err := r.WaitReadable(t.Context()); err != nil {
					t.Fatal(err)
				}
				got = make([]byte, len(right)-2)
				if _, err := io.ReadFull(r, got); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := pw.Write(tt.sent[len(tt.sent)-1:]); err != nil {
				t.Fatal(err)
			}
			if !tt.read {
				waitFor(t, "it is fetched again", func() bool { return r.Arrived() == int64(len(right)-1) && liars.Load() == 1 })
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				if n, err := r.With(ctx, Failover{}).Read(make([]byte, 10)); n > 0 || err == nil {
					t.Errorf("%d bytes of what isn't believed any more", n)
				}
				r.With(t.Context(), Failover{})
			}
			close(held)
			rest, err := io.ReadAll(r)
			got = append(got, rest...)
			switch {
			case !tt.breaks && (err != nil || !bytes.Equal(got, right)):
				t.Errorf("%d bytes, %v", len(got), err)
			case tt.breaks && (err == nil || errors.Is(err, ErrCorrupt) || len(got) >= len(right)):
				t.Errorf("%d wrong bytes, %v", len(got), err)
			}
			if kept := <-ended; kept == tt.breaks || s.Has(d) != kept {
				t.Errorf("kept: %v", kept)
			}
			if isWrong := !bytes.Equal(tt.sent, right); (liars.Load() == 1) != isWrong {
				t.Errorf("%d times wrong", liars.Load())
			}
		})
	}
}

// waits is a reader that has to wait first.
type waits struct {
	io.Reader
	until chan struct{}
}

func (w *waits) Read(p []byte) (int, error) {
	<-w.until
	return w.Reader.Read(p)
}

// cutting is a source that gives bytes in random pieces, and breaks off.
type cutting struct {
	r    *rand.Rand
	from []byte
	left int
}

func (c *cutting) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	if len(c.from) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), c.left, 1+c.r.IntN(2*chunkSize))], c.from)
	c.from, c.left = c.from[n:], c.left-n
	return n, nil
}

func (c *cutting) Close() error { return nil }

// Random stories: blobs of all sizes, whose sources break off and lie; readers that
// come at any time, read from anywhere at any pace, and leave; a disk that is slow,
// or hangs for a while. Whatever a reader is given is right, or, as only the last
// byte vouches for it, not whole; and nothing is left.
func TestArrivalStories(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 1))
			s := open(t, t.TempDir(), Options{MaxBytes: 128 << 20})
			g := new(gate)
			defer g.open()
			var mu sync.Mutex
			slow := rand.New(rand.NewPCG(seed, 2))
			isSlow, hangs := r.IntN(2) == 0, r.IntN(2) == 0
			s.disk.timeout = 100 * time.Millisecond
			if !hangs {
				s.disk.timeout = time.Hour
			}
			s.disk.hold = func() {
				g.hold()
				if isSlow {
					mu.Lock()
					d := time.Duration(slow.IntN(2000)) * time.Microsecond
					mu.Unlock()
					time.Sleep(d) // that is what a slow disk does
				}
			}
			want := random(seed+500, 1+r.IntN([]int{100, 2 * chunkSize, 3 << 20, 9 << 20}[r.IntN(4)]))
			d := digest.FromBytes(want)
			size := int64(len(want))
			if r.IntN(4) == 0 {
				size = -1
			}
			var opened atomic.Uint64
			source := func(of []byte, cuts int) io.ReadCloser {
				c := &cutting{rand.New(rand.NewPCG(seed, 100+opened.Add(1))), of, len(of) + 1}
				if cuts > 0 {
					c.left = 1 + c.r.IntN(len(of))
				}
				return c
			}
			cuts := r.IntN(6)
			if size < 0 {
				cuts = 0
			}
			more := func(_ context.Context, off int64) (io.ReadCloser, error) {
				return source(want[off:], cuts-int(opened.Load())), nil
			}
			tr, _ := s.Claim(d, Origin{})
			ended := make(chan bool, 1)
			tr.OnEnd(func(kept bool) { ended <- kept })
			var first *Reader
			var err error
			turns := false // it comes from one who was believed
			if r.IntN(3) == 0 && size >= 0 {
				wrong := bytes.Clone(want)
				wrong[r.IntN(len(wrong))] ^= 1
				turns = r.IntN(2) == 0
				first, err = tr.BeginUnverified(size, source(wrong, 0), more, Unverified{Believed: turns, Wrong: func() {}, Refetch: againFrom(want)})
			} else {
				first, err = tr.Begin(size, source(want, cuts), more)
			}
			if hangs && errors.Is(err, ErrDiskHangs) {
				return // where all stories at once are slower than its timeout
			}
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			follow := func(tr *Reader, seed uint64) {
				r := rand.New(rand.NewPCG(seed, 3))
				off := int64(0)
				if r.IntN(3) == 0 {
					off = r.Int64N(int64(len(want)))
				}
				leaves, pauses, misled := r.IntN(4) == 0, r.IntN(3) == 0, false
				wg.Go(func() {
					defer tr.Close()
					if _, err := tr.Seek(off, io.SeekStart); err != nil {
						t.Error(err)
					}
					at, buf := off, make([]byte, 1+r.IntN(100_000))
					for {
						n, err := tr.Read(buf[:1+r.IntN(len(buf))])
						wrong := !bytes.Equal(buf[:n], want[at:at+int64(n)])
						at += int64(n)
						switch {
						case wrong && turns && at < int64(len(want)):
							misled = true
						case wrong || misled && (err == nil && at == int64(len(want)) || errors.Is(err, io.EOF)):
							t.Errorf("wrong bytes before %d of %d", at, len(want))
							return
						case turns && err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, ErrCorrupt):
							return
						case errors.Is(err, io.EOF) && at == int64(len(want)):
							return
						case err != nil && errors.Is(err, ErrDiskHangs):
							// Its bytes were held back, or are only on the disk.
							return
						case err != nil:
							t.Errorf("at %d of %d: %v", at, len(want), err)
							return
						case leaves && r.IntN(20) == 0:
							return
						}
						if pauses {
							time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond) // a slow client
						}
					}
				})
			}
			follow(first, seed)
			if hangs {
				wg.Go(func() {
					time.Sleep(time.Duration(seed) * 200 * time.Microsecond) // at any moment
					g.close()
				})
			}
			for range r.IntN(6) {
				tr, leader := s.Claim(d, Origin{})
				if leader {
					tr.Abandon(errors.New("not again"))
					break
				}
				if other, err := tr.Wait(t.Context()); err == nil {
					follow(other, r.Uint64())
				}
			}
			wg.Wait()
			var kept bool
			select {
			case kept = <-ended:
			case <-time.After(2 * time.Second): // it has no readers any more, and waits
				s.cancel()
				kept = <-ended
			}
			g.open()
			s.cancel()
			s.wg.Wait()
			waitFor(t, "the disk answers", func() bool { return s.Stats().Hangs.IsZero() })
			if kept != s.Has(d) {
				t.Errorf("kept %v", kept)
			}
			if got, err := read(s, d); kept && (err != nil || !bytes.Equal(got, want)) {
				t.Errorf("kept: %d bytes, %v", len(got), err)
			}
			left := 1 // the lock
			bytesKept := int64(0)
			if kept {
				left, bytesKept = 3, int64(len(want))
			}
			waitFor(t, "nothing is left in memory", func() bool { return s.pieces.lent.Load() == 0 })
			if n, st := files(t, s.dir), s.Stats(); n != left || st.Bytes != bytesKept || s.provisional != 0 || s.promised != 0 {
				t.Errorf("%d files, want %d; %+v, provisional %d, promised %d", n, left, st, s.provisional, s.promised)
			}
		})
	}
}

// A reader that is behind the window reads from the file no more than is there in order: what
// others have put farther on leaves a hole before it.
func TestHoleInFile(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := random(77, 6<<20)
	d := digest.FromBytes(want)
	var armed atomic.Bool
	var writes atomic.Int64
	release := make(chan struct{})
	s.disk.hold = func() {
		if armed.Load() && writes.Add(1) > 1 {
			<-release
		}
	}
	pr, pw := io.Pipe()
	r := begin(t, s, d, int64(len(want)), pr, nil)
	defer r.Close()
	if _, err := pw.Write(want[:chunkSize]); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got[:chunkSize-1]); err != nil {
		t.Fatal(err)
	}
	armed.Store(true) // the first chunk is written, and no more
	if err := r.arriving.t.file.Truncate(int64(len(want))); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, err := pw.Write(want[chunkSize:])
		pw.CloseWithError(err)
	}()
	waitFor(t, "the first chunk has left the window", func() bool {
		w := r.arriving.t
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.base >= chunkSize
	})
	n, err := r.Read(got[chunkSize-1 : 8*chunkSize])
	if err != nil || n == 0 || !bytes.Equal(got[:chunkSize-1+n], want[:chunkSize-1+n]) {
		t.Errorf("%d bytes, err %v, and not what came", n, err)
	}
	close(release)
	if _, err := io.ReadFull(r, got[chunkSize-1+n:]); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the rest: %v", err)
	}
}
