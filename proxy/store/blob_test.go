// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
)

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

// A blob of one chunk that was read is in memory until the store has it no more: it
// takes no file to read it again. One that was damaged before is not.
func TestHot(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	for _, n := range []int{0, 1, 1000, chunkSize, chunkSize + 1} {
		want := random(uint64(n), n)
		d := put(t, s, want)
		first, err := read(s, d)
		if err != nil || !bytes.Equal(first, want) {
			t.Fatal(n, err)
		}
		clear(first) // the reader's own
		if err := os.Remove(s.blobPath(d)); err != nil {
			t.Fatal(err)
		}
		again, err := read(s, d)
		if hot := n > 0 && n <= chunkSize; hot != (err == nil) || hot && !bytes.Equal(again, want) {
			t.Errorf("%d bytes, the file gone: %d bytes, err %v", n, len(again), err)
		}
		s.drop(d, ErrNotFound)
		if _, err := s.Get(d); !errors.Is(err, ErrNotFound) {
			t.Errorf("%d bytes, dropped: err %v", n, err)
		}
	}
	b, err := s.Get(put(t, s, random(1, 1000)))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := os.WriteFile(s.blobPath(b.digest), random(2, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(b.Reader()); !errors.Is(err, ErrCorrupt) {
		t.Errorf("damaged: err %v", err)
	}
	if _, err := s.Get(b.digest); !errors.Is(err, ErrNotFound) {
		t.Errorf("dropped as damaged: err %v", err)
	}
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
