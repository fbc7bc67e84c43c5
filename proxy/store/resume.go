// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Missing returns the first range of the blob which is missing, and on its way to nobody, if some
// of it is there from the same origin: its first byte, up to where it is, and the size of the
// whole blob. The first byte is the size if there is no such range. The leader goes on by
// [Transfer.Resume], once the registry has given a part of it to the client. [Transfer.Begin]
// begins anew.
func (t *Transfer) Missing() (first, to, size int64, ok bool) {
	s := t.store
	s.mu.Lock()
	p := s.partials[running{t.digest, t.from.Name}]
	if p == nil || p.from != t.from || p.sizeNow() < 0 {
		s.mu.Unlock()
		return 0, 0, 0, false
	}
	s.takePartial(p)
	used := p.users > 0
	s.mu.Unlock()
	if p.over() {
		s.removePartial(p)
		return 0, 0, 0, false
	}
	p.opening.Lock()
	f, err := p.open(s, true)
	if err == nil && used && p.file == nil { // those who read ranges now find it later, too
		p.file, err = p.open(s, false)
	}
	p.opening.Unlock()
	if err != nil {
		s.removePartial(p)
		return 0, 0, 0, false
	}
	t.mu.Lock()
	t.part, t.file = p, f
	t.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	for first < p.size {
		is, to, _ := p.look(first, p.size)
		if is == nowhere {
			return first, to, p.size, true
		}
		first = to
	}
	return p.size, p.size, p.size, true
}

// giveBack leaves the partial that [Transfer.Missing] has found to those who come later.
func (t *Transfer) giveBack() {
	p, s := t.part, t.store
	if p == nil || t.file == nil {
		return
	}
	t.file.Close()
	t.setPart(nil, nil)
	p.leaveAll(false)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() == nil && !s.admit(p) {
		s.removePartial(p)
	}
}

// drop drops the partial that [Transfer.Missing] has found.
func (t *Transfer) drop() {
	if t.part == nil {
		return
	}
	t.file.Close()
	t.store.removePartial(t.part)
	t.setPart(nil, nil)
}

func (t *Transfer) setPart(p *partial, f *os.File) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.part, t.file = p, f
}

// Rest is what a blob is made of, beside what is there of it.
type Rest struct {
	Size int64 // of the whole blob, in bytes
	// Body is from First up to To. Nil if nothing is missing, or it is not known to be.
	Body      io.ReadCloser
	First, To int64
	// Firm says that all of Body is wanted from there, and nobody takes a part of it over.
	Firm bool
	// Pieces says that clients ask for ranges, and may leave in the middle of them.
	Pieces bool
	// Gap opens other ranges that are missing.
	Gap Opener
	// More opens the blob from an offset on when either breaks off.
	More Source
	// Refetch fetches the blob again when its digest turns out to be wrong, and no reader was
	// given anything.
	Refetch Refetch
}

// Resume is Begin for a blob that comes in parts: what [Transfer.Missing] has found to be there,
// what others bring who ask for ranges of it ([Store.Ranges]), and the rest.
func (t *Transfer) Resume(rest Rest) (*Reader, error) {
	s := t.store
	if err := s.refuse(); err != nil {
		t.Abandon(err)
		return nil, err
	}
	t.room = s.newRoom(t.from, t.from.Free)
	p := t.part
	if p == nil {
		p = newPartial(running{t.digest, t.from.Name}, t.from, rest.Size)
		t.setPart(p, nil)
	}
	m := newMended(t, 0, rest.More)
	m.gap = rest.Gap
	p.mu.Lock()
	p.shared, p.transfer = true, t
	p.piece = 0
	if rest.Pieces {
		p.piece = PieceSize
	}
	if rest.Body != nil {
		if is, _, _ := p.look(rest.First, rest.Size); is == nowhere {
			p.reserve(rest.First, rest.To, true).firm = rest.Firm
			_ = m.add(rest.Body, []Span{{rest.First, rest.To}})
		} else {
			rest.Body.Close()
		}
	}
	p.mu.Unlock()
	var u *Unverified
	if rest.Refetch != nil {
		u = &Unverified{Believed: true, Refetch: rest.Refetch}
	}
	return t.begin(rest.Size, t.room.reserve(rest.Size), m, rest.More, u)
}

// opening opens a source at an offset when it is read, for what isn't there.
func (t *Transfer) opening(src Source, off int64) io.ReadCloser {
	if p := t.part; p != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.shared {
			return newMended(t, off, src)
		}
	}
	return newOpening(t.ctx, src, off)
}

// mended reads a blob from an offset on: what is there of it from the file, also when somebody
// else brings it, and what is missing from a registry.
type mended struct {
	t      *Transfer
	part   *partial
	ctx    context.Context
	cancel context.CancelFunc
	gap    Opener // may be nil
	src    Source
	off    int64 // of the one who reads
	inflow
}

