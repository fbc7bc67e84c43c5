// SPDX-License-Identifier: Apache-2.0

package store

import (
	"cmp"
	"math"
	"slices"
)

// span is a range of a blob's bytes: from one up to, and without, another.
type span struct{ from, to int64 }

// spans are ranges that don't touch each other, in order.
type spans []span

// at says whether the byte at off is in a range, and up to where that stays so:
// math.MaxInt64 if nothing follows.
func (s spans) at(off int64) (to int64, in bool) {
	i, _ := slices.BinarySearchFunc(s, off+1, func(e span, end int64) int { return cmp.Compare(e.to, end) })
	switch {
	case i == len(s):
		return math.MaxInt64, false
	case s[i].from <= off:
		return s[i].to, true
	}
	return s[i].from, false
}

// add returns the ranges with one more. It may change s.
func (s spans) add(from, to int64) spans {
	if from >= to {
		return s
	}
	i, _ := slices.BinarySearchFunc(s, from, func(e span, at int64) int { return cmp.Compare(e.to, at) })
	j := i
	for ; j < len(s) && s[j].from <= to; j++ {
		from, to = min(from, s[j].from), max(to, s[j].to)
	}
	return slices.Replace(s, i, j, span{from, to})
}

// bytes is how many are in the ranges.
func (s spans) bytes() (n int64) {
	for _, e := range s {
		n += e.to - e.from
	}
	return n
}

// valid says whether they are ranges of a blob of size bytes, as add makes them.
func (s spans) valid(size int64) bool {
	end := int64(-1)
	for _, e := range s {
		if e.from <= end || e.from >= e.to || e.to > size {
			return false
		}
		end = e.to
	}
	return true
}
