// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"

	"weir/agent/runtimes"
	"weir/p2p"
	"weir/proxy/registry"
)

// Figures are sums and counts, of one node or of several. They are all that
// nodes send each other of themselves: no image, no client, no name but those of
// registries.
type Figures struct {
	Runtimes      int64            `json:"runtimes"`
	Intercepted   int64            `json:"intercepted"` // of the runtimes
	Pulling       int64            `json:"pulling"`     // pulls that are running
	StoreBlobs    int64            `json:"store_blobs"`
	StoreBytes    int64            `json:"store_bytes"`
	StoreMaxBytes int64            `json:"store_max_bytes"`
	Registries    []registry.Stats `json:"registries"` // since the start
	// History are the quarters of an hour of the last day in which something
	// was got, the oldest first.
	History []Step `json:"history,omitempty"`
}

// NodeFigures are a node's.
type NodeFigures struct {
	// ID is the node's name among peers, and Address where it was connected to;
	// this node's own has none.
	ID      string `json:"id"`
	Address string `json:"address,omitempty"`
	Version string `json:"version"`
	Figures
}

// Cluster is what /api/cluster shows: this node and its peers.
type Cluster struct {
	// Figures are the sums over Nodes.
	Figures
	// Nodes has this node first, without the history.
	Nodes []NodeFigures `json:"nodes"`
	// Silent are peers that are connected and sent no figures.
	Silent int `json:"silent"`
}

const (
	// maxFigures bounds all of a peer's figures together, so that no sum over
	// nodes can overflow.
	maxFigures = 1 << 52
	// maxRegistries bounds the registries that are named; the rest is summed up.
	maxRegistries = 64
	// peersMaxAge is how old what peers said may be before they are asked again,
	// peersKeepAge how long it counts when they don't answer.
	peersMaxAge, peersKeepAge = 5 * time.Second, time.Minute
)

// nameRE is what a registry's name and a version are made of. Those without TLS,
// or with a CA of a runtime's own, are called http://HOST@ADDRESS and HOST#KEY.
var nameRE = regexp.MustCompile(`^[A-Za-z0-9()\[\]._:+/@#-]{1,255}$`)

// figures are this node's.
func (s *Server) figures() NodeFigures {
	all, kept := s.o.Runtimes.Status(), s.o.Store.Stats()
	f := NodeFigures{Version: s.o.Version, Figures: Figures{Runtimes: int64(len(all)), Registries: topRegistries(s.o.Registry.Stats()),
		StoreBlobs: int64(kept.Blobs), StoreBytes: kept.Bytes, StoreMaxBytes: kept.MaxBytes}}
	if s.o.Peers != nil {
		f.ID = s.o.Peers.ID()
	}
	for _, r := range all {
		if r.Reach == runtimes.ReachIntercepted {
			f.Intercepted++
		}
	}
	for _, p := range s.o.Registry.Pulls() {
		if p.Ended.IsZero() {
			f.Pulling++
		}
	}
	s.history.add(time.Now(), trafficOf(f.Registries))
	f.History = s.history.list()
	return f
}

// Figures are this node's figures, as peers get them; nil if there are none for
// them.
func (s *Server) Figures() []byte {
	b, err := json.Marshal(s.figures())
	if err != nil || len(b) > p2p.MaxFigures {
		s.o.Log.Warn("this node's figures can't be sent to peers", "bytes", len(b), "err", err)
		return nil
	}
	return b
}

// topRegistries returns those of the registries from which most came, and the rest as one.
// What no node may say is among the rest: clients make up names of registries
// without TLS.
func topRegistries(all []registry.Stats) []registry.Stats {
	all = slices.Clone(all)
	unsaid := func(r registry.Stats) bool { return !nameRE.MatchString(r.Registry) }
	if len(all) > maxRegistries || slices.ContainsFunc(all, unsaid) {
		slices.SortFunc(all, func(a, b registry.Stats) int {
			return cmp.Or(cmp.Compare(bytesOf(b), bytesOf(a)), cmp.Compare(a.Registry, b.Registry))
		})
		named, other := 0, registry.Stats{Registry: registry.Other}
		all = slices.DeleteFunc(all, func(r registry.Stats) bool {
			rest := r.Registry == registry.Other || named == maxRegistries-1 || unsaid(r)
			if rest {
				other.Add(r)
			} else {
				named++
			}
			return rest
		})
		all = append(all, other)
	}
	slices.SortFunc(all, func(a, b registry.Stats) int { return cmp.Compare(a.Registry, b.Registry) })
	return all
}

func bytesOf(r registry.Stats) int64 {
	return r.BytesFromStore + r.BytesFromPeers + r.BytesFromUpstream
}

