// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"encoding/hex"
	"math/rand/v2"
	"net"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/discovery/mdns"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

const (
	// lookLonely is how often a node without peers looks for some, lookAgain
	// how often one that has some looks for others, which is what makes the
	// two halves of a partition find each other again.
	lookLonely = time.Second
	lookAgain  = 30 * time.Second
	// fewPeers are too few to rely on their telling of others.
	fewPeers = 8
	// dialFew and dialMany bound the addresses that are tried at a time.
	dialFew, dialMany = 2, 16
)

// discover looks for peers until the node is closed.
func (n *Node) discover() {
	if len(n.opts.Peers) == 0 {
		// Swarms with different keys on one network don't bother each other.
		name := "_weir-" + hex.EncodeToString(n.secret[:4]) + "._udp"
		s := mdns.NewMdnsService(n.host, name, finder{n})
		if err := s.Start(); err != nil {
			n.log.Warn("peers can't be found on the local network by themselves; name some with --peer", "err", err)
			return
		}
		context.AfterFunc(n.ctx, func() { s.Close() })
		return
	}
	known := make(map[string]peer.ID) // by address
	n.wg.Go(func() {
		for {
			n.look(known)
			wait := lookAgain
			if !n.Ready() {
				wait = lookLonely
			}
			select {
			case <-time.After(wait):
			case <-n.ctx.Done():
				return
			}
		}
	})
}

type finder struct{ *Node }

// HandlePeerFound implements mdns.Notifee.
func (f finder) HandlePeerFound(p peer.AddrInfo) {
	if p.ID != f.host.ID() {
		f.connect(p)
	}
}

// look resolves the configured names and connects to some of the addresses
// at which no peer is known.
func (n *Node) look(known map[string]peer.ID) {
	ctx, cancel := context.WithTimeout(n.ctx, 10*time.Second)
	defer cancel()
	all := make(map[string]bool)
	for _, name := range n.opts.Peers {
		host, port, err := net.SplitHostPort(name)
		if err != nil {
			host, port = name, DefaultPort
		}
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			n.log.Debug("a peer's name isn't known", "name", host, "err", err)
		}
		for _, ip := range ips {
			all[net.JoinHostPort(ip.Unmap().String(), port)] = true
		}
	}
	var addrs []string
	for addr := range all {
		if id, ok := known[addr]; !ok || id != n.host.ID() && n.host.Network().Connectedness(id) != network.Connected {
			addrs = append(addrs, addr)
		}
	}
	for addr := range known {
		if !all[addr] {
			delete(known, addr)
		}
	}
	slices.Sort(addrs)
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
	limit := dialFew
	if n.dht.RoutingTable().Size() < fewPeers {
		limit = dialMany
	}
	for _, addr := range addrs[:min(limit, len(addrs))] {
		// Who is there is learned by asking: names know addresses only.
		tc, id, err := n.dialPeer(ctx, "", []string{addr})
		if err != nil {
			n.log.Debug("no peer at an address", "addr", addr, "err", err)
			continue
		}
		tc.Close()
		known[addr] = id
		if id == n.host.ID() {
			continue
		}
		tcp, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			continue
		}
		if a, err := manet.FromNetAddr(tcp); err == nil {
			n.connect(peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{a}})
		}
	}
}

func (n *Node) connect(p peer.AddrInfo) {
	ctx, cancel := context.WithTimeout(n.ctx, 10*time.Second)
	defer cancel()
	if err := n.host.Connect(ctx, p); err != nil {
		n.log.Debug("can't connect to a peer", "peer", p.ID, "err", err)
		return
	}
	if n.dht.RoutingTable().Size() <= fewPeers {
		n.dht.RefreshRoutingTable()
	}
}
