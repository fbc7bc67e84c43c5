// SPDX-License-Identifier: Apache-2.0

package store

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

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
