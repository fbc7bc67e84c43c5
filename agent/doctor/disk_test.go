// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A disk that hangs is waited for no longer than a moment.
func TestHangingDisk(t *testing.T) {
	fuse, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	dir, run := t.TempDir(), t.TempDir()
	// Nothing answers what the kernel asks of it.
	if err := unix.Mount("hangs", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The end of its server fails all that waits for it.
		if err := errors.Join(unix.Close(fuse), unix.Unmount(dir, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	d := &doctor{conf: Config{DataDir: filepath.Join(dir, "weir"), RunDir: run}}
	d.directories()
	d.clock()
	if len(d.findings) != 2 || !d.findings[0].Warning || !strings.Contains(d.findings[0].Problem, "does not answer") || d.findings[1].Problem != "" {
		t.Errorf("%+v", d.findings)
	}
}
