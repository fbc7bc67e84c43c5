// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"slices"
	"sync"
	"time"

	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multihash"
	"github.com/opencontainers/go-digest"
)

// What a node has is announced in two ways. The stewards of what is new are sent it
// at once, one by one. And provider records are put into the DHT, at the replicas
// closest peers of each key: what is new with the next round, all else once an
// hour, a part of the key space at a time. Neighbouring keys have the
// same closest peers, so a peer gets many keys in one message. (kad-dht's own
// provider, as of 0.42.2, sends a message for each record, and picks other
// peers of a region than the closest, where regions don't begin at the root.)

const (
	// roundTime is how often records of what is new are put.
	roundTime = 10 * time.Second
	// sweeps is in how many parts the key space is swept each hour.
	sweeps = 12
	// maxKeys bounds the keys of a message.
	maxKeys = 512
	// maxProvided bounds the records that are taken from a peer each hour.
	maxProvided = 1 << 17
)

// provided is what this node provides.
type provided struct {
	mu   sync.Mutex
	keys map[key]kb.ID
	new  map[key]bool
	wake chan struct{} // receives when there is something new
}

func newProvided() *provided {
	return &provided{keys: make(map[key]kb.ID), new: make(map[key]bool), wake: make(chan struct{}, 1)}
}

func (p *provided) add(keys ...key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range keys {
		if _, ok := p.keys[k]; !ok {
			p.keys[k], p.new[k] = kb.ConvertKey(string(k)), true
		}
	}
}

func (p *provided) remove(k key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.keys, k)
	delete(p.new, k)
}

// due returns what is new, and all else that is in the part of the key space
// with a number, or everything.
func (p *provided) due(part int, all bool) (due []key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, id := range p.keys {
		if all || p.new[k] || int(id[0])*sweeps>>8 == part {
			due = append(due, k)
		}
	}
	clear(p.new)
	return due
}

// keepProviding puts records until the node is closed.
func (n *Node) keepProviding() {
	t := time.NewTicker(roundTime)
	defer t.Stop()
	sweep := time.NewTicker(reprovide / sweeps)
	defer sweep.Stop()
	known, swept := 0, 0
	for {
		part := -1
		select {
		case <-n.ctx.Done():
			return
		case <-t.C:
		case <-n.provided.wake:
		case <-sweep.C:
			part = swept % sweeps
			swept++
		}
		now := n.dht.RoutingTable().Size()
		if now == 0 {
			continue
		}
		// When so many have come or gone, others are closest.
		moved := known == 0 || max(now, known)-min(now, known) > known/4
		if moved {
			known = now
		}
		n.putRecords(n.ctx, n.provided.due(part, moved))
	}
}

// putRecords puts records of keys at the peers that are closest to them.
func (n *Node) putRecords(ctx context.Context, keys []key) {
	messages := make(map[peer.ID][]key)
	for _, k := range keys {
		for _, p := range n.closest(ctx, k, replicas) {
			messages[p] = append(messages[p], k)
		}
		if ctx.Err() != nil {
			return
		}
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for p, keys := range messages {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			for part := range slices.Chunk(keys, maxKeys) {
				if _, err := n.ask(ctx, p, question{Op: opProvide, Keys: part}); err != nil {
					n.log.Debug("a peer can't be sent provider records", "peer", p, "keys", len(part), "err", err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// record records what a peer provides.
func (n *Node) record(ctx context.Context, who peer.ID, keys []key) {
	if who != n.host.ID() && !n.peers.provides(who, len(keys)) {
		return
	}
	for _, k := range keys {
		if err := n.dht.ProviderStore().AddProvider(ctx, multihash.Multihash(k), peer.AddrInfo{ID: who}); err != nil {
			n.log.Debug("a record can't be kept", "peer", who, "err", err)
			return
		}
	}
}

// Provide tells the swarm that this node has a new blob. Its stewards know at
// once.
func (n *Node) Provide(d digest.Digest) {
	if k, err := keyOf(d); err == nil {
		n.provide(k)
	}
}

// ProvideName tells the swarm that this node knows something under a name. Only
// the name's hash leaves the node.
func (n *Node) ProvideName(name string) { n.provide(nameKey(name)) }

func (n *Node) provide(k key) {
	n.provided.add(k)
	n.tellStewards(question{Op: opHave, Key: k})
}

// ProvideAll tells the swarm of all that this node has had before, in bulk.
func (n *Node) ProvideAll(all []digest.Digest) {
	keys := make([]key, 0, len(all))
	for _, d := range all {
		if k, err := keyOf(d); err == nil {
			keys = append(keys, k)
		}
	}
	if len(keys) == 0 {
		return
	}
	n.provided.add(keys...)
	select {
	case n.provided.wake <- struct{}{}:
	default:
	}
}

// Withdraw says that a blob is here no more. Records of it that are still
// around lead to a clean "not here".
func (n *Node) Withdraw(d digest.Digest) {
	if k, err := keyOf(d); err == nil {
		n.provided.remove(k)
		n.tellStewards(question{Op: opGone, Key: k})
	}
}

// tellStewards tells a key's stewards something, in the background.
func (n *Node) tellStewards(q question) {
	if n.ctx.Err() != nil || !n.Ready() {
		return
	}
	n.wg.Go(func() {
		ctx, cancel := context.WithTimeout(n.ctx, answerTime)
		defer cancel()
		n.tell(n.closest(ctx, q.Key, stewards), q)
	})
}
