// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/routing"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

const (
	// walkTime is how long the search for the peers closest to a key may take,
	// in a swarm so large that not all peers know each other.
	walkTime = time.Second / 2
	// regionTime is how long the peers in a part of the key space are remembered.
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
	// As long as the bucket that the key falls into isn't full, there is no peer
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
	found := n.search(ctx, k, target)
	if ctx.Err() == nil {
		n.regions.put(target, found)
	}
	return found
}

// search finds the peers closest to a key: it asks the closest that it knows
// for closer ones until they have all answered. Peers that are close know
// all that are, so a few answers are enough; kad-dht's own search would ask
// each peer of a bucket.
func (n *Node) search(ctx context.Context, k key, target kb.ID) []peer.ID {
	known := n.dht.RoutingTable().NearestPeers(target, bucketSize)
	asked := make(map[peer.ID]bool)
	for ctx.Err() == nil {
		known = slices.DeleteFunc(known, func(p peer.ID) bool { return p == n.host.ID() || n.peers.isDown(p) })
		next := slices.DeleteFunc(slices.Clone(known[:min(stewards, len(known))]), func(p peer.ID) bool { return asked[p] })
		if len(next) == 0 {
			break
		}
		type near struct {
			by peer.ID
			answer
		}
		answers := make(chan near, len(next))
		for _, p := range next {
			asked[p] = true
			go func() {
				a, _ := n.ask(n.ctx, p, question{Op: opNear, Key: k})
				answers <- near{p, a}
			}()
		}
		for range next {
			select {
			case a := <-answers:
				watched(ctx, a.by, a.Near)
				for _, s := range a.Near {
					if !slices.Contains(known, s.ID) {
						n.learnAddrs(s)
						known = append(known, s.ID)
					}
				}
			case <-ctx.Done(): // what is known by now has to do
			}
		}
		known = kb.SortClosestPeers(known, target)
		known = known[:min(bucketSize, len(known))]
	}
	return known
}

// watched tells those who watch a search, with routing.RegisterForQueryEvents,
// whom a peer has named.
func watched(ctx context.Context, by peer.ID, named []source) {
	if !routing.SubscribesToQueryEvents(ctx) {
		return
	}
	ev := &routing.QueryEvent{ID: by, Type: routing.PeerResponse}
	for _, s := range named {
		ev.Responses = append(ev.Responses, &peer.AddrInfo{ID: s.ID})
	}
	routing.PublishQueryEvent(ctx, ev)
}

// knownNear answers opNear.
func (n *Node) knownNear(k key, who peer.ID) (near []source) {
	for _, p := range n.dht.RoutingTable().NearestPeers(kb.ConvertKey(string(k)), bucketSize) {
		if addrs := n.addrsOf(p); p != who && len(addrs) > 0 && !n.peers.isDown(p) {
			near = append(near, source{ID: p, Addrs: addrs[:min(len(addrs), maxAddrs)]})
		}
	}
	return near
}

// learnAddrs records the addresses of a peer that this node is not connected to.
func (n *Node) learnAddrs(s source) {
	var addrs []ma.Multiaddr
	for _, hostPort := range s.Addrs {
		ap, err := netip.ParseAddrPort(hostPort)
		if err != nil {
			continue
		}
		if a, err := manet.FromNetAddr(net.TCPAddrFromAddrPort(ap)); err == nil {
			addrs = append(addrs, a)
		}
	}
	n.host.Peerstore().AddAddrs(s.ID, addrs, peerstore.TempAddrTTL)
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

// put records the result of a search: the peers closest to target. Of those
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
