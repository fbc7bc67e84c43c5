// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
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
)

// body is a blob that comes from a peer.
type body struct {
	s      *Share
	src    source
	resp   *http.Response
	total  int64 // its size, or -1
	start  int64 // where it begins
	kept   bool  // the peer says that it has the whole, verified
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
		b.s.closed(b)
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
				b.s.n.mute(b.src)
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
				b.s.n.mute(b.src)
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

// sign is what a source that hasn't begun to send shows of itself.
type sign int

const (
	unanswered sign = iota // it has been asked, and hasn't answered yet
	alive                  // it has answered something
	waits                  // it waits for its own source, for some time already
)
