// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"

	"golang.org/x/sys/unix"
)

// dir is an open directory (O_PATH). Names in it are single elements.
type dir struct {
	fd   int
	path string // below the root, for messages
}

func (d *dir) close() { unix.Close(d.fd) }

func (r *Root) openDir(name string) (*dir, error) {
	fd, err := r.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, &fs.PathError{Op: "open directory", Path: name, Err: err}
	}
	return &dir{fd: fd, path: name}, nil
}

// openParent opens the directory that name is in.
func (r *Root) openParent(name string) (parent *dir, base string, err error) {
	name = path.Clean("/" + name)
	if name == "/" {
		return nil, "", &fs.PathError{Op: "open directory", Path: name, Err: errors.New("the root has no name")}
	}
	parent, err = r.openDir(path.Dir(name))
	return parent, path.Base(name), err
}

// makeDir makes the directory name and those above it that are missing, with
// mode 0755 whatever the umask, and opens it. It returns the directories that it
// made, the topmost first, also when it fails.
func (r *Root) makeDir(name string) (_ *dir, made []string, err error) {
	name = path.Clean("/" + name)
	d, err := r.openDir(name)
	if err == nil || !errors.Is(err, fs.ErrNotExist) || name == "/" {
		return d, nil, err
	}
	parent, made, err := r.makeDir(path.Dir(name))
	if err != nil {
		return nil, made, err
	}
	defer parent.close()
	if err := parent.checkWritable(); err != nil {
		return nil, made, &fs.PathError{Op: "mkdir", Path: name, Err: err}
	}
	err = unix.Mkdirat(parent.fd, path.Base(name), 0o755)
	switch {
	case err == nil:
		made = append(made, name)
	case !errors.Is(err, unix.EEXIST):
		return nil, made, &fs.PathError{Op: "mkdir", Path: name, Err: err}
	}
	// Also after EEXIST, which may be another process that was faster. A symbolic link
	// that leads nowhere fails here.
	d, err = r.openDir(name)
	if err != nil {
		return nil, made, err
	}
	if len(made) > 0 && made[len(made)-1] == name {
		// The umask may have taken from the mode.
		if err := unix.Fchmodat(unix.AT_FDCWD, procFD(d.fd), 0o755, 0); err != nil {
			d.close()
			return nil, made, &fs.PathError{Op: "chmod", Path: name, Err: err}
		}
	}
	return d, made, nil
}

// checkWritable refuses the kernel's own file systems, where making a file or
// a directory means something: a cgroup, a mount, a program.
func (d *dir) checkWritable() error {
	var st unix.Statfs_t
	if err := retryEINTR(func() error { return unix.Fstatfs(d.fd, &st) }); err != nil {
		return err
	}
	switch st.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
		unix.BPF_FS_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, 0x62656570 /* configfs */ :
		return errors.New("on a file system of the kernel")
	}
	return nil
}

// names returns at most limit names in d.
func (d *dir) names(limit int) ([]string, error) {
	fd, err := openRetry(d.fd, ".", &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), d.path)
	defer f.Close()
	var all []string
	for len(all) < limit {
		names, err := f.Readdirnames(min(limit-len(all), 1024))
		all = append(all, names...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// stat does not follow symbolic links.
func (d *dir) stat(name string) (st unix.Stat_t, err error) {
	err = retryEINTR(func() error { return unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
	return st, err
}

// read reads a regular file in d, not following symbolic links.
func (d *dir) read(name string, limit int) ([]byte, error) {
	fd, err := openRetry(d.fd, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return readRegular(fd, limit)
}

func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// readRegular reads the file that handle, an O_PATH descriptor, stands for. Opening a
// device or a FIFO can block or do something, so it is known to be neither
// before it is opened.
func readRegular(handle, limit int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(handle, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("not a regular file")
	}
	if st.Size > int64(limit) {
		return nil, ErrTooLarge
	}
	// O_NONBLOCK: a lease of another process must not hold us up.
	fd, err := openRetry(unix.AT_FDCWD, procFD(handle), &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// One byte more than expected: the size may lie (/proc) or change.
	b := make([]byte, 0, st.Size+1)
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return b, nil
		}
		if b = b[:len(b)+n]; len(b) > limit {
			return nil, ErrTooLarge
		}
	}
}

// openRetry is openat2(2). EAGAIN says that something was renamed while ".."
// was resolved; a process that renames all the time gets the error.
func openRetry(at int, name string, how *unix.OpenHow) (fd int, err error) {
	for range 16 {
		fd, err = unix.Openat2(at, name, how)
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	return fd, err
}

func retryEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
