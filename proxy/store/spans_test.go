// SPDX-License-Identifier: Apache-2.0

package store

import (
	"math"
	"math/rand/v2"
	"testing"
)

// mapped is which bytes are in ranges, one by one: what spans are compared with.
type mapped []bool

func (m mapped) at(off int64) (to int64, in bool) {
	in = off < int64(len(m)) && m[off]
	for to = off; to < int64(len(m)) && m[to] == in; to++ {
	}
	if !in && to == int64(len(m)) {
		to = math.MaxInt64
	}
	return to, in
}

// compareSpans adds ranges in order, and compares what is said of each byte.
func compareSpans(t *testing.T, size int, ranges []byte) {
	var s spans
	m := make(mapped, size)
	for len(ranges) >= 2 {
		from, to := int64(ranges[0])%int64(size+1), int64(ranges[1])%int64(size+1)
		ranges = ranges[2:]
		s = s.add(from, to)
		for i := from; i < to; i++ {
			m[i] = true
		}
		bytes := int64(0)
		for off := range int64(size) {
			gotTo, got := s.at(off)
			wantTo, want := m.at(off)
			if got != want || gotTo != wantTo {
				t.Fatalf("after %d-%d, at %d: %v to %d, want %v to %d: %v", from, to, off, got, gotTo, want, wantTo, s)
			}
			if want {
				bytes++
			}
		}
		if s.bytes() != bytes || !s.valid(int64(size)) {
			t.Fatalf("%v: %d bytes, want %d; valid: %v", s, s.bytes(), bytes, s.valid(int64(size)))
		}
	}
}

func TestSpans(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 500 {
		ranges := make([]byte, 2*(1+r.IntN(30)))
		for i := range ranges {
			ranges[i] = byte(r.Uint32())
		}
		compareSpans(t, 1+r.IntN(200), ranges)
	}
	for _, bad := range []spans{{{0, 0}}, {{3, 2}}, {{-1, 2}}, {{0, 2}, {2, 4}}, {{0, 2}, {1, 4}}, {{5, 6}, {1, 2}}, {{0, 11}}} {
		if bad.valid(10) {
			t.Errorf("%v is taken for ranges", bad)
		}
	}
}

func FuzzSpans(f *testing.F) {
	f.Add(uint8(100), []byte{0, 10, 10, 20, 50, 60, 5, 55})
	f.Fuzz(func(t *testing.T, size uint8, ranges []byte) {
		compareSpans(t, 1+int(size), ranges[:min(len(ranges), 60)])
	})
}
