// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("WEIR_TEST_CRASH"); dir != "" {
		crash(dir)
	}
	os.Exit(m.Run())
}

func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

func open(t *testing.T, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	// A machine that is busy is no disk that hangs.
	s.disk.timeout, s.reading.timeout = time.Minute, time.Minute
	return s
}

func put(t *testing.T, s *Store, b []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(b)
	if err := s.Put(d, b, Origin{}); err != nil {
		t.Fatal(err)
	}
	return d
}

func read(s *Store, d digest.Digest) ([]byte, error) {
	b, err := s.Get(d)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	return io.ReadAll(b.Reader())
}

func body(b []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(b)) }

// begin claims a blob and starts its transfer.
func begin(t *testing.T, s *Store, d digest.Digest, size int64, from io.ReadCloser, more Source) *Reader {
	t.Helper()
	tr, leader := s.Claim(d, Origin{})
	if !leader {
		t.Fatal("another one leads")
	}
	r, err := tr.Begin(size, from, more)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func files(t *testing.T, dir string) (n int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestPutGet(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	for _, n := range []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, 3*chunkSize + 7} {
		want := random(1, n)
		got, err := read(s, put(t, s, want))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: not the same, err %v", n, err)
		}
	}
	big := random(2, 900<<10)
	d512 := digest.SHA512.FromBytes(big)
	if err := s.Put(d512, big, Origin{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(d512, big[1:], Origin{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("other bytes for a digest: %v", err)
	}
	if _, err := s.Get(digest.FromString("not kept")); !errors.Is(err, ErrNotFound) {
		t.Errorf("missing blob: %v", err)
	}
	for _, bad := range []digest.Digest{"", "sha256:../../etc/passwd", "sha256:ABC", "md5:d41d8cd98f00b204e9800998ecf8427e", "sha256"} {
		if _, err := s.Get(bad); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("Get(%q) = %v, want it refused", bad, err)
		}
	}

	before := s.Stats()
	s.Close()
	s = open(t, dir, Options{})
	if after := s.Stats(); after != before {
		t.Errorf("reopened: %+v, was %+v", after, before)
	}
	if got, err := read(s, d512); err != nil || !bytes.Equal(got, big) {
		t.Errorf("reopened: sha512 blob differs, err %v", err)
	}
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("second Open: %v", err)
	}
}

// Only the store's own user can read it, whatever the umask.
func TestPermissions(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	dir := filepath.Join(t.TempDir(), "store")
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	arriving, leader := s.Claim(digest.FromString("arriving"), Origin{})
	if !leader {
		t.Fatal("it is locked")
	}
	in, out := io.Pipe()
	defer out.Close()
	r, err := arriving.Begin(100, in, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	pushed := []byte("pushed")
	up := s.NewUpload(Origin{})
	_, _ = up.Write(pushed)
	if err := errors.Join(up.Commit(digest.FromBytes(pushed)), s.Put(digest.SHA512.FromString("put"), []byte("put"), Origin{})); err != nil {
		t.Fatal(err)
	}
	files := 0
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if !e.IsDir() {
			files++
		}
		return err
	})
	if err != nil || files != 6 { // two blobs, their checksums, what arrives, the lock
		t.Errorf("%d files, %v", files, err)
	}
}

// What passes by is kept as what it is, whatever it is called.
func TestUpload(t *testing.T) {
	is := []byte("what passes by")
	for name, c := range map[string]struct {
		d    digest.Digest
		kept bool
	}{
		"its digest":                   {digest.FromBytes(is), true},
		"another of its digests":       {digest.SHA512.FromBytes(is), true},
		"a third":                      {digest.SHA384.FromBytes(is), true},
		"another blob's":               {digest.FromString("another"), false},
		"another blob's, of 512":       {digest.SHA512.FromString("another"), false},
		"that of nothing":              {digest.FromString(""), false},
		"its digest in capitals":       {digest.Digest("sha256:" + strings.ToUpper(digest.FromBytes(is).Encoded())), false},
		"of an algorithm of its own":   {digest.Digest("md5:d41d8cd98f00b204e9800998ecf8427e"), false},
		"with a path in the algorithm": {digest.Digest("../sha256:" + digest.FromBytes(is).Encoded()), false},
		"with a path":                  {digest.Digest("sha256:../../../../etc/passwd"), false},
		"none":                         {"", false},
	} {
		s := open(t, t.TempDir(), Options{})
		up := s.NewUpload(Origin{})
		_, _ = up.Write(is[:5])
		_, _ = up.Write(is[5:])
		err := up.Commit(c.d)
		b, gerr := s.Get(c.d)
		if (err == nil) != c.kept || (gerr == nil) != c.kept {
			t.Errorf("%s: %v, %v", name, err, gerr)
		}
		if gerr == nil {
			b.Close()
		}
		// The same in one piece.
		if err := s.Put(c.d, is, Origin{}); (err == nil) != c.kept {
			t.Errorf("%s, put: %v", name, err)
		}
		if st := s.Stats(); !c.kept && (st.Blobs != 0 || st.Bytes != 0) {
			t.Errorf("%s: %+v", name, st)
		}
	}
}

