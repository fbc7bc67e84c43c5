// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"io"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
)

func TestStream(t *testing.T) {
	want := random(12, 100_000)
	d := digest.FromBytes(want)
	more := func(_ context.Context, off int64) (io.ReadCloser, error) { return body(want[off:]), nil }
	for name, tt := range map[string]struct {
		size int64
		body io.Reader
		more Source
		ok   bool
	}{
		"whole":            {100_000, bytes.NewReader(want), nil, true},
		"unknown size":     {-1, bytes.NewReader(want), nil, true},
		"byte by byte":     {100_000, iotest.OneByteReader(bytes.NewReader(want)), nil, true},
		"data with error":  {-1, iotest.DataErrReader(bytes.NewReader(want)), nil, true},
		"cut":              {100_000, bytes.NewReader(want[:50_000]), nil, false},
		"cut and reopened": {100_000, bytes.NewReader(want[:50_000]), more, true},
		"forged":           {100_000, bytes.NewReader(append([]byte{want[0] ^ 1}, want[1:]...)), more, false},
		"forged last":      {-1, bytes.NewReader(append(bytes.Clone(want[:99_999]), want[99_999]^1)), nil, false},
		"too long":         {100_000, io.MultiReader(bytes.NewReader(want[:99_000]), bytes.NewReader(want)), nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := NewStream(t.Context(), d, tt.size, io.NopCloser(tt.body), tt.more)
			defer s.Close()
			got, err := io.ReadAll(s)
			if tt.ok && (err != nil || !bytes.Equal(got, want)) {
				t.Errorf("%d bytes, err %v", len(got), err)
			}
			if !tt.ok && (err == nil || len(got) >= len(want)) {
				t.Errorf("%d bytes, err %v", len(got), err)
			}
		})
	}
	if err := iotest.TestReader(struct{ io.Reader }{NewStream(t.Context(), d, -1, body(want), nil)}, want); err != nil {
		t.Error(err)
	}
}
