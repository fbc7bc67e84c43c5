// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptrace"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
)

const (
	// maxAsks is how often the stewards are asked for other sources.
	maxAsks = 4
)

// ErrNoPeer says that a blob is to be had from no peer, and this node is the
// one to fetch it.
var ErrNoPeer = errors.New("no peer gives the blob")

// Share is this node's part in the getting of one blob. Its methods may be
// called concurrently, but for Open.
type Share struct {
	n    *Node
	d    digest.Digest
	key  key
	pace int64

	mu      sync.Mutex
	fetch   bool
	sources []source // not tried yet
	failed  []peer.ID
	asked   int
	gave    map[peer.ID]given
	last    *body // that Open has returned
}

// given is what a share had of a peer.
type given struct {
	bytes int64
	fault fault // that it would be the peer's if the whole were wrong
}

// Want says that this node wants a blob, and asks the blob's stewards whom to
// read it from. pace is the rate in bytes per second at which the upstream
// would give it, or 0 when that isn't known. It returns nil when there are no
// peers to ask. Close the share.
func (n *Node) Want(ctx context.Context, d digest.Digest, pace int64) *Share {
	k, err := keyOf(d)
	if err != nil {
		return nil
	}
	s := &Share{n: n, d: d, key: k, pace: pace, gave: make(map[peer.ID]given)}
	if !s.ask(ctx) {
		return nil
	}
	return s
}

// Mine says that this node is the one to fetch the blob from the upstream.
func (s *Share) Mine() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fetch
}

// ask asks the stewards.
func (s *Share) ask(ctx context.Context) bool {
	s.mu.Lock()
	q := question{Op: opWant, Key: s.key, Avoid: s.failed[max(0, len(s.failed)-maxAvoid):]}
	s.asked++
	s.mu.Unlock()
	a, ok := s.n.consult(ctx, q)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.take(a, ok)
	return ok
}

// take records an answer. The caller holds s.mu.
func (s *Share) take(a answer, ok bool) {
	s.fetch = !ok || a.Fetch
	s.sources = slices.DeleteFunc(a.Sources, func(x source) bool {
		if slices.Contains(s.failed, x.ID) {
			return true
		}
		if !s.n.good(x) {
			s.failed = append(s.failed, x.ID) // the stewards know others
			return true
		}
		return false
	})
	slices.SortStableFunc(s.sources, func(a, b source) int {
		bad := func(x source) int {
			switch {
			case s.n.peers.isDown(x.ID):
				return 2
			case s.n.peers.isSlow(x.ID), s.n.peers.doubted(x.ID):
				return 1
			}
			return 0
		}
		return bad(a) - bad(b)
	})
}

// next returns the next source to try. With more, the stewards are asked when none
// is left.
func (s *Share) next(ctx context.Context, more bool) (source, error) {
	for {
		s.mu.Lock()
		if len(s.sources) > 0 {
			src := s.sources[0]
			s.sources = s.sources[1:]
			s.mu.Unlock()
			return src, nil
		}
		done := !more || s.fetch || s.asked >= maxAsks
		s.mu.Unlock()
		if done || ctx.Err() != nil {
			return source{}, ErrNoPeer
		}
		s.ask(ctx)
	}
}

func (s *Share) fail(id peer.ID) {
	s.mu.Lock()
	s.failed = append(s.failed, id)
	s.mu.Unlock()
}

