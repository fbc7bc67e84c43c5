// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
)

const (
	// watchTime is how often a transfer from a peer is looked at, and how long the
	// peer has to say how far it is. lookTime is how often before it has begun.
	watchTime = time.Second / 2
	lookTime  = 300 * time.Millisecond
	// The following are counts of looks in a row.
	//
	// maxIdleTicks is how many may show a source that answers to send nothing, and to be
	// without more than it has sent: it waits for the upstream, as this node would.
	// After hedgeTicks there may be another source beside it.
	maxIdleTicks, hedgeTicks = 10, 3
	// maxStalledTicks is how many may show that it sends nothing though it has more,
	// maxStalledTicksAtFirst the same before the first byte, when both sides may have much
	// to begin at the same time.
	maxStalledTicks, maxStalledTicksAtFirst = 2, 4
	// maxSlowTicks is how many may show it to be slower than the upstream though it has
	// more, and maxLowTicks that it gives much less, when it has not much more.
	maxSlowTicks, maxLowTicks = 5, 20
	// slack is how far a peer may be ahead of what it has sent: what is in the
	// buffers between.
	slack = 4 << 20
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
			case s.n.peers.isSlow(x.ID):
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
	running, mute := 0, make(map[peer.ID]bool) // those that have shown nothing of themselves
	begin := func(src source, err error) bool {
		if err != nil {
			return false
		}
		running++
		mute[src.ID] = true
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
			for id := range mute {
				s.n.peers.mute(id)
			}
			return nil, 0, ErrNoPeer
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

// sign is what a source that hasn't begun to send shows of itself.
type sign int

const (
	unanswered sign = iota // it has been asked, and hasn't answered yet
	alive                  // it has answered something
	waits                  // it waits for its own source, for some time already
)

// open reads from one source, and tells what that shows of itself before it begins.
func (s *Share) open(ctx context.Context, src source, offset, size int64, tell func(sign)) (*body, error) {
	ctx, cancel := context.WithCancel(ctx)
	b := &body{s: s, src: src, cancel: cancel, pos: offset, total: -1, stop: make(chan struct{}), begun: make(chan struct{})}
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
		s.n.penalize(src.ID, s.d, true)
		return nil, fmt.Errorf("it would have %d bytes instead of %d", b.total, size)
	}
	kept := resp.Header.Get(keptHeader) != ""
	s.mu.Lock()
	s.gave[src.ID] = kept
	s.mu.Unlock()
	return b, nil
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
	total  int64 // its size, or -1
	cancel context.CancelFunc
	begun  chan struct{} // closed when there is an answer, or none
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

// await leaves a source that doesn't begin, and tells what it shows of itself. It
// returns true when it has begun.
func (b *body) await(ctx context.Context, tell func(sign)) bool {
	look := time.NewTicker(lookTime)
	defer look.Stop()
	type answer struct {
		state
		err error
	}
	answers := make(chan answer, 1)
	asking, idle, stall := false, 0, 0
	for {
		select {
		case <-b.stop:
			return false
		case <-ctx.Done():
			return false
		case <-b.begun:
			return true
		case <-look.C:
			if asking {
				tell(unanswered)
				continue
			}
			asking = true
			go func() {
				st, err := b.ask(ctx, b.s.n.answers.enough())
				answers <- answer{st, err}
			}()
		case a := <-answers:
			asking = false
			switch {
			case ctx.Err() != nil:
				return false
			case errors.Is(a.err, ErrNotHere):
				b.leave("it doesn't have it any more", a.err)
				return false
			case a.err != nil:
				b.s.n.peers.mute(b.src.ID)
				b.leave("it doesn't answer", a.err)
				return false
			case a.Arrived-b.at.Load() > 1:
				if stall++; stall >= maxStalledTicksAtFirst {
					b.leave("it has more, and sends nothing", nil)
					return false
				}
			default: // the last byte waits for the digest
				if idle++; idle >= maxIdleTicks {
					b.leave("it waits itself", nil)
					return false
				}
			}
			if idle > 0 && idle%hedgeTicks == 0 {
				tell(waits)
			} else {
				tell(alive)
			}
		}
	}
}

// watch leaves a source that sends nothing though it has something, or less
// than the upstream would. Before the first byte it tells what it shows of itself.
func (b *body) watch(ctx context.Context, tell func(sign)) {
	if !b.await(ctx, tell) {
		return
	}
	timer := time.NewTimer(watchTime)
	defer timer.Stop()
	start := b.at.Load()
	pace := max(b.s.pace/2, minPace) // per second
	floor := int64(float64(pace) * watchTime.Seconds())
	last, idle, slow, stall, low := start, 0, 0, 0, 0
	for ; ; timer.Reset(watchTime) {
		select {
		case <-b.stop:
			return
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := b.at.Load()
		got := now - last
		last = now
		if got >= floor || got > 0 && b.s.n.intake.get() >= float64(pace) {
			// The node gets what it can take; what it takes is shared.
			idle, slow, stall, low = 0, 0, 0, 0
			continue
		}
		st, err := b.ask(ctx, watchTime)
		if ctx.Err() != nil {
			return
		}
		switch {
		case err != nil && !errors.Is(err, ErrNotHere):
			if b.at.Load() == now {
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
			if slow++; slow >= maxSlowTicks {
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
func (b *body) ask(ctx context.Context, long time.Duration) (state, error) {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	start := time.Now()
	st, err := b.s.n.stateAt(ctx, b.src, b.s.d)
	if err == nil {
		b.s.n.answers.took(time.Since(start))
	}
	return st, err
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
	_, b, err := firstOf(ctx, n.goodOf(a.Sources), n.opts.next, func(src source) ([]byte, error) {
		b, err := n.small(n.ctx, src, "/blobs/"+d.String(), limit)
		if err == nil && d.Algorithm().FromBytes(b) != d {
			n.penalize(src.ID, d, true)
			err = errors.New("it is another blob")
		}
		return b, err
	}, nil, nil)
	if err != nil {
		return nil, ErrNoPeer
	}
	return b, nil
}

// good says whether something may be read from a source, and goodOf are those.
func (n *Node) good(x source) bool {
	return x.ID != n.host.ID() && !n.peers.shunned(x.ID) && !n.peers.isMute(x.ID)
}

func (n *Node) goodOf(all []source) []source {
	return slices.DeleteFunc(all, func(x source) bool { return !n.good(x) })
}

// small reads something small from a peer. One that doesn't give it in time is left
// out for a while.
func (n *Node) small(ctx context.Context, src source, path string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, silentTime)
	defer cancel()
	resp, err := n.get(ctx, src, path, 0)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			n.peers.mute(src.ID)
		}
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

// LoadName returns what peers know under a name that they provide. Those that are
// silent while others answer are waited for a moment.
func (n *Node) LoadName(ctx context.Context, name string) (all [][]byte) {
	k := nameKey(name)
	a, _ := n.consult(ctx, question{Op: opFind, Key: k})
	sources := n.goodOf(a.Sources)
	answers := make(chan []byte, len(sources))
	for _, src := range sources {
		go func() {
			b, _ := n.small(n.ctx, src, "/names/"+HashName(name), maxName)
			answers <- b
		}()
	}
	var enough <-chan time.Time
	for range sources {
		select {
		case b := <-answers:
			if b == nil {
				continue
			}
			if all = append(all, b); enough == nil {
				enough = time.After(secondTime)
			}
		case <-enough:
			return all
		case <-ctx.Done():
			return all
		}
	}
	return all
}

// HashName is what [Content.Export] gets for a name.
func HashName(name string) string { return fmt.Sprintf("%x", nameKey(name)[2:]) }
