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
	"time"

	"golang.org/x/sys/unix"
)

// Names of the files that weir installs.
const (
	systemFile = "weir-ca.pem"
	certsDFile = "weir-ca.crt" // dockerd and containerd read *.crt alone
)

// hubName is what runtimes call Docker Hub in a certs.d.
const hubName = "docker.io"

// hubHost is the host that runtimes pull Docker Hub's images from.
const hubHost = "registry-1.docker.io"

// Why a registry is not covered in a certs.d. All are about settings of a user
// that weir leaves alone.
var (
	// ErrHostsFile: the registry has a hosts.toml, and containerd then takes
	// no notice of certificates beside it. Adding the CA to that file's "ca"
	// covers the registry.
	ErrHostsFile = errors.New("a hosts.toml decides")

	// ErrHides: the registry gets its settings from another directory, which
	// would no longer be read if it had one here.
	ErrHides = errors.New("a directory for the registry would hide other settings")

	// ErrForeign: something that is not weir's has the name of weir's file.
	ErrForeign = errors.New("there is a file of that name that is not weir's")
)

// Why the CA is not among the roots that a process reads.
var (
	// ErrNoRoots: the process has no roots at all. weir's would be all that it
	// has, and a program that was built with roots of its own to fall back on
	// takes those only while the system has none: SetFallbackRoots in
	// crypto/x509/root.go, and likewise packages that look whether
	// SystemCertPool is empty. With the CA there it could not verify any
	// registry but weir. A program without roots can't pull anyhow.
	ErrNoRoots = errors.New("there are no root certificates")

	// ErrOthers: [Places.Owners] doesn't allow to write there.
	ErrOthers = errors.New("the directory isn't its own")
)

// hides are the directories whose entry for a registry a runtime doesn't read
// if there is one in the first: containers/image and nerdctl look for the
// first that exists, containerd with its default config_path too.
var hides = map[string]string{
	ContainersCertsD: DockerCertsD,
	ContainerdCertsD: DockerCertsD,
}

// Coverage says of one certs.d for which registries the CA is in place (nil)
// and why not for others.
type Coverage map[string]error

// Covers reports whether the CA is in place for host, as it was given to
// [CA.Install].
func (c Coverage) Covers(host string) bool {
	err, ok := c[host]
	return ok && err == nil
}

// Result is what [CA.Install] has come to.
type Result struct {
	// System is nil if the CA is in one of Places.System: one is enough, as
	// Go reads all of them.
	System error

	// File is the CA's in that place, and Since when it was there at the latest.
	// Superseded says that it was put in the place of an earlier generation.
	File       string
	Since      time.Time
	Superseded bool

	// CertsD has an entry for each of Places.CertsD.
	CertsD map[string]Coverage

	// Files and Dirs are what was made, or in the case of files replaced, in
	// that order. [Ledger.Record] keeps them.
	Files, Dirs []string
}

// Install puts the CA where p says, for hosts, and finds out where it already
// is. Calling it again is cheap: it is made for being called whenever a runtime
// starts.
//
// In a certs.d each of hosts gets a directory for each of the names that image
// references may have for it: with port 443 as well, and docker.io if one of the
// other names of Docker Hub is among hosts. So does the second probe address. A
// directory that a user needs more than
// weir does is left, and the registry reported as not covered. If such a need
// came up later, because a _default appeared, what weir had made is removed.
//
// An older certificate of weir is replaced; no other file is.
func (ca *CA) Install(r *Root, p Places, hosts []string) Result {
	in := installer{ca: ca, gen: ca.current.Load(), root: r, current: make(map[inode]bool), users: make(map[string]bool)}
	in.res.System = in.system(p)

	var wanted []string
	for _, h := range hosts {
		wanted = append(wanted, namesOf(h)...)
	}
	if slices.Contains(wanted, "index.docker.io") {
		wanted = append(wanted, hubName)
	}
	if len(ca.probes) > 1 {
		wanted = append(wanted, ca.probes[1].Unmap().String())
	}
	in.res.CertsD = make(map[string]Coverage, len(p.CertsD))
	for _, certsD := range p.CertsD {
		if in.res.CertsD[certsD] == nil {
			in.res.CertsD[certsD] = in.certsD(certsD, wanted)
		}
	}
	return in.res
}

