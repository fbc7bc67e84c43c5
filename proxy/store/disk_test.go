// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// freezable is a file system that writes hang on between freeze and thaw.
func freezable(t *testing.T) (dir string, freeze, thaw func()) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	dir = t.TempDir()
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v (needs root): %v\n%s", args, err, out)
		}
	}
	run("truncate", "-s", "256M", image)
	run("mkfs.ext4", "-q", "-F", image)
	run("mount", "-o", "loop", image, dir)
	var mu sync.Mutex
	frozen := false
	thaw = func() {
		mu.Lock()
		defer mu.Unlock()
		if frozen {
			frozen = false
			run("fsfreeze", "-u", dir)
		}
	}
	t.Cleanup(func() {
		thaw()
		run("umount", "-l", dir)
	})
	return dir, func() {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		run("fsfreeze", "-f", dir)
		frozen = true
		// The kernel doesn't end a process with a thread that waits for it.
		time.AfterFunc(time.Minute, thaw)
	}, thaw
}

// waitFor waits for what no event tells of.
func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within 30 s: " + what)
		}
	}
}

// The disk hangs while a blob arrives: whoever reads it gets all of it. What
// comes after that isn't kept, and waits for nothing. When the disk answers
// again, nothing is left behind, and blobs are kept again.
func TestDiskHangs(t *testing.T) {
	dir, freeze, thaw := freezable(t)
	s := open(t, dir, Options{})
	s.disk.timeout = diskTimeout
	kept := random(89, 300_000)
	keptDigest := put(t, s, kept)
	want := random(90, 20<<20)
	d := digest.FromBytes(want)
	pr, pw := io.Pipe()
	first := begin(t, s, d, int64(len(want)), pr, nil)
	tr, _ := s.Claim(d, Origin{})
	second, err := tr.Wait(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	held := random(91, 200_000)
	unverified, _ := s.Claim(digest.FromBytes(held), Origin{})
	hr, hw := io.Pipe()
	fromPeer, err := unverified.BeginUnverified(int64(len(held)), hr, nil, Unverified{Wrong: func() {}, Refetch: againFrom()})
	if err != nil {
		t.Fatal(err)
	}
	defer fromPeer.Close()
	_, _ = hw.Write(held[:100_000])
	pushed := random(92, 20<<20)
	up := s.NewUpload(Origin{})
	_, _ = up.Write(pushed[:1<<20])
	const before = 3 << 20
	if _, err := pw.Write(want[:before]); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, before-1)
	if _, err := io.ReadFull(first, got); err != nil {
		t.Fatal(err)
	}

	freeze()
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = pw.Write(want[before:]) })
	for r, from := range map[*Reader]int{first: before - 1, second: 0} {
		wg.Go(func() {
			defer r.Close()
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want[from:]) {
				t.Errorf("from %d: %d bytes, %v", from, len(got), err)
			}
		})
	}
	wg.Go(func() {
		for part := pushed[1<<20:]; len(part) > 0; part = part[min(len(part), 100_000):] {
			_, _ = up.Write(part[:min(len(part), 100_000)])
		}
	})
	wg.Go(func() {
		if err := fromPeer.WaitReadable(t.Context()); !errors.Is(err, ErrDiskHangs) {
			t.Error("of a peer's bytes, which can't be verified before they are given:", err)
		}
	})
	wg.Wait()
	fromPeer.Close()
	if err := up.Commit(digest.FromBytes(pushed)); err == nil {
		t.Error("a push is kept on a disk that hangs")
	}
	if since := s.Stats().Hangs; since.IsZero() {
		t.Error("it doesn't say that the disk hangs")
	}
	// A frozen file system can be read.
	if got, err := read(s, keptDigest); err != nil || !bytes.Equal(got, kept) {
		t.Errorf("what was kept before: %d bytes, %v", len(got), err)
	}
	if s.Has(d) {
		t.Error("kept on a disk that hangs")
	}
	goroutines := runtime.NumGoroutine()
	for i := range 100 {
		b := random(uint64(1000+i), 10)
		if err := s.Put(digest.FromBytes(b), b, Origin{}); !errors.Is(err, ErrDiskHangs) {
			t.Fatal(err)
		}
		tr, leader := s.Claim(d, Origin{})
		if !leader {
			t.Fatal("a transfer whose beginning may be gone is given to others")
		}
		if _, err := tr.Begin(10, body(b), nil); !errors.Is(err, ErrDiskHangs) {
			t.Fatal(err)
		}
		up := s.NewUpload(Origin{})
		_, _ = up.Write(b)
		up.Close()
		s.drop(keptDigest, ErrCorrupt)
	}
	if n := runtime.NumGoroutine(); n > goroutines+5 {
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}

	thaw()
	waitFor(t, "the disk answers", func() bool { return s.Stats().Hangs.IsZero() })
	waitFor(t, "nothing is left", func() bool { return files(t, dir) == 1 && s.pieces.lent.Load() == 0 })
	again := begin(t, s, d, int64(len(want)), body(want), nil)
	if got, err := io.ReadAll(again); err != nil || !bytes.Equal(got, want) || !s.Has(d) {
		t.Errorf("after that: %d bytes, %v, kept %v", len(got), err, s.Has(d))
	}
	if st := s.Stats(); st.Bytes != int64(len(want)) || st.NotKept != 0 || s.provisional != 0 || s.promised != 0 {
		t.Errorf("%+v, provisional %d, promised %d", st, s.provisional, s.promised)
	}
}

