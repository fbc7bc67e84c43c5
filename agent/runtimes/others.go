// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"weir/agent/procfs"
)

// Other is a program that isn't known as a runtime, by its name, and that has
// connected to a known registry: its pulls are not seen.
type Other struct {
	Program string `json:"program"` // the executable's name
	// Registries are hosts of known registries.
	Registries []string  `json:"registries"`
	LastSeen   time.Time `json:"last_seen"`
}

const (
	// maxOthers bounds the programs that are remembered, and maxOtherHosts the
	// registries of each. The programs that have not been seen for longest go first.
	maxOthers     = 64
	maxOtherHosts = 16
)

// Others are the programs that pull without being known to. The zero value has none.
type Others struct {
	mu  sync.Mutex
	all *simplelru.LRU[string, *Other] // nil for none
}

// See records that a process, which the kernel calls comm, has connected to a
// registry.
func (o *Others) See(pid int, comm, host string) {
	program := comm
	if p, err := procfs.Read(pid); err == nil && p.Exe != "" {
		program = p.Exe
	}
	if kindOf(program) != nil {
		return // it has only just become one
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.all == nil {
		o.all, _ = simplelru.NewLRU[string, *Other](maxOthers, nil)
	}
	seen, ok := o.all.Get(program)
	if !ok {
		seen = &Other{Program: program}
		o.all.Add(program, seen)
	}
	seen.LastSeen = time.Now()
	if i, found := slices.BinarySearch(seen.Registries, host); !found && len(seen.Registries) < maxOtherHosts {
		seen.Registries = slices.Insert(seen.Registries, i, host)
	}
}

// All returns them by name.
func (o *Others) All() []Other {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := []Other{}
	if o.all == nil {
		return all
	}
	for _, o := range o.all.Values() {
		seen := *o
		seen.Registries = slices.Clone(seen.Registries)
		all = append(all, seen)
	}
	slices.SortFunc(all, func(a, b Other) int { return strings.Compare(a.Program, b.Program) })
	return all
}
