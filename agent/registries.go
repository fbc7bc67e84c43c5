// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"weir/proxy/registry"
)

// registryFileInterval is how often it is looked whether --registry-file has
// changed.
const registryFileInterval = 2 * time.Second

// registries are the registries that a user has added, and what they are
// verified with.
type registries struct {
	hosts registry.Hosts
	flags []string
	file  string

	mu      sync.Mutex
	pools   map[string]*x509.CertPool
	content []byte   // of the file, when it was last looked at
	missing []string // the CA may not speak for them
}

// load reads the flags and the file.
func (rs *registries) load(flags []string, file string) error {
	rs.flags, rs.file = flags, file
	if file != "" {
		var err error
		if rs.content, err = os.ReadFile(file); err != nil {
			return fmt.Errorf("reading --registry-file: %w", err)
		}
	}
	return rs.set(rs.content)
}

// set makes known what the flags and the file's content name.
func (rs *registries) set(content []byte) error {
	var hosts []string
	pools := make(map[string]*x509.CertPool)
	add := func(where, spec string) error {
		host, pool, err := parseRegistry(where, spec)
		if err != nil {
			return err
		}
		hosts = append(hosts, host)
		if pool != nil {
			pools[host] = pool
		}
		return nil
	}
	for _, spec := range rs.flags {
		if err := add("--registry", spec); err != nil {
			return err
		}
	}
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if err := add(rs.file+":", line); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: %w", rs.file, err)
	}
	rs.mu.Lock()
	rs.pools = pools
	rs.mu.Unlock()
	rs.hosts.Set(hosts...)
	return nil
}

// parseRegistry reads HOST[:PORT][=FILE.pem].
func parseRegistry(where, spec string) (host string, pool *x509.CertPool, err error) {
	host, file, withCA := strings.Cut(spec, "=")
	host = registry.Canonical(host)
	if host == "" || strings.ContainsAny(host, "/ \t") {
		return "", nil, fmt.Errorf("%s %q names no host; write HOST, HOST:PORT or HOST=FILE.pem", where, spec)
	}
	if !withCA {
		return host, nil, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return "", nil, fmt.Errorf("reading the CA of %s %s: %w", where, host, err)
	}
	if pool, err = x509.SystemCertPool(); err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return "", nil, fmt.Errorf("%s, the CA of %s %s, has no PEM certificate", file, where, host)
	}
	return host, pool, nil
}

// roots returns what a registry is verified with, nil for the system's roots.
func (rs *registries) roots(host string) *x509.CertPool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.pools[host]
}

// reload reads the file again if it has changed. permits says for which hosts
// the CA may speak: others have to wait until the agent starts anew, when the
// CA's certificate is made anew.
func (rs *registries) reload(permits func(host string) bool, log *slog.Logger) {
	if rs.file == "" {
		return
	}
	content, err := os.ReadFile(rs.file)
	if err != nil || bytes.Equal(content, rs.content) {
		return // between two versions of it, maybe
	}
	rs.content = content
	if err := rs.set(content); err != nil {
		log.Error("the registries are left as they were", "err", err)
		return
	}
	var missing []string
	for _, k := range rs.hosts.All() {
		name := k.Host
		if h, _, err := net.SplitHostPort(name); err == nil {
			name = h
		}
		if !permits(name) {
			missing = append(missing, k.Host)
		}
	}
	rs.mu.Lock()
	rs.missing = missing
	rs.mu.Unlock()
	log.Info("the registries were read again", "file", rs.file)
	if len(missing) > 0 {
		log.Warn("registries are passed through until the agent is restarted: its CA was made without them", "registries", missing)
	}
}

// waiting are the registries that need a restart of the agent.
func (rs *registries) waiting() []string {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return slices.Clone(rs.missing)
}
