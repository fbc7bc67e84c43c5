// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"io"
	"math"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// flushSize is how much of a range is written at a time.
	flushSize = 128 << 10
	// gatherSize bounds what all ranges together have in memory until then: of one whose client
	// reads slowly, it stays there.
	gatherSize = 16 << 20
	// maxComing bounds the ranges that are on their way of a blob: each is looked at to find another.
	maxComing = 4096
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
	open  Opener
	off   int64

	wanted   []Span    // in order; -1 is where the last one ends if it has no end
	mine     *coming   // what is read of what it asks for; nil if nobody is to wait for it
	ahead    []*coming // what else it asks for, in order
	inflow             // of these
	buf      []byte    // what is to be written at mine.at
	failures int       // in a row
	alone    bool      // it waits for nobody any more
	memory   *Transfer // what is read next has come by it, and need not be in the file
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
	r := &Ranges{store: s, part: p, ctx: context.Background()}
	if _, err := p.ranged(s, false); err != nil && p.there() > 0 {
		r.Close() // the file has another name by now, or none
		return nil
	}
	return r
}

// With has what is missing be opened by open, and reads end with
// ctx. An error that wraps [ErrCorrupt] says that what is there may be wrong, which is dropped. It returns r.
func (r *Ranges) With(ctx context.Context, open Opener) *Ranges {
	r.ctx, r.open = ctx, open
	return r
}

// Size is the blob's length in bytes, or -1 while no registry has said it.
func (r *Ranges) Size() int64 { return r.part.sizeNow() }

// Missing returns which of the ranges that are wanted nobody has yet, nor brings soon, or the first of them, if they
// are many. These are the caller's to bring, by [Ranges.Fill]. The ranges are in order, and don't overlap. A single one may
// have no end, which is -1: then what is missing may end at math.MaxInt64, while nobody knows how large the
// blob is. Of a single one no more is returned than the first bytes that are missing, if these are at its
// beginning. It waits until the size is known of what somebody else brings.
func (r *Ranges) Missing(wanted ...Span) (missing []Span) {
	p := r.part
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked, r.wanted = true, wanted
	for _, w := range wanted {
		for off := w.From; (w.To < 0 || off < w.To) && (p.size < 0 || off < p.size); {
			to, is, c := r.reserve(off)
			if !is && p.size < 0 && len(missing) == 0 && r.ctx.Err() == nil {
				if !p.lags {
					_, _, c := p.look(off, math.MaxInt64)
					p.await(r.ctx, c, off)
					continue
				}
				is = true
			}
			if is {
				missing = spans(missing).add(off, to)
			}
			if c != nil {
				if n := len(r.ahead); n > 0 {
					c.after = r.ahead[n-1]
				}
				r.ahead = append(r.ahead, c)
			}
			if off = to; len(wanted) == 1 {
				break
			}
		}
	}
	return missing[:min(len(missing), maxAsked)]
}

// reserve says up to where the byte at off, and what follows it, is to be asked for, if it is, and reserves that: c is nil
// if nobody is to wait for it. The caller holds p.mu.
func (r *Ranges) reserve(off int64) (to int64, is bool, c *coming) {
	p, end := r.part, r.end(off)
	open := end < 0
	if open {
		end = math.MaxInt64
	}
	if p.size >= 0 {
		end = min(end, p.size)
	}
	where, to, other := p.look(off, end)
	if where == onItsWay && other.before(off) > nearSpan {
		if !p.split(other, off) {
			return end, true, nil
		}
		where, to, _ = p.look(off, end)
	}
	if where != nowhere {
		return to, false, nil
	}
	if open && p.piece > 0 {
		to = min(to, off+p.piece)
	}
	if !p.dead && len(p.have) < maxSpans && len(p.coming) < maxComing {
		c = p.reserve(off, to, false)
	}
	return to, true, c
}

// end is where the range ends that is wanted at off, or -1 if it has no end.
func (r *Ranges) end(off int64) int64 {
	i, _ := slices.BinarySearchFunc(r.wanted, off, func(w Span, off int64) int {
		if w.To >= 0 && w.To <= off {
			return -1
		}
		return 1
	})
	if i == len(r.wanted) {
		return -1
	}
	return r.wanted[i].To
}

// Decline has others bring what [Ranges.Missing] has left to the caller, who doesn't.
func (r *Ranges) Decline() {
	r.leave()
	for len(r.bodies) > 0 {
		r.pop()
	}
	r.part.mu.Lock()
	defer r.part.mu.Unlock()
	for _, c := range r.ahead {
		r.part.leave(c)
	}
	r.ahead = nil
}

// Fill has body, which gives the bytes of ranges that are missing, one after another, of a blob of size bytes, be read,
// and put with what is there. It returns false if the blob was said to have another size before: which one
// is right nobody knows, and what is there is dropped.
func (r *Ranges) Fill(body io.ReadCloser, given []Span, size int64) bool {
	if r.fill(body, given, size) {
		return true
	}
	r.store.lose(r.part)
	return false
}