// peerStats is the figures that peers have sent.
type peerStats struct {
	mu    sync.Mutex
	asked time.Time
	nodes map[string]peerFigures // by peer id
}

type peerFigures struct {
	NodeFigures
	at time.Time
}

// Cluster returns the sums over this node and its peers. Peers are asked when
// a client asks for the sums, and not more often than each few seconds.
func (s *Server) Cluster() Cluster {
	c := Cluster{Nodes: []NodeFigures{s.figures()}}
	if s.o.Peers != nil {
		var others []NodeFigures
		others, c.Silent = s.peerStats.from(time.Now(), s.o.Peers.Status().Peers, func() map[string][]byte { return s.o.Peers.Figures(s.ctx) })
		c.Nodes = append(c.Nodes, others...)
	}
	c.Figures = sum(c.Nodes)
	for i := range c.Nodes {
		c.Nodes[i].History = nil
	}
	return c
}

// from returns what the connected peers say, and how many say nothing.
func (h *peerStats) from(now time.Time, connected []p2p.Peer, ask func() map[string][]byte) (nodes []NodeFigures, silent int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now.Sub(h.asked) >= peersMaxAge {
		said := ask()
		next := make(map[string]peerFigures)
		for _, p := range connected {
			if f, err := readFigures(said[p.ID]); err == nil {
				next[p.ID] = peerFigures{f, now}
			} else if old, ok := h.nodes[p.ID]; ok && now.Sub(old.at) < peersKeepAge {
				next[p.ID] = old
			}
		}
		h.asked, h.nodes = now, next
	}
	for _, p := range connected {
		n, ok := h.nodes[p.ID]
		if !ok {
			silent++
			continue
		}
		n.ID, n.Address = p.ID, p.Address
		nodes = append(nodes, n.NodeFigures)
	}
	slices.SortFunc(nodes, func(a, b NodeFigures) int { return cmp.Compare(a.Address, b.Address) })
	return nodes, silent
}

// readFigures reads what a peer says, and refuses what no node says.
func readFigures(b []byte) (f NodeFigures, err error) {
	if b == nil {
		return f, errors.New("nothing was said")
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return f, err
	}
	if len(f.Registries) > maxRegistries || len(f.History) > historySteps {
		return f, fmt.Errorf("%d registries and %d steps are too many", len(f.Registries), len(f.History))
	}
	all := []int64{f.Runtimes, f.Intercepted, f.Pulling, f.StoreBlobs, f.StoreBytes, f.StoreMaxBytes}
	names := []string{f.Version}
	for _, r := range f.Registries {
		all = append(all, r.Requests, r.Hits, r.Misses, r.Errors, r.Stale, r.Pushed, r.BytesFromStore, r.BytesFromPeers, r.BytesFromUpstream)
		names = append(names, r.Registry)
	}
	for _, s := range f.History {
		all = append(all, s.BytesFromStore, s.BytesFromPeers, s.BytesFromUpstream)
	}
	var total int64
	for _, n := range all {
		if n < 0 || n > maxFigures || total > maxFigures {
			return f, fmt.Errorf("%d can't be", n)
		}
		total += n
	}
	for _, name := range names {
		if !nameRE.MatchString(name) {
			return f, fmt.Errorf("%.40q can't be a name", name)
		}
	}
	return f, nil
}

// sum adds nodes' figures up.
func sum(nodes []NodeFigures) (f Figures) {
	registries := make(map[string]*registry.Stats)
	steps := make(map[int64]*Step)
	for _, n := range nodes {
		f.Runtimes += n.Runtimes
		f.Intercepted += n.Intercepted
		f.Pulling += n.Pulling
		f.StoreBlobs += n.StoreBlobs
		f.StoreBytes += n.StoreBytes
		f.StoreMaxBytes += n.StoreMaxBytes
		for _, r := range n.Registries {
			if registries[r.Registry] == nil {
				registries[r.Registry] = &registry.Stats{Registry: r.Registry}
			}
			registries[r.Registry].Add(r)
		}
		for _, s := range n.History {
			k := stepOf(s.At)
			if steps[k] == nil {
				steps[k] = &Step{At: stepStart(k)}
			}
			steps[k].add(s.traffic)
		}
	}
	all := make([]registry.Stats, 0, len(registries))
	for _, r := range registries {
		all = append(all, *r)
	}
	f.Registries = topRegistries(all)
	// A peer's clock may be wrong.
	newest := stepOf(time.Now())
	for k, s := range steps {
		if k <= newest && k > newest-historySteps {
			f.History = append(f.History, *s)
		}
	}
	slices.SortFunc(f.History, func(a, b Step) int { return a.At.Compare(b.At) })
	return f
}
