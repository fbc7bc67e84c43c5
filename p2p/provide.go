// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"

	"github.com/multiformats/go-multihash"
	"github.com/opencontainers/go-digest"
)

// Provide tells the swarm that this node has a new blob. Its stewards know at
// once, the other holders of the record when the DHT's provider gets to it.
func (n *Node) Provide(d digest.Digest) {
	if k, err := keyOf(d); err == nil {
		n.provide(k)
	}
}

// ProvideName tells the swarm that this node knows something under a name. Only
// the name's hash leaves the node.
func (n *Node) ProvideName(name string) { n.provide(nameKey(name)) }

func (n *Node) provide(k key) {
	n.schedule(k)
	if n.ctx.Err() != nil || !n.Ready() {
		return
	}
	n.wg.Go(func() {
		ctx, cancel := context.WithTimeout(n.ctx, answerTime)
		defer cancel()
		n.tell(n.stewards(ctx, k), question{Op: opHave, Key: k})
	})
}

// ProvideAll tells the swarm of all that this node has had before, in bulk.
func (n *Node) ProvideAll(all []digest.Digest) {
	keys := make([]key, 0, len(all))
	for _, d := range all {
		if k, err := keyOf(d); err == nil {
			keys = append(keys, k)
		}
	}
	n.schedule(keys...)
}

func (n *Node) schedule(keys ...key) {
	mhs := make([]multihash.Multihash, len(keys))
	for i, k := range keys {
		mhs[i] = multihash.Multihash(k)
	}
	if err := n.provider.StartProviding(false, mhs...); err != nil && n.ctx.Err() == nil {
		n.log.Warn("peers can't be told what is here", "err", err)
	}
}

// Withdraw says that a blob is here no more. Records of it that are still
// around lead to a clean "not here".
func (n *Node) Withdraw(d digest.Digest) {
	k, err := keyOf(d)
	if err != nil || n.ctx.Err() != nil {
		return
	}
	if err := n.provider.StopProviding(multihash.Multihash(k)); err != nil {
		n.log.Debug("a blob can't be withdrawn", "digest", d, "err", err)
	}
	if !n.Ready() {
		return
	}
	n.wg.Go(func() {
		ctx, cancel := context.WithTimeout(n.ctx, answerTime)
		defer cancel()
		n.tell(n.stewards(ctx, k), question{Op: opGone, Key: k})
	})
}
