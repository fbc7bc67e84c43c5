// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
)

// broken is a blob that breaks off at a byte, for good.
func broken(want []byte, at int) io.ReadCloser {
	return io.NopCloser(io.MultiReader(bytes.NewReader(want[:at]), iotest.ErrReader(errors.New("reset"))))
}

// leave has a transfer of a blob break off at a byte, and waits until it has ended.
func leave(t *testing.T, s *Store, from Origin, want []byte, at int) digest.Digest {
	t.Helper()
	d := digest.FromBytes(want)
	tr, leader := s.Claim(d, from)
	if !leader {
		t.Fatal("another one leads")
	}
	r, err := tr.Begin(int64(len(want)), broken(want, at), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Ended(t.Context()); err == nil {
		t.Fatal("it came to its end")
	}
	r.Close()
	return d
}

// copyDir copies what a store that is killed would leave behind.
func copyDir(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return to
}

// What has come of a blob is there for the next client from the same repository, after a
// restart too, and one that was killed.
func TestResume(t *testing.T) {
	want := random(700, 9<<20)
	const at = 7<<20 + 1000
	from := Origin{Name: "registry/a", Owner: ""}
	for _, how := range []string{"goes on", "is closed", "is killed", "is killed in the middle"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, Options{MaxBytes: 200 << 20})
			d := digest.FromBytes(want)
			least := int64(at)
			switch how {
			case "is killed in the middle":
				pr, pw := io.Pipe()
				tr, _ := s.Claim(d, from)
				r, err := tr.Begin(int64(len(want)), pr, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer pw.Close()
				defer r.Close()
				if _, err := pw.Write(want[:at]); err != nil {
					t.Fatal(err)
				}
				waitFor(t, "it is written down", func() bool {
					_, err := os.Stat(tr.part.path + recordSuffix)
					return err == nil
				})
				least = saveStep
			default:
				leave(t, s, from, want, at)
				if st := s.Stats(); st.Partial != at || st.Bytes != at || st.Running != 0 {
					t.Errorf("%+v", st)
				}
			}
			switch how {
			case "is closed":
				s.Close()
				s = open(t, dir, Options{MaxBytes: 200 << 20})
			case "is killed", "is killed in the middle":
				dir = copyDir(t, dir)
				s = open(t, dir, Options{MaxBytes: 200 << 20})
			}
			other, _ := s.Claim(d, Origin{Name: "registry/b"})
			if _, _, _, ok := other.Missing(); ok {
				t.Error("another repository's client is given what came for this one")
			}
			other.Abandon(errors.New("no"))

			tr, leader := s.Claim(d, from)
			first, to, size, ok := tr.Missing()
			if !leader || !ok || first < least || first > at || to != int64(len(want)) || size != to {
				t.Fatalf("missing is %d to %d of %d, %v, leader %v", first, to, size, ok, leader)
			}
			tr.Abandon(errors.New("not now")) // it stays for those who come later
			tr, _ = s.Claim(d, from)
			if again, _, _, ok := tr.Missing(); !ok || again != first {
				t.Fatalf("then missing is %d, %v", again, ok)
			}
			r, err := tr.Resume(Rest{Size: size, Body: body(want[first:]), First: first, To: to})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if err := r.Ended(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got, err := read(s, d); err != nil || !bytes.Equal(got, want) {
				t.Errorf("kept: %d bytes, %v", len(got), err)
			}
			if st := s.Stats(); st.Partial != 0 || st.Bytes != int64(len(want)) || files(t, s.dir) != 3 {
				t.Errorf("%+v, %d files", st, files(t, s.dir))
			}
		})
	}
}