type inode struct{ dev, ino uint64 }

// installer is one call of Install.
type installer struct {
	ca   *CA
	gen  *generation
	root *Root
	res  Result

	// current are inodes known to hold the certificate: one file with many
	// names is read once.
	current map[inode]bool
	// users are the directories of registries that were looked at, and whether
	// they have settings of a user.
	users map[string]bool
}

func (in *installer) system(p Places) error {
	dirs := p.System
	if len(dirs) == 0 {
		return errors.New("no directory to install the CA into: SSL_CERT_DIR of the process names none")
	}
	if !in.hasRoots(p) {
		return explain("install CA in "+dirs[0], ErrNoRoots)
	}
	var failed []error
	for _, name := range dirs {
		d, err := in.root.openDir(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = in.systemDir(d, p.Owners)
			d.close()
		}
		if err == nil {
			in.res.File = path.Join(name, systemFile)
			return nil
		}
		failed = append(failed, explain("install CA in "+name, err))
	}
	if len(failed) > 0 {
		return errors.Join(failed...)
	}
	if p.Owners != nil { // whose would the new one be?
		return explain("install CA in "+dirs[0], ErrOthers)
	}
	d, made, err := in.root.makeDir(dirs[0])
	in.res.Dirs = append(in.res.Dirs, made...)
	if err != nil {
		return explain("install CA in "+dirs[0], err)
	}
	defer d.close()
	if err := in.systemDir(d, nil); err != nil {
		return explain("install CA in "+dirs[0], err)
	}
	in.res.File = path.Join(dirs[0], systemFile)
	return nil
}

// FileID tells a file from one that was made anew in its place. It is comparable.
type FileID struct {
	dev, ino uint64
	born     unix.StatxTimestamp
}

// Holds fails unless a file that [CA.Install] named has a certificate of the CA's, of
// whichever generation.
func (ca *CA) Holds(r *Root, file string) (FileID, error) {
	id, err := r.fileID(file)
	var b []byte
	if err == nil {
		b, err = r.ReadFile(file, maxPEM)
	}
	if err == nil {
		if _, ok := ca.ownPEM(b); !ok {
			err = fmt.Errorf("%s has another content", file)
		}
	}
	if err != nil {
		return FileID{}, fmt.Errorf("weir's CA was installed and is gone: %w", err)
	}
	return id, nil
}

// hasRoots reports whether a process has roots but for weir's.
func (in *installer) hasRoots(p Places) bool {
	for _, name := range p.Bundles {
		if size, err := in.root.size(name); err == nil {
			// The first that is there counts, as in crypto/x509.
			if size > 0 {
				return true
			}
			break
		}
	}
	for _, name := range p.System {
		d, err := in.root.openDir(name)
		if err != nil {
			continue
		}
		// Few are weir's: the file, links of c_rehash to it, files aside.
		names, _ := d.names(8)
		has := slices.ContainsFunc(names, func(n string) bool {
			if n == systemFile || strings.HasPrefix(n, asidePrefix) {
				return false
			}
			var target [len(systemFile) + 1]byte
			l, err := unix.Readlinkat(d.fd, n, target[:])
			return err != nil || string(target[:l]) != systemFile
		})
		d.close()
		if has {
			return true
		}
	}
	return false
}

