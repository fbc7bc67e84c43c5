// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"testing"
)

func FuzzRangeFrom(f *testing.F) {
	f.Add("bytes=1-")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		if n, ok := rangeFrom(s); ok && n < 0 {
			t.Errorf("%q: %d", s, n)
		}
	})
}
