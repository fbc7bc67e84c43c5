// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// diskTime bounds how long a disk is waited for.
const diskTime = 2 * time.Second

// within returns what f returns, and whether it did so in time. A system call on a
// disk that hangs can't be ended: it is left behind.
func within[T any](f func() T) (v T, ok bool) {
	done := make(chan T, 1)
	go func() { done <- f() }()
	select {
	case v = <-done:
		return v, true
	case <-time.After(diskTime):
		return v, false
	}
}

func (d *doctor) directories() {
	for _, dir := range []struct{ flag, path string }{{"--data-dir", d.conf.DataDir}, {"--run-dir", d.conf.RunDir}} {
		what, store := dir.flag+" "+dir.path, dir.flag == "--data-dir"
		found, ok := within(func() *Finding { return directory(dir.path, store) })
		switch {
		case !ok && store:
			d.hangs = true
			d.warn(what, "its disk does not answer: blobs are served and pushed through without being kept",
				"look at the disk and the kernel's log (dmesg), or choose another directory with --data-dir")
		case !ok:
			d.problem(what, "its disk does not answer", "look at the disk and the kernel's log (dmesg), or choose another directory with "+dir.flag)
		case found == nil:
			d.ok(what)
		default:
			found.What = what
			if found.Step == "" {
				found.Step = "choose a writable directory with " + dir.flag
			}
			d.findings = append(d.findings, *found)
		}
	}
}

// directory says what is wrong with a directory, of the store or not, if anything.
func directory(path string, store bool) *Finding {
	if err := writable(path); err != nil {
		return &Finding{Problem: err.Error()}
	}
	if store {
		if problem, step := disk(path); problem != "" {
			return &Finding{Problem: problem, Step: step, Warning: true}
		}
	}
	return nil
}

// disk says what is wrong with the file system of the store.
func disk(dir string) (problem, step string) {
	const other = "choose another directory with --data-dir"
	var st unix.Statfs_t
	for unix.Statfs(dir, &st) != nil {
		if dir == filepath.Dir(dir) {
			return "", ""
		}
		dir = filepath.Dir(dir)
	}
	switch st.Type {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC:
		return "it is on a network's file system, from where blobs come no faster than from a registry nearby", other
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "it is in a container's own file system, and goes with it", "mount a directory of the node there: docker run -v /var/lib/weir:/var/lib/weir"
	}
	if st.Bavail < st.Blocks/20 {
		return fmt.Sprintf("only %d MiB are free; weir keeps nothing when less than 5%% of a file system is", int64(st.Bavail)*st.Bsize>>20),
			"free some space, or " + other
	}
	if st.Files > 0 && st.Ffree < st.Files/100 {
		return fmt.Sprintf("only %d inodes are free, of %d", st.Ffree, st.Files), "remove files there, or " + other
	}
	return "", ""
}

// writable says whether files can be made in dir or, if it isn't there, in the
// next directory above it that is.
func writable(dir string) error {
	for {
		st, err := os.Stat(dir)
		if errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
			dir = filepath.Dir(dir)
			continue
		}
		if err != nil {
			return err
		}
		if !st.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
		if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
			return fmt.Errorf("%s can't be written to: %w", dir, err)
		}
		return nil
	}
}
