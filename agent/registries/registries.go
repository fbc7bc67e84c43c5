// SPDX-License-Identifier: Apache-2.0

// Package registries has the registries of a node beside the well-known ones: those
// that an operator has named, by flags and by a file that is read again when it
// changes, and those that were learned.
package registries

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"weir/proxy/registry"
)

// fileInterval is how often it is looked whether --registry-file has
// changed.
const fileInterval = 2 * time.Second

// List are the registries of a node. [List.Load] and [List.OpenLearned] fill it.
type List struct {
	Hosts registry.Hosts
	flags []string
	file  string

	content []byte // of the file, when it was last looked at

	mu      sync.Mutex
	pools   map[string]*x509.CertPool
	named   []string
	added   map[string]time.Time // while the agent runs, and when
	learned learned
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
	defer rs.mu.Unlock()
	rs.pools, rs.named = pools, hosts
	rs.update()
	return nil
}

// update makes known what is in the lists. The caller holds rs.mu.
func (rs *List) update() { rs.Hosts.Set(rs.named, rs.learned.hosts(StateLearned)) }

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

// Names are the names that the CA has to speak for: of all registries that are known.
func (rs *List) Names() (names []string) {
	for _, k := range rs.Hosts.All() {
		if k.Learned {
			if by, _ := rs.Hosts.Find(k.Host); !by.Learned {
				continue // it is one already by its domain
			}
		}
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

// Ports are those that registries are at.
func (rs *List) Ports() (ports []uint16) {
	for _, k := range rs.Hosts.All() {
		if _, port, err := net.SplitHostPort(k.Host); err == nil {
			if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 && !slices.Contains(ports, uint16(n)) {
				ports = append(ports, uint16(n))
			}
		}
	}
	return ports
}

// recently is for how long a registry has been added just now: longer than most
// pulls take.
const recently = 10 * time.Minute

// Recent are the registries that were added just now.
func (rs *List) Recent() (hosts []string) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for host, at := range rs.added {
		if time.Since(at) < recently {
			hosts = append(hosts, host)
		}
	}
	for _, r := range rs.learned.all {
		if since := time.Since(r.At); r.State == StateLearned && since >= 0 && since < recently {
			hosts = append(hosts, r.Host)
		}
	}
	return hosts
}

// Watch reads the file again whenever it has changed, until ctx is done. changed is
// told then, and of the registries that were added.
func (rs *List) Watch(ctx context.Context, changed func(added ...string), log *slog.Logger) {
	if rs.file == "" {
		return
	}
	t := time.NewTicker(fileInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			rs.reload(changed, log)
		case <-ctx.Done():
			return
		}
	}
}

// reload reads the file again if it has changed.
func (rs *List) reload(changed func(added ...string), log *slog.Logger) {
	content, err := os.ReadFile(rs.file)
	if err != nil || bytes.Equal(content, rs.content) {
		return // between two versions of it, maybe
	}
	rs.content = content
	before := rs.Hosts.All()
	if err := rs.set(content); err != nil {
		log.Error("--registry-file has an error; the registries stay as they were", "err", err)
		return
	}
	var added []string
	for _, k := range rs.Hosts.All() {
		if !slices.Contains(before, k) {
			added = append(added, k.Host)
		}
	}
	rs.mu.Lock()
	if rs.added == nil {
		rs.added = make(map[string]time.Time)
	}
	maps.DeleteFunc(rs.added, func(_ string, at time.Time) bool { return time.Since(at) > recently })
	for _, host := range added {
		rs.added[host] = time.Now()
	}
	rs.mu.Unlock()
	log.Info("read --registry-file again", "file", rs.file, "added", added)
	changed(added...)
}
