// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"slices"
	"sync"
	"time"

	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/peer"
)

const (
	// walkTime is how long the search for the peers closest to a key may take,
	// in a swarm so large that not everybody knows everybody.
	walkTime = 2 * time.Second
	// regionTime is how long it is believed who is in a part of the key space.
	// A peer that has come since is asked later for what is there.
	regionTime = 5 * time.Minute
	// maxRegionBits bounds how small a part of the key space is remembered by
	// itself.
	maxRegionBits = 16
)

// closest returns the peers closest to a key, this node among them if it is,
// the closest first. Those that don't answer are left out.
func (n *Node) closest(ctx context.Context, k key, count int) []peer.ID {
	target := kb.ConvertKey(string(k))
	near := slices.DeleteFunc(slices.Clone(n.near(ctx, k, target)), func(p peer.ID) bool { return p == n.host.ID() || n.peers.isDown(p) })
	return kb.SortClosestPeers(append(near, n.host.ID()), target)[:min(count, len(near)+1)]
}

// near returns peers of which those closest to a key are some. All nodes have
// to agree on who is closest.
func (n *Node) near(ctx context.Context, k key, target kb.ID) []peer.ID {
	rt := n.dht.RoutingTable()
	// As long as the bucket that the key falls into isn't full, there is nobody
	// in it that this node doesn't know.
	cpl := kb.CommonPrefixLen(target, kb.ConvertPeerID(n.host.ID()))
	if rt.NPeersForCpl(uint(cpl)) < bucketSize {
		return rt.NearestPeers(target, 2*replicas)
	}
	if peers, ok := n.regions.get(target); ok {
		return peers
	}
	ctx, cancel := context.WithTimeout(ctx, walkTime)
	defer cancel()
	found, err := n.dht.GetClosestPeers(ctx, string(k))
	if err != nil {
		return rt.NearestPeers(target, 2*replicas)
	}
	n.regions.put(target, found)
	return found
}

// regions remembers who is where in the key space. Those closest to a key are
// all of those that share so many first bits with it, when these are enough.
type regions struct {
	mu  sync.Mutex
	all map[string]region
}

type region struct {
	peers []peer.ID
	until time.Time
}

// prefix names the first bits of an id.
func prefix(id kb.ID, bits int) string {
	b := append([]byte{byte(bits)}, id[:(bits+7)/8]...)
	if rest := bits % 8; rest > 0 {
		b[len(b)-1] &= 0xff << (8 - rest)
	}
	return string(b)
}

func (r *regions) get(target kb.ID) ([]peer.ID, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for bits := range maxRegionBits + 1 {
		p := prefix(target, bits)
		x, ok := r.all[p]
		if ok && time.Now().Before(x.until) {
			return x.peers, true
		}
		delete(r.all, p)
	}
	return nil, false
}

// put takes in the result of a search: the peers closest to target. Of those
// farthest from it there may be more.
func (r *regions) put(target kb.ID, found []peer.ID) {
	bits := maxRegionBits + 1
	for _, p := range found {
		bits = min(bits, kb.CommonPrefixLen(target, kb.ConvertPeerID(p))+1)
	}
	within := slices.DeleteFunc(slices.Clone(found), func(p peer.ID) bool { return kb.CommonPrefixLen(target, kb.ConvertPeerID(p)) < bits })
	if bits > maxRegionBits || len(within) < 2*replicas {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil {
		r.all = make(map[string]region)
	}
	r.all[prefix(target, bits)] = region{within, time.Now().Add(regionTime)}
}
