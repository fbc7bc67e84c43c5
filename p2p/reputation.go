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
	// shunTime is how long nothing is read from a peer that has handed on wrong bytes
	// maxStrikes times, which it hadn't verified itself, and lieTime from one that sent
	// wrong bytes for a blob that it said to have verified. No honest peer does that:
	// what it has kept it checks when it reads it.
	shunTime   = 10 * time.Minute
	maxStrikes = 3
	lieTime    = 24 * time.Hour
	// believeBytes is how much must have come from a peer and been verified before its
	// bytes are passed on as they come. An identity costs nothing, and a lie breaks off
	// one pull: that is to be had for having given a small image.
	believeBytes = 32 << 20
	// maxReports bounds the reports of wrong bytes that are taken from a peer in
	// reportTime.
	maxReports, reportTime = 8, time.Hour
	// reportTries is how often a report is sent to a peer that gives no answer.
	reportTries = 3
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
	verified                        int64 // bytes of blobs that came from it and were verified
	lied                            bool
	doubtUntil                      time.Time // a peer says that it has lied
	reported                        int       // by this peer, since
	reportsSince                    time.Time
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

// fault is what a peer has to do with wrong bytes that came from it.
type fault int

const (
	unverified fault = iota // it had not said that it has the blob, or not all of the bytes are its
	partial                 // the latter, and it was believed
	lie                     // it had, and they are
)

// wrong notes that a peer sent wrong bytes. It returns for how long nothing is read from
// it, and whether others should know of it.
func (r *reputation) wrong(p peer.ID, f fault) (shunned time.Duration, news bool) {
	r.with(p, func(x *record) {
		now := r.now()
		if f != unverified {
			news = !x.lied && !now.Before(x.doubtUntil)
			x.lied = x.lied || f == lie
			x.disbelieve(now)
		}
		switch x.strikes++; {
		case f == lie:
			shunned = lieTime
		case x.strikes >= maxStrikes:
			shunned = shunTime
		default:
			return
		}
		x.shunUntil, x.strikes = now.Add(shunned), 0
	})
	return shunned, news
}

// disbelieve has a peer be one that is verified first, for a while, and has to earn
// again to be believed.
func (x *record) disbelieve(now time.Time) {
	x.doubtUntil, x.verified = now.Add(lieTime), 0
}

// verified notes that a blob, of which so many bytes came from a peer, was verified.
func (r *reputation) verified(p peer.ID, bytes int64) {
	r.with(p, func(x *record) { x.verified += bytes })
}

// believed says whether the bytes of a peer may be passed on before the digest of all
// is verified, of a blob that it says it has verified. One that has ever sent wrong ones
// is not believed again.
func (r *reputation) believed(p peer.ID) (is bool) {
	r.with(p, func(x *record) {
		is = x.verified >= believeBytes && !x.lied && !r.now().Before(x.doubtUntil)
	})
	return is
}

// reports says whether one more report of a peer's counts.
func (r *reputation) reports(by peer.ID) (ok bool) {
	r.with(by, func(x *record) {
		if now := r.now(); now.Sub(x.reportsSince) > reportTime {
			x.reportsSince, x.reported = now, 0
		}
		x.reported++
		ok = x.reported <= maxReports
	})
	return ok
}

// doubt notes that one peer says that another has lied. That may itself be a lie, so
// it costs that one no more than to be believed: nothing of it is passed on before it
// is verified, and others are read from first. It returns false when that was so, or
// when the one says too much.
func (r *reputation) doubt(by, p peer.ID) (is bool) {
	if !r.reports(by) {
		return false
	}
	r.with(p, func(x *record) {
		now := r.now()
		is = !now.Before(x.doubtUntil)
		x.disbelieve(now)
	})
	return is
}

// doubted says whether another peer is to be read from before this one.
func (r *reputation) doubted(p peer.ID) (is bool) {
	r.with(p, func(x *record) { is = x.lied || r.now().Before(x.doubtUntil) })
	return is
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

// penalize records that a peer sent wrong bytes, and tells all peers, unless one of them
// has told this node, when it may have been a lie.
func (n *Node) penalize(id peer.ID, d digest.Digest, f fault) {
	shunned, news := n.peers.wrong(id, f)
	if shunned > 0 {
		n.log.Warn("a peer sent wrong bytes; nothing is read from it for a while", "peer", id, "digest", d, "for", shunned)
	}
	k, err := keyOf(d)
	if !news || err != nil || !n.peers.reports(n.host.ID()) {
		return
	}
	all := append(n.host.Network().Peers(), n.dht.RoutingTable().ListPeers()...)
	slices.Sort(all)
	all = slices.DeleteFunc(slices.Compact(all), func(p peer.ID) bool { return p == id })
	n.tell(all, question{Op: opLie, Key: k, From: id})
}

// reported records what a peer reports.
func (n *Node) reported(by peer.ID, q question) {
	if q.From != n.host.ID() && q.From != by && n.peers.doubt(by, q.From) {
		n.log.Info("a peer says that another has sent wrong bytes: what that one sends is verified before any of it is passed on", "by", by, "peer", q.From, "key", q.Key)
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
