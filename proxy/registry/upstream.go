// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"net/http"
	"net/netip"
	"net/url"

	"weir/proxy/rights"
)

// Upstream is the registry that a client has connected to.
type Upstream struct {
	// Host is HOST or HOST:PORT in canonical form: what clients call it.
	Host string
	// Plain is the address and port of a registry that is spoken to without
	// TLS, and empty for all others. Since nothing says who answers there, it
	// is part of the registry's identity.
	Plain string
	// NetworkID names the network that the client is in: a registry without TLS
	// is another one in each network, and any may authorize a client by its
	// address. Empty means the node's.
	NetworkID string
	// Worldwide says that it is one of those that everybody uses: it answers requests
	// without credentials alike in each network, and HEAD of a tag as GET.
	Worldwide bool
	// TrustRootsID stands for the certificates that the client's runtime verifies
	// the registry with where this node doesn't trust it, and is empty for all
	// others. Whoever has the runtime can pose by them as any registry. So they
	// are part of the registry's identity.
	TrustRootsID string
	// ClientIdentity tells clients apart that the registry knows by something
	// that isn't in their requests, such as a TLS certificate. Empty means nothing.
	ClientIdentity string
	// Client names the client for people. It gives no rights.
	Client string
	// Transport sends requests there, and to where the registry redirects,
	// as the client would. It verifies TLS.
	Transport http.RoundTripper
}

// ID is the registry's identity: what it says of its repositories holds for
// those of no other.
func (u Upstream) ID() string {
	if u.Plain != "" && u.NetworkID != "" {
		return u.name() + "#" + u.NetworkID
	}
	return u.name()
}

// name is the identity as people see it: one registry is one line in figures,
// from wherever it is reached.
func (u Upstream) name() string {
	if u.Plain != "" {
		return "http://" + u.Host + "@" + u.Plain
	}
	if u.TrustRootsID != "" {
		return u.host() + "#" + u.TrustRootsID
	}
	return u.host()
}

// host is Host, but one for Docker Hub, which has two.
func (u Upstream) host() string {
	if u.Host == dockerHubIndex {
		return DockerHub
	}
	return u.Host
}

// authenticated says whether the registry's answers are known to be its own.
func (u Upstream) authenticated() bool { return u.Plain == "" && u.TrustRootsID == "" }

// repository is a repository of the registry.
func (u Upstream) repository(name string) rights.Repository {
	repo := rights.Repository{Registry: u.ID(), Name: name}
	if !u.authenticated() {
		repo.Network = rights.UnauthenticatedNetwork(u.NetworkID)
	}
	return repo
}

// base is where requests go.
func (u Upstream) base() *url.URL {
	if u.Plain != "" {
		return &url.URL{Scheme: "http", Host: u.Plain}
	}
	host := u.Host
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is6() {
		host = "[" + host + "]"
	}
	return &url.URL{Scheme: "https", Host: host}
}

// vantage is a network from which a repository is asked for, where that counts.
func (u Upstream) vantage(repo rights.Repository) rights.Vantage {
	if u.Worldwide && u.authenticated() {
		return rights.Vantage{Repository: repo}
	}
	return rights.Vantage{Repository: repo, From: u.NetworkID}
}

// owner is whose bounds count for what the upstream brings: empty when it is
// authenticated. Of any other, a pod chooses the name, and the address and port as
// well, so that it is the pod's network which counts.
func (u Upstream) owner() string {
	switch {
	case u.authenticated():
		return ""
	case u.NetworkID != "":
		return "network " + u.NetworkID
	case u.TrustRootsID != "":
		return "roots " + u.TrustRootsID
	}
	return "address " + u.Plain
}

// follow is a client that follows redirects from the registry.
func (u Upstream) follow(rt http.RoundTripper) *http.Client {
	return &http.Client{Transport: rt, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= 5 || req.URL.Scheme != "https" && req.URL.Host != u.Plain {
			return http.ErrUseLastResponse
		}
		req.Header.Del("Referer")
		return nil
	}}
}
