// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"errors"
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
