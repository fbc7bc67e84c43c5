// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/rand"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"
)

// asidePrefix begins the names of files that are not yet in place. No
// runtime takes such a name for a certificate of a registry.
const asidePrefix = ".weir-ca-"

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
