// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/net/idna"
	"golang.org/x/sys/unix"
)

// Why a registry is not covered by what a runtime reads now, see [CA.Coverage].
var (
	// ErrLeads: a pull of another image, whose settings don't have the CA, can
	// come to this registry as well, and a connection doesn't tell the two apart.
	ErrLeads = errors.New("another registry's settings lead here")

	// ErrUnreadable: something in the certs.d may lead anywhere.
	ErrUnreadable = errors.New("it can't be told where that leads")

	// ErrNoCA: the directory that the runtime reads doesn't have the CA.
	ErrNoCA = errors.New("weir's CA isn't there")
)

// CertsD is how a runtime finds the certificates for a registry.
type CertsD struct {
	// Dirs are the directories that the runtime looks through for one of the
	// registry's name, in that order. The first that it finds is all it reads.
	Dirs []string
	// Also are directories that it may look through in another of its ways to
	// pull, or beside Dirs: what is there may lead to a registry too.
	Also []string
	// HostsFiles says that it does so as containerd does, with hosts.toml,
	// _default and HOST_PORT_ (core/remotes/docker/config/hosts.go). Otherwise
	// it reads HOST:PORT alone, as containers/image does (docker/docker_client.go,
	// dockerCertDir).
	HostsFiles bool
}

const (
	hostsFile  = "hosts.toml"
	defaultDir = "_default"

	// maxHostsFile bounds a hosts.toml, maxBundle a file of CAs that it names, and
	// maxDirs the registries' directories that are looked at.
	maxHostsFile = 64 << 10
	maxBundle    = 1 << 20
	maxDirs      = 4096
)

// Coverage finds out for which of hosts every pull of a runtime that trusts the
// CA by c alone finds it, reading what is there now: that is what the runtime
// does at each pull.
//
// A runtime reads the settings of the registry that is in an image's name. For
// a host to be covered, those of each name of the host must have the CA, and so
// must those of all other registries that lead to it, be they known to weir or
// not.
func (ca *CA) Coverage(r *Root, c CertsD, hosts []string) Coverage {
	cov := make(Coverage, len(hosts))
	l := looker{ca: ca, root: r, certsD: c, away: make(map[string]string), own: make(map[string][]server)}
	err := l.readLeads()
	for _, host := range hosts {
		if cov[host] = err; err == nil {
			cov[host] = l.covers(host)
		}
	}
	return cov
}

// looker is one call of Coverage.
type looker struct {
	ca     *CA
	root   *Root
	certsD CertsD
	away   map[string]string // hosts that are reached without the CA → the file that leads there
	// own has, for the directories with a hosts.toml, how the registry that an image
	// is of is asked, when that is asked itself.
	own map[string][]server
}

// readLeads reads every hosts.toml.
func (l *looker) readLeads() error {
	if !l.certsD.HostsFiles {
		return nil
	}
	seen := make(map[string]bool)
	for _, certsD := range append(append([]string(nil), l.certsD.Dirs...), l.certsD.Also...) {
		if seen[certsD] {
			continue
		}
		seen[certsD] = true
		names, err := l.root.ReadDir(certsD)
		switch {
		case absent(err):
			continue
		case err == nil && len(names) > maxDirs:
			err = ErrTooLarge
		}
		if err != nil {
			return unreadable(certsD, err)
		}
		for _, name := range names {
			dir := path.Join(certsD, name)
			if err := l.readHosts(dir, name); err != nil {
				return unreadable(path.Join(dir, hostsFile), err)
			}
		}
	}
	return nil
}

func unreadable(file string, err error) error {
	return fmt.Errorf("%s: %w, so nothing is intercepted: %w; mend or remove it", file, ErrUnreadable, err)
}

// absent reports whether an error says that a name isn't there.
func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

