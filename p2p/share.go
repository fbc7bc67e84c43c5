// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
)

const (
	// watchTime is how often a transfer from a peer is looked at.
	watchTime = time.Second
	// maxIdleTicks is how often in a row a peer may send nothing, and be without
	// more than it has sent, before it is left: it waits for the upstream, as
	// this node would.
	maxIdleTicks = 20
	// maxStalledTicks is how often in a row a peer may send nothing though it has more,
	// maxStalledTicksAtFirst that before the first byte, when both sides may have much to
	// begin at the same time.
	maxStalledTicks, maxStalledTicksAtFirst = 2, 3
	// slack is how far a peer may be ahead of what it has sent: what is in the
	// buffers between.
	slack = 4 << 20
	// openTime is how long others are tried after a source that gave nothing. The
	// first may take its own time, because it may wait for the upstream itself.
	openTime = 3 * time.Second
	// maxLowTicks is how many looks in a row may show a source to give much less than
	// the upstream, when it has not much more.
	maxLowTicks = 10
	// minPace is the rate below which a peer that has more is left when it
	// isn't known what the upstream gives, in bytes per second.
	minPace = 256 << 10
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
	gave    map[peer.ID]bool // who gave bytes, and whether it had said that it has all
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
	s := &Share{n: n, d: d, key: k, pace: pace, gave: make(map[peer.ID]bool)}
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
		return x.ID == s.n.host.ID() || slices.Contains(s.failed, x.ID) || s.n.peers.shunned(x.ID) || s.n.peers.isMute(x.ID)
	})
	slices.SortStableFunc(s.sources, func(a, b source) int {
		bad := func(x source) int {
			switch {
			case s.n.peers.isDown(x.ID):
				return 2
			case s.n.peers.isSlow(x.ID):
				return 1
			}
			return 0
		}
		return bad(a) - bad(b)
	})
}

