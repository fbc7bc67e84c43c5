// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
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
