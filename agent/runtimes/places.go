// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"path/filepath"
	"strings"

	"weir/agent/procfs"
	"weir/agent/trust"
)

// placesOf returns where a process reads its roots, and whose directories may
// be written to for it. root has no bounds. Any other user could lead weir, by
// its environment or by mounts in a user namespace of its own, to a directory
// that it can't write to itself:
//
//   - what its SSL_CERT_DIR names has to be its own;
//   - the usual directories have to belong to a user of its user namespace. In
//     the first one, where all are, only root can have mounted something there;
//     the root file system of a container with a user namespace belongs to that;
//     and what an ordinary user sees in one of its own belongs to another user.
func placesOf(pid int) (trust.Places, error) {
	environ := procfs.Strings(pid, "environ")
	places, err := trust.SystemPlaces(environ)
	if err != nil {
		return places, err
	}
	uid, err := procfs.User(pid)
	switch {
	case err != nil:
		return places, err
	case uid == 0:
	case trust.NamesDirs(environ):
		places.Owners = func(owner uint32) bool { return owner == uid }
	default:
		mapped, err := procfs.UsersOf(pid)
		if err != nil {
			return places, err
		}
		places.Owners = mapped.Has
	}
	return places, nil
}

// inImage says whether a process's root file system is an image's in the
// making: what is written there comes to be in the image. The process runs in a
// step of a build, or unpacks a layer, for which dockerd, podman and the like
// run themselves once more. Its ancestors lead to the builder past runc alone,
// where those of a container that is run lead to its shim. Kaniko builds in its
// own root file system, the others don't. The lifecycle's extender has kaniko do
// that.
func inImage(rt *Runtime, root *trust.Root) bool {
	if rt.kind.name == lifecycle && rt.Comm == "extender" {
		return true
	}
	for pid := rt.Parent; pid > 1; {
		p, err := procfs.Read(pid)
		if err != nil || strings.HasPrefix(p.Comm, "containerd-shim") || p.Comm == "conmon" {
			return false
		}
		if k := kindOf(p.Comm, p.Exe); k != nil && (k.builds || k == rt.kind) {
			r, err := trust.OpenRoot(pid)
			if err != nil {
				return false
			}
			builder, own := r.ID(), root.ID()
			r.Close()
			// In another mount namespace it is still the same directory.
			return k.name == "kaniko" || builder.Dev != own.Dev || builder.Ino != own.Ino
		}
		pid = p.Parent
	}
	return false
}

// userSettings are the certs.d directories of the user who runs a runtime.
func (rt *Runtime) userSettings() (dirs []string) {
	for _, config := range trust.UserConfigs(procfs.Strings(rt.PID, "environ")) {
		for _, d := range rt.kind.userSettings {
			dirs = append(dirs, filepath.Join(config, d))
		}
	}
	return dirs
}