// next returns the next source to try.
func (s *Share) next(ctx context.Context) (source, error) {
	for {
		s.mu.Lock()
		if len(s.sources) > 0 {
			src := s.sources[0]
			s.sources = s.sources[1:]
			s.mu.Unlock()
			return src, nil
		}
		done := s.fetch || s.asked >= maxAsks
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
func (s *Share) Open(ctx context.Context, offset, size int64) (io.ReadCloser, int64, error) {
	for start := time.Now(); ; {
		src, err := s.next(ctx)
		if err != nil {
			return nil, 0, err
		}
		if time.Since(start) > openTime {
			return nil, 0, ErrNoPeer
		}
		body, n, err := s.open(ctx, src, offset, size)
		if err == nil {
			return body, n, nil
		}
		s.fail(src.ID)
		if ctx.Err() != nil {
			return nil, 0, ctx.Err()
		}
		s.n.log.Debug("a peer doesn't give a blob", "peer", src.ID, "digest", s.d, "offset", offset, "err", err)
		if !errors.Is(err, ErrNotHere) && !errors.Is(err, errBusy) {
			s.n.peers.slow(src.ID)
		}
	}
}

// open reads from one source. A source that waits for its own is waited for.
func (s *Share) open(ctx context.Context, src source, offset, size int64) (io.ReadCloser, int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	b := &body{s: s, src: src, cancel: cancel, pos: offset}
	b.at.Store(offset)
	stop := make(chan struct{})
	go b.watch(ctx, stop)
	resp, err := s.n.get(ctx, src, "/blobs/"+s.d.String(), offset)
	if err != nil {
		close(stop)
		cancel()
		return nil, 0, err
	}
	total := int64(-1)
	if resp.ContentLength >= 0 {
		total = offset + resp.ContentLength
	}
	if size >= 0 && total >= 0 && total != size {
		close(stop)
		cancel()
		resp.Body.Close()
		s.n.penalize(src.ID, s.d, true)
		return nil, 0, fmt.Errorf("it would have %d bytes instead of %d", total, size)
	}
	kept := resp.Header.Get(keptHeader) != ""
	s.mu.Lock()
	s.gave[src.ID] = kept
	s.mu.Unlock()
	b.resp, b.stop = resp, stop
	return b, total, nil
}

// penalize records that a peer sent what it should not have.
func (n *Node) penalize(id peer.ID, d digest.Digest, verified bool) {
	if n.peers.wrong(id, verified) {
		n.log.Warn("a peer sent wrong bytes; nothing is read from it for a while", "peer", id, "digest", d, "for", shunTime)
	}
}

// Wrong says that what the share gave was not the blob.
func (s *Share) Wrong() {
	s.mu.Lock()
	gave := s.gave
	s.gave = make(map[peer.ID]bool)
	s.mu.Unlock()
	for id, kept := range gave {
		s.fail(id)
		// A peer that handed on what it had not verified, or one of several, need
		// not be the cause.
		s.n.penalize(id, s.d, kept && len(gave) == 1)
	}
}

// Close ends the share. A node that didn't keep the blob is no source of it.
func (s *Share) Close(kept bool) {
	if !kept {
		s.n.tellStewards(question{Op: opGone, Key: s.key})
	}
}

// body is a blob that comes from a peer.
type body struct {
	s      *Share
	src    source
	resp   *http.Response
	cancel context.CancelFunc
	stop   chan struct{}
	once   sync.Once
	pos    int64
	at     atomic.Int64 // pos, for the watcher
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	k, err := b.resp.Body.Read(p)
	b.pos += int64(k)
	b.at.Store(b.pos)
	b.s.n.intake.add(k)
	if k > 0 {
		b.s.n.peers.took(b.src.ID, int64(k))
	}
	if err != nil && err != io.EOF {
		b.s.fail(b.src.ID)
	}
	return k, err
}

// Close implements io.Closer.
func (b *body) Close() error {
	var err error
	b.once.Do(func() {
		close(b.stop)
		err = b.resp.Body.Close()
		b.cancel()
	})
	return err
}

// watch leaves a source that sends nothing though it has something, or less
// than the upstream would.
func (b *body) watch(ctx context.Context, stop <-chan struct{}) {
	t := time.NewTicker(watchTime)
	defer t.Stop()
	start := b.at.Load()
	last, idle, slow, mute, stall, low := start, 0, 0, 0, 0, 0
	for {
		select {
		case <-stop:
			return
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := b.at.Load()
		got := now - last
		last = now
		floor := max(b.s.pace/2, minPace)
		if got >= floor || got > 0 && b.s.n.intake.get() >= float64(floor) {
			// The node gets what it can take; what it takes is shared.
			idle, slow, mute, stall, low = 0, 0, 0, 0, 0
			continue
		}
		st, err := b.ask(ctx)
		if ctx.Err() != nil {
			return
		}
		switch {
		case err != nil && !errors.Is(err, ErrNotHere):
			if mute++; mute >= 3 && b.at.Load() == now {
				b.s.n.peers.mute(b.src.ID)
				b.leave("it doesn't answer", err)
				return
			}
			continue
		case err != nil:
			b.leave("it doesn't have it any more", err)
			return
		case got == 0 && st.Arrived-now <= 1: // the last byte waits for the digest
			if idle++; idle >= maxIdleTicks {
				b.leave("it waits itself", nil)
				return
			}
		case got == 0 && b.at.Load() == now:
			if stall++; stall >= maxStalledTicksAtFirst || now > start && stall >= maxStalledTicks {
				b.leave("it has more, and sends nothing", nil)
				return
			}
		case st.Arrived-now > slack || st.Kept:
			if slow++; slow >= 3 {
				b.leave("it is slower than the upstream", nil)
				return
			}
		case got < floor/4:
			// It has little more itself, and gets it by drips.
			if low++; low >= maxLowTicks {
				b.leave("it gives much less than the upstream", nil)
				return
			}
		default:
			idle, slow, stall, low = 0, 0, 0, 0
		}
	}
}

// ask asks the source how far it is.
func (b *body) ask(ctx context.Context) (state, error) {
	ctx, cancel := context.WithTimeout(ctx, watchTime)
	defer cancel()
	return b.s.n.stateAt(ctx, b.src, b.s.d)
}

func (b *body) leave(why string, err error) {
	b.s.n.log.Info("a peer is left for another source", "peer", b.src.ID, "digest", b.s.d, "offset", b.at.Load(), "why", why, "err", err)
	b.s.n.peers.slow(b.src.ID)
	b.s.fail(b.src.ID)
	b.cancel()
}

// Get returns a small blob from a peer, verified, at most limit bytes. The
// error is [ErrNoPeer] when none gives it.
func (n *Node) Get(ctx context.Context, d digest.Digest, limit int64) ([]byte, error) {
	k, err := keyOf(d)
	if err != nil {
		return nil, err
	}
	a, ok := n.consult(ctx, question{Op: opFind, Key: k})
	if !ok {
		return nil, ErrNoPeer
	}
	for _, src := range a.Sources {
		if n.peers.shunned(src.ID) || src.ID == n.host.ID() {
			continue
		}
		b, err := n.small(ctx, src, "/blobs/"+d.String(), limit)
		if err == nil && d.Algorithm().FromBytes(b) != d {
			n.penalize(src.ID, d, true)
			continue
		}
		if err == nil {
			return b, nil
		}
	}
	return nil, ErrNoPeer
}

// small reads something small from a peer.
func (n *Node) small(ctx context.Context, src source, path string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	resp, err := n.get(ctx, src, path, 0)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	n.peers.took(src.ID, int64(len(b)))
	return b, err
}

// Recall returns what peers know under a name that they provide.
func (n *Node) Recall(ctx context.Context, name string) (all [][]byte) {
	k := nameKey(name)
	a, _ := n.consult(ctx, question{Op: opFind, Key: k})
	for _, src := range a.Sources {
		if n.peers.shunned(src.ID) || src.ID == n.host.ID() {
			continue
		}
		if b, err := n.small(ctx, src, "/names/"+HashName(name), maxRecall); err == nil {
			all = append(all, b)
		}
	}
	return all
}

// HashName is what [Content.Recall] gets for a name.
func HashName(name string) string { return fmt.Sprintf("%x", nameKey(name)[2:]) }
