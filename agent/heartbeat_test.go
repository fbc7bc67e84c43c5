// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCrowded(t *testing.T) {
	if crowded() {
		t.Fatal("crowded from the start")
	}
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := openDescriptors(); err != nil || int(n) < len(names)-1 || int(n) > len(names)+1 {
		t.Errorf("%d descriptors (%v), the directory has %d", n, err, len(names))
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	for _, tt := range []struct {
		more uint64 // than are open
		want bool
	}{{0, true}, {1, true}, {4 * spareDescriptors, false}} {
		low := unix.Rlimit{Cur: uint64(len(names)) + tt.more, Max: limit.Max}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
			t.Fatal(err)
		}
		if got := crowded(); got != tt.want {
			t.Errorf("%d more than are open: crowded is %v", tt.more, got)
		}
	}
}
