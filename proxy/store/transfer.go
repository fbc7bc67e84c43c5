// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// lingerTime is how long a transfer without readers goes on: runtimes
	// come back for the rest within seconds after a broken connection. One of which
	// no more is missing than finishSize, or one part in finishShare of the blob,
	// goes on to its end: that costs hardly more than what is under way anyway, and
	// then there is a blob, which others can be given too. It has to come in
	// finishTimes as long. What has come of any other stays as a partial.
	lingerTime  = 30 * time.Second
	finishSize  = 16 << 20
	finishShare = 10
	finishTimes = 10
	// attempts is how many times in a row a source may fail without a byte
	// in between.
	attempts = 3
	// maxSources bounds the sources of a transfer: each reader may add its own.
	maxSources = 8
	// allocateSize is how much of a file is allocated at a time.
	allocateSize = 4 << 20
	// holdTime is how long bytes are held back that nothing vouches for but the
	// digest, at most. Clients give a registry a minute to send something.
	holdTime = 20 * time.Second
)

// Refetch opens a blob once more, from its beginning, after what was read of it
// turned out to be wrong, and returns its size, or -1. The error ends the
// transfer.
type Refetch func(ctx context.Context) (io.ReadCloser, int64, error)

// Unverified is what becomes of a body for which the registry doesn't vouch: of a peer,
// which may send anything.
type Unverified struct {
	// Believed has its bytes given as they come, but for the last one, as those of a
	// registry. What the transfer goes on with has to be believed, too. Otherwise its
	// readers get nothing before the digest is verified, or a long time has passed,
	// see [Reader.WaitReadable].
	Believed bool
	// Wrong, if it isn't nil, is called when what was sent has another digest. It is nil
	// where all of it is the registry's.
	Wrong func()
	// Refetch fetches the blob again then, if no reader was given any of it, and no
	// client has noticed. Otherwise the transfer fails.
	Refetch Refetch
}

// Transfer is a blob on its way into the store. Any number of readers follow
// it. See [Store.Claim].
type Transfer struct {
	store  *Store
	digest digest.Digest
	from   Origin
	ctx    context.Context
	cancel context.CancelCauseFunc
	room   *room

	window
	// What follows is guarded by the window's mutex, and change is of it too.
	state      transferState
	size       int64 // -1 while it isn't known
	err        error
	sources    []Source
	unverified *Unverified // nil where the registry vouches for the bytes
	until      time.Time   // when they are held back no more
	given      bool        // bytes that nothing vouches for, or their number, were given to a reader
	round      int         // how often it has begun again
	refs       int         // of file: the readers, the writer, and run
	readers    map[*follower]struct{}
	waiting    int         // readers
	told       int64       // how many bytes readers know of
	tell       *time.Timer // for them to be told of more
	linger     *time.Timer
	onEnd      func(kept bool)
	// part is what is there of the blob, in file, of which a transfer that doesn't come to
	// its end may leave a partial. Nil if that is not to be: its size isn't known, or
	// nothing vouches for the bytes but the digest.
	part *partial

	// Of the writer alone, once it is there.
	allocated int64 // bytes of file
	promised  int64 // bytes that it will need more, see [Store.free]
}

type transferState int

const (
	claimed transferState = iota // the leader is asking for the blob
	arriving
	kept
	failed
)

// Claim returns the one transfer of a blob from a repository, and whether the
// caller is to lead it: a leader must call [Transfer.Begin] or
// [Transfer.Abandon]. The others call [Transfer.Wait].
func (s *Store) Claim(d digest.Digest, from Origin) (t *Transfer, leader bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := running{d, from.Name}
	if t, ok := s.running[key]; ok {
		return t, false
	}
	t = &Transfer{store: s, digest: d, from: from, size: -1, readers: make(map[*follower]struct{})}
	t.init(s, batchSize, t.readByAll)
	s.running[key] = t
	return t, true
}

// Abandon ends a transfer that could not begin; those who wait get err.
func (t *Transfer) Abandon(err error) {
	t.giveBack()
	t.mu.Lock()
	t.state, t.err = failed, err
	t.change.Broadcast()
	t.mu.Unlock()
	t.forget()
	t.over(false)
}

// OnEnd has f called when the transfer ends, with whether the blob is kept. It
// must be called before the transfer begins, by its leader.
func (t *Transfer) OnEnd(f func(kept bool)) { t.onEnd = f }

func (t *Transfer) over(kept bool) {
	if t.onEnd != nil {
		t.onEnd(kept)
	}
}

// forget has the next client begin another transfer.
func (t *Transfer) forget() {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	if key := (running{t.digest, t.from.Name}); t.store.running[key] == t {
		delete(t.store.running, key)
	}
}

// Begin starts to take the blob of size bytes (-1 if not known) from body,
// and from more when body breaks off. It returns a reader for the leader. The
// error is [ErrNoSpace] or [ErrDiskHangs] when the blob can't be kept; then the transfer is
// abandoned and body is still the caller's.
//
// Kept blobs make room for one whose size is known. One without may be endless,
// and takes only room that is free.
func (t *Transfer) Begin(size int64, body io.ReadCloser, more Source) (*Reader, error) {
	if err := t.store.refuse(); err != nil {
		t.Abandon(err)
		return nil, err
	}
	t.drop()
	t.room = t.store.newRoom(t.from, t.from.Free || size < 0)
	if size > 0 {
		t.part = newPartial(running{t.digest, t.from.Name}, t.from, size)
	}
	return t.begin(size, t.room.reserve(max(size, 0)), body, more, nil)
}