func TestSeek(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := random(3, 2*chunkSize+100)
	b, err := s.Get(put(t, s, want))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	r := b.Reader()
	for _, off := range []int64{chunkSize + 5, 0, int64(len(want)) - 1, chunkSize - 1, int64(len(want))} {
		if _, err := r.Seek(off, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, want[off:]) {
			t.Errorf("from %d: not the same, err %v", off, err)
		}
	}
	if err := iotest.TestReader(b.Reader(), want); err != nil {
		t.Error(err)
	}
}

// A damaged file is noticed at the damaged place, dropped, and can come again.
func TestDamage(t *testing.T) {
	want := random(4, 3*chunkSize)
	d := digest.FromBytes(want)
	path := func(dir string) string { return filepath.Join(dir, "blobs", "sha256", d.Encoded()) }
	sums := func(dir string) string { return filepath.Join(dir, "sums", "sha256", d.Encoded()) }
	flip := func(t *testing.T, p string, off int64) {
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var b [1]byte
		if _, err := f.ReadAt(b[:], off); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x40
		if _, err := f.WriteAt(b[:], off); err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct {
		damage func(t *testing.T, dir string)
		good   int // bytes that come before the error
		whole  bool
	}{
		"bit":                 {func(t *testing.T, dir string) { flip(t, path(dir), 2*chunkSize+9) }, 2 * chunkSize, false},
		"shorter":             {func(t *testing.T, dir string) { os.Truncate(path(dir), 100) }, 0, false},
		"gone":                {func(t *testing.T, dir string) { os.Remove(path(dir)) }, 0, false},
		"sums gone":           {func(t *testing.T, dir string) { os.Remove(sums(dir)) }, len(want), true},
		"sums damaged":        {func(t *testing.T, dir string) { flip(t, sums(dir), 20) }, len(want), true},
		"sums gone and bit":   {func(t *testing.T, dir string) { os.Remove(sums(dir)); flip(t, path(dir), 5) }, 0, false},
		"zeros after a crash": {func(t *testing.T, dir string) { os.WriteFile(path(dir), make([]byte, len(want)), 0o600) }, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, Options{})
			put(t, s, want)
			tt.damage(t, dir)
			got, err := read(s, d)
			if !bytes.Equal(got, want[:tt.good]) {
				t.Errorf("%d bytes came, want the first %d", len(got), tt.good)
			}
			if tt.whole {
				if err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(sums(dir)); err != nil {
					t.Error("the checksums were not made again:", err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			if s.Has(d) || s.Stats().Bytes != 0 {
				t.Errorf("still there: %+v", s.Stats())
			}
			put(t, s, want)
			if got, err := read(s, d); err != nil || !bytes.Equal(got, want) {
				t.Error("fetched again, but not the same:", err)
			}
		})
	}
}

func TestEviction(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{MaxBytes: 10_000})
	var ds []digest.Digest
	for i := range 10 {
		ds = append(ds, put(t, s, random(uint64(100+i), 1000)))
	}
	held, err := s.Get(ds[0]) // used: no longer the oldest
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	put(t, s, random(200, 2500)) // three must go
	for i, d := range ds {
		if want := i == 0 || i > 3; s.Has(d) != want {
			t.Errorf("blob %d there: %v, want %v", i, !want, want)
		}
	}
	if st := s.Stats(); st.Evicted != 3 || st.Bytes > st.MaxBytes {
		t.Errorf("%+v", st)
	}
	put(t, s, random(201, 9900)) // everything else must go, also what is being read
	if got, err := io.ReadAll(held.Reader()); err != nil || !bytes.Equal(got, random(100, 1000)) {
		t.Error("a blob that was open when it was evicted can't be read:", err)
	}
	big := random(202, 10_001)
	if err := s.Put(digest.FromBytes(big), big, Origin{}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("larger than the store: %v", err)
	}
	if got := files(t, dir); got != 3 { // blob, sums, lock
		t.Errorf("%d files left", got)
	}
	s.Close()
	s = open(t, dir, Options{MaxBytes: 5000})
	if st := s.Stats(); st.Blobs != 0 || st.Bytes != 0 {
		t.Errorf("reopened with a smaller bound: %+v", st)
	}
}

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

func TestForeign(t *testing.T) {
	dir := t.TempDir()
	s := open(t, t.TempDir(), Options{})
	want := random(10, 2*chunkSize)
	d := digest.FromBytes(want)
	path := filepath.Join(dir, "sha256", d.Encoded())
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	s.AddForeign(dir)
	if s.Has(d) {
		t.Fatal("there before it is")
	}
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time with remembered checksums
		got, err := read(s, d)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatal("not the same:", err)
		}
	}
	bad := bytes.Clone(want)
	bad[len(bad)-1] ^= 1
	if err := os.WriteFile(path, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := read(s, d); !errors.Is(err, ErrCorrupt) || len(got) != 0 {
		t.Errorf("damaged: %d bytes, err %v", len(got), err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error("a file that isn't ours was touched:", err)
	}
	os.Remove(path)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if s.Has(d) {
		t.Error("a FIFO is taken for a blob")
	}
	s.RemoveForeign(dir)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	_ = os.WriteFile(path, want, 0o600)
	if s.Has(d) {
		t.Error("read from a removed directory")
	}
}

// smallDisk is a file system of n bytes.
func smallDisk(t *testing.T, n int) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", n)); err != nil {
		t.Fatal("mounting a small tmpfs (needs root):", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestDiskFull(t *testing.T) {
	dir := smallDisk(t, 2<<20)
	s := open(t, dir, Options{})
	want := random(11, 3<<20)
	d := digest.FromBytes(want)
	tr, _ := s.Claim(d, Origin{})
	if _, err := tr.Begin(int64(len(want)), body(want), nil); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("begin on a full disk: %v", err)
	}
	st := NewStream(t.Context(), d, int64(len(want)), body(want), nil)
	if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, want) {
		t.Error("streamed, but not the same:", err)
	}

	// Of unknown size: the disk is full in the middle.
	r := begin(t, s, d, -1, body(want), nil)
	got, err := io.ReadAll(r)
	if err == nil || len(got) == 0 {
		t.Fatalf("%d bytes on a disk too small, err %v", len(got), err)
	}
	r.With(t.Context(), Failover{Own: func(_ context.Context, off int64) (io.ReadCloser, error) { return body(want[off:]), nil }})
	tail, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(append(got, tail...), want) {
		t.Error("continued, but not the same:", err)
	}
	r.Close()
	if st := s.Stats(); st.Bytes != 0 || st.Blobs != 0 || files(t, dir) != 1 {
		t.Errorf("left behind: %+v, %d files", st, files(t, dir))
	}
}

