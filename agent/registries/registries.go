// SPDX-License-Identifier: Apache-2.0

// Package registries has the registries that an operator has named beside the
// well-known ones, by flags and by a file that is read again when it changes.
package registries

import (
	"bufio"
	"bytes"
	"context"
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

// fileInterval is how often it is looked whether --registry-file has
// changed.
const fileInterval = 2 * time.Second

// List are the registries that an operator has named, and what they are
// verified with.
type List struct {
	Hosts registry.Hosts
	flags []string
	file  string

	mu      sync.Mutex
	pools   map[string]*x509.CertPool
	content []byte   // of the file, when it was last looked at
	missing []string // the CA may not speak for them
}

// Load reads the flags and the file.
func (rs *List) Load(flags []string, file string) error {
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
func (rs *List) set(content []byte) error {
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
	rs.Hosts.Set(hosts...)
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

// Roots returns what a registry is verified with, nil for the system's roots.
func (rs *List) Roots(host string) *x509.CertPool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.pools[host]
}

// Names are the names of all registries that are known.
func (rs *List) Names() (names []string) {
	for _, k := range rs.Hosts.All() {
		names = append(names, k.Host)
	}
	return names
}

// Directories are the names of registries that can be made a directory of in a
// certs.d: of those that are known by the domain that they are in, it is for the
// one that is used.
func (rs *List) Directories() (names []string) {
	for _, k := range rs.Hosts.All() {
		if !k.Below {
			names = append(names, k.Host)
		}
	}
	return names
}

// Watch reads the file again whenever it has changed, until ctx is done. permits
// is as in reload.
func (rs *List) Watch(ctx context.Context, permits func(host string) bool, log *slog.Logger) {
	if rs.file == "" {
		return
	}
	t := time.NewTicker(fileInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			rs.reload(permits, log)
		case <-ctx.Done():
			return
		}
	}
}

// reload reads the file again if it has changed. permits says for which hosts
// the CA may speak: others have to wait until the agent starts anew, when the
// CA's certificate is made anew.
func (rs *List) reload(permits func(host string) bool, log *slog.Logger) {
	content, err := os.ReadFile(rs.file)
	if err != nil || bytes.Equal(content, rs.content) {
		return // between two versions of it, maybe
	}
	rs.content = content
	if err := rs.set(content); err != nil {
		log.Error("--registry-file has an error; the registries stay as they were", "err", err)
		return
	}
	var missing []string
	for _, k := range rs.Hosts.All() {
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
	log.Info("read --registry-file again", "file", rs.file)
	if len(missing) > 0 {
		log.Warn("registries are passed through until the agent is restarted: its CA was made without them", "registries", missing)
	}
}

// Waiting are the registries that need a restart of the agent.
func (rs *List) Waiting() []string {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return slices.Clone(rs.missing)
}
