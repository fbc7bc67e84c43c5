// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxNames bounds what is read of a directory that others fill.
const maxNames = 1 << 16

// ErrTooLarge is returned by [Root.ReadFile] and [Root.ReadDir] for what is
// larger than the caller or the package allows.
var ErrTooLarge = errors.New("too large")

// Root is the root directory of a process, or another directory that is taken
// for one, held open. It stays the same directory when the process is gone, but
// what was mounted below it goes with the last process of the mount namespace.
//
// Paths are names below it, with or without a leading slash. The kernel
// resolves them as if the caller were chrooted there (openat2(2),
// RESOLVE_IN_ROOT), so no symbolic link leads out of it, and neither do the
// links of /proc. What is found there belongs to others: devices and FIFOs are
// never opened. A file system in user space, mounted there, can still make a
// call wait for as long as it likes.
//
// Methods may be called concurrently.
type Root struct {
	f  *os.File // O_PATH
	id RootID

	noTmpfile bool // for tests: as on a file system without O_TMPFILE
}

// RootID identifies what processes see below their root: equal for two
// processes with the same root directory in the same mount namespace.
type RootID struct {
	Dev, Ino uint64
	Mount    uint64
}

// OpenRoot opens the root directory of the process pid, as that process sees
// it. The caller closes it. The error is [fs.ErrNotExist] if there is no such
// process.
func OpenRoot(pid int) (*Root, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("open root of process %d: not a process id", pid)
	}
	return OpenRootDir("/proc/" + strconv.Itoa(pid) + "/root")
}

// LastingRoots are the root file systems that outlive their runtimes: this
// process's own and that of the node's first process. Each is named by where it
// can be opened.
func LastingRoots() map[RootID]string {
	m := make(map[RootID]string)
	for _, name := range []string{"/proc/1/root", "/"} {
		if r, err := OpenRootDir(name); err == nil {
			m[r.ID()] = name
			r.Close()
		}
	}
	return m
}

// OpenRootDir opens a directory as a root. The caller closes it.
func OpenRootDir(dir string) (*Root, error) {
	fd, err := openRetry(unix.AT_FDCWD, dir, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC})
	if err != nil {
		return nil, fmt.Errorf("open root %s: %w", dir, err)
	}
	var st unix.Statx_t
	// STATX_MNT_ID_UNIQUE (Linux 6.8) is never used again after an unmount.
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_MNT_ID|unix.STATX_MNT_ID_UNIQUE, &st)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("stat root %s: %w", dir, err)
	}
	return &Root{
		f:  os.NewFile(uintptr(fd), dir),
		id: RootID{Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino, Mount: st.Mnt_id},
	}, nil
}

// Close releases the directory.
func (r *Root) Close() error { return r.f.Close() }

// ID tells whether two processes see the same files. It is comparable.
func (r *Root) ID() RootID { return r.id }

// Same reports whether the directory name is the same one below both roots.
func (r *Root) Same(other *Root, name string) bool {
	var st [2]unix.Stat_t
	for i, root := range []*Root{r, other} {
		d, err := root.openDir(name)
		if err != nil {
			return false
		}
		st[i], err = d.stat(".")
		d.close()
		if err != nil {
			return false
		}
	}
	return st[0].Dev == st[1].Dev && st[0].Ino == st[1].Ino
}

// Exists reports whether name exists, following symbolic links. It is an error
// if that can't be told.
func (r *Root) Exists(name string) (bool, error) {
	fd, err := r.open(name, unix.O_PATH)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	unix.Close(fd)
	return true, nil
}

// size returns the size of the regular file name, following symbolic links.
func (r *Root) size(name string) (int64, error) {
	fd, err := r.open(name, unix.O_PATH)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, errors.New("not a regular file")
	}
	return st.Size, nil
}

// fileID identifies the file name, following symbolic links.
func (r *Root) fileID(name string) (FileID, error) {
	fd, err := r.open(name, unix.O_PATH)
	if err != nil {
		return FileID{}, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_CTIME|unix.STATX_BTIME, &st); err != nil {
		return FileID{}, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	id := FileID{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino, born: st.Btime}
	if st.Mask&unix.STATX_BTIME == 0 { // NFS, say: an inode may be used again
		id.born = st.Ctime
	}
	return id, nil
}

// ReadFile returns the content of the regular file name, following symbolic
// links. It fails with [ErrTooLarge] if that is more than limit bytes.
func (r *Root) ReadFile(name string, limit int) ([]byte, error) {
	fd, err := r.open(name, unix.O_PATH)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	b, err := readRegular(fd, limit)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return b, nil
}

// ReadDir returns the names in the directory name, in no order. It fails with
// [ErrTooLarge] if there are more than 65536.
func (r *Root) ReadDir(name string) ([]string, error) {
	d, err := r.openDir(name)
	if err != nil {
		return nil, err
	}
	defer d.close()
	names, err := d.names(maxNames + 1)
	if err == nil && len(names) > maxNames {
		err = ErrTooLarge
	}
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	return names, nil
}

// RemoveDirIfEmpty removes the directory name if nothing is in it, and reports
// whether it did. A directory that is not there is no error.
func (r *Root) RemoveDirIfEmpty(name string) (bool, error) {
	parent, base, err := r.openParent(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer parent.close()
	err = unix.Unlinkat(parent.fd, base, unix.AT_REMOVEDIR)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOENT):
		return false, nil
	}
	return false, &fs.PathError{Op: "rmdir", Path: name, Err: err}
}

// DialUnix connects to the unix stream socket name, following symbolic links.
// The socket is reached wherever it is mounted, whatever the length of its
// path and the network namespace of its server.
func (r *Root) DialUnix(ctx context.Context, name string) (net.Conn, error) {
	fd, err := r.open(name, unix.O_PATH)
	if err != nil {
		return nil, &fs.PathError{Op: "dial", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &fs.PathError{Op: "dial", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, &fs.PathError{Op: "dial", Path: name, Err: errors.New("not a socket")}
	}
	// The kernel follows the descriptor's link to this very inode.
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", procFD(fd))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", name, err)
	}
	return c, nil
}

// open resolves name below the root. flags get O_CLOEXEC.
func (r *Root) open(name string, flags int) (int, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return -1, unix.EINVAL
	}
	rc, err := r.f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	// Control keeps the root open while it is used, also if it is closed just
	// now: its number must not come to mean another directory.
	cerr := rc.Control(func(root uintptr) {
		fd, err = openRetry(int(root), name, &unix.OpenHow{
			Flags:   uint64(flags) | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
	})
	if cerr != nil {
		return -1, fs.ErrClosed
	}
	return fd, err
}