func (in *installer) systemDir(d *dir, owners func(uint32) bool) error {
	return in.put(d, systemFile, func() (*staged, func(), error) {
		if owners != nil {
			if st, err := d.stat("."); err != nil || !owners(st.Uid) {
				return nil, nil, errors.Join(ErrOthers, err)
			}
		}
		// Unresolved: ".." is to be that of what d really is.
		parent, err := in.root.openDir(d.path + "/..")
		if err == nil {
			defer parent.close()
		}
		// Not synced, for a runtime doesn't wait: if the power fails now
		// there may be an empty file, which does no harm here.
		s, err := in.root.stage(d, parent, in.gen.pem, 0o644, false)
		if err != nil {
			return nil, nil, err
		}
		return s, s.close, nil
	})
}

func (in *installer) certsD(name string, hosts []string) Coverage {
	cov := make(Coverage, len(hosts))
	d, made, err := in.root.makeDir(name)
	in.res.Dirs = append(in.res.Dirs, made...)
	if err != nil {
		err = explain("install CA in "+name, err)
		for _, h := range hosts {
			cov[h] = err
		}
		return cov
	}
	defer d.close()

	c := certsD{installer: in, dir: d}
	defer c.close()
	_, err = d.stat("_default")
	c.hasDefault = !errors.Is(err, unix.ENOENT)
	if lower := hides[path.Clean(name)]; lower != "" {
		if ok, err := in.root.Exists(lower); ok || err != nil {
			c.lower = lower
			ok, err := in.root.Exists(path.Join(lower, "_default"))
			c.hasDefault = c.hasDefault || ok || err != nil
		}
	}
	for _, h := range hosts {
		if _, ok := cov[h]; !ok {
			cov[h] = c.cover(h)
		}
	}
	return cov
}

// certsD is one certs.d in the course of an Install.
type certsD struct {
	*installer
	dir        *dir
	hasDefault bool    // a new directory would hide a _default
	lower      string  // the certs.d that comes after this one and exists
	staged     *staged // made when first needed
}

func (c *certsD) close() {
	if c.staged != nil {
		c.staged.close()
	}
}

// file returns the certificate as a file to be linked into the directories of
// the registries. It is synced, as an empty .crt after a power failure would
// make pulls fail.
func (c *certsD) file() (*staged, func(), error) {
	if c.staged == nil {
		s, err := c.root.stage(c.dir, nil, c.gen.pem, 0o644, true)
		if err != nil {
			return nil, nil, err
		}
		c.staged = s
	}
	return c.staged, func() {}, nil
}

func (c *certsD) cover(host string) error {
	e, err := parseEndpoint(host)
	if err != nil {
		return err
	}
	// Docker Hub's directory has a name that no server of its has.
	if host != hubName && !permits(c.gen.cert, e) {
		return fmt.Errorf("%s: the CA is not made for this host", host)
	}
	// Where there is no HOST_PORT_ containerd takes HOST:PORT, so it is never
	// needed, only to be kept up with.
	if e.containerdDir() != e.dir() {
		d, err := c.root.openDir(c.dir.path + "/" + e.containerdDir())
		if err == nil {
			err = c.coverDir(d)
			d.close()
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return explain("install CA in "+path.Join(c.dir.path, e.containerdDir()), err)
		}
	}
	if err := c.coverHost(e); err != nil {
		return explain("install CA in "+path.Join(c.dir.path, e.dir()), err)
	}
	return nil
}

