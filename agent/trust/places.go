// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"path"
	"strings"
)

// Places are directories in a runtime's root file system from which it reads
// the certificates that it trusts. All are absolute.
type Places struct {
	// System are directories of which every file is read as roots. A Go
	// program reads them once, when it first verifies a certificate.
	System []string

	// CertsD are directories that have a directory for each registry, whose
	// *.crt are trusted for that registry. One that doesn't exist is made.
	CertsD []string
}

// Directories of certificates by registry.
const (
	DockerCertsD     = "/etc/docker/certs.d"
	ContainerdCertsD = "/etc/containerd/certs.d"
	ContainersCertsD = "/etc/containers/certs.d"

	// ContainerdPairCertsD is one directory of that name: containerd 2.2 has
	// a list as its default config_path and its transfer service takes the
	// list for a path (containerd issues 12415 and 12808).
	ContainerdPairCertsD = ContainerdCertsD + ":" + DockerCertsD
)

// UsualPlaces returns all directories that some runtime reads by default. It is
// where to look for what weir has installed; a single runtime reads only some.
func UsualPlaces() Places {
	return Places{
		System: SystemDirs(nil),
		CertsD: []string{DockerCertsD, ContainerdCertsD, ContainerdPairCertsD, ContainersCertsD},
	}
}

// SystemDirs returns the directories whose every file a Go program with that
// environment ("KEY=value" each) takes for roots, in the order in which it
// reads them: those of SSL_CERT_DIR, or the default ones. It follows
// loadSystemRoots in crypto/x509/root_unix.go and root_linux.go; SSL_CERT_FILE
// only replaces the bundle that is read besides. Relative directories are left
// out, and the result may be empty.
//
// A process chooses its environment: one that is not root's could have weir
// write where it itself may not, so for that one pass nil.
func SystemDirs(environ []string) []string {
	for _, kv := range environ {
		list, ok := strings.CutPrefix(kv, "SSL_CERT_DIR=")
		if !ok {
			continue
		}
		if list == "" {
			break // as if unset, and only the first of several counts
		}
		var dirs []string
		for dir := range strings.SplitSeq(list, ":") {
			if path.IsAbs(dir) {
				dirs = append(dirs, path.Clean(dir))
			}
		}
		return dirs
	}
	return []string{"/etc/ssl/certs", "/etc/pki/tls/certs"}
}
