// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"slices"
	"strings"
	"sync/atomic"

	ups "weir/proxy/upstream" // upstream is a type of the tests
)

// Known is a registry that weir knows to be one.
type Known struct {
	// Host is what clients connect to. With Subtree, every host below it is
	// a registry too, and with Below only those.
	Host    string
	Subtree bool
	Below   bool
	// Name is what image references and certs.d directories call it, when
	// that isn't Host.
	Name string
	// Worldwide says that it answers a request alike from wherever it comes:
	// it is one service for the whole internet, and no tenant's.
	Worldwide bool
	// Learned says that a client of this node has used it: that it is a registry is
	// its own word.
	Learned bool
}

// DockerHub is the host that Docker Hub's images are pulled from, and DockerHubName
// what references call it.
const (
	DockerHub     = "registry-1.docker.io"
	DockerHubName = "docker.io"
)

// dockerHubIndex is Docker Hub too, to crane, kaniko and all else that is built
// on go-containerregistry.
const dockerHubIndex = "index.docker.io"

// Hosts tells registries from other hosts. Its methods may be called
// concurrently.
type Hosts struct {
	known atomic.Pointer[[]Known]
}

// NewHosts knows the well-known registries and the given ones, each HOST or
// HOST:PORT.
func NewHosts(more ...string) *Hosts {
	h := &Hosts{}
	h.Set(more, nil)
	return h
}

// Set makes the given registries the ones that are known beside the well-known, and
// that were learned.
func (h *Hosts) Set(more, learned []string) {
	known := slices.Clone(WellKnown)
	for _, m := range more {
		known = append(known, Known{Host: Canonical(m)})
	}
	for _, l := range learned {
		known = append(known, Known{Host: Canonical(l), Learned: true})
	}
	h.known.Store(&known)
}

// All returns every known registry.
func (h *Hosts) All() []Known { return *h.known.Load() }

// Named returns the host of the registry that image references call name. Who names
// one to weir has to have it from elsewhere than what was learned.
func (h *Hosts) Named(name string) (host string, ok bool) {
	for _, k := range h.All() {
		if k.Name == name {
			return k.Host, true
		}
	}
	host = Canonical(name)
	k, ok := h.Find(host)
	return host, ok && !k.Learned
}

// Find returns the known registry that a host (in its canonical form) is or
// belongs to.
func (h *Hosts) Find(host string) (Known, bool) {
	for _, k := range h.All() {
		if host == k.Host && !k.Below || (k.Subtree || k.Below) && strings.HasSuffix(host, "."+k.Host) {
			return k, true
		}
	}
	return Known{}, false
}

// Canonical returns the form in which a registry's host is compared: see
// [ups.Host].
func Canonical(hostport string) string { return ups.ParseHost(hostport).String() }
