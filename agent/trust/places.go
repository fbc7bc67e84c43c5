// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"
	"path"
	"slices"
	"strings"
)

// Places are where a runtime reads the certificates that it trusts, in its
// root file system. All paths are absolute.
type Places struct {
	// System are directories of which every file is read as roots. A Go
	// program reads them once, when it first verifies a certificate.
	System []string

	// Bundles are files with many roots, of which the first that can be read
	// counts beside the System directories.
	Bundles []string

	// Owners, if not nil, says whose System directories may be written to.
	Owners func(uid uint32) bool

	// CertsD are directories that have a directory for each registry, whose
	// *.crt are trusted for that registry. One that doesn't exist is made.
	CertsD []string
}

// Where a Go program reads the system's roots: certDirectories and certFiles in
// crypto/x509/root_linux.go, the same on every distribution.
var (
	systemDirs = []string{
		"/etc/ssl/certs",     // Debian, Ubuntu, Alpine, Arch, SUSE; a link to the next on Fedora and UBI
		"/etc/pki/tls/certs", // Fedora, RHEL, UBI, Amazon Linux
	}
	systemBundles = []string{
		"/etc/ssl/certs/ca-certificates.crt", // Debian, Ubuntu, Alpine, Arch, distroless
		"/etc/pki/tls/certs/ca-bundle.crt",   // Fedora, RHEL, UBI: a link into /etc/pki/ca-trust/extracted/pem
		"/etc/ssl/ca-bundle.pem",             // SUSE
		"/etc/pki/tls/cacert.pem",            // OpenELEC
		"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
		"/etc/ssl/cert.pem", // Alpine, where it may be all there is
	}
)

// Directories of certificates by registry.
const (
	// DockerCertsD is read at each pull by dockerd (registry/config.go,
	// loadTLSConfig; with the containerd image store daemon/hosts.go), and by
	// containers/image and nerdctl after their own.
	DockerCertsD = "/etc/docker/certs.d"
	// ContainerdCertsD is what a containerd's config_path is by custom, and
	// the first of nerdctl's (pkg/defaults/defaults_linux.go, HostsDirs).
	ContainerdCertsD = "/etc/containerd/certs.d"
	// ContainersCertsD is containers-certs.d(5): podman, buildah, skopeo, CRI-O.
	ContainersCertsD = "/etc/containers/certs.d"

	// ContainerdPairCertsD is one directory of that name: containerd 2.2 has
	// a list as its default config_path and its transfer service takes the
	// list for a path (containerd issues 12415 and 12808).
	ContainerdPairCertsD = ContainerdCertsD + ":" + DockerCertsD

	// UserDockerCertsD, UserContainersCertsD and UserContainerdCertsD are the
	// same of a user, below [UserConfigs]: of a rootless dockerd
	// (daemon/command/config_unix.go, configureCertsDir), of
	// containers-certs.d(5), and of a rootless nerdctl
	// (pkg/defaults/defaults_linux.go, HostsDirs). weir puts nothing there.
	UserDockerCertsD     = "docker/certs.d"
	UserContainersCertsD = "containers/certs.d"
	UserContainerdCertsD = "containerd/certs.d"
)

// UsualPlaces returns all places that some runtime reads by default. It is
// where to look for what weir has installed; a single runtime reads only some.
func UsualPlaces() Places {
	return Places{
		System: systemDirs, Bundles: systemBundles,
		CertsD: []string{DockerCertsD, ContainerdCertsD, ContainerdPairCertsD, ContainersCertsD},
	}
}

// ErrFallbackRoots says that a program takes no notice of the system's roots.
var ErrFallbackRoots = errors.New("GODEBUG=x509usefallbackroots=1 makes it trust only the roots that it was built with")

// SystemPlaces returns where a Go program with that environment ("KEY=value"
// each) reads roots, in the order in which it does. It follows loadSystemRoots
// in crypto/x509/root_unix.go: SSL_CERT_DIR, a list, replaces the directories,
// SSL_CERT_FILE the bundles. What is relative, to a working directory that
// changes, is left out, and nothing may be left. It fails with
// [ErrFallbackRoots] when such a program reads nothing.
//
// A process chooses its environment: what it names may be a directory that it
// may not write to itself. [Places.Owners] is for that.
func SystemPlaces(environ []string) (Places, error) {
	p := Places{System: systemDirs, Bundles: systemBundles}
	if list := variable(environ, "SSL_CERT_DIR"); list != "" {
		p.System = absolute(strings.Split(list, ":"))
	}
	if file := variable(environ, "SSL_CERT_FILE"); file != "" {
		p.Bundles = absolute([]string{file})
	}
	if slices.Contains(strings.Split(variable(environ, "GODEBUG"), ","), "x509usefallbackroots=1") {
		return p, ErrFallbackRoots
	}
	return p, nil
}

// NamesDirs reports whether an environment says where the directories are.
func NamesDirs(environ []string) bool { return variable(environ, "SSL_CERT_DIR") != "" }

// UserConfigs returns the directories of a user's own settings, as an
// environment names them: $XDG_CONFIG_HOME (XDG Base Directory Specification)
// and $HOME/.config, of which some programs read one and some the other.
func UserConfigs(environ []string) []string {
	dirs := []string{variable(environ, "XDG_CONFIG_HOME")}
	if home := variable(environ, "HOME"); home != "" {
		dirs = append(dirs, home+"/.config")
	}
	return slices.Compact(absolute(dirs))
}

// variable returns the value of an environment's variable: the first counts, as
// in Go's os.Getenv.
func variable(environ []string, name string) string {
	for _, kv := range environ {
		if k, v, ok := strings.Cut(kv, "="); ok && k == name {
			return v
		}
	}
	return ""
}

func absolute(paths []string) (found []string) {
	for _, p := range paths {
		if path.IsAbs(p) {
			found = append(found, path.Clean(p))
		}
	}
	return found
}