func newMended(t *Transfer, off int64, src Source) *mended {
	m := &mended{t: t, part: t.part, off: off, src: src}
	m.ctx, m.cancel = context.WithCancel(t.store.ctx)
	return m
}

// Read implements io.Reader. It is not for concurrent use.
func (m *mended) Read(b []byte) (n int, err error) {
	in, to := m.next(int64(len(b)))
	switch {
	case m.ctx.Err() != nil:
		return 0, os.ErrClosed
	case to == m.off:
		return 0, io.EOF
	case in:
		n, err = m.t.store.reading.readAt(m.t.file, b[:min(int64(len(b)), to-m.off)], m.off)
		m.off += int64(n)
		if n > 0 {
			err = nil
		} else if !errors.Is(err, ErrDiskHangs) && !errors.Is(err, os.ErrClosed) {
			err = fmt.Errorf("%s: what has come of it can't be read at byte %d: %w", m.t.digest, m.off, ErrCorrupt)
		}
		return n, err
	}
	if !m.find(m.off) {
		if err := m.open(to); err != nil {
			return 0, err
		}
	}
	n, err = m.read(b[:min(int64(len(b)), to-m.off, m.at(m.off))])
	m.off += int64(n)
	return n, err
}

// next says whether what is at off is there, or else to be asked for, and up to where: of that no
// more than n bytes are read. It waits for what somebody else brings.
func (m *mended) next(n int64) (in bool, to int64) {
	p, t := m.part, m.t
	t.mu.Lock()
	arrived := t.arrived
	t.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	for m.ctx.Err() == nil && m.off < p.size {
		is, to, c := p.look(m.off, p.size)
		switch {
		case is == there:
			return true, to
		case is == onItsWay && c.window:
			c.read = max(c.read, min(m.off+n, to))
			return false, to
		case is == onItsWay && p.lags && !c.writing:
			c.to = m.off
			p.change.Broadcast()
		case is == onItsWay:
			// Whoever brings it may need what has come before that, and isn't written before more comes.
			p.arrived = arrived
			p.change.Broadcast()
			p.await(m.ctx, c, m.off)
		default:
			if p.piece > 0 && (p.asked || m.off < patience*p.piece) {
				to = min(to, m.off+p.piece)
			}
			p.reserve(m.off, to, true)
		}
	}
	return false, m.off
}

// open asks for what is missing from off up to to.
func (m *mended) open(to int64) error {
	if m.gap == nil {
		return m.add(newOpening(m.ctx, m.src, m.off), []Span{{m.off, m.part.sizeNow()}})
	}
	missing := []Span{{m.off, to}}
	if len(m.bodies) == 0 { // or they give what comes after that
		missing = m.gaps(to)
	}
	return m.add(newOpening(m.ctx, func(ctx context.Context, _ int64) (io.ReadCloser, error) {
		body, n, err := m.gap(ctx, missing)
		m.gives(n)
		return body, err
	}, m.off), missing)
}

// gaps are what the transfer is to bring from off up to to, and the small ranges that are missing after that, which it
// reserves: there may be thousands, and each would take a request of its own.
func (m *mended) gaps(to int64) []Span {
	p, all, n := m.part, []Span{{m.off, to}}, to-m.off
	p.mu.Lock()
	defer p.mu.Unlock()
	_, _, last := p.look(m.off, to)
	for off := to; off < p.size && len(all) < maxAsked; {
		is, end, c := p.look(off, p.size)
		if is == nowhere || is == onItsWay && c.window && c.from == off {
			if n += end - off; off == to || n > nearSpan {
				break
			}
			if is == nowhere {
				c = p.reserve(off, end, true)
			}
			c.after, last = last, c
			all = append(all, Span{off, end})
		}
		off = end
	}
	return all
}

// Close implements io.Closer.
func (m *mended) Close() error {
	m.cancel()
	m.end()
	return nil
}

// ranged says whether clients ask for ranges of the blob, now or not long ago.
func (t *Transfer) ranged() bool {
	if t.part == nil {
		return false
	}
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	return t.part.users > 0 || time.Since(t.part.used) < lingerTime
}

// finishes says whether it is worth to go on without readers, when n bytes have come in lingerTime: little is
// missing, and it comes soon. The caller holds t.mu.
func (t *Transfer) finishes(n int64) bool {
	missing := t.size - t.arrived
	return t.size >= 0 && missing <= max(finishSize, t.size/finishShare) && n > missing/finishTimes
}

// lingers has the transfer end after a while, if it has no readers until then and more is
// missing than is worth to go on for. The caller holds t.mu.
func (t *Transfer) lingers() {
	was := t.arrived
	var timer *time.Timer
	timer = time.AfterFunc(lingerTime, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		switch {
		case t.linger != timer: // a reader has come just now
		case t.state == arriving && t.finishes(t.arrived-was):
			t.lingers()
		case t.ranged():
			t.lingers()
		default:
			t.cancel(nil)
		}
	})
	t.linger = timer
}
