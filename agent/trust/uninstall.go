// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Uninstall removes from r what Install has put there: the files and
// directories in made, which [Ledger.Made] gives, and weir's files in p,
// usually [UsualPlaces]. A file is removed only if it holds a certificate of
// weir, a directory only if nothing is left in it and weir made it. Where the ledger
// has nothing (made is empty, as for a container), weir is taken to have made
// the directory of a registry in which there was nothing else.
//
// It goes on after a failure, and returns what it removed and all errors.
func Uninstall(r *Root, p Places, made []Made) (removed []string, err error) {
	return uninstall(r, p, made, isOurs)
}

// UninstallOf is Uninstall for a container, which may have the CA of another
// node: it may be one itself, or of one, such as those that kind makes. It
// removes only what is of the CA that cert, as PEM, is a certificate of.
func UninstallOf(cert []byte, r *Root, p Places) (removed []string, err error) {
	mine, err := parseCert(cert)
	if err != nil {
		return nil, fmt.Errorf("the node's own CA: %w", err)
	}
	return uninstall(r, p, nil, func(b []byte) bool {
		c, err := parseCert(b)
		return len(b) == 0 || err == nil && bytes.Equal(c.RawSubject, mine.RawSubject) // which has the key's id
	})
}

// Undo removes from r what one [CA.Install] has made there.
func (res Result) Undo(r *Root) error {
	var made []Made
	for _, f := range res.Files {
		made = append(made, Made{Path: f})
	}
	for _, d := range res.Dirs {
		made = append(made, Made{Path: d, Dir: true})
	}
	_, err := Uninstall(r, Places{}, made)
	return err
}

func uninstall(r *Root, p Places, made []Made, ours func([]byte) bool) (removed []string, err error) {
	u := uninstaller{root: r, ours: ours, ledger: len(made) > 0, dirs: make(map[string]bool)}
	for _, m := range made {
		if m.Dir {
			u.dirs[m.Path] = true
		} else {
			u.file(m.Path)
		}
	}
	for _, dir := range p.System {
		u.system(dir)
	}
	for _, dir := range p.CertsD {
		u.certsD(dir)
	}
	// What is below goes first.
	dirs := make([]string, 0, len(u.dirs))
	for d := range u.dirs {
		dirs = append(dirs, d)
	}
	slices.SortFunc(dirs, func(a, b string) int { return strings.Compare(b, a) })
	for _, d := range dirs {
		ok, err := r.RemoveDirIfEmpty(d)
		u.did(d, ok, err)
	}
	return u.removed, errors.Join(u.errs...)
}

// Withdraw removes from a certs.d what [CA.Install] has put there for one registry.
// made is as for [Uninstall].
func Withdraw(r *Root, certsD, host string, made []Made) error {
	u := uninstaller{root: r, ours: isOurs}
	for _, name := range namesOf(host) {
		e, err := parseEndpoint(name)
		if err != nil {
			return err
		}
		dir := path.Join(certsD, e.dir())
		if u.file(path.Join(dir, certsDFile)) && (len(made) == 0 || slices.ContainsFunc(made, func(m Made) bool { return m.Dir && m.Path == dir })) {
			ok, err := r.RemoveDirIfEmpty(dir)
			u.did(dir, ok, err)
		}
	}
	return errors.Join(u.errs...)
}

type uninstaller struct {
	root    *Root
	ours    func([]byte) bool // says whether a file has the CA that is to go
	ledger  bool
	dirs    map[string]bool // weir made them
	removed []string
	errs    []error
}

func (u *uninstaller) did(name string, ok bool, err error) {
	if ok {
		u.removed = append(u.removed, name)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.errs = append(u.errs, explain("remove CA from "+path.Dir(name), err))
	}
}

// file removes the file name if it is weir's, and reports whether it was.
func (u *uninstaller) file(name string) bool {
	base := path.Base(name)
	if base != systemFile && base != certsDFile && !strings.HasPrefix(base, asidePrefix) {
		return false
	}
	d, err := u.root.openDir(path.Dir(name))
	if err != nil {
		u.did(name, false, err)
		return false
	}
	defer d.close()
	// Something else of that name is a user's: no error.
	st, err := d.stat(base)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxPEM {
		return false
	}
	b, err := d.read(base, maxPEM)
	if err != nil {
		u.did(name, false, err)
		return false
	}
	// A file aside that was left is incomplete.
	if !u.ours(b) && !strings.HasPrefix(base, asidePrefix) {
		return false
	}
	err = unix.Unlinkat(d.fd, base, 0)
	u.did(name, err == nil, err)
	return err == nil
}

func (u *uninstaller) system(dir string) {
	_, _ = u.aside(path.Dir(dir))
	names, err := u.aside(dir)
	if err != nil {
		u.did(dir+"/.", false, err)
		return
	}
	u.file(path.Join(dir, systemFile))
	d, err := u.root.openDir(dir)
	if err != nil {
		u.did(dir+"/.", false, err)
		return
	}
	defer d.close()
	// c_rehash, which update-ca-certificates runs, has made links HASH.N.
	var target [len(systemFile) + 1]byte
	for _, n := range names {
		l, err := unix.Readlinkat(d.fd, n, target[:])
		if err != nil || string(target[:l]) != systemFile {
			continue
		}
		if _, err := d.stat(systemFile); errors.Is(err, unix.ENOENT) {
			err = unix.Unlinkat(d.fd, n, 0)
			u.did(path.Join(dir, n), err == nil, err)
		}
	}
}

func (u *uninstaller) certsD(dir string) {
	names, err := u.aside(dir)
	if err != nil {
		u.did(dir+"/.", false, err)
		return
	}
	for _, n := range names {
		host := path.Join(dir, n)
		_, _ = u.aside(host) // for want of a directory
		if u.file(path.Join(host, certsDFile)) && !u.ledger {
			u.dirs[host] = true
		}
	}
	if dir == ContainerdPairCertsD && !u.ledger {
		// Only weir makes a directory of that name.
		for d := dir; d != path.Dir(ContainerdCertsD); d = path.Dir(d) {
			u.dirs[d] = true
		}
	}
}

// aside removes files that a process that was killed has left in dir, and returns
// what is there.
func (u *uninstaller) aside(dir string) (names []string, err error) {
	names, err = u.root.ReadDir(dir)
	for _, n := range names {
		if strings.HasPrefix(n, asidePrefix) {
			u.file(path.Join(dir, n))
		}
	}
	return names, err
}