func TestMinFree(t *testing.T) {
	dir := smallDisk(t, 4<<20)
	s := open(t, dir, Options{MinFree: 2 << 20})
	var last digest.Digest
	for i := range 20 {
		last = put(t, s, random(uint64(300+i), 300<<10))
	}
	if st := s.Stats(); st.Bytes > 2<<20 || st.Evicted == 0 || !s.Has(last) {
		t.Errorf("%+v", st)
	}
}

func TestStream(t *testing.T) {
	want := random(12, 100_000)
	d := digest.FromBytes(want)
	more := func(_ context.Context, off int64) (io.ReadCloser, error) { return body(want[off:]), nil }
	for name, tt := range map[string]struct {
		size int64
		body io.Reader
		more Source
		ok   bool
	}{
		"whole":            {100_000, bytes.NewReader(want), nil, true},
		"unknown size":     {-1, bytes.NewReader(want), nil, true},
		"byte by byte":     {100_000, iotest.OneByteReader(bytes.NewReader(want)), nil, true},
		"data with error":  {-1, iotest.DataErrReader(bytes.NewReader(want)), nil, true},
		"cut":              {100_000, bytes.NewReader(want[:50_000]), nil, false},
		"cut and reopened": {100_000, bytes.NewReader(want[:50_000]), more, true},
		"forged":           {100_000, bytes.NewReader(append([]byte{want[0] ^ 1}, want[1:]...)), more, false},
		"forged last":      {-1, bytes.NewReader(append(bytes.Clone(want[:99_999]), want[99_999]^1)), nil, false},
		"too long":         {100_000, io.MultiReader(bytes.NewReader(want[:99_000]), bytes.NewReader(want)), nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := NewStream(t.Context(), d, tt.size, io.NopCloser(tt.body), tt.more)
			defer s.Close()
			got, err := io.ReadAll(s)
			if tt.ok && (err != nil || !bytes.Equal(got, want)) {
				t.Errorf("%d bytes, err %v", len(got), err)
			}
			if !tt.ok && (err == nil || len(got) >= len(want)) {
				t.Errorf("%d bytes, err %v", len(got), err)
			}
		})
	}
	if err := iotest.TestReader(struct{ io.Reader }{NewStream(t.Context(), d, -1, body(want), nil)}, want); err != nil {
		t.Error(err)
	}
}

