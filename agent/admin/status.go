// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"os"
	"time"

	"weir/agent/redirect"
	"weir/agent/registries"
	"weir/agent/runtimes"
	"weir/bpf"
	"weir/p2p"
	"weir/proxy"
	"weir/proxy/registry"
	"weir/proxy/store"
)

// Status is what /api/status shows.
type Status struct {
	Version  string            `json:"version"`
	PID      int               `json:"pid"`
	Started  time.Time         `json:"started"`
	Cgroup   string            `json:"cgroup"`
	DataDir  string            `json:"data_dir"`
	Runtimes []runtimes.Status `json:"runtimes"`
	// Restarts are those of runtimes that weir has done, the latest last, if it was
	// asked to.
	Restarts []runtimes.Restart `json:"restarts,omitempty"`
	// OtherPrograms have connected to known registries, and are not known as runtimes;
	// --program makes one known.
	OtherPrograms []runtimes.Other  `json:"other_programs"`
	Listeners     []redirect.Status `json:"listeners"`
	Registries    []registry.Stats  `json:"registries"`
	// UnknownHosts were passed through because they aren't known to be
	// registries; --registry makes one known.
	UnknownHosts []proxy.Unknown `json:"unknown_hosts"`
	Connections  proxy.Stats     `json:"connections"`
	Store        store.Stats     `json:"store"`
	// Peers is nil without a swarm key.
	Peers  *p2p.Status `json:"peers,omitempty"`
	Kernel bpf.Stats   `json:"kernel"`
}

// Status returns the agent's present state.
func (s *Server) Status() Status {
	kernel, err := s.o.Kernel.Stats()
	if err != nil {
		s.o.Log.Warn("reading the kernel side's figures", "err", err)
	}
	st := Status{
		Version: s.o.Version, PID: os.Getpid(), Started: s.started, Cgroup: s.o.Cgroup, DataDir: s.o.DataDir,
		Runtimes: s.o.Runtimes.Status(), OtherPrograms: s.o.Others.All(), Listeners: s.o.Listeners.Status(),
		Registries: s.o.Registry.Stats(), UnknownHosts: s.o.Proxy.Unknowns(), Connections: s.o.Proxy.Stats(),
		Store: s.o.Store.Stats(), Kernel: kernel,
	}
	if s.o.Restarts != nil {
		st.Restarts = s.o.Restarts.All()
	}
	if s.o.Peers != nil {
		p := s.o.Peers.Status()
		st.Peers = &p
	}
	return st
}

// Registry is what /api/registries shows of one.
type Registry struct {
	registries.Registry
	// Runtimes are those that are intercepted for it, Of how many that run.
	Runtimes int `json:"runtimes"`
	Of       int `json:"of"`
}

// Registries returns the registries of the node.
func (s *Server) Registries() []Registry {
	rts := s.o.Runtimes.Status()
	found := []Registry{}
	for _, r := range s.o.Registries.All() {
		n := 0
		for _, rt := range rts {
			if r.State != registries.StateForgotten && rt.Intercepts(r.Host) {
				n++
			}
		}
		found = append(found, Registry{r, n, len(rts)})
	}
	return found
}
