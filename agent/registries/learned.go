// SPDX-License-Identifier: Apache-2.0

package registries

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/publicsuffix"
	"weir/proxy/registry"
)

// State is how a registry comes to be known.
type State string

const (
	// StateKnown: by itself.
	StateKnown State = "known"
	// StateConfigured: an operator has named it.
	StateConfigured State = "configured"
	// StateLearned: a client has shown that it is one.
	StateLearned State = "learned"
	// StateForgotten: it is none, because an operator does not want it to be.
	StateForgotten State = "forgotten"
)

// Registry is a registry of the node.
type Registry struct {
	// Host is in canonical form. Below says that it is a domain, and the hosts below
	// it are registries.
	Host  string `json:"host"`
	Below bool   `json:"below,omitempty"`
	State State  `json:"state"`
	// At is when it was learned or forgotten, and By the runtime by which it was
	// learned.
	At time.Time `json:"at,omitzero"`
	By string    `json:"by,omitempty"`
}

const (
	// maxLearned bounds the registries that are learned, and those that are not to
	// be. Half of them are for the runtimes of the node: what pods run can't take
	// all.
	maxLearned = 256
	// maxLearnedFile bounds what is read of them.
	maxLearnedFile = 1 << 20
)

// Why a registry is not learned.
var (
	errBound = fmt.Errorf("%d registries were learned already; `weir registries forget` makes room", maxLearned)
	errName  = errors.New("its name stands for others' names too")
)

// learned are the registries that were learned. Its zero value learns none.
type learned struct {
	file string
	all  []Registry
}

func (l *learned) hosts(s State) (hosts []string) {
	for _, r := range l.all {
		if r.State == s {
			hosts = append(hosts, r.Host)
		}
	}
	return hosts
}

// OpenLearned reads the registries that were learned from a file, where they are kept
// from then on. What can't be read is as if nothing had been learned.
func (rs *List) OpenLearned(file string) error {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.learned = learned{file: file}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		rs.learned.all, err = parseLearned(b)
		rs.update()
	}
	if err != nil {
		return fmt.Errorf("reading the registries that were learned: %w", err)
	}
	return nil
}

func parseLearned(b []byte) (all []Registry, err error) {
	if len(b) > maxLearnedFile {
		return nil, errors.New("the file is too large")
	}
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	counts := make(map[State]int)
	seen := make(map[string]bool)
	for i, r := range all {
		if err := checkName(r.Host); err != nil || seen[r.Host] || (r.State != StateLearned && r.State != StateForgotten) {
			return nil, fmt.Errorf("entry %d makes no sense", i)
		}
		seen[r.Host] = true
		if counts[r.State]++; counts[r.State] > maxLearned {
			return nil, errBound
		}
	}
	return all, nil
}

// checkName says why a host can't be learned. The CA is made for its name and the
// names below it.
func checkName(host string) error {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	if addr, err := netip.ParseAddr(name); err == nil {
		if addr.Zone() != "" || addr.IsLoopback() || addr.IsUnspecified() || addr.IsMulticast() {
			return errName
		}
		return nil
	}
	if host != registry.Canonical(host) || len(name) > 253 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "" {
		return errors.New("it is no host's name")
	}
	if suffix, _ := publicsuffix.PublicSuffix(name); suffix == name {
		return errName
	}
	return nil
}

// Learn makes a host a registry of the node, if it isn't one yet; added says so. by
// is the client's runtime, and onNode that it is the node's own, not a pod's.
func (rs *List) Learn(host, by string, onNode bool) (added bool, err error) {
	host = registry.Canonical(host)
	if err := checkName(host); err != nil {
		return false, fmt.Errorf("%s: %w", host, err)
	}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.learned.file == "" || slices.ContainsFunc(rs.learned.all, func(r Registry) bool { return r.Host == host }) ||
		slices.ContainsFunc(rs.Hosts.All(), func(k registry.Known) bool { return k.Host == host && !k.Below }) {
		return false, nil
	}
	bound := maxLearned
	if !onNode {
		bound /= 2
	}
	if len(rs.learned.hosts(StateLearned)) >= bound {
		return false, errBound
	}
	return true, rs.replace(append(slices.Clone(rs.learned.all), Registry{Host: host, State: StateLearned, At: time.Now().UTC().Truncate(time.Second), By: by}))
}

// Forget ends that a host is a registry of the node because it was learned, and has it
// not learned again. It is false for one that an operator has named, or that is known
// by itself.
func (rs *List) Forget(host string) (bool, error) {
	host = registry.Canonical(host)
	if err := checkName(host); err != nil {
		return false, fmt.Errorf("%s: %w", host, err)
	}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if slices.ContainsFunc(rs.Hosts.All(), func(k registry.Known) bool { return k.Host == host && !k.Learned }) || rs.learned.file == "" {
		return false, nil
	}
	all := slices.DeleteFunc(slices.Clone(rs.learned.all), func(r Registry) bool { return r.Host == host })
	all = append(all, Registry{Host: host, State: StateForgotten, At: time.Now().UTC().Truncate(time.Second)})
	if first := slices.IndexFunc(all, func(r Registry) bool { return r.State == StateForgotten }); len(all)-len(rs.learned.hosts(StateLearned)) > maxLearned {
		all = slices.Delete(all, first, first+1)
	}
	return true, rs.replace(all)
}

// Revert takes back that a host was learned.
func (rs *List) Revert(host string) error {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.replace(slices.DeleteFunc(slices.Clone(rs.learned.all), func(r Registry) bool { return r.Host == host }))
}

// All returns the registries of the node, and what was forgotten: what was learned
// first, and what is known by itself last.
func (rs *List) All() []Registry {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	all := slices.Clone(rs.learned.all)
	for _, host := range rs.named {
		all = append(all, Registry{Host: host, State: StateConfigured})
	}
	for _, k := range registry.WellKnown {
		all = append(all, Registry{Host: k.Host, Below: k.Below || k.Subtree, State: StateKnown})
	}
	return all
}

// replace keeps all, and makes it known. The caller holds rs.mu.
func (rs *List) replace(all []Registry) error {
	b, err := json.MarshalIndent(all, "", "\t")
	if err == nil {
		aside := rs.learned.file + ".new"
		err = errors.Join(os.WriteFile(aside, b, 0o600), os.Rename(aside, rs.learned.file))
	}
	if err != nil {
		return fmt.Errorf("keeping the registries that were learned: %w", err)
	}
	rs.learned.all = all
	rs.update()
	return nil
}