func (c *certsD) coverHost(e endpoint) error {
	hidden, err := c.hidesSettings(e)
	if err != nil {
		return err
	}
	name := c.dir.path + "/" + e.dir()
	d, err := c.root.openDir(name)
	if err == nil {
		defer d.close()
		if hidden {
			if withdrawn, err := c.withdraw(d, name); withdrawn || err != nil {
				return errors.Join(ErrHides, err)
			}
		}
		return c.coverDir(d)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if hidden {
		return ErrHides
	}
	// The file first, so that an empty directory is there but for a moment,
	// and not at all if the disk is full.
	if _, _, err := c.file(); err != nil {
		return err
	}
	d, made, err := c.root.makeDir(name)
	c.res.Dirs = append(c.res.Dirs, made...)
	if err != nil {
		return err
	}
	defer d.close()
	return c.coverDir(d)
}

// coverDir puts the certificate into the directory of a registry, unless that
// would be in vain.
func (c *certsD) coverDir(d *dir) error {
	st, err := d.stat("hosts.toml")
	switch {
	case err == nil && st.Size > 0: // containerd takes an empty one for none
		return ErrHostsFile
	case err != nil && !errors.Is(err, unix.ENOENT):
		return err
	}
	return c.put(d, certsDFile, c.file)
}

// hidesSettings reports whether a directory for e would keep a runtime from
// reading settings of a user elsewhere.
func (c *certsD) hidesSettings(e endpoint) (bool, error) {
	if c.hasDefault || c.lower == "" {
		return c.hasDefault, nil
	}
	for _, name := range slices.Compact([]string{e.dir(), e.containerdDir()}) {
		users, err := c.usersDir(c.lower + "/" + name)
		if users || err != nil {
			return users, err
		}
	}
	return false, nil
}

// usersDir reports whether the directory name of a registry has anything in it
// that weir did not put there.
func (in *installer) usersDir(name string) (bool, error) {
	if users, ok := in.users[name]; ok {
		return users, nil
	}
	users := false
	d, err := in.root.openDir(name)
	if err == nil {
		var names []string
		names, err = d.names(2)
		d.close()
		users = slices.ContainsFunc(names, func(n string) bool { return n != certsDFile })
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	in.users[name] = users
	return users, nil
}

// withdraw removes the directory of a registry that only weir uses.
func (c *certsD) withdraw(d *dir, name string) (bool, error) {
	names, err := d.names(2)
	if err != nil || len(names) != 1 || names[0] != certsDFile {
		return false, err
	}
	b, err := d.read(certsDFile, maxPEM)
	if err != nil || !isOurs(b) {
		return false, err
	}
	if err := unix.Unlinkat(d.fd, certsDFile, 0); err != nil {
		return false, err
	}
	_, err = c.root.RemoveDirIfEmpty(name)
	return true, err
}

// put makes name in d hold the certificate. file returns it staged, and what to
// call when it has been placed.
func (in *installer) put(d *dir, name string, file func() (*staged, func(), error)) error {
	// Twice again if another process put or removed it just then.
	for try := 0; ; try++ {
		there, since, err := in.look(d, name)
		if err != nil || !since.IsZero() {
			in.res.Since = since
			return err
		}
		s, done, err := file()
		if err != nil {
			return err
		}
		was := in.superseded(d, name)
		err = s.place(d, name, there)
		done()
		if err == nil {
			in.ca.supersede(was, in.superseded(d, name))
			in.res.Superseded = in.res.Superseded || was != (FileID{})
			in.res.Since = time.Now()
			in.res.Files = append(in.res.Files, path.Join(d.path, name))
			return nil
		}
		if !errors.Is(err, unix.EEXIST) || try == 2 {
			return err
		}
	}
}

// superseded identifies name in d if it is one of the CA's certificates. The zero
// value is none.
func (in *installer) superseded(d *dir, name string) FileID {
	if name != systemFile {
		return FileID{}
	}
	id, _ := in.ca.Holds(in.root, path.Join(d.path, name))
	return id
}

// supersede records that the CA's own file was replaced by its next generation.
func (ca *CA) supersede(was, by FileID) {
	if was == (FileID{}) || by == (FileID{}) {
		return
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if len(ca.superseded) >= maxSuperseded {
		clear(ca.superseded)
	}
	ca.superseded[was] = by
}

// maxSuperseded bounds the files that are remembered. What is forgotten counts as
// removed.
const maxSuperseded = 1 << 14

// Follows says whether one file that [CA.Holds] has identified is the other, or has
// replaced it as the next generation of the certificate: that of the CA has been there
// all the time.
func (ca *CA) Follows(now, was FileID) bool {
	// The file is there a moment before that is recorded.
	for try := 0; ; try++ {
		ca.mu.Lock()
		id, ok := was, true
		for n := 0; id != now && ok; n++ {
			id, ok = ca.superseded[id]
			ok = ok && n < maxSuperseded
		}
		ca.mu.Unlock()
		if ok || try == 20 {
			return ok
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// fileClock is how far the clock of files may be behind: a tick, of which there
// are at least 100 a second.
const fileClock = 10 * time.Millisecond

// look reports whether name is in d, and if it is the current certificate, since
// when at the latest: a file that is linked or renamed is changed by that. It
// fails with ErrForeign if what is there is not weir's to replace.
func (in *installer) look(d *dir, name string) (there bool, since time.Time, err error) {
	st, err := d.stat(name)
	if errors.Is(err, unix.ENOENT) {
		return false, since, nil
	}
	if err != nil {
		return false, since, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxPEM {
		return true, since, ErrForeign
	}
	changed := time.Unix(st.Ctim.Unix()).Add(fileClock)
	id := inode{st.Dev, st.Ino}
	if in.current[id] {
		return true, changed, nil
	}
	b, err := d.read(name, maxPEM)
	if errors.Is(err, unix.ENOENT) {
		return false, since, nil
	}
	if err != nil {
		return true, since, err
	}
	if bytes.Equal(b, in.gen.pem) {
		in.current[id] = true
		return true, changed, nil
	}
	if !isOurs(b) {
		return true, since, ErrForeign
	}
	return true, since, nil
}

// isOurs reports whether b, found under one of weir's names, is weir's: a CA
// certificate of this or an earlier generation, or what a power failure has
// left of one.
func isOurs(b []byte) bool { return len(b) == 0 || IsNodeCA(b) }

// explain adds to an error what can be done about it.
func explain(what string, err error) error {
	var do string
	switch {
	case errors.Is(err, ErrHostsFile):
		do = `add weir's CA to its "ca"`
	case errors.Is(err, ErrHides):
		do = "remove them, or add the CA to them"
	case errors.Is(err, ErrForeign):
		do = "move it away"
	case errors.Is(err, ErrNoRoots):
		do = "add those of the world (ca-certificates) to the image, unless it brings its own"
	case errors.Is(err, ErrOthers):
		do = "only its owner or root may let weir's CA be there"
	case errors.Is(err, unix.EROFS):
		do = "the file system is read-only: mount a writable directory there, or put the CA into the image"
	case errors.Is(err, unix.EOVERFLOW):
		do = "the file system is of a user namespace in which the node's root is nobody: put the CA into the image"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		do = "make room"
	case errors.Is(err, fs.ErrPermission):
		do = "see whether it is immutable (lsattr) or a security module forbids it"
	case errors.Is(err, fs.ErrNotExist):
		do = "a symbolic link on the way leads nowhere"
	case errors.Is(err, unix.ENOTDIR):
		do = "a file is where a directory should be"
	default:
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%s: %w: %s", what, err, do)
}

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
	u.aside(path.Dir(dir))
	names, err := u.root.ReadDir(dir)
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
		if strings.HasPrefix(n, asidePrefix) {
			u.file(path.Join(dir, n))
			continue
		}
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
	u.aside(dir)
	names, err := u.root.ReadDir(dir)
	if err != nil {
		u.did(dir+"/.", false, err)
		return
	}
	for _, n := range names {
		host := path.Join(dir, n)
		u.aside(host)
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

// aside removes files that a process that was killed has left in dir.
func (u *uninstaller) aside(dir string) {
	names, err := u.root.ReadDir(dir)
	if err != nil {
		return // for want of a directory, or certsD and system report it
	}
	for _, n := range names {
		if strings.HasPrefix(n, asidePrefix) {
			u.file(path.Join(dir, n))
		}
	}
}
