// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// A blob is read while it arrives, and from the store afterwards.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	s, err := store.Open(dir, store.Options{MaxBytes: 1 << 30})
	if err != nil {
		panic(err)
	}
	defer s.Close()

	const layer = "what the registry sends"
	d := digest.FromString(layer)
	t, leader := s.Claim(d, store.Origin{Name: "docker.io/library/debian"})
	if !leader {
		panic("another client's transfer is running: Wait for it")
	}
	ended := make(chan bool, 1)
	t.OnEnd(func(kept bool) { ended <- kept })
	r, err := t.Begin(int64(len(layer)), io.NopCloser(strings.NewReader(layer)), nil)
	if err != nil {
		panic(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	fmt.Printf("%s, %v\n", b, err)
	fmt.Println("kept:", <-ended)

	blob, err := s.Get(d)
	if err != nil {
		panic(err)
	}
	b, err = io.ReadAll(blob.Reader())
	fmt.Printf("%s, %v\n", b, err)
	// Output:
	// what the registry sends, <nil>
	// kept: true
	// what the registry sends, <nil>
}
