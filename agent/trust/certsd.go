// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"golang.org/x/sys/unix"
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
	_, err = d.stat(defaultDir)
	c.hasDefault = !errors.Is(err, unix.ENOENT)
	if lower := hides[path.Clean(name)]; lower != "" {
		if ok, err := in.root.Exists(lower); ok || err != nil {
			c.lower = lower
			ok, err := in.root.Exists(path.Join(lower, defaultDir))
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
	st, err := d.stat(hostsFile)
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
