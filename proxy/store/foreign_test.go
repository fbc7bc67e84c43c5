// SPDX-License-Identifier: Apache-2.0

package store

import (
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
)

// A random story of blobs that come to the store and to content stores of others, and
// leave those: what is held twice is what is in both, goes first when there is no room,
// and is read where it is left; and whoever is told of changes knows what can be had.
func TestHeldTwice(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		can := map[digest.Digest]bool{} // as it was told
		s := open(t, t.TempDir(), Options{MaxBytes: 200 << 10, Changed: func(d digest.Digest, here bool) {
			if can[d] = here; !here {
				delete(can, d)
			}
		}})
		dirs := []string{t.TempDir(), t.TempDir()}
		for _, dir := range dirs {
			if err := os.Mkdir(filepath.Join(dir, "sha256"), 0o700); err != nil {
				t.Fatal(err)
			}
			s.AddForeign(dir)
		}
		blobs := map[digest.Digest][]byte{}
		var all []digest.Digest
		for i := range uint64(40) {
			b := random(seed*100+i, 1+r.IntN(20<<10))
			blobs[digest.FromBytes(b)] = b
			all = append(all, digest.FromBytes(b))
		}
		in := func(dir string, d digest.Digest) bool {
			_, err := os.Stat(filepath.Join(dir, "sha256", d.Encoded()))
			return err == nil
		}
		kept := func() (own, twice map[digest.Digest]bool, bytes int64) {
			s.mu.Lock()
			defer s.mu.Unlock()
			own, twice = map[digest.Digest]bool{}, map[digest.Digest]bool{}
			for d := range s.index {
				if own[d] = true; in(dirs[0], d) || in(dirs[1], d) {
					twice[d] = true
					bytes += int64(len(blobs[d]))
				}
			}
			return own, twice, bytes
		}
		for step := range 150 {
			d, dir := all[r.IntN(len(all))], dirs[r.IntN(2)]
			path := filepath.Join(dir, "sha256", d.Encoded())
			switch r.IntN(5) {
			case 0:
				if err := os.WriteFile(path, blobs[d], 0o600); err != nil {
					t.Fatal(err)
				}
			case 1:
				_ = os.Remove(path)
			case 2:
				if r.IntN(10) == 0 {
					s.RemoveForeign(dir)
					s.AddForeign(dir)
				}
			default:
				s.lookAtForeign()
				before, _, _ := kept()
				if err := s.Put(d, blobs[d], Origin{}); err != nil {
					t.Fatal(err)
				}
				after, twice, _ := kept()
				for gone := range before {
					if !after[gone] && !in(dirs[0], gone) && !in(dirs[1], gone) && len(twice) > 0 && (len(twice) > 1 || !twice[d]) {
						t.Fatalf("seed %d, step %d: %s made room, and %d that others have did not", seed, step, gone, len(twice))
					}
				}
			}
			s.lookAtForeign()
			own, _, bytes := kept()
			if got := s.Stats().Duplicate; got != bytes {
				t.Fatalf("seed %d, step %d: %d bytes are held twice, and %d by the store", seed, step, bytes, got)
			}
			want := own
			for d := range blobs {
				if in(dirs[0], d) || in(dirs[1], d) {
					want[d] = true
				}
				if _, err := s.Get(d); (err == nil) != want[d] {
					t.Fatalf("seed %d, step %d: %s is to be had: %v, err %v", seed, step, d, want[d], err)
				}
			}
			s.mu.Lock()
			told := maps.Clone(can)
			s.mu.Unlock()
			if !maps.Equal(told, want) {
				t.Fatalf("seed %d, step %d: told of %d, there are %d", seed, step, len(told), len(want))
			}
		}
		s.Close()
	}
}