// Open reads the blob from a peer, from an offset on, and returns its size, -1
// if that isn't known. size is what it must be, or -1 if that isn't known. The
// error is [ErrNoPeer] when the upstream is the place to get it from. What is
// read may be wrong; tell [Share.Wrong].
//
// A source that says nothing has the next one tried beside it. One that says that it
// waits for its own is waited for, and stewards are asked for another meanwhile: one
// of the nodes that wait is the next to fetch it then, and a source of the others.
func (s *Share) Open(ctx context.Context, offset, size int64) (io.ReadCloser, int64, error) {
	type opened struct {
		*body
		by  peer.ID
		err error
	}
	type told struct {
		sign
		by peer.ID
	}
	type another struct {
		source
		err error
	}
	results, signs, found, over := make(chan opened), make(chan told), make(chan another), make(chan struct{})
	defer close(over)
	running, mute := 0, make(map[peer.ID]source) // those that have shown nothing of themselves
	begin := func(src source, err error) bool {
		if err != nil {
			return false
		}
		running++
		mute[src.ID] = src
		go func() {
			b, err := s.open(ctx, src, offset, size, func(what sign) {
				select {
				case signs <- told{what, src.ID}:
				case <-over:
				}
			})
			if err != nil {
				s.fail(src.ID)
				if ctx.Err() == nil {
					s.n.log.Debug("a peer doesn't give a blob", "peer", src.ID, "digest", s.d, "offset", offset, "err", err)
					if !errors.Is(err, ErrNotHere) && !errors.Is(err, errBusy) {
						s.n.peers.slow(src.ID)
					}
				}
			}
			select {
			case results <- opened{b, src.ID, err}:
			case <-over:
				if err == nil {
					b.Close()
				}
			}
		}()
		return true
	}
	silence := time.NewTimer(s.n.answers.enough())
	defer silence.Stop()
	for {
		if running == 0 && !begin(s.next(ctx, true)) {
			return nil, 0, ErrNoPeer
		}
		select {
		case r := <-results:
			if running--; r.err == nil {
				s.mu.Lock()
				s.last = r.body
				s.mu.Unlock()
				return r.body, r.total, nil
			}
			delete(mute, r.by)
			if ctx.Err() != nil {
				return nil, 0, ctx.Err()
			}
		case t := <-signs:
			if t.sign == unanswered {
				begin(s.next(ctx, false))
				continue
			}
			delete(mute, t.by)
			if t.sign == waits {
				s.fail(t.by) // it need not be named again
				go func() {
					src, err := s.next(ctx, true)
					select {
					case found <- another{src, err}:
					case <-over:
					}
				}()
			}
			silence.Reset(s.n.answers.enough())
		case f := <-found:
			if !begin(f.source, f.err) && s.Mine() {
				return nil, 0, ErrNoPeer
			}
		case <-silence.C:
			for _, src := range mute {
				s.n.mute(src)
			}
			return nil, 0, ErrNoPeer
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

// open reads from one source, and tells what that shows of itself before it begins.
func (s *Share) open(ctx context.Context, src source, offset, size int64, tell func(sign)) (*body, error) {
	ctx, cancel := context.WithCancel(ctx)
	b := &body{s: s, src: src, cancel: cancel, start: offset, pos: offset, total: -1, stop: make(chan struct{}), begun: make(chan struct{})}
	b.at.Store(offset)
	go b.watch(ctx, tell)
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		if !info.Reused { // it has shown who it is
			tell(alive)
		}
	}})
	resp, err := s.n.get(traced, src, "/blobs/"+s.d.String(), offset) //nolint:bodyclose // the body closes it
	close(b.begun)
	if err != nil {
		close(b.stop)
		cancel()
		return nil, err
	}
	b.resp = resp
	if resp.ContentLength >= 0 {
		b.total = offset + resp.ContentLength
	}
	if size >= 0 && b.total >= 0 && b.total != size {
		b.Close()
		// The size may be what another has said.
		return nil, fmt.Errorf("it would have %d bytes instead of %d", b.total, size)
	}
	b.kept = resp.Header.Get(keptHeader) != ""
	return b, nil
}

// closed records what a peer gave, once its body is closed. A peer that handed on what
// it had not verified, or gave a part, need not be the cause of wrong bytes.
func (s *Share) closed(b *body) {
	s.mu.Lock()
	defer s.mu.Unlock()
	to := b.at.Load()
	if to == b.start {
		return
	}
	g := s.gave[b.src.ID]
	g.bytes += to - b.start
	switch {
	case b.kept && b.start == 0 && to == b.total:
		g.fault = lie
	case b.kept && s.n.peers.believed(b.src.ID):
		g.fault = max(g.fault, partial)
	}
	s.gave[b.src.ID] = g
}

// Believed says whether what [Share.Open] has returned may be passed on before it is
// verified: its peer says that it has the whole, and what has come from it until now
// was right.
func (s *Share) Believed() bool {
	s.mu.Lock()
	b := s.last
	s.mu.Unlock()
	return b != nil && b.kept && s.n.peers.believed(b.src.ID)
}

// Range reads a few bytes once more from the peer that [Share.Open] reads from.
func (s *Share) Range(ctx context.Context, offset int64, p []byte) error {
	s.mu.Lock()
	b := s.last
	s.mu.Unlock()
	if b == nil || len(p) == 0 {
		return ErrNoPeer
	}
	ctx, cancel := context.WithTimeout(ctx, s.n.answers.enough())
	defer cancel()
	resp, err := s.n.getRange(ctx, b.src, "/blobs/"+s.d.String(), offset, int64(len(p)))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.ReadFull(resp.Body, p)
	return err
}

// Wrong says that what the share gave, whose readers are closed, was not the blob.
func (s *Share) Wrong() {
	for id, g := range s.received() {
		s.fail(id)
		s.n.penalize(id, s.d, g.fault)
	}
}

// received returns who gave something since it was called.
func (s *Share) received() map[peer.ID]given {
	s.mu.Lock()
	defer s.mu.Unlock()
	gave := s.gave
	s.gave = make(map[peer.ID]given)
	return gave
}

// Close ends the share. kept is whether this node has the blob now, verified. One that
// hasn't is no source of it.
func (s *Share) Close(kept bool) {
	if kept {
		for id, g := range s.received() {
			s.n.peers.verified(id, g.bytes)
		}
	} else {
		s.n.tellStewards(question{Op: opGone, Key: s.key})
	}
}
