// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Missing returns the first range of the blob which is missing, if some of it is there from
// a transfer of the same origin that did not come to its end: its first byte, up to where it is,
// and the size of the whole blob. The leader goes on by [Transfer.Resume] once the
// registry has given it that range. [Transfer.Begin] begins anew.
//
// One byte is always missing: that of the last word to a client is the registry's.
func (t *Transfer) Missing() (first, to, size int64, ok bool) {
	s := t.store
	s.mu.Lock()
	p := s.partials[running{t.digest, t.from.Name}]
	if p == nil || p.from != t.from {
		s.mu.Unlock()
		return 0, 0, 0, false
	}
	s.takePartial(p)
	s.mu.Unlock()
	if p.over() {
		s.removePartial(p)
		return 0, 0, 0, false
	}
	f, err := on(s.disk, func() (*os.File, error) { return os.OpenFile(p.path, os.O_RDWR, 0) }, func(f *os.File) { f.Close() })
	if err != nil {
		s.removePartial(p)
		return 0, 0, 0, false
	}
	t.part, t.file = p, f
	p.mu.Lock()
	defer p.mu.Unlock()
	if to, in := p.have.at(0); in {
		first = to
	}
	if first >= p.size {
		first = p.size - 1
		p.have = spans{{0, first}}
	}
	to, _ = p.have.at(first)
	return first, min(to, p.size), p.size, true
}

// giveBack leaves the partial that [Transfer.Missing] has found to those who come later.
func (t *Transfer) giveBack() {
	p, s := t.part, t.store
	if p == nil || t.file == nil {
		return
	}
	t.file.Close()
	t.part, t.file = nil, nil
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
	t.part, t.file = nil, nil
}

// Resume is Begin for a blob of which [Transfer.Missing] has found some: body is the missing
// range, and what else is missing comes from more. When the digest turns out to be wrong, and
// no reader was given anything, the blob is fetched again by refetch.
func (t *Transfer) Resume(body io.ReadCloser, more Source, refetch Refetch) (*Reader, error) {
	s, p := t.store, t.part
	if err := s.refuse(); err != nil {
		t.Abandon(err)
		return nil, err
	}
	t.room = s.newRoom(t.from, t.from.Free)
	return t.begin(p.size, t.room.reserve(p.size), &mended{t: t, part: p, body: body, src: more}, more, refetch)
}

// clear forgets what is there, and says whether the size is that of the blob.
func (p *partial) clear(size int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.have, p.saved = nil, 0
	return p.size == size
}

// opening opens a source at an offset when it is read, for what isn't there.
func (t *Transfer) opening(src Source, off int64) io.ReadCloser {
	if t.part != nil {
		t.part.mu.Lock()
		n := len(t.part.have)
		more := n > 0 && t.part.have[n-1].to > off
		t.part.mu.Unlock()
		if more {
			return &mended{t: t, part: t.part, src: src, off: off}
		}
	}
	return newOpening(t.ctx, src, off)
}

// mended reads a blob from an offset on: what is there of it from the file, and what is
// missing from a source.
type mended struct {
	t    *Transfer
	part *partial
	src  Source
	off  int64 // of the one who reads

	mu     sync.Mutex
	body   io.ReadCloser // at what is missing next; nil while nothing is open
	closed bool
}

// Read implements io.Reader. It is not for concurrent use.
func (m *mended) Read(b []byte) (n int, err error) {
	to, there := m.part.at(m.off)
	b = b[:min(int64(len(b)), to-m.off)]
	if there {
		n, err = m.t.store.reading.readAt(m.t.file, b, m.off)
		m.off += int64(n)
		if n > 0 {
			err = nil
		} else if !errors.Is(err, ErrDiskHangs) && !errors.Is(err, os.ErrClosed) {
			err = fmt.Errorf("%s: what has come of it can't be read at %d (%v): %w", m.t.digest, m.off, err, ErrCorrupt)
		}
		return n, err
	}
	if len(b) == 0 {
		return 0, io.EOF
	}
	body, err := m.gap()
	if err != nil {
		return 0, err
	}
	n, err = body.Read(b)
	if m.off += int64(n); m.off == to {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.body.Close()
		m.body, err = nil, nil
	}
	return n, err
}

// gap returns what reads what is missing at off.
func (m *mended) gap() (io.ReadCloser, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return nil, os.ErrClosed
	case m.body == nil:
		m.body = newOpening(m.t.ctx, m.src, m.off)
	}
	return m.body, nil
}

// Close implements io.Closer.
func (m *mended) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	if m.body == nil {
		return nil
	}
	return m.body.Close()
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
		case t.state == arriving && t.arrived > was && t.size-t.arrived <= max(finishSize, t.size/finishShare) && t.size >= 0:
			t.lingers()
		default:
			t.cancel(nil)
		}
	})
	t.linger = timer
}
