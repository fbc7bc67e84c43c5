// SPDX-License-Identifier: Apache-2.0

package store

import (
	"container/list"
	"errors"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	// partialShare is which part of the store all partials have at most.
	partialShare = 10
	// partialTime is how long a partial is good: as long as what a registry has sent
	// proves that it is in a repository.
	partialTime = 24 * time.Hour
	// minPartial is of how many bytes a partial is at least. Less is had again at once.
	minPartial = chunkSize
	// saveStep is after how many bytes it is written down again which are there: an
	// agent that is killed loses no more.
	saveStep = 4 << 20
	// maxSpans bounds the ranges of a partial, and maxRecord the file that names them.
	maxSpans  = 4096
	maxRecord = 1 << 20
	// recordSuffix is how the name of that file ends, after the name of the partial's.
	recordSuffix = ".partial"
)

// partial is what is there of a blob that has not arrived as a whole: a file, and which
// ranges of it were written. Beside the file a record names them, so that it is found
// again after a restart. Nothing has verified the bytes: they are given to nobody but
// those who share its origin.
type partial struct {
	key   running
	from  Origin
	path  string
	begun time.Time

	mu       sync.Mutex
	size     int64 // of the whole blob; -1 before a registry has said it
	have     spans
	saved    int64 // how many bytes of have are written down
	recorded bool  // there is a record
	change   sync.Cond
	coming   []*coming
	piece    int64     // how much is asked for at a time, if clients ask for ranges without an end
	shared   bool      // whoever asks for a range finds it, while a transfer has it
	asked    bool      // clients have asked for ranges
	lags     bool      // one that a client brings has lagged
	transfer *Transfer // that has it, and whose bytes before arrived need not be in the file yet
	arrived  int64
	dead     bool // it was dropped, or is stored: nothing is written any more

	opening sync.Mutex
	file    *os.File // of those who read ranges; guarded by opening

	// Guarded by the store's mutex:
	idle  *list.Element // among those that no transfer has
	bytes int64         // that are counted
	users int           // who read ranges
	used  time.Time     // when one of them came, or left
}

// has says whether a range is there.
func (p *partial) has(from, to int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	end, in := p.have.at(from)
	return in && end >= to
}

// wrote says that a range is in the file now, and writes it down now and then. When it
// can't be, no more is lost than what a restart would have found.
func (p *partial) wrote(from, to int64) {
	p.mu.Lock()
	p.add(from, to)
	save := p.have.bytes()-p.saved >= saveStep
	p.mu.Unlock()
	if save {
		_ = p.save()
	}
}

// over says that it is too old.
func (p *partial) over() bool { age := time.Since(p.begun); return age < 0 || age > partialTime }

// admit has the store have a partial, which no transfer has any more, if its bounds allow it.
// The caller holds s.mu, and no room for it.
func (s *Store) admit(p *partial) bool {
	n := p.there()
	if old := s.partials[p.key]; old != nil {
		s.takePartial(old)
		s.removePartial(old)
	}
	if p.over() || !s.admits(p, n) {
		return false
	}
	p.idle = s.idle.PushBack(p)
	s.partials[p.key] = p
	s.own(p.from.Owner, 0)
	if !s.allot(p, n) {
		s.takePartial(p)
		return false
	}
	return true
}

// shares says whether p is within its shares of a bound for all partials: with an owner, a quarter is for those
// of that owner, and half for those of all owners.
func (p *partial) shares(bound int64, within func(of func(*partial) bool, bound int64) bool) bool {
	owner := p.from.Owner
	return (owner == "" || within(func(q *partial) bool { return q.from.Owner == owner }, bound/4) &&
		within(func(q *partial) bool { return q.from.Owner != "" }, bound/2)) && within(anyPartial, bound)
}

// allot counts n bytes more for a partial, if its bounds allow it: others that are older go, and no
// blob. They are on the disk already, or soon. The caller holds s.mu.
func (s *Store) allot(p *partial, n int64) bool {
	all, owner := p.bytes+n, p.from.Owner
	within := func(of func(*partial) bool, bound int64) bool {
		others := func(q *partial) bool { return q != p && q.bytes > 0 && of(q) }
		for all <= bound && s.partialBytes(others)+all > bound {
			s.dropPartial(others)
		}
		return all <= bound
	}
	most := s.opts.MaxBytes
	if !p.shares(s.partialBound(), within) || most > 0 && s.stats.Bytes+n > most || !s.fits(0) ||
		owner != "" && most > 0 && (s.ownedBy(owner).bytes+n > most/ownerShare || s.owned+n > most/ownersShare) {
		return false
	}
	p.bytes += n
	s.stats.Bytes += n
	s.stats.Partial += n
	s.own(owner, n)
	return true
}

// extend has room for n bytes more of what comes of a partial.
func (s *Store) extend(p *partial, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.idle == nil {
		return true // a transfer has it, and the room, or nobody
	}
	s.idle.MoveToBack(p.idle)
	return s.allot(p, max(0, p.there()+n-p.bytes))
}

