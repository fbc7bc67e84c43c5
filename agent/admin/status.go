// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"os"
	"time"

	"weir/agent/redirect"
	"weir/agent/runtimes"
	"weir/bpf"
	"weir/p2p"
	"weir/proxy"
	"weir/proxy/registry"
	"weir/proxy/store"
)

// Status is what /api/status shows.
type Status struct {
	Version    string            `json:"version"`
	PID        int               `json:"pid"`
	Started    time.Time         `json:"started"`
	Cgroup     string            `json:"cgroup"`
	DataDir    string            `json:"data_dir"`
	Runtimes   []runtimes.Status `json:"runtimes"`
	Listeners  []redirect.Status `json:"listeners"`
	Registries []registry.Stats  `json:"registries"`
	// Waiting are registries that are passed through until the agent is
	// restarted.
	Waiting []string `json:"waiting,omitempty"`
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
		Runtimes: s.o.Runtimes.Status(), Listeners: s.o.Listeners.Status(),
		Registries: s.o.Registry.Stats(), Waiting: s.o.Registries.Waiting(), UnknownHosts: s.o.Proxy.Unknowns(), Connections: s.o.Proxy.Stats(),
		Store: s.o.Store.Stats(), Kernel: kernel,
	}
	if s.o.Peers != nil {
		p := s.o.Peers.Status()
		st.Peers = &p
	}
	return st
}