// What is there isn't what it was: whoever reads gets no whole of it, it is fetched again for
// readers who were given nothing, and the next client finds nothing.
func TestResumeWrong(t *testing.T) {
	want := random(701, 3<<20)
	const at = 2 << 20
	for _, how := range []string{"other bytes", "shorter"} {
		s := open(t, t.TempDir(), Options{})
		d := leave(t, s, Origin{}, want, at)
		tr, _ := s.Claim(d, Origin{})
		if _, _, _, ok := tr.Missing(); !ok {
			t.Fatal("nothing is there")
		}
		f, err := os.OpenFile(tr.part.path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if how == "shorter" {
			err = f.Truncate(at / 2)
		} else {
			_, err = f.WriteAt([]byte("something else"), at/2)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		refetched := 0
		var r *Reader
		begun := make(chan struct{})
		r, err = tr.Resume(Rest{Size: int64(len(want)), Body: body(want[at:]), First: at, To: int64(len(want)), Refetch: func(context.Context) (io.ReadCloser, int64, error) {
			<-begun
			refetched++
			now, cancel := context.WithCancel(t.Context())
			cancel()
			if n, _ := r.With(now, Failover{}).Read(make([]byte, 100)); n > 0 {
				t.Errorf("%s: %d wrong bytes are given while it is fetched again", how, n)
			}
			r.With(t.Context(), Failover{})
			return body(want), int64(len(want)), nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		close(begun)
		if err := r.Ended(t.Context()); err != nil || refetched != 1 {
			t.Errorf("%s: %v, fetched %d times again", how, err, refetched)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", how, len(got), err)
		}
		r.Close()

		s = open(t, t.TempDir(), Options{})
		leave(t, s, Origin{}, want, at)
		tr, _ = s.Claim(d, Origin{})
		tr.Missing()
		wrong := bytes.Clone(want[at:])
		wrong[0] ^= 1
		if r, err = tr.Resume(Rest{Size: int64(len(want)), Body: body(wrong), First: at, To: int64(len(want))}); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); !errors.Is(err, ErrCorrupt) || len(got) >= len(want) {
			t.Errorf("%d bytes of wrong ones, %v", len(got), err)
		}
		r.Close()
		tr, _ = s.Claim(d, Origin{})
		if _, _, _, ok := tr.Missing(); ok || files(t, s.dir) != 1 {
			t.Errorf("what is wrong is there still: %d files", files(t, s.dir))
		}
		tr.Abandon(errors.New("no"))
	}
}

// Partials have a tenth of the store, an owner's a part of that, and all else goes before them.
func TestPartialsAreBounded(t *testing.T) {
	const size = 100 << 20
	blob := func(i, n int) []byte { return random(uint64(720+i), n) }
	s := open(t, t.TempDir(), Options{MaxBytes: size})
	there := func(d digest.Digest, from Origin) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.partials[running{d, from.Name}] != nil
	}
	var ds []digest.Digest
	for i := range 6 { // of 3 MiB: three of them are the tenth
		ds = append(ds, leave(t, s, Origin{}, blob(i, 4<<20), 3<<20))
	}
	for i, d := range ds {
		if there(d, Origin{}) != (i >= 3) {
			t.Errorf("of six the %d. is there: %v", i+1, i < 3)
		}
	}
	if big := leave(t, s, Origin{}, blob(10, 12<<20), 11<<20); there(big, Origin{}) || s.Stats().Partial != 9<<20 {
		t.Errorf("one that is larger than a tenth is there; %+v", s.Stats())
	}
	for i := range 4 { // each owner has a quarter of the tenth, and all half of it
		own := Origin{Name: "plain", Owner: fmt.Sprint("network ", i/2), Free: true}
		ds = append(ds, leave(t, s, own, blob(20+i, 3<<20), 2<<20))
	}
	s.mu.Lock()
	owned := s.partialBytes(func(p *partial) bool { return p.from.Owner != "" })
	s.mu.Unlock()
	if owned != 4<<20 || s.provisional != 0 {
		t.Errorf("owners have %d bytes", owned)
	}
	// Blobs that need room have it from partials first.
	for i := range 5 {
		put(t, s, blob(30+i, 19<<20))
	}
	if st := s.Stats(); st.Evicted != 0 || st.Blobs != 5 || st.Partial > 5<<20 || st.Bytes > size {
		t.Errorf("%+v", st)
	}
	put(t, s, blob(40, 5<<20))
	if st := s.Stats(); st.Evicted != 0 || st.Partial != 0 || files(t, s.path("ingest")) != 0 || s.owned != 0 {
		t.Errorf("%+v, %d files, owners have %d", st, files(t, s.path("ingest")), s.owned)
	}
	leave(t, s, Origin{}, blob(50, 3<<20), 2<<20) // and makes no blob go
	if st := s.Stats(); st.Blobs < 5 || st.Bytes > size {
		t.Errorf("%+v", st)
	}
}

// Another boot's, one that is too old, and what isn't what it says, are removed.
func TestPartialsThatAreNoGood(t *testing.T) {
	want := random(740, 3<<20)
	dir := t.TempDir()
	s := open(t, dir, Options{})
	d := leave(t, s, Origin{}, want, 2<<20)
	s.Close()
	name, err := filepath.Glob(filepath.Join(dir, "ingest", "*"+recordSuffix))
	if err != nil || len(name) != 1 {
		t.Fatal(name, err)
	}
	good, err := os.ReadFile(name[0])
	if err != nil {
		t.Fatal(err)
	}
	base := filepath.Base(name[0])
	replaced := func(old, with string) func(string) error {
		return func(dir string) error {
			b := strings.Replace(string(good), old, with, 1)
			if b == string(good) {
				return fmt.Errorf("%s isn't in %s", old, good)
			}
			return os.WriteFile(filepath.Join(dir, base), []byte(b), 0o600)
		}
	}
	for what, spoil := range map[string]func(dir string) error{
		"":             func(string) error { return nil },
		"another boot": replaced(bootID(), "another"),
		"too old":      replaced(time.Now().UTC().Format("2006"), "2001"),
		"to come":      replaced(time.Now().UTC().Format("2006"), "2101"),
		"torn":         func(dir string) error { return os.Truncate(filepath.Join(dir, base), int64(len(good)/2)) },
		"empty":        func(dir string) error { return os.Truncate(filepath.Join(dir, base), 0) },
		"no file":      func(dir string) error { return os.Remove(filepath.Join(dir, strings.TrimSuffix(base, recordSuffix))) },
		"a shorter file": func(dir string) error {
			return os.Truncate(filepath.Join(dir, strings.TrimSuffix(base, recordSuffix)), 1<<20)
		},
		"a link": func(dir string) error {
			path := filepath.Join(dir, strings.TrimSuffix(base, recordSuffix))
			return errors.Join(os.Rename(path, path+"x"), os.Symlink(path+"x", path))
		},
		"no digest": replaced(d.String(), "sha256:x"),
		"no ranges": replaced("[[0,2097152]]", "[]"),
		"too much":  replaced("[[0,2097152]]", "[[0,2097152],[3000000,9000000]]"),
		"strange":   replaced(`"size"`, `"length"`),
	} {
		other := copyDir(t, dir)
		if err := spoil(filepath.Join(other, "ingest")); err != nil {
			t.Fatal(what, err)
		}
		s := open(t, other, Options{})
		tr, _ := s.Claim(d, Origin{})
		if _, _, _, ok := tr.Missing(); ok != (what == "") {
			t.Errorf("%s: there is something: %v", what, ok)
		}
		tr.Abandon(errors.New("no"))
		if n := files(t, filepath.Join(other, "ingest")); (n == 0) != (what != "") {
			t.Errorf("%s: %d files", what, n)
		}
	}
}

// A transfer without readers ends, and stays as a partial, unless little is missing.
func TestLinger(t *testing.T) {
	want := random(741, 40<<20)
	d := digest.FromBytes(want)
	s := open(t, t.TempDir(), Options{})
	pr, pw := io.Pipe()
	r := begin(t, s, d, int64(len(want)), pr, nil)
	tr := r.arriving.t
	wait := func(at int) {
		t.Helper()
		if _, err := pw.Write(want[r.Arrived():at]); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "it has arrived", func() bool { return r.Arrived() == int64(at) })
	}
	over := func() { // its time is over
		tr.mu.Lock()
		linger := tr.linger
		tr.mu.Unlock()
		linger.Reset(0)
	}
	wait(10 << 20)
	r.Close()
	wait(26 << 20) // 14 MiB are missing
	over()
	wait(28 << 20)
	tr.mu.Lock()
	tr.linger.Stop()
	tr.mu.Unlock()
	go func() { _, _ = pw.Write(want[28<<20:]) }()
	if err := r.Ended(t.Context()); err != nil || !s.Has(d) {
		t.Errorf("one of which little is missing: %v", err)
	}

	for _, then := range []int{0, 1000} { // nothing more, or so little that it would take for ever
		s = open(t, t.TempDir(), Options{})
		pr, pw = io.Pipe()
		r = begin(t, s, d, int64(len(want)), pr, nil)
		tr = r.arriving.t
		at := 10 << 20
		if then > 0 {
			at = 30 << 20
		}
		wait(at)
		r.Close()
		wait(at + then)
		tr.mu.Lock()
		was := tr.linger
		tr.mu.Unlock()
		over()
		waitFor(t, "it is decided whether it goes on", func() bool {
			tr.mu.Lock()
			defer tr.mu.Unlock()
			if tr.state == arriving && tr.linger != was {
				t.Errorf("with %d bytes more it goes on", then)
				tr.cancel(nil)
			}
			return tr.state != arriving || tr.linger != was
		})
		if err := r.Ended(t.Context()); err == nil || s.Stats().Partial != int64(at+then) {
			t.Errorf("%v, %+v", err, s.Stats())
		}
	}
}

// Who asks for ranges of blobs that nobody has takes no partial from others, nor does a network from other
// networks, however many there are.
func TestPartialsOfNothing(t *testing.T) {
	s := open(t, t.TempDir(), Options{MaxBytes: 1 << 30})
	there := make(map[running]Origin)
	for i := range 4 {
		from := Origin{Name: fmt.Sprint("honest ", i)}
		if i%2 == 1 {
			from.Owner, from.Free = fmt.Sprint("network ", i), true
		}
		there[running{leave(t, s, from, random(uint64(750+i), 1<<20), 1<<19), from.Name}] = from
	}
	for i := range 2000 {
		from := Origin{Name: "hostile"}
		if i%2 == 1 {
			from = Origin{"plain", "network of one pod", true}
		}
		if r := s.Ranges(t.Context(), digest.FromString(fmt.Sprint(i)), from); r != nil {
			defer r.Close()
		}
	}
	for i := range 200 { // bytes of its own
		leave(t, s, Origin{"plain", "network of one pod", true}, random(uint64(760+i), 2*chunkSize), chunkSize)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.partials) > maxPartials || s.idle.Len() != len(s.partials) {
		t.Errorf("%d partials", len(s.partials))
	}
	for key, from := range there {
		if s.partials[key] == nil {
			t.Errorf("that of %s has gone", from.Name)
		}
	}
}

// Random stories: a blob comes in parts, from sources that break off, lie, or are silent
// until the store is closed or killed, and then is asked for again. What a reader is given is right,
// no byte that is there is asked for again, and nothing is left behind.
func TestResumeStories(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 7))
			dir := t.TempDir()
			want := random(seed+800, minPartial+r.IntN(5<<20))
			d := digest.FromBytes(want)
			from := Origin{Name: "a"}
			s := open(t, dir, Options{MaxBytes: 256 << 20})
			for range 12 {
				if s.Has(d) {
					break
				}
				tr, leader := s.Claim(d, from)
				if !leader {
					t.Fatal("another one leads")
				}
				first, to, size, ok := tr.Missing()
				if ok && (size != int64(len(want)) || first >= to || to > size) {
					t.Fatalf("missing is %d to %d of %d", first, to, size)
				}
				first, to = max(first, 0), max(to, int64(len(want))*map[bool]int64{true: 0, false: 1}[ok])
				lie := r.IntN(6) == 0
				sent := bytes.Clone(want)
				if lie {
					sent[first+r.Int64N(to-first)] ^= 1
				}
				var asked atomic.Int64
				cut := first + 1 + r.Int64N(to-first)
				src := &counting{from: io.MultiReader(bytes.NewReader(sent[first:cut]), iotest.ErrReader(errors.New("reset"))), n: &asked}
				if cut == to {
					src.from = bytes.NewReader(sent[first:cut])
				}
				var reader *Reader
				var err error
				if ok {
					reader, err = tr.Resume(Rest{Size: size, Body: src, First: first, To: to})
				} else {
					reader, err = tr.Begin(int64(len(want)), src, nil)
				}
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(reader)
				switch {
				case len(got) > len(want), err == nil && !bytes.Equal(got, want):
					t.Fatalf("%d bytes, not the blob's", len(got))
				case !lie && !bytes.Equal(got, want[:len(got)]) && first == 0:
					t.Fatal("wrong bytes, though the source is right")
				case asked.Load() > to-first:
					t.Fatalf("%d bytes were taken of %d", asked.Load(), to-first)
				}
				_ = reader.Ended(t.Context())
				reader.Close()
				switch r.IntN(5) {
				case 0:
					s.Close()
					s = open(t, dir, Options{MaxBytes: 256 << 20})
				case 1:
					killed := copyDir(t, dir)
					s.Close()
					dir, s = killed, open(t, killed, Options{MaxBytes: 256 << 20})
				}
			}
			if got, err := read(s, d); err == nil && !bytes.Equal(got, want) {
				t.Errorf("kept: %d bytes, %v", len(got), err)
			}
			st := s.Stats()
			left, bytesLeft := 1, st.Partial
			if s.Has(d) {
				left, bytesLeft = 3, int64(len(want))
			} else if st.Partial > 0 {
				left = 3 // the lock, the partial, and its record
			}
			if n := files(t, s.dir); n != left || st.Bytes != bytesLeft || s.promised != 0 {
				t.Errorf("%d files, want %d; %+v, promised %d", n, left, st, s.promised)
			}
		})
	}
}