// BeginUnverified is Begin for a body from a source that may send anything.
//
// It takes room that is free, too, if there is enough. Otherwise kept blobs make
// room for those bytes that come, and not for those that are announced.
func (t *Transfer) BeginUnverified(size int64, body io.ReadCloser, more Source, u Unverified) (*Reader, error) {
	s := t.store
	if err := s.refuse(); err != nil {
		t.Abandon(err)
		return nil, err
	}
	t.drop()
	t.room = s.newRoom(t.from, true)
	reserved := t.room.reserve(max(size, 0))
	if !reserved && !t.from.Free && size >= 0 && (s.opts.MaxBytes <= 0 || size <= s.opts.MaxBytes) {
		t.room.release()
		t.room, reserved = s.newRoom(t.from, false), true
	}
	return t.begin(size, reserved, body, more, &u)
}

// fromPeer says whether another than the registry has sent what has arrived.
func (t *Transfer) fromPeer() bool { return t.unverified != nil && t.unverified.Wrong != nil }

// begin is Begin once the room is reserved, or can't be.
func (t *Transfer) begin(size int64, reserved bool, body io.ReadCloser, more Source, u *Unverified) (*Reader, error) {
	s := t.store
	if !reserved {
		t.room.release()
		err := s.notKept()
		t.Abandon(err)
		return nil, err
	}
	answers := s.disk.answering()
	var err error
	if t.file == nil {
		t.file, err = t.create(size)
	}
	if err != nil {
		t.promise(0)
		t.room.release()
		if !errors.Is(err, ErrDiskHangs) {
			err = fmt.Errorf("%w: %w", s.notKept(), err)
		}
		t.Abandon(err)
		return nil, err
	}

	t.mu.Lock()
	t.ctx, t.cancel = context.WithCancelCause(s.ctx)
	t.state, t.refs, t.size = arriving, 1, size
	t.tell = time.AfterFunc(time.Hour, t.tellReaders)
	t.tell.Stop()
	if more != nil {
		t.sources = append(t.sources, more)
	}
	t.unverified = u
	if u != nil && !u.Believed {
		t.until = time.Now().Add(holdTime)
		time.AfterFunc(holdTime, t.change.Broadcast)
	}
	r := t.reader()
	t.change.Broadcast()
	t.mu.Unlock()

	s.wg.Go(func() { t.run(body, answers) })
	return r, nil
}

// Follow returns a reader of a running transfer for a peer that verifies the
// digest itself: nothing is held back but the last byte, and a read fails
// when the transfer begins again. It waits until the transfer has begun. The
// error is [ErrNotFound] when there is none.
func (s *Store) Follow(ctx context.Context, d digest.Digest) (*Reader, error) {
	t := s.furthest(d)
	if t == nil {
		return nil, fmt.Errorf("%s: %w", d, ErrNotFound)
	}
	r, err := t.Wait(ctx)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	r.arriving.raw, r.arriving.round = true, t.round
	t.mu.Unlock()
	return r, nil
}

// Arriving says how many bytes of a running transfer are there, and how many it
// will be, or -1. The error is [ErrNotFound] when there is none.
func (s *Store) Arriving(d digest.Digest) (arrived, size int64, err error) {
	t := s.furthest(d)
	if t == nil {
		return 0, 0, fmt.Errorf("%s: %w", d, ErrNotFound)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.arrived, t.size, nil
}

// furthest returns the transfer of a blob of which most has arrived, or nil. One
// for whose bytes nothing vouches isn't passed on: who gets them from here takes
// this node for the liar.
func (s *Store) furthest(d digest.Digest) (t *Transfer) {
	s.mu.Lock()
	var all []*Transfer
	for key, t := range s.running {
		if key.digest == d && !t.from.Free {
			all = append(all, t)
		}
	}
	s.mu.Unlock()
	most := int64(-1)
	for _, c := range all {
		c.mu.Lock()
		if c.arrived > most {
			t, most = c, c.arrived
		}
		c.mu.Unlock()
	}
	return t
}

// wakeWith wakes those who wait for a change when ctx is done, until what it
// returns is called.
func (t *Transfer) wakeWith(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.wake()
	})
}

// Wait waits until a claimed transfer has begun and returns a reader of it. The
// error is that of the leader when it could not begin.
func (t *Transfer) Wait(ctx context.Context) (*Reader, error) {
	defer t.wakeWith(ctx)()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.state == claimed && ctx.Err() == nil {
		t.change.Wait()
	}
	switch {
	case t.state == failed:
		return nil, t.err
	case t.state == claimed:
		return nil, ctx.Err()
	case t.refs == 0: // kept, and the file is closed: it is in the store
		return nil, errFinished
	case t.unkept:
		return nil, fmt.Errorf("%s: its beginning is gone: %w", t.digest, ErrDiskHangs)
	}
	return t.reader(), nil
}

var errFinished = errors.New("the transfer is over")

// reader counts one reader more. The caller holds t.mu.
func (t *Transfer) reader() *Reader {
	t.refs++
	if t.linger != nil {
		t.linger.Stop()
		t.linger = nil
	}
	p := &follower{t: t}
	t.readers[p] = struct{}{}
	return &Reader{store: t.store, digest: t.digest, ctx: context.Background(), from: p, arriving: p}
}

// unrefFile gives up a reference to the file. The caller holds t.mu.
func (t *Transfer) unrefFile() {
	if t.refs--; t.refs == 0 {
		t.clear()
		t.file.Close()
		if t.state == failed {
			t.room.release()
		}
	}
}

// readByAll is up to where all readers have read. The caller holds t.mu.
func (t *Transfer) readByAll() int64 {
	to := t.arrived
	for r := range t.readers {
		to = min(to, r.at)
	}
	return to
}
