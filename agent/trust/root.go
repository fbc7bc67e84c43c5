// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// asidePrefix begins the names of files that are not yet in place. No
	// runtime takes such a name for a certificate of a registry.
	asidePrefix = ".weir-ca-"

	// maxNames bounds what is read of a directory that others fill.
	maxNames = 1 << 16
)

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

// MkdirAll makes the directory name and those above it that are missing, with
// mode 0755 whatever the umask. It returns the directories that it made, the
// topmost first, also when it fails.
func (r *Root) MkdirAll(name string) (made []string, err error) {
	d, made, err := r.makeDir(name)
	if err != nil {
		return made, err
	}
	d.close()
	return made, nil
}

// WriteFile makes the file name hold b, replacing what has that name. It
// follows symbolic links to the directory but not the file's own. No reader
// sees the file with only a part of b.
func (r *Root) WriteFile(name string, b []byte, perm fs.FileMode) error {
	parent, base, err := r.openParent(name)
	if err != nil {
		return err
	}
	defer parent.close()
	s, err := r.stage(parent, nil, b, perm, true)
	if err == nil {
		defer s.close()
		err = s.place(parent, base, true)
	}
	if err != nil {
		return &fs.PathError{Op: "write", Path: name, Err: err}
	}
	return nil
}

// Remove removes the file name, which may be a symbolic link but not a
// directory.
func (r *Root) Remove(name string) error {
	parent, base, err := r.openParent(name)
	if err != nil {
		return err
	}
	defer parent.close()
	if err := unix.Unlinkat(parent.fd, base, 0); err != nil {
		return &fs.PathError{Op: "remove", Path: name, Err: err}
	}
	return nil
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

// makeDir is MkdirAll and openDir in one.
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

// staged is a file that is complete but for its name. It can be put in many
// places as hard links, which spares syncing each.
type staged struct {
	fd    int
	data  []byte
	perm  fs.FileMode
	sync  bool
	dirFD int    // a copy of the directory that holds name, or -1
	name  string // of the named kind: its name aside
}

// stage makes a file next to where it is to be placed. Without O_TMPFILE
// (overlayfs before Linux 6.3, NFS) the file has a name while it is written; it
// is then in aside, if given, so that readers of every file in d don't come
// upon it.
func (r *Root) stage(d, aside *dir, data []byte, perm fs.FileMode, sync bool) (*staged, error) {
	s := &staged{fd: -1, data: data, perm: perm, sync: sync, dirFD: -1}
	if err := d.checkWritable(); err != nil {
		return nil, err
	}
	err := error(unix.EOPNOTSUPP)
	if !r.noTmpfile {
		s.fd, err = openRetry(d.fd, ".", &unix.OpenHow{Flags: unix.O_TMPFILE | unix.O_WRONLY | unix.O_CLOEXEC, Mode: 0o600})
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EINVAL) {
		if aside == nil || aside.checkWritable() != nil || s.create(aside) != nil {
			err = s.create(d)
		} else {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	if err := s.fill(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// create opens a new file in d under a name that means nothing to anyone.
func (s *staged) create(d *dir) error {
	name := asideName()
	fd, err := openRetry(d.fd, name, &unix.OpenHow{
		Flags: unix.O_CREAT | unix.O_EXCL | unix.O_WRONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Mode: 0o600})
	if err != nil {
		return err
	}
	dirFD, err := unix.FcntlInt(uintptr(d.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		unix.Unlinkat(d.fd, name, 0)
		unix.Close(fd)
		return err
	}
	s.fd, s.dirFD, s.name = fd, dirFD, name
	return nil
}

func (s *staged) fill() error {
	for b := s.data; len(b) > 0; {
		n, err := unix.Write(s.fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	if err := unix.Fchmod(s.fd, uint32(s.perm.Perm())); err != nil {
		return err
	}
	if s.sync {
		return retryEINTR(func() error { return unix.Fsync(s.fd) })
	}
	return nil
}

// place gives the file its name in d. Without replace it fails with EEXIST if
// the name is taken.
func (s *staged) place(d *dir, name string, replace bool) error {
	err := s.link(d, name, replace)
	switch {
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EMLINK),
		errors.Is(err, unix.ENOENT):
		// Another mount, a file system without hard links, or a process has
		// removed all names that the file had: a copy.
		return s.copyTo(d, name, replace)
	}
	return err
}

func (s *staged) link(d *dir, name string, replace bool) error {
	to := name
	if replace {
		to = asideName() // linkat can't replace but renameat can
	}
	if err := unix.Linkat(unix.AT_FDCWD, procFD(s.fd), d.fd, to, unix.AT_SYMLINK_FOLLOW); err != nil || !replace {
		return err
	}
	err := unix.Renameat(d.fd, to, d.fd, name)
	// Also after success: rename(2) leaves both names if they are of one file.
	unix.Unlinkat(d.fd, to, 0)
	return err
}

func (s *staged) copyTo(d *dir, name string, replace bool) error {
	c := &staged{fd: -1, dirFD: -1, data: s.data, perm: s.perm, sync: s.sync}
	if err := d.checkWritable(); err != nil {
		return err
	}
	if err := c.create(d); err != nil {
		return err
	}
	defer c.close()
	if err := c.fill(); err != nil {
		return err
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if replace {
		flags = 0
	}
	if err := unix.Renameat2(d.fd, c.name, d.fd, name, flags); err != nil {
		return err
	}
	c.name = ""
	return nil
}

func (s *staged) close() {
	if s.name != "" {
		unix.Unlinkat(s.dirFD, s.name, 0)
	}
	if s.dirFD >= 0 {
		unix.Close(s.dirFD)
	}
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
}

func asideName() string { return asidePrefix + rand.Text() }

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