func (r *Ranges) fill(body io.ReadCloser, given []Span, size int64) bool {
	p := r.part
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.size < 0 {
		p.size = size
	}
	if p.size != size {
		return false
	}
	_ = r.add(body, slices.Clone(given))
	last := given[len(given)-1].To
	for _, c := range r.ahead {
		if c.from < last && c.to > last {
			c.to = last
		}
		c.to = min(c.to, size)
	}
	r.off = given[0].From
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
		case ask && r.find(r.off):
		case ask:
			if !r.goesOn() {
				return 0, r.ctx.Err()
			}
			missing := r.asks(to)
			body, n, err := r.open(r.ctx, missing)
			if err != nil {
				r.leave()
				if errors.Is(err, ErrCorrupt) {
					r.store.lose(r.part)
				}
				return 0, err
			}
			_ = r.add(body, missing[:n])
		default:
			if n := r.fromFile(b[:min(int64(len(b)), to-r.off)]); n > 0 {
				return n, nil
			}
			if r.alone = r.memory != nil; r.alone {
				continue
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
	r.memory = nil
	for len(r.ahead) > 0 && (r.ahead[0].to <= r.off || r.ahead[0].from < r.off) { // others have brought it
		p.leave(r.ahead[0])
		r.ahead = r.ahead[1:]
	}
	if r.off >= p.size {
		return r.off, false, false
	}
	if len(r.ahead) > 0 && r.ahead[0].from == r.off {
		r.mine, r.ahead = r.ahead[0], r.ahead[1:]
		return r.mine.to, true, false
	}
	if to, ask, r.mine = r.reserve(r.off); ask {
		return to, true, false
	}
	is, to, c := p.look(r.off, p.size)
	switch {
	case is != onItsWay:
		return to, false, false
	case r.alone || p.lags && !c.window:
		to, _ = p.have.at(r.off)
		if to = min(to, p.size); r.end(r.off) > r.off {
			to = min(to, r.end(r.off))
		}
		return to, true, false
	case c.window && r.off < p.arrived:
		r.memory = p.transfer
		return min(to, p.arrived), false, false
	}
	r.alone = p.await(r.ctx, c, r.off)
	return to, false, true
}

// asks are the ranges that are asked for together: that from off up to to, and those ahead, if they don't come already.
func (r *Ranges) asks(to int64) []Span {
	if len(r.ahead) > 0 {
		to = min(to, r.ahead[0].from)
	}
	all := []Span{{r.off, to}}
	if len(r.bodies) > 0 {
		return all
	}
	r.part.mu.Lock()
	defer r.part.mu.Unlock()
	for _, c := range r.ahead {
		if c.from < c.to && len(all) < maxAsked {
			all = spans(all).add(c.from, c.to)
		}
	}
	return all
}

// goesOn says whether the client is there still, which hangs up when it has the chunk that it
// wanted: asked for after that, a piece would come for nobody. A client whose chunks are larger than
// a piece gets larger ones from then on.
func (r *Ranges) goesOn() bool {
	p := r.part
	p.mu.Lock()
	pieces := r.end(r.off) < 0 && p.piece > 0
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

// mayRead says how many bytes of n may be read of what comes.
func (r *Ranges) mayRead(n int64) int64 {
	if n = min(n, r.at(r.off)); n == 0 {
		return 0
	}
	c, p := r.mine, r.part
	p.mu.Lock()
	defer p.mu.Unlock()
	if c == nil {
		if len(r.ahead) > 0 {
			n = min(n, max(0, r.ahead[0].from-r.off))
		}
		return n
	}
	n = max(0, min(n, c.to-r.off)) // somebody may have taken the rest over
	c.read = max(c.read, r.off+n)
	return n
}

func (r *Ranges) fromBody(b []byte) (int, error) {
	n, err := r.read(b)
	r.off += int64(n)
	if r.mine != nil {
		r.buf = append(r.buf, b[:n]...)
		if all := r.store.gathered.Add(int64(n)); len(r.buf) >= flushSize || all > gatherSize || r.at(r.off) == 0 {
			r.flush()
		}
	}
	if err == nil {
		if n > 0 {
			r.failures = 0
		}
		return n, nil
	}
	r.pop()
	r.leave()
	if r.failures++; r.failures < attempts && r.ctx.Err() == nil {
		err = nil
	}
	return 0, err
}

func (r *Ranges) fromFile(b []byte) int {
	if t := r.memory; t != nil {
		n, _ := arrivedAt{t}.ReadAt(b, r.off)
		r.off += int64(n)
		return n
	}
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
					p.wrote(at, at+int64(len(b)))
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

// leave gives up what is being read, but for what has come of it.
func (r *Ranges) leave() {
	if r.mine != nil && len(r.buf) > 0 {
		r.flush()
	}
	if c := r.mine; c != nil {
		r.part.mu.Lock()
		r.part.leave(c)
		r.part.mu.Unlock()
	}
	for len(r.bodies) > 0 && !r.useful() {
		r.pop()
	}
	r.forget()
	r.mine = nil
}

// useful says whether something of the answer that comes next is to be read later.
func (r *Ranges) useful() bool {
	rest := r.bodies[len(r.bodies)-1].rest
	n := len(rest)
	return n > 0 && (rest[n-1].From > r.off || len(r.ahead) > 0 && r.ahead[0].from < rest[n-1].To)
}

// forget forgets what is to be written.
func (r *Ranges) forget() {
	r.store.gathered.Add(-int64(len(r.buf)))
	r.buf = nil
}

// Close gives the reader up. What has come stays.
func (r *Ranges) Close() error {
	r.Decline()
	p, s := r.part, r.store
	if p.unsaved() >= saveStep/4 {
		_ = s.disk.do(func() error { return p.save() }, nil)
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