// readHosts reads the hosts.toml in the directory of a registry, if there is one
// that isn't empty.
func (l *looker) readHosts(dir, name string) error {
	b, err := l.root.ReadFile(path.Join(dir, hostsFile), maxHostsFile)
	if absent(err) || err == nil && len(b) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	servers, newer, err := parseHosts(b)
	if err != nil {
		return err
	}
	l.own[dir] = []server{}
	if newer {
		l.own[dir] = []server{{}} // without the CA
		l.away[registryOf(name)] = path.Join(dir, hostsFile)
	}
	for _, s := range servers {
		for _, file := range s.ca {
			if !path.IsAbs(file) {
				file = path.Join(dir, file)
			}
			if err := l.readCAs(&s, file); err != nil {
				return err
			}
		}
		if s.host == "" {
			s.host = registryOf(name)
			l.own[dir] = append(l.own[dir], s)
		}
		if !s.trusts(s.host) {
			l.away[s.host] = path.Join(dir, hostsFile)
		}
	}
	return nil
}

// readCAs finds the CA's certificates in a file of certificates. One that isn't
// there has none; the runtime's pull fails then, whatever weir does.
func (l *looker) readCAs(s *server, file string) error {
	b, err := l.root.ReadFile(file, maxBundle)
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return nil
		}
		if cert, ok := l.ca.own(block.Bytes); ok {
			s.weir = append(s.weir, cert)
		}
	}
}

// trusts reports whether a server is asked with the CA where it is host.
func (s server) trusts(host string) bool {
	e, err := parseEndpoint(host)
	return s.skipVerify || err == nil && slices.ContainsFunc(s.weir, func(c *x509.Certificate) bool { return permits(c, e) })
}

