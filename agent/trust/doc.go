// SPDX-License-Identifier: Apache-2.0

// Package trust makes container runtimes trust this node's weir, and takes
// that trust back.
//
// A node has one [CA]. Its certificate may only vouch for the registries that
// weir caches and for the probe addresses (X.509 name constraints), its key
// never leaves the node, and the leaves that it signs live for a day.
//
// Every runtime reads certificates from somewhere in its own root file system,
// while it runs: Go programs the whole of /etc/ssl/certs at their first
// verification, dockerd, containerd, podman and others a directory for each
// registry at each pull. [CA.Install] puts the certificate there. A runtime
// may live in a container, and whoever controls that container controls every
// name below its root, so a [Root] is a descriptor, below which the kernel
// resolves all paths, rather than a string.
//
// What is put into a runtime's world must never do harm there:
//
//   - A file is complete when its name appears. containerd fails a pull when a
//     .crt can't be parsed.
//   - A directory that would hide a user's settings is not made. containerd
//     takes the first of HOST and _default that exists, and nothing of the other.
//   - A file that is not weir's is left as it is.
//   - [Uninstall] leaves the tree as it was.
package trust
