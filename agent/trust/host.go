// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// endpoint is a registry as an image reference spells it: a DNS name or an
// address, with or without a port.
type endpoint struct {
	name string     // lower-case DNS name; empty for an address
	addr netip.Addr // invalid for a DNS name
	port string     // decimal; empty if the reference has none
}

// parseEndpoint reads NAME, NAME:PORT, IPv4, IPv4:PORT, IPv6, [IPv6] and
// [IPv6]:PORT. What it accepts is safe as a file name and as a name in a
// certificate.
func parseEndpoint(s string) (endpoint, error) {
	bad := func(why string) (endpoint, error) {
		return endpoint{}, fmt.Errorf("registry host %q: %s", s, why)
	}
	if len(s) > 300 {
		return endpoint{}, errors.New("registry host: longer than any DNS name")
	}
	if ip, err := netip.ParseAddr(s); err == nil {
		if ip.Zone() != "" {
			return bad("an address with a zone can't be in a certificate")
		}
		return endpoint{addr: ip.Unmap()}, nil
	}

	host, port := s, ""
	switch {
	case strings.HasPrefix(s, "["):
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return bad("'[' without ']'")
		}
		host, port = s[1:end], s[end+1:]
		if port != "" && (port[0] != ':' || port == ":") {
			return bad("want [ADDRESS]:PORT")
		}
		port = strings.TrimPrefix(port, ":")
	case strings.Contains(s, ":"):
		host, port, _ = strings.Cut(s, ":")
		if port == "" {
			return bad("empty port")
		}
	}
	if port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
			return bad("bad port")
		}
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.Zone() != "" {
			return bad("an address with a zone can't be in a certificate")
		}
		return endpoint{addr: ip.Unmap(), port: port}, nil
	}
	if strings.HasPrefix(s, "[") {
		return bad("not an address between the brackets")
	}
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	if err := checkDNSName(name); err != nil {
		return bad(err.Error())
	}
	return endpoint{name: name, port: port}, nil
}

// checkDNSName accepts host names (RFC 1123, section 2.1) and the underscore
// that container networks use in names.
func checkDNSName(name string) error {
	if name == "" || len(name) > 253 {
		return errors.New("not a host name")
	}
	last := ""
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return errors.New("not a host name")
		}
		for i := range len(label) {
			switch c := label[i]; {
			case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
			default:
				return errors.New("not a host name")
			}
		}
		last = label
	}
	// Resolvers read such names as addresses: 127.1, 10.0.0x1.
	if digits := strings.TrimPrefix(last, "0x"); strings.Trim(digits, "0123456789") == "" ||
		digits != last && strings.Trim(digits, "0123456789abcdef") == "" {
		return errors.New("neither a host name nor an address")
	}
	return nil
}

// subject is the name as a certificate has it, without the port.
func (e endpoint) subject() string {
	if e.addr.IsValid() {
		return e.addr.String()
	}
	return e.name
}

// dir is the name of the registry's directory in a certs.d.
func (e endpoint) dir() string {
	host := e.subject()
	if e.addr.Is6() {
		host = "[" + host + "]"
	}
	if e.port == "" {
		return host
	}
	return host + ":" + e.port
}

// containerdDir is the name that containerd looks for before that of
// [endpoint.dir], and the same for a registry without a port (hostDirectory in
// containerd's core/remotes/docker/config/hosts.go).
func (e endpoint) containerdDir() string {
	if e.port == "" {
		return e.dir()
	}
	return endpoint{name: e.name, addr: e.addr}.dir() + "_" + e.port + "_"
}

// hubName is what runtimes call Docker Hub in a certs.d.
const hubName = "docker.io"

// hubHost is the host that runtimes pull Docker Hub's images from.
const hubHost = "registry-1.docker.io"