// gate holds up operations on a disk.
type gate struct {
	mu   sync.Mutex
	shut chan struct{}
}

func (g *gate) hold() {
	g.mu.Lock()
	shut := g.shut
	g.mu.Unlock()
	if shut != nil {
		<-shut
	}
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut != nil {
		close(g.shut)
		g.shut = nil
	}
}

// A disk that can't be read: what is on it isn't there, and is when it can be read
// again. Of a content store of others the same, and only of that.
func TestReadingHangs(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	own, others := new(gate), new(gate)
	defer own.open()
	defer others.open()
	s.reading.hold = own.hold
	mine, theirs := random(93, 3*chunkSize), random(94, 1000)
	d := put(t, s, mine)
	foreign := t.TempDir()
	dt := digest.FromBytes(theirs)
	if err := errors.Join(os.Mkdir(filepath.Join(foreign, "sha256"), 0o700), os.WriteFile(filepath.Join(foreign, "sha256", dt.Encoded()), theirs, 0o600)); err != nil {
		t.Fatal(err)
	}
	s.looking.Lock() // or it is looked at meanwhile
	s.AddForeign(foreign)
	s.foreign[0].timeout, s.foreign[0].hold = 100*time.Millisecond, others.hold
	s.looking.Unlock()

	opened, err := s.Get(d)
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	others.close()
	if _, err := s.Get(dt); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if !s.Has(d) || !s.Stats().Hangs.IsZero() {
		t.Error("a disk of others hangs, and the store's with it")
	}
	s.reading.timeout = 100 * time.Millisecond
	own.close()
	for range 100 {
		if _, err := s.Get(d); !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
	}
	// What the kernel has in memory of it may be read.
	if got, err := io.ReadAll(opened.Reader()); err == nil && !bytes.Equal(got, mine) || err != nil && !errors.Is(err, ErrDiskHangs) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if st := s.Stats(); st.Hangs.IsZero() || st.Blobs != 1 || st.Corrupt != 0 {
		t.Errorf("%+v", st)
	}
	own.open()
	others.open()
	for d, want := range map[digest.Digest][]byte{d: mine, dt: theirs} {
		waitFor(t, "it can be read", func() bool {
			got, err := read(s, d)
			return err == nil && bytes.Equal(got, want)
		})
	}
}

// An operation that succeeds when it isn't waited for any more is undone.
func TestLateOperation(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	g := new(gate)
	s.disk.timeout, s.disk.hold = 100*time.Millisecond, g.hold
	g.close()
	b := random(95, 1000)
	d := digest.FromBytes(b)
	if err := s.Put(d, b, Origin{}); !errors.Is(err, ErrDiskHangs) {
		t.Error(err)
	}
	g.open()
	waitFor(t, "the disk answers", func() bool { return s.Stats().Hangs.IsZero() })
	if n := files(t, s.dir); n != 1 || s.Has(d) || s.Stats().Bytes != 0 {
		t.Errorf("%d files, %+v", n, s.Stats())
	}
	s.disk.timeout = diskTimeout
	put(t, s, b)
}
