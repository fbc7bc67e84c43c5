// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

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
