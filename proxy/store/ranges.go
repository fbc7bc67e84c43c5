// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"io"
	"math"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// flushSize is how much of a range is written at a time.
	flushSize = 128 << 10
	// gatherSize bounds what all ranges together have in memory until then: of one whose client
	// reads slowly, it stays there.
	gatherSize = 16 << 20
)

// Ranges reads ranges of a blob that isn't stored, for clients that ask for no more: what is there
// of it, what others of the same origin bring, and the rest from a registry, which is put with what
// is there. When all of it is there, a transfer verifies and keeps it.
//
// Nothing has verified what it reads. It is for those whom the registry gives the blob.
//
// It is not for concurrent use.
type Ranges struct {
	store *Store
	part  *partial
	ctx   context.Context
	open  func(ctx context.Context, first, to int64) (io.ReadCloser, error)
	off   int64
	end   int64 // of what is wanted; -1 is that of the blob

	mine     *coming // what is asked for; nil if nobody is to wait for it
	body     io.ReadCloser
	at, to   int64  // of body
	buf      []byte // what is to be written at mine.at
	failures int    // in a row
	alone    bool   // it waits for nobody any more
}

// Ranges returns what reads ranges of a blob from an origin. It returns nil when the blob is stored, or
// comes by a transfer in its order alone. It waits for one that is to begin. Close it.
func (s *Store) Ranges(ctx context.Context, d digest.Digest, from Origin) *Ranges {
	if d.Validate() != nil || s.refuse() != nil {
		return nil
	}
	s.mu.Lock()
	if t := s.running[running{d, from.Name}]; t != nil {
		s.mu.Unlock()
		p := t.sharedPart(ctx)
		if p == nil {
			return nil
		}
		s.mu.Lock()
		return s.ranges(p, from)
	}
	if _, kept := s.index[d]; kept {
		s.mu.Unlock()
		return nil
	}
	p := s.partials[running{d, from.Name}]
	if p == nil || p.from != from || p.over() {
		if p = newPartial(running{d, from.Name}, from, -1); !s.admit(p) {
			s.mu.Unlock()
			return nil
		}
	}
	return s.ranges(p, from)
}

// sharedPart is what is there of a running transfer's blob, if others may read and write it.
func (t *Transfer) sharedPart(ctx context.Context) *partial {
	defer t.wakeWith(ctx)()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.state == claimed && ctx.Err() == nil {
		t.change.Wait()
	}
	p := t.part
	if t.state != arriving || t.unkept || p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.shared {
		return nil
	}
	return p
}

// ranges returns a reader of p. The caller holds s.mu, which is given up.
func (s *Store) ranges(p *partial, from Origin) *Ranges {
	if p.from != from {
		s.mu.Unlock()
		return nil
	}
	p.users++
	p.used = time.Now()
	s.mu.Unlock()
	r := &Ranges{store: s, part: p, ctx: context.Background(), end: -1}
	if _, err := p.ranged(s, false); err != nil && p.there() > 0 {
		r.Close() // the file has another name by now, or none
		return nil
	}
	return r
}

// With has what is missing be opened by open, from its first byte up to to, and reads end with
// ctx. An error that wraps [ErrCorrupt] says that what is there may be wrong, which is dropped. It returns r.
func (r *Ranges) With(ctx context.Context, open func(ctx context.Context, first, to int64) (io.ReadCloser, error)) *Ranges {
	r.ctx, r.open = ctx, open
	return r
}

// Size is the blob's length in bytes, or -1 while no registry has said it.
func (r *Ranges) Size() int64 { return r.part.sizeNow() }

// Missing says whether nobody has the byte at first yet, nor brings it soon, and up to where that
// is so: to end at most, or, if that is -1, to the end of the blob, which is math.MaxInt64 while
// nobody knows it. The caller brings it then, by [Ranges.Fill]. It waits until the size is known
// of what somebody else brings.
func (r *Ranges) Missing(first, end int64) (to int64, is bool) {
	p := r.part
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked, r.end = true, end
	for {
		if to, is = r.reserve(first); is || p.size >= 0 || r.ctx.Err() != nil {
			return to, is
		}
		if p.lags {
			return to, true
		}
		_, _, c := p.look(first, math.MaxInt64)
		p.await(r.ctx, c, first)
	}
}

