// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"io"
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
