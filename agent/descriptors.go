// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"github.com/prometheus/procfs"
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
	self, err := procfs.Self()
	if err != nil {
		return 0, err
	}
	n, err := self.FileDescriptorsLen()
	return uint64(n), err
}