// reserve is Missing. The caller holds p.mu.
func (r *Ranges) reserve(off int64) (to int64, is bool) {
	p, end := r.part, r.end
	open := end < 0
	if open {
		end = math.MaxInt64
	}
	if p.size >= 0 {
		end = min(end, p.size)
	}
	where, to, c := p.look(off, end)
	if where == onItsWay && off > c.read+nearSpan {
		if !p.split(c, off) {
			return end, true
		}
		where, to, _ = p.look(off, end)
	}
	if where != missing {
		return to, false
	}
	if open && p.piece > 0 {
		to = min(to, off+p.piece)
	}
	if !p.dead && len(p.have) < maxSpans {
		r.mine = p.reserve(off, to, false)
	}
	return to, true
}

// Decline has others bring what [Ranges.Missing] has left to the caller, who doesn't.
func (r *Ranges) Decline() { r.leave() }

// Fill has body, which is a part of a blob of size bytes from first up to to, read from there on, and
// put with what is there. It returns false if the blob was said to have another size before: which one
// is right nobody knows, and what is there is dropped.
func (r *Ranges) Fill(body io.ReadCloser, first, to, size int64) bool {
	if r.fill(body, first, to, size) {
		return true
	}
	r.store.lose(r.part)
	return false
}

func (r *Ranges) fill(body io.ReadCloser, first, to, size int64) bool {
	p := r.part
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.size < 0 {
		p.size = size
	}
	if p.size != size {
		return false
	}
	r.body, r.off, r.at, r.to = body, first, first, to
	if c := r.mine; c != nil && c.to > to {
		c.to = to
	}
	p.change.Broadcast()
	return true
}

// Seek implements io.Seeker. The size must be known.
func (r *Ranges) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.off
	case io.SeekEnd:
		offset += r.Size()
	}
	if offset < 0 {
		return r.off, errors.New("seek before the beginning of a blob")
	}
	r.off = offset
	return offset, nil
}

// Read implements io.Reader.
func (r *Ranges) Read(b []byte) (int, error) {
	for {
		if err := r.ctx.Err(); err != nil {
			return 0, err
		}
		if n := r.mayRead(int64(len(b))); n > 0 {
			if k, err := r.fromBody(b[:n]); k > 0 || err != nil {
				return k, err
			}
			continue
		}
		r.leave()
		to, ask, wait := r.next()
		switch {
		case to == r.off:
			return 0, io.EOF
		case wait:
		case ask:
			if !r.goesOn() {
				return 0, r.ctx.Err()
			}
			body, err := r.open(r.ctx, r.off, to)
			if err != nil {
				r.leave()
				if errors.Is(err, ErrCorrupt) {
					r.store.lose(r.part)
				}
				return 0, err
			}
			r.body, r.at, r.to = body, r.off, to
		default:
			if n := r.fromFile(b[:min(int64(len(b)), to-r.off)]); n > 0 {
				return n, nil
			}
			r.store.lose(r.part)
			r.part.lose(r.off, to) // it is asked for instead
		}
	}
}

// next says whether what is at off is to be asked for, or was waited for, or is there, and up to
// where.
func (r *Ranges) next() (to int64, ask, wait bool) {
	p := r.part
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.off >= p.size {
		return r.off, false, false
	}
	if to, ask = r.reserve(r.off); ask {
		return to, true, false
	}
	is, to, c := p.look(r.off, p.size)
	switch {
	case is != onItsWay:
		return to, false, false
	case r.alone || p.lags && !c.window:
		to, _ = p.have.at(r.off)
		if to = min(to, p.size); r.end > r.off {
			to = min(to, r.end)
		}
		return to, true, false
	}
	r.alone = p.await(r.ctx, c, r.off)
	return to, false, true
}

