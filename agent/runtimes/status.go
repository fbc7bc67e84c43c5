// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"maps"
	"slices"
)

// How a runtime's connections are treated.
const (
	ReachStarting    = "starting"    // just found; its trust is being established
	ReachIntercepted = "intercepted" // registries it trusts us for are intercepted
	ReachPassthrough = "passthrough" // nothing is touched
)

// Ways in which a runtime came to trust the CA.
const (
	trustByStart    = "started after the CA was installed"
	trustBySystem   = "proven: its system roots have the CA"
	trustByCertsD   = "proven: it reads the CA from certs.d at each pull"
	trustRemembered = "proven before the agent's own restart"
)

// Status is a runtime as the status shows it.
type Status struct {
	Kind  string `json:"kind"`
	PID   int    `json:"pid"`
	Netns uint64 `json:"netns"` // the namespace's inode
	Reach string `json:"reach"`
	// Trust says how it came to trust the CA.
	Trust string `json:"trust,omitempty"`
	// Except are registries that are passed through although others are
	// intercepted, with the reason.
	Except map[string]string `json:"except,omitempty"`
	// Reason says why it is passed through, and Step what changes that.
	Reason string `json:"reason,omitempty"`
	Step   string `json:"step,omitempty"`
	// RestartHelps says that a restart is all that it needs to be intercepted.
	RestartHelps bool `json:"restart_helps,omitempty"`
}

// Intercepts says whether the runtime is intercepted for a registry.
func (s Status) Intercepts(host string) bool {
	return s.Reach == ReachIntercepted && s.Except[host] == "" && s.Except[anyRegistry] == ""
}

// anyRegistry stands for all hosts in Status.Except.
const anyRegistry = "any registry"

func (rs *Runtimes) Status() []Status {
	rs.mu.Lock()
	all := slices.Collect(maps.Values(rs.all))
	rs.mu.Unlock()
	slices.SortFunc(all, func(a, b *Runtime) int { return a.PID - b.PID })
	hosts := rs.o.Registries()
	found := make([]Status, 0, len(all))
	for _, rt := range all {
		rt.mu.Lock()
		refused := rs.state.refusedBy(rt.program)
		rt.mu.Unlock()
		except := exceptions(rs.except(rt, slices.Compact(slices.Sorted(slices.Values(slices.Concat(hosts, refused))))...))
		rt.mu.Lock()
		s := Status{Kind: rt.kind.name, PID: rt.PID, Netns: rt.netns, Reach: rt.reach, Trust: rt.how, Reason: rt.reason, Step: rt.step,
			RestartHelps: rt.restartHelps && rt.reach == ReachPassthrough}
		if rt.reach == ReachIntercepted {
			s.Except = except
		}
		rt.mu.Unlock()
		found = append(found, s)
	}
	return found
}

// exceptions puts exceptions into words, what is the same for all registries
// once.
func exceptions(all map[string]error) (said map[string]string) {
	texts := make(map[string]bool)
	for host, err := range all {
		if err == nil {
			texts[""] = true
			continue
		}
		if said == nil {
			said = make(map[string]string)
		}
		said[host] = err.Error()
		texts[err.Error()] = true
	}
	if len(all) > 1 && len(texts) == 1 && !texts[""] {
		return map[string]string{anyRegistry: slices.Collect(maps.Keys(texts))[0]}
	}
	return said
}
