// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"slices"
	"time"
)

const (
	// nearSpan is how far beyond what has come of a range another reader waits for it. From
	// farther on, it takes the rest over.
	nearSpan = 1 << 20
	// PieceSize is how much is asked for at a time for clients who ask for ranges without an
	// end and leave in the middle (containerd's concurrent_layer_fetch_buffer, whose
	// documentation names 8 MiB): what comes after that would be lost. It becomes as large as their
	// chunks are, from leastPiece to mostPiece.
	PieceSize  = 8 << 20
	leastPiece = 256 << 10
	mostPiece  = 64 << 20
	// hangUpTime is how long it may take to see that such a client has hung up.
	hangUpTime = 50 * time.Millisecond
	// patience is for how many pieces a transfer waits for such a client's next range. Then
	// nobody else is to be expected, and the rest is asked for at once.
	patience = 4
)

// stallTime is how long a range that is on its way may lag before another reader asks
// for it, too: its client may read slowly, or reach the registry by a way of its own that is held up.
// It is a variable for tests.
var stallTime = 10 * time.Second

// leastPace is what a range on its way has to bring, in bytes per second read and written, or it lags.
const leastPace = 1 << 20

// coming is a range that somebody has asked a registry for. It is guarded by the partial's mutex.
type coming struct {
	from, at, to int64   // what of it is in the file ends at at
	read         int64   // up to where it was read from the registry
	begun        int64   // where the request for it began
	after        *coming // what the same request brings before it
	window       bool    // it is a transfer's, and goes through its window to the file
	firm         bool    // its rest is taken over by nobody
	writing      bool
}

// place is where a byte is.
type place int

const (
	nowhere  place = iota // nobody has asked for it
	onItsWay              // somebody has
	there                 // in the file
)

// look says where the byte at off is, and up to where that stays so, but not beyond end. The
// caller holds p.mu.
func (p *partial) look(off, end int64) (is place, to int64, c *coming) {
	to, in := p.have.at(off)
	if to = min(to, end); in {
		return there, to, nil
	}
	for _, c := range p.coming {
		switch {
		case c.from <= off && off < c.to:
			return onItsWay, min(c.to, to), c
		case c.from > off:
			to = min(to, c.from)
		}
	}
	return nowhere, to, nil
}

// before is how many bytes whoever brings it reads before the one at off, or more than nearSpan.
func (c *coming) before(off int64) int64 {
	n := off - c.read
	for b := c.after; b != nil && n <= nearSpan; b = b.after {
		n += max(0, b.to-b.read)
	}
	return n
}

// split has who looks at off take over the rest of a range that is on its way there, and says
// whether that may be. The caller holds p.mu.
func (p *partial) split(c *coming, off int64) bool {
	if p.dead || c.firm || off < c.read {
		return false
	}
	c.to = off
	if n := off - c.begun; p.piece > 0 && n >= leastPiece {
		p.piece = min(p.piece, n)
	}
	p.change.Broadcast()
	return true
}

// reserve says that a range is being asked for. The caller holds p.mu.
func (p *partial) reserve(from, to int64, window bool) *coming {
	c := &coming{from: from, at: from, to: to, read: from, begun: from, window: window}
	p.coming = append(p.coming, c)
	return c
}

// leave says that nothing more of a range is to come. The caller holds p.mu.
func (p *partial) leave(c *coming) {
	if i := slices.Index(p.coming, c); i >= 0 {
		p.coming = slices.Delete(p.coming, i, i+1)
		p.change.Broadcast()
	}
}

// leaveAll says that a transfer has ended. With die nobody reads or writes the file through
// the partial any more, once it returns.
func (p *partial) leaveAll(die bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.coming = slices.DeleteFunc(p.coming, func(c *coming) bool { return c.window })
	p.transfer, p.arrived = nil, 0
	p.dead = p.dead || die
	p.change.Broadcast()
	for die && slices.ContainsFunc(p.coming, func(c *coming) bool { return c.writing }) {
		p.change.Wait()
	}
}

// add says that a range is in the file. The caller holds p.mu.
func (p *partial) add(from, to int64) {
	p.have = p.have.add(from, to)
	p.coming = slices.DeleteFunc(p.coming, func(c *coming) bool {
		if !c.window || c.at < from || c.at > to {
			return false
		}
		c.at = min(to, c.to)
		return c.at == c.to
	})
	p.change.Broadcast()
}

// await waits until the byte at off, which c is to bring, is there, or has come by a transfer that waits, or is somebody else's to bring,
// the size becomes known, or ctx is done. When c lags it is the caller's to bring, and await says so. Nobody waits
// for other ranges that clients bring any more then: there may be any number of them. The caller holds p.mu.
func (p *partial) await(ctx context.Context, c *coming, off int64) (lagged bool) {
	wake := func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.change.Broadcast()
	}
	defer context.AfterFunc(ctx, wake)()
	size := p.size
	progress := func() int64 { return c.at + c.read }
	at, until := progress(), time.Now().Add(stallTime)
	timer := time.AfterFunc(stallTime, wake)
	defer timer.Stop()
	for ctx.Err() == nil {
		if is, _, now := p.look(off, off+1); is != onItsWay || now != c || p.size != size || off < p.arrived {
			return false
		}
		if now := progress(); now-at >= int64(stallTime.Seconds()*leastPace) {
			at, until = now, time.Now().Add(stallTime)
			timer.Reset(stallTime)
		}
		if !time.Now().Before(until) && !c.writing && (!c.window || off >= c.read) {
			c.to, p.lags = off, true
			p.change.Broadcast()
			return true
		}
		p.change.Wait()
	}
	return false
}

func newPartial(key running, from Origin, size int64) *partial {
	p := &partial{key: key, from: from, size: size, begun: time.Now()}
	p.change.L = &p.mu
	return p
}