// counting counts what is read of it.
type counting struct {
	from io.Reader
	n    *atomic.Int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.from.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func (c *counting) Close() error { return nil }

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"boot":"b","digest":"` + digest.FromString("x").String() + `","name":"r/a","size":10,"begun":"2026-01-02T03:04:05Z","have":[[0,3],[5,9]]}`))
	f.Add([]byte(`{"have":[[9,1]],"size":-1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, _, err := parseRecord(b)
		if err != nil {
			if !errors.Is(err, errRecord) {
				t.Fatal(err)
			}
			return
		}
		if p.key.digest.Validate() != nil || p.size <= 0 || !p.have.valid(p.size) || p.key.name != p.from.Name {
			t.Fatalf("%+v", p)
		}
		dir := t.TempDir()
		p.path = filepath.Join(dir, "x")
		if err := p.save(); err != nil {
			t.Skip(err) // a time that has no form
		}
		saved, err := os.ReadFile(p.path + recordSuffix)
		if err != nil {
			t.Fatal(err)
		}
		if q, _, err := parseRecord(saved); err != nil || fmt.Sprint(q.have) != fmt.Sprint(p.have) || q.key != p.key || q.from != p.from || q.size != p.size {
			t.Fatalf("%+v became %+v, %v", p, q, err)
		}
	})
}
