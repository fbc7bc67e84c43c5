// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
)

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

func FuzzSums(f *testing.F) {
	for _, n := range []int{0, 1, chunkSize, chunkSize + 1} {
		s := new(sums)
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