// covers says whether all ways to host have the CA.
func (l *looker) covers(host string) error {
	key, err := hostOf(host)
	if err != nil {
		return err
	}
	if file, ok := l.away[key]; ok {
		return fmt.Errorf(`%s: %w, without weir's CA: add the CA to the "ca" of %s there, or remove that`, file, ErrLeads, host)
	}
	for _, name := range namesOf(host) {
		e, err := parseEndpoint(name)
		if err == nil {
			err = l.coversName(e, host)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// namesOf returns what references of images on a host may call it: with the port
// spelled out too, and Docker Hub by its own name.
func namesOf(host string) []string {
	names := []string{host}
	if e, err := parseEndpoint(host); err == nil && e.port == "" {
		e.port = "443"
		names = append(names, e.dir())
	}
	if host == hubHost {
		names = append(names, hubName)
	}
	return names
}

// coversName says whether the settings for images of a registry, which is at host,
// have the CA.
func (l *looker) coversName(e endpoint, host string) error {
	entries := []string{e.dir()}
	if l.certsD.HostsFiles {
		entries = []string{e.containerdDir(), e.dir(), defaultDir}
	}
	for _, certsD := range l.certsD.Dirs {
		for i, entry := range entries {
			if i > 0 && entry == entries[i-1] {
				continue
			}
			dir := path.Join(certsD, entry)
			there, err := l.root.Exists(dir)
			if err != nil {
				return err
			}
			if !there {
				continue
			}
			if l.certsD.HostsFiles {
				if servers, ok := l.own[dir]; ok {
					if slices.ContainsFunc(servers, func(s server) bool { return !s.trusts(host) }) {
						return fmt.Errorf(`%s: %w: add it to the "ca" there`, path.Join(dir, hostsFile), ErrNoCA)
					}
					return nil
				}
			}
			b, err := l.root.ReadFile(path.Join(dir, certsDFile), maxPEM)
			if err == nil {
				at, herr := parseEndpoint(host)
				if cert, ok := l.ca.ownPEM(b); ok && herr == nil && permits(cert, at) {
					return nil
				}
			}
			if absent(err) || err == nil {
				err = ErrNoCA
			}
			return fmt.Errorf("%s: %w: put it there, or restart the runtime, which then finds it among the system's roots", dir, err)
		}
	}
	return fmt.Errorf("no directory of a certs.d is %s: %w: restart the runtime, which then finds it among the system's roots", e.dir(), ErrNoCA)
}

// server is a host of a hosts.toml.
type server struct {
	host       string // in the form of [hostOf]; empty for the directory's registry
	ca         []string
	skipVerify bool
	weir       []*x509.Certificate // the CA's, in ca
}

// hostsToml is what containerd reads of a hosts.toml. What decides nothing here
// is in it for its type: a file with another type is none to containerd.
type hostsToml struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// parseHosts returns the hosts that a hosts.toml names, and the registry's own
// in the end, if it names no server. It fails for what can't be understood:
// containerd then takes the certificates beside the file, but its versions read
// TOML with different libraries, so that another may well understand it. newer
// says that only newer versions accept the file, and older ones do as with one
// that they can't understand.
func parseHosts(b []byte) (servers []server, newer bool, err error) {
	var file struct {
		hostsToml
		Server string               `toml:"server"`
		Hosts  map[string]hostsToml `toml:"host"`
	}
	if err := toml.Unmarshal(b, &file); err != nil {
		return nil, false, err
	}
	add := func(name string, c hostsToml) error {
		s, isNewer, err := parseServer(name, c)
		servers, newer = append(servers, s), newer || isNewer
		return err
	}
	for name, c := range file.Hosts {
		if err := add(name, c); err != nil {
			return nil, false, err
		}
	}
	if err := add(file.Server, file.hostsToml); err != nil {
		return nil, false, err
	}
	return servers, newer, nil
}

// parseServer is containerd's parseHostConfig, and refuses what that refuses.
func parseServer(name string, c hostsToml) (s server, newer bool, err error) {
	s.skipVerify = c.SkipVerify != nil && *c.SkipVerify
	if s.host, err = serverHost(name); err != nil {
		return s, false, err
	}
	for _, capability := range c.Capabilities {
		switch strings.ToLower(capability) {
		case "pull", "resolve", "push":
		case "referrers": // containerd 2.1
			newer = true
		default:
			return s, false, fmt.Errorf("unknown capability %q", capability)
		}
	}
	if s.ca, err = texts("ca", c.CA); err != nil {
		return s, false, err
	}
	pairs, _ := c.Client.([]any)
	for _, pair := range pairs {
		files, err := texts("client", pair)
		if _, one := pair.(string); err == nil && !one && len(files) != 2 {
			err = fmt.Errorf("\"client\" has %d files in a pair", len(files))
		}
		if err != nil {
			return s, false, err
		}
	}
	if pairs == nil {
		if _, err := texts("client", c.Client); err != nil {
			return s, false, err
		}
	}
	for key, value := range c.Header {
		if _, err := texts("header "+key, value); err != nil {
			return s, false, err
		}
	}
	if c.DialTimeout != "" {
		if _, err := time.ParseDuration(c.DialTimeout); err != nil {
			return s, false, err
		}
	}
	return s, newer, nil
}

// texts returns what a value that is a text or a list of them has.
func texts(key string, value any) (all []string, err error) {
	switch v := value.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		for _, one := range v {
			text, ok := one.(string)
			if !ok {
				return nil, fmt.Errorf("%q has a %T", key, one)
			}
			all = append(all, text)
		}
		return all, nil
	}
	return nil, fmt.Errorf("%q is a %T", key, value)
}

// serverHost returns the host of a server as a hosts.toml has it, empty if it
// has none: parseHostConfig.
func serverHost(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	if !strings.HasPrefix(s, "http") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		return "", err
	}
	if u.Host == "" {
		return "", nil
	}
	return hostOf(u.Host)
}

// hostOf returns the form in which hosts are compared: as net/http writes one to
// a connection, in lower case, without a trailing dot, and without the port of
// HTTPS.
func hostOf(hostport string) (string, error) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		host, port = strings.Trim(hostport, "[]"), ""
	}
	if strings.ContainsFunc(host, func(r rune) bool { return r > 127 }) {
		if host, err = idna.Lookup.ToASCII(host); err != nil {
			return "", fmt.Errorf("host %q: %w", hostport, err)
		}
	}
	host = strings.ToLower(strings.TrimRight(host, "."))
	if port == "" || port == "443" {
		return host, nil
	}
	return net.JoinHostPort(host, port), nil
}

// portDirRE is HOST_PORT_, containerd's hostDirectory.
var portDirRE = regexp.MustCompile(`^(.+)_([0-9]+)_$`)

// registryOf returns the host that images are pulled from whose settings are in
// a directory of that name.
func registryOf(dir string) string {
	if m := portDirRE.FindStringSubmatch(dir); m != nil {
		dir = m[1] + ":" + m[2]
	}
	if dir == hubName {
		return hubHost
	}
	host, err := hostOf(dir)
	if err != nil {
		return dir // no host either
	}
	return host
}
