// SPDX-License-Identifier: Apache-2.0

package store

import (
	"container/list"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Origin is where a blob comes from, as far as the store has to tell origins
// apart.
type Origin struct {
	// Name is the repository, of which registry. A running transfer is shared
	// by those who name the same one.
	Name string
	// Owner is whose bounds the blob counts for: it is empty for registries
	// that are authenticated, which have no bound but the store's.
	Owner string
	// Free says that nothing vouches for the bytes but the digest: until they
	// are verified they take only room that is free.
	Free bool
}

// The store's room is shared so that no client can take it from the others:
//
//   - Room for a blob whose source vouches for it, and for whatever is verified,
//     is made: the least recently used blobs go.
//   - A blob that may come to nothing has provisional room: only room that is
//     free, half of the store for all of them, an eighth for those with an owner,
//     and half of that for each owner. It gives way when a blob of the first kind
//     can't be had otherwise.
//   - What an owner has in the store is a tenth of it at most, and all owners
//     together have half of it. Beyond that, the least recently used of theirs
//     go first.
//   - What transfers that did not come to their end have left, the partials, is a tenth
//     of the store at most, half of that for those with an owner, and half of that for each
//     owner. They go first, the oldest one before the others, whatever room is needed
//     for; none of them makes another blob go.
const (
	provisionalShare  = 2  // of the store, for provisional room
	ownersProvisional = 8  // for that of all owners
	ownerProvisional  = 16 // for that of one owner
	ownerShare        = 10 // for what one owner has
	ownersShare       = 2  // for what all owners have
	// spareShare is how much more room is made when some has to be made, so
	// that a full store has some that is free.
	spareShare = 32
)

// maxPartials bounds how many there are. Of those with an owner there are half as many at most, and half of
// that of each owner.
const maxPartials = 512

// reserveStep is by how much at a time room is reserved for a blob whose size
// isn't known.
const reserveStep = 1 << 20

// accounts are who has which part of the room. They are guarded by the store's mutex.
type accounts struct {
	owners      map[string]*owned
	owned       int64      // bytes of all owners but the one without a name
	waiting     *list.List // of *room: the provisional ones, the oldest first
	provisional int64      // bytes of those
	promised    int64      // bytes of running transfers that are not on the disk yet
}

// owned is what an owner has in the store.
type owned struct {
	blobs       *list.List // of *entry, the most recently used first
	bytes       int64      // kept, and reserved
	provisional int64      // reserved provisionally
}

// room is what the store counts for one blob on its way in. All but lost is
// guarded by the store's mutex.
type room struct {
	store *Store
	from  Origin
	bytes int64
	// waiting is its place among the store's provisional rooms, the oldest
	// first; nil for room that was made.
	waiting *list.Element
	// file, if it isn't nil, is emptied when the room is lost.
	file *os.File
	lost atomic.Bool // it gave way
}

// newRoom returns room for no bytes yet.
func (s *Store) newRoom(from Origin, provisional bool) *room {
	r := &room{store: s, from: from}
	if provisional {
		s.mu.Lock()
		r.waiting = s.waiting.PushBack(r)
		s.mu.Unlock()
	}
	return r
}

// reach makes it room for size bytes at least, and for a step more if there
// are as many.
func (r *room) reach(size int64) error {
	s := r.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.lost.Load() {
		return ErrNoSpace
	}
	need := size - r.bytes
	if need <= 0 {
		return nil
	}
	if s.grow(r, max(need, reserveStep)) || s.grow(r, need) {
		return nil
	}
	s.stats.NotKept++
	return ErrNoSpace
}

// reserve makes it room for size bytes more, and says whether it could.
func (r *room) reserve(size int64) bool {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	return r.store.grow(r, size)
}

// confirm says that the blob is verified, and has size bytes: it is room that
// was made from now on.
func (r *room) confirm(size int64) error {
	s := r.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.lost.Load() {
		return ErrNoSpace
	}
	if r.waiting == nil && size >= r.bytes && s.grow(r, size-r.bytes) {
		return nil
	}
	s.giveUp(r)
	if s.grow(r, size) {
		return nil
	}
	s.stats.NotKept++
	return ErrNoSpace
}

// release gives the room up.
func (r *room) release() {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	r.store.giveUp(r)
}

// giveUp is release. The caller holds s.mu.
func (s *Store) giveUp(r *room) {
	s.count(r, -r.bytes)
	if r.waiting != nil {
		s.waiting.Remove(r.waiting)
		r.waiting = nil
	}
}

// grow makes a room larger, if there is as much for it. The caller holds s.mu.
func (s *Store) grow(r *room, n int64) bool {
	if r.waiting == nil && !s.makeRoom(r.from.Owner, n) || r.waiting != nil && !s.findRoom(r.from.Owner, n) {
		return false
	}
	s.count(r, n)
	return true
}

// count counts n bytes more for a room. The caller holds s.mu.
func (s *Store) count(r *room, n int64) {
	r.bytes += n
	s.stats.Bytes += n
	if r.waiting != nil {
		s.provisional += n
		s.ownedBy(r.from.Owner).provisional += n
	} else {
		s.own(r.from.Owner, n)
	}
	s.forgetOwner(r.from.Owner)
}

// own counts n bytes more of what an owner has. The caller holds s.mu.
func (s *Store) own(owner string, n int64) {
	s.ownedBy(owner).bytes += n
	if owner != "" {
		s.owned += n
	}
}

// ownedBy returns what an owner has. The caller holds s.mu.
func (s *Store) ownedBy(owner string) *owned {
	o, ok := s.owners[owner]
	if !ok {
		o = &owned{blobs: list.New()}
		s.owners[owner] = o
	}
	return o
}

// forgetOwner forgets an owner that has nothing. The caller holds s.mu.
func (s *Store) forgetOwner(owner string) {
	if o := s.owners[owner]; o.blobs.Len() == 0 && o.bytes == 0 && o.provisional == 0 {
		delete(s.owners, owner)
	}
}

// makeRoom makes room for size bytes more of an owner: it evicts the least
// recently used blobs until they fit all bounds, those first that others have as well.
// The caller holds s.mu.
func (s *Store) makeRoom(owner string, size int64) bool {
	if s.opts.MaxBytes > 0 && size > s.opts.MaxBytes || !s.makeOwnerRoom(owner, size) {
		return false
	}
	for !s.fits(size) && s.dropPartial(anyPartial) {
	}
	if s.fits(size) {
		return true
	}
	enough := size + s.opts.MaxBytes/spareShare
	for el := s.recent.Back(); el != nil && s.stats.Duplicate > 0 && !s.fits(enough); {
		before := el.Prev()
		if el.Value.(*entry).twice {
			s.evict(el)
		}
		el = before
	}
	for !s.fits(enough) {
		el := s.recent.Back()
		if el == nil {
			break
		}
		s.evict(el)
	}
	for !s.fits(size) {
		if !s.giveWay(func(*room) bool { return true }) {
			return false
		}
	}
	return true
}

// makeOwnerRoom makes room within the bounds of owners. The caller holds s.mu.
func (s *Store) makeOwnerRoom(owner string, size int64) bool {
	if owner == "" || s.opts.MaxBytes <= 0 {
		return true
	}
	if size > s.opts.MaxBytes/ownerShare {
		return false
	}
	for {
		over := s.owners[owner]
		switch {
		case over != nil && over.bytes+size > s.opts.MaxBytes/ownerShare:
			if s.dropPartial(func(p *partial) bool { return p.from.Owner == owner }) {
				continue
			}
		case s.owned+size <= s.opts.MaxBytes/ownersShare:
			return true
		default:
			if s.dropPartial(func(p *partial) bool { return p.from.Owner != "" }) {
				continue
			}
			over = nil
			for name, o := range s.owners {
				if name != "" && o.blobs.Len() > 0 && (over == nil || o.bytes > over.bytes) {
					over = o
				}
			}
		}
		if over == nil || over.blobs.Len() == 0 {
			return false
		}
		s.evict(s.index[over.blobs.Back().Value.(*entry).digest])
	}
}

// admits says whether there may be one partial more, of n bytes: the oldest goes where there are too many, those of
// which nothing has come yet before others. For one of those no other goes: anybody may ask for ranges of
// whatever there isn't. The caller holds s.mu.
func (s *Store) admits(p *partial, n int64) bool {
	return p.shares(maxPartials, func(of func(*partial) bool, bound int64) bool {
		count := int64(0)
		for el := s.idle.Front(); el != nil; el = el.Next() {
			if of(el.Value.(*partial)) {
				count++
			}
		}
		return count < bound || s.dropPartial(func(q *partial) bool { return q.bytes == 0 && of(q) }) || n > 0 && s.dropPartial(of)
	})
}

// findRoom says whether size bytes more of an owner fit into the room that is
// free. What is authenticated goes before what isn't. The caller holds s.mu.
func (s *Store) findRoom(owner string, size int64) bool {
	bounded := s.opts.MaxBytes > 0
	if bounded && size > s.opts.MaxBytes/provisionalShare {
		return false
	}
	if bounded && owner != "" {
		var own, all int64
		for name, o := range s.owners {
			if name != "" {
				all += o.provisional
			}
			if name == owner {
				own = o.provisional
			}
		}
		if own+size > s.opts.MaxBytes/ownerProvisional || all+size > s.opts.MaxBytes/ownersProvisional {
			return false
		}
	}
	for !s.fits(size) && s.dropPartial(anyPartial) {
	}
	for !s.fits(size) || bounded && s.provisional+size > s.opts.MaxBytes/provisionalShare {
		if owner != "" || !s.giveWay(func(r *room) bool { return r.from.Owner != "" }) {
			return false
		}
	}
	return true
}

// fits says whether size bytes more fit both bounds. The caller holds s.mu.
func (s *Store) fits(size int64) bool {
	return (s.opts.MaxBytes <= 0 || s.stats.Bytes+size <= s.opts.MaxBytes) &&
		(s.opts.MinFree <= 0 || s.free()-size >= s.opts.MinFree)
}

// giveWay takes the oldest provisional room that there is of a kind. The caller
// holds s.mu.
func (s *Store) giveWay(of func(*room) bool) bool {
	for el := s.waiting.Front(); el != nil; el = el.Next() {
		r := el.Value.(*room)
		if r.bytes == 0 || !of(r) {
			continue
		}
		s.giveUp(r)
		r.lost.Store(true)
		s.stats.NotKept++
		if r.file != nil {
			if err := s.disk.do(func() error { return r.file.Truncate(0) }, nil); err != nil {
				s.log.Warn("can't empty an unfinished upload", "file", r.file.Name(), "err", err)
			}
		}
		return true
	}
	return false
}

// free is how many bytes the file system has left beside what running transfers
// will need, or MinFree's bound lifted when it doesn't say. The caller holds
// s.mu.
func (s *Store) free() int64 {
	st, err := on(s.disk, func() (st unix.Statfs_t, err error) {
		err = unix.Statfs(s.dir, &st)
		return st, err
	}, nil)
	if err != nil {
		return 1 << 62
	}
	return int64(st.Bavail)*st.Bsize - s.promised
}
