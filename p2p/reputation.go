// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
)

const (
	// downTime is how long a peer that didn't answer is passed over.
	downTime = 30 * time.Second
	// slowTime is how long a peer that was slow is asked last.
	slowTime = time.Minute
	// shunTime is how long nothing is read from a peer that sent what it
	// should not have.
	shunTime = 10 * time.Minute
	// maxStrikes is how often a peer may hand on wrong bytes that it hadn't
	// verified itself.
	maxStrikes = 3
)

// reputation is what a node has seen of its peers.
type reputation struct {
	mu  sync.Mutex
	lru *lru.Cache[peer.ID, *record]
	now func() time.Time
}

type record struct {
	downUntil, slowUntil, shunUntil time.Time
	muteUntil                       time.Time
	strikes                         int
	received                        int64
	provided                        int // records since
	since                           time.Time
}

func newReputation() *reputation {
	r := &reputation{now: time.Now}
	r.lru, _ = lru.New[peer.ID, *record](1 << 13)
	return r
}

func (r *reputation) with(p peer.ID, f func(*record)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, ok := r.lru.Get(p)
	if !ok {
		rec = &record{}
		r.lru.Add(p, rec)
	}
	f(rec)
}

func (r *reputation) up(p peer.ID) { r.with(p, func(x *record) { x.downUntil = time.Time{} }) }
func (r *reputation) down(p peer.ID) {
	r.with(p, func(x *record) { x.downUntil = r.now().Add(downTime) })
}
func (r *reputation) slow(p peer.ID) {
	r.with(p, func(x *record) { x.slowUntil = r.now().Add(slowTime) })
}

func (r *reputation) mute(p peer.ID) {
	r.with(p, func(x *record) { x.muteUntil = r.now().Add(slowTime) })
}

func (r *reputation) heard(p peer.ID) { r.with(p, func(x *record) { x.muteUntil = time.Time{} }) }

func (r *reputation) isMute(p peer.ID) (is bool) {
	r.with(p, func(x *record) { is = r.now().Before(x.muteUntil) })
	return is
}

// wrong notes that a peer sent wrong bytes. verified is whether it had said
// that it has the whole blob, which it ought to have verified.
func (r *reputation) wrong(p peer.ID, verified bool) (shunned bool) {
	r.with(p, func(x *record) {
		if x.strikes++; verified || x.strikes >= maxStrikes {
			x.shunUntil, x.strikes, shunned = r.now().Add(shunTime), 0, true
		}
	})
	return shunned
}

func (r *reputation) took(p peer.ID, bytes int64) { r.with(p, func(x *record) { x.received += bytes }) }

func (r *reputation) received(p peer.ID) (n int64) {
	r.with(p, func(x *record) { n = x.received })
	return n
}

func (r *reputation) isDown(p peer.ID) (is bool) {
	r.with(p, func(x *record) { is = r.now().Before(x.downUntil) })
	return is
}

func (r *reputation) isSlow(p peer.ID) (is bool) {
	r.with(p, func(x *record) { is = r.now().Before(x.slowUntil) })
	return is
}

func (r *reputation) shunned(p peer.ID) (is bool) {
	r.with(p, func(x *record) { is = r.now().Before(x.shunUntil) })
	return is
}

// provides says whether so many records more are taken from a peer.
func (r *reputation) provides(p peer.ID, records int) (ok bool) {
	r.with(p, func(x *record) {
		if now := r.now(); now.Sub(x.since) > reprovide {
			x.since, x.provided = now, 0
		}
		x.provided += records
		ok = x.provided <= maxProvided
	})
	return ok
}

// penalize records that a peer sent what it should not have.
func (n *Node) penalize(id peer.ID, d digest.Digest, verified bool) {
	if n.peers.wrong(id, verified) {
		n.log.Warn("a peer sent wrong bytes; nothing is read from it for a while", "peer", id, "digest", d, "for", shunTime)
	}
}

// mute has nothing read from a source that answers nothing, until it answers, or for a
// while: finding that out again would take a second of each blob.
func (n *Node) mute(src source) {
	if n.peers.isMute(src.ID) {
		return
	}
	n.peers.mute(src.ID)
	go func() {
		for n.peers.isMute(src.ID) {
			select {
			case <-time.After(silentTime):
			case <-n.ctx.Done():
				return
			}
			ctx, cancel := context.WithTimeout(n.ctx, silentTime)
			_, err := n.stateAt(ctx, src, digest.FromString("")) // whatever it has
			cancel()
			if err == nil || errors.Is(err, ErrNotHere) {
				n.peers.heard(src.ID)
			}
		}
	}()
}

// good says whether something may be read from a source, and goodOf are those.
func (n *Node) good(x source) bool {
	return x.ID != n.host.ID() && !n.peers.shunned(x.ID) && !n.peers.isMute(x.ID)
}

func (n *Node) goodOf(all []source) []source {
	return slices.DeleteFunc(all, func(x source) bool { return !n.good(x) })
}