// crash is the process that TestKill kills: it keeps blobs as fast as it can,
// all ways at once.
func crash(dir string) {
	s, err := Open(dir, Options{MaxBytes: 8 << 20})
	if err != nil {
		panic(err)
	}
	fmt.Println("open")
	var wg sync.WaitGroup
	for w := range uint64(4) {
		wg.Go(func() {
			for i := uint64(0); ; i++ {
				b := random(w<<4+i%16, int(1+i*7919%(700<<10)))
				d := digest.FromBytes(b)
				if w == 0 {
					_ = s.Put(d, b, Origin{})
					continue
				}
				if tr, leader := s.Claim(d, Origin{}); leader {
					if r, err := tr.Begin(int64(len(b)), body(b), nil); err == nil {
						_, _ = io.Copy(io.Discard, r)
						r.Close()
					}
				}
			}
		})
	}
	wg.Wait()
}

// However a process ends, the next one finds no half blob and no litter.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	for i := range 15 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "WEIR_TEST_CRASH="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(60 * time.Millisecond)) // killed at any moment: that is the test
		_ = cmd.Process.Kill()
		_ = cmd.Wait()

		s, err := Open(dir, Options{MaxBytes: 8 << 20})
		if err != nil {
			t.Fatal(err)
		}
		if n := files(t, filepath.Join(dir, "ingest")); n != 0 {
			t.Errorf("run %d: %d temporary files left", i, n)
		}
		for d := range s.index {
			got, err := os.ReadFile(s.blobPath(d))
			if err != nil || digest.FromBytes(got) != d {
				t.Errorf("run %d: %s is kept and wrong: %v", i, d, err)
			}
			if _, err := read(s, d); err != nil {
				t.Errorf("run %d: %v", i, err)
			}
		}
		s.Close()
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

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "17": 17, "5B": 5, "2KiB": 2048, "20GiB": 20 << 30, "3MB": 3e6, "1TiB": 1 << 40} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "GiB", "-1", "1.5GiB", "1 GiB", "10PiB", "9999999999TiB", "0x10", "1e3"} {
		if got, err := ParseSize(text); err == nil || !strings.Contains(err.Error(), "20GiB") {
			t.Errorf("ParseSize(%q) = %d, %v", text, got, err)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	f.Add("20GiB")
	f.Add("9223372036854775807B")
	f.Add("+1KB")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := ParseSize(text)
		if err == nil && (n < 0 || n > 1<<62) {
			t.Errorf("%q is %d", text, n)
		}
	})
}

func FuzzSums(f *testing.F) {
	for _, n := range []int{0, 1, chunkSize, chunkSize + 1} {
		s := newSums()
		_, _ = s.Write(random(14, n))
		f.Add(s.marshal())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSums(b)
		if err == nil && !bytes.Equal(s.marshal(), b) {
			t.Error("not the file that was read")
		}
	})
}

func BenchmarkRead(b *testing.B) {
	s, err := Open(b.TempDir(), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data := random(15, 64<<20)
	d := digest.FromBytes(data)
	if err := s.Put(d, data, Origin{}); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		blob, err := s.Get(d)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, blob.Reader()); err != nil {
			b.Fatal(err)
		}
		blob.Close()
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
	}{
		{"right", right, againFrom(), false},
		{"wrong", wrong, againFrom(right), false},
		{"wrong twice", wrong, againFrom(wrong, right), false},
		{"longer", append(bytes.Clone(wrong), wrong...), againFrom(right), false},
		{"shorter", wrong[:1000], againFrom(right), false},
		{"never right", wrong, againFrom(wrong, wrong), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			kept := make(map[digest.Digest]bool)
			s := open(t, t.TempDir(), Options{MaxBytes: 10 << 20, Changed: func(d digest.Digest, is bool) { kept[d] = is }})
			tr, _ := s.Claim(d, Origin{})
			ended := make(chan bool, 1)
			tr.OnEnd(func(kept bool) { ended <- kept })
			// The last byte comes only when a reader waits.
			pr, pw := io.Pipe()
			r, err := tr.BeginUnverified(int64(len(tt.first)), pr, nil, tt.again)
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