// lose drops a partial, unless a transfer has it.
func (s *Store) lose(p *partial) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.idle != nil {
		s.takePartial(p)
		s.removePartial(p)
	}
}

func anyPartial(*partial) bool { return true }

// hasRecord says whether it has a record.
func (p *partial) hasRecord() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recorded
}

// sizeNow is the blob's size, or -1.
func (p *partial) sizeNow() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.size
}

// unsaved is how many bytes are there that are not written down.
func (p *partial) unsaved() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead || p.size < 0 {
		return 0
	}
	return p.have.bytes() - p.saved
}

// clear forgets what is there, which is wrong, or is there no more.
func (p *partial) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.have, p.saved = nil, 0
}

// lose forgets a range that can't be read.
func (p *partial) lose(from, to int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = true // what can be read of the rest, nobody knows
	p.have = slices.DeleteFunc(p.have, func(e Span) bool { return e.From < to && from < e.To })
	p.change.Broadcast()
}

// ranged is the file for those who read ranges. It stays open until the last of them leaves, also
// when it is removed, or is another's by then.
func (p *partial) ranged(s *Store, makes bool) (*os.File, error) {
	p.opening.Lock()
	defer p.opening.Unlock()
	if p.file != nil {
		return p.file, nil
	}
	var err error
	p.file, err = p.open(s, makes)
	return p.file, err
}

// unused closes it.
func (p *partial) unused() {
	p.opening.Lock()
	defer p.opening.Unlock()
	if p.file != nil {
		p.file.Close()
		p.file = nil
	}
}

// open opens the file, and makes it if it isn't there and it is to be. The caller holds
// p.opening.
func (p *partial) open(s *Store, makes bool) (*os.File, error) {
	p.mu.Lock()
	path, dead := p.path, p.dead
	p.mu.Unlock()
	if path == "" && (!makes || dead) {
		return nil, os.ErrNotExist
	}
	f, err := on(s.disk, func() (*os.File, error) {
		if path != "" {
			return os.OpenFile(path, os.O_RDWR, 0)
		}
		return os.CreateTemp(s.path("ingest"), p.key.digest.Encoded()+".")
	}, func(f *os.File) {
		f.Close()
		if path == "" {
			os.Remove(f.Name())
		}
	})
	if err == nil && path == "" {
		p.mu.Lock()
		p.path = f.Name()
		p.mu.Unlock()
	}
	return f, err
}

// there is how many bytes are there.
func (p *partial) there() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.have.bytes()
}

// partialBound is how many bytes all partials may have. The caller holds s.mu.
func (s *Store) partialBound() int64 {
	if s.opts.MaxBytes > 0 {
		return s.opts.MaxBytes / partialShare
	}
	return (s.stats.Bytes + s.free()) / partialShare
}

// partialBytes is how many bytes the partials of a kind have that no transfer has. The
// caller holds s.mu.
func (s *Store) partialBytes(of func(*partial) bool) (n int64) {
	for el := s.idle.Front(); el != nil; el = el.Next() {
		if p := el.Value.(*partial); of(p) {
			n += p.bytes
		}
	}
	return n
}

// dropPartial drops the oldest partial of a kind, and says whether there was one. The caller
// holds s.mu.
func (s *Store) dropPartial(of func(*partial) bool) bool {
	for el := s.idle.Front(); el != nil; el = el.Next() {
		if p := el.Value.(*partial); of(p) {
			s.takePartial(p)
			s.removePartial(p)
			return true
		}
	}
	return false
}

// takePartial takes a partial out of the books. The caller holds s.mu.
func (s *Store) takePartial(p *partial) {
	s.idle.Remove(p.idle)
	delete(s.partials, p.key)
	s.stats.Bytes -= p.bytes
	s.stats.Partial -= p.bytes
	s.own(p.from.Owner, -p.bytes)
	s.forgetOwner(p.from.Owner)
	p.idle, p.bytes = nil, 0
}

// removePartial removes the files of a partial that isn't in the books.
func (s *Store) removePartial(p *partial) {
	p.mu.Lock()
	p.dead = true
	path := p.path
	p.change.Broadcast()
	p.mu.Unlock()
	if path == "" {
		return
	}
	if err := s.disk.remove(path, path+recordSuffix); err != nil {
		s.log.Warn("can't remove an unfinished blob", "err", err)
	}
}

// leavePartial keeps what has come of a transfer that has failed, and says whether it could.
func (t *Transfer) leavePartial(cause error) bool {
	p, s := t.part, t.store
	t.mu.Lock()
	unkept := t.unkept || t.window.err != nil
	t.mu.Unlock()
	if p == nil || unkept || s.kept(t.digest) || errors.Is(cause, ErrCorrupt) || errors.Is(cause, ErrShort) || p.there() < minPartial {
		return false
	}
	p.leaveAll(false)
	if err := s.disk.do(func() error { return p.save() }, nil); err != nil {
		s.log.Warn("what has come of a blob can't be kept", "digest", t.digest, "err", err)
		return false
	}
	t.room.release()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.admit(p)
}
