// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"

	"golang.org/x/sys/unix"
)

// spareDescriptors are kept for the connections that the agent has by then, and
// those that still come until the kernel side knows: each may need some, to the
// registry and for the blob's file.
const spareDescriptors = 256

// crowded says that the agent has few descriptors left. A connection that is
// redirected to it then could neither be accepted nor passed through.
func crowded() bool {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return false
	}
	open, err := openDescriptors()
	return err != nil || open+min(spareDescriptors, limit.Cur/2) > limit.Cur
}

// openDescriptors counts those of this process. The error is that there is none
// left to do so with.
func openDescriptors() (uint64, error) {
	const dir = "/proc/self/fd"
	if st, err := os.Stat(dir); err == nil && st.Size() > 0 {
		return uint64(st.Size()), nil // since Linux 6.2
	}
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	return uint64(len(names)), err
}
