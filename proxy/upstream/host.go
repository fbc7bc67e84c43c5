// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// Host is a registry's identity: the host that clients name, and the port. Equal
// hosts are equal values. The zero value is none.
type Host struct{ name, port string }

// ParseHost returns the host that HOST or HOST:PORT means. It takes whatever a
// client may send: what is no host has no connection at the end.
func ParseHost(hostport string) Host {
	h := strings.ToLower(hostport)
	if name, port, err := net.SplitHostPort(h); err == nil {
		return Host{strings.TrimRight(name, "."), port}
	}
	return Host{strings.TrimRight(strings.Trim(h, "[]"), "."), "443"}
}

// String returns the canonical form: lower case, no trailing dot, and no port when
// it is 443.
func (h Host) String() string {
	if h.port == "443" || h.port == "" && h.name == "" {
		return h.name
	}
	return h.HostPort()
}

// HostPort returns HOST:PORT.
func (h Host) HostPort() string { return net.JoinHostPort(h.name, h.port) }

// Settings are what a client's runtime has for one registry beside the system's
// roots. The zero value is nothing.
type Settings struct {
	// Roots verify the registry. Nil means the usual ones.
	Roots *x509.CertPool
	// Certificates are what the client can show to the registry.
	Certificates []tls.Certificate
	// Key tells different settings apart.
	Key string
}

// WithoutRoots returns the same settings for a registry that the node trusts.
func (s Settings) WithoutRoots() Settings {
	if len(s.Certificates) == 0 {
		return Settings{}
	}
	if s.Roots != nil {
		s.Roots, s.Key = nil, s.Key+", without its roots"
	}
	return s
}

// Target is a registry as a client has dialled it. What is known of one, and the
// connections that are kept to it, belong to all of it: the address that a client
// dials is where its requests go, whatever else the name stands for.
type Target struct {
	// Host is the registry. It is zero for one without TLS, which is what is at
	// Addr.
	Host Host
	// Addr is the address that the client dialled. Where it dialled none, the name
	// is resolved.
	Addr netip.AddrPort
	// Tunnel is the proxy that the client reaches it through, and other hosts too. Addr
	// is invalid then.
	Tunnel Tunnel
	// Settings verify the registry.
	Settings Settings
}

// key returns the target's pool.
func (t Target) key() key {
	if t.Host == (Host{}) {
		return key{scheme: "http", hostport: t.Addr.String(), settings: t.Settings.Key}
	}
	return key{"https", t.Host.HostPort(), t.Addr, t.Settings.Key, t.Tunnel.id}
}

// keyFor returns the pool for a URL: the target's own, or that of another host,
// which is resolved by name.
func (t Target) keyFor(u *url.URL) key {
	own := t.key()
	k := key{scheme: u.Scheme, hostport: ParseHost(u.Host).HostPort(), settings: own.settings, tunnel: own.tunnel}
	if u.Scheme == "http" && u.Port() == "" {
		k.hostport = net.JoinHostPort(u.Hostname(), "80")
	}
	if k.scheme == own.scheme && k.hostport == own.hostport {
		return own
	}
	return k
}

// key tells pools of connections apart.
type key struct {
	scheme, hostport string
	addr             netip.AddrPort // where it was dialled; invalid when by name
	settings         string
	tunnel           string
}