// goesOn says whether the client is there still, which hangs up when it has the chunk that it
// wanted: asked for after that, a piece would come for nobody. A client whose chunks are larger than
// a piece gets larger ones from then on.
func (r *Ranges) goesOn() bool {
	p := r.part
	p.mu.Lock()
	pieces := r.end < 0 && p.piece > 0
	p.mu.Unlock()
	if !pieces {
		return true
	}
	select {
	case <-r.ctx.Done():
		r.leave()
		return false
	case <-time.After(hangUpTime):
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.piece = min(2*p.piece, mostPiece)
	return true
}

// mayRead says how many bytes of n may be read of body.
func (r *Ranges) mayRead(n int64) int64 {
	if r.body == nil || r.at != r.off {
		return 0
	}
	n = min(n, r.to-r.off)
	c, p := r.mine, r.part
	if c == nil {
		return n
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	n = min(n, c.to-r.off) // somebody may have taken the rest over
	c.read = max(c.read, r.off+n)
	return n
}

func (r *Ranges) fromBody(b []byte) (int, error) {
	n, err := r.body.Read(b)
	r.off += int64(n)
	r.at = r.off
	if r.mine != nil {
		r.buf = append(r.buf, b[:n]...)
		if all := r.store.gathered.Add(int64(n)); len(r.buf) >= flushSize || all > gatherSize || r.off == r.to {
			r.flush()
		}
	}
	switch {
	case n > 0:
		r.failures = 0
	case err == nil:
	default:
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		r.leave()
		if r.failures++; r.failures < attempts && r.ctx.Err() == nil {
			err = nil
		}
		return 0, err
	}
	return n, nil
}

func (r *Ranges) fromFile(b []byte) int {
	file, err := r.part.ranged(r.store, false)
	if err != nil {
		return 0
	}
	n, _ := r.store.reading.readAt(file, b, r.off)
	r.off += int64(n)
	return n
}

// flush writes what has come. When that can't be, nobody waits for it any more.
func (r *Ranges) flush() {
	p, c, s := r.part, r.mine, r.store
	p.mu.Lock()
	at := c.at
	b := r.buf[:max(0, min(int64(len(r.buf)), c.to-at))]
	c.writing = !p.dead && len(b) > 0
	writes := c.writing
	p.mu.Unlock()
	r.forget() // it may be left behind with the disk
	if !writes {
		return
	}
	err := ErrNoSpace
	if s.extend(p, int64(len(b))) {
		var file *os.File
		if file, err = p.ranged(s, true); err == nil {
			err = s.disk.do(func() error {
				_, err := file.WriteAt(b, at)
				if err == nil {
					p.wrote(at, at+int64(len(b)), s.path("ingest"))
				}
				return err
			}, nil)
		}
	}
	if errors.Is(err, ErrDiskHangs) {
		s.lose(p)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.writing = false
	if err == nil {
		c.at = at + int64(len(b))
	} else {
		p.leave(c)
		r.mine = nil
	}
	p.change.Broadcast()
}

// leave gives up what is being asked for, but for what has come of it.
func (r *Ranges) leave() {
	if r.mine != nil && len(r.buf) > 0 {
		r.flush()
	}
	if c := r.mine; c != nil {
		r.part.mu.Lock()
		r.part.leave(c)
		r.part.mu.Unlock()
	}
	if r.body != nil {
		r.body.Close()
	}
	r.forget()
	r.body, r.mine = nil, nil
}

// forget forgets what is to be written.
func (r *Ranges) forget() {
	r.store.gathered.Add(-int64(len(r.buf)))
	r.buf = nil
}

// Close gives the reader up. What has come stays.
func (r *Ranges) Close() error {
	r.leave()
	p, s := r.part, r.store
	if p.unsaved() >= saveStep/4 {
		_ = s.disk.do(func() error { return p.save(s.path("ingest")) }, nil)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.used = time.Now()
	if p.users--; p.users > 0 {
		return nil
	}
	p.mu.Lock()
	p.lags = false
	p.mu.Unlock()
	if p.idle != nil && p.there() == 0 {
		s.takePartial(p)
		s.removePartial(p)
	}
	p.unused()
	return nil
}

// There says how many bytes of the blob are there, and whether no transfer has them.
func (r *Ranges) There() (n int64, idle bool) {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	return r.part.there(), r.part.idle != nil
}
