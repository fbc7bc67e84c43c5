// SPDX-License-Identifier: Apache-2.0

package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Source opens a blob at an offset, at a place that it can be had from. The
// store closes what it returns.
type Source func(ctx context.Context, offset int64) (io.ReadCloser, error)

const (
	// lingerTime is how long a transfer that nobody reads goes on: runtimes
	// come back for the rest within seconds after a broken connection.
	lingerTime = 30 * time.Second
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

// Again opens a blob once more, from its beginning, after what was read of it
// turned out to be wrong, and returns its size, or -1. The error ends the
// transfer.
type Again func(ctx context.Context) (io.ReadCloser, int64, error)

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
	state   transferState
	size    int64 // -1 while it isn't known
	err     error
	sources []Source
	again   Again     // not nil while nothing vouches for the bytes
	until   time.Time // when they are held back no more
	given   bool      // bytes that nothing vouches for were given to a reader
	round   int       // how often it has begun again
	refs    int       // of file: the readers, the writer, and run
	readers map[*TransferReader]struct{}
	waiting int         // readers
	told    int64       // how many bytes readers know of
	tell    *time.Timer // for them to be told of more
	linger  *time.Timer
	onEnd   func(kept bool)

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
	t = &Transfer{store: s, digest: d, from: from, size: -1, readers: make(map[*TransferReader]struct{})}
	t.init(s, batchSize, t.readByAll)
	s.running[key] = t
	return t, true
}

// Abandon ends a transfer that could not begin; those who wait get err.
func (t *Transfer) Abandon(err error) {
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
func (t *Transfer) Begin(size int64, body io.ReadCloser, more Source) (*TransferReader, error) {
	if err := t.store.refuse(); err != nil {
		t.Abandon(err)
		return nil, err
	}
	t.room = t.store.newRoom(t.from, t.from.Free || size < 0)
	return t.begin(size, t.room.reserve(max(size, 0)), body, more, nil)
}

// BeginUnverified is Begin for a body of somebody who may send anything, such as
// a peer. Its readers get nothing before the digest is verified, or a long time
// has passed, see [TransferReader.Settle]. When the digest turns out to be
// wrong before that, the blob is taken from again, and nobody has noticed.
//
// It takes room that is free, too, if there is enough. Otherwise kept blobs make
// room for those bytes that come, and not for those that are announced.
func (t *Transfer) BeginUnverified(size int64, body io.ReadCloser, more Source, again Again) (*TransferReader, error) {
	s := t.store
	if err := s.refuse(); err != nil {
		t.Abandon(err)
		return nil, err
	}
	t.room = s.newRoom(t.from, true)
	reserved := t.room.reserve(max(size, 0))
	if !reserved && !t.from.Free && size >= 0 && (s.opts.MaxBytes <= 0 || size <= s.opts.MaxBytes) {
		t.room.release()
		t.room, reserved = s.newRoom(t.from, false), true
	}
	return t.begin(size, reserved, body, more, again)
}

// begin is Begin once the room is reserved, or can't be.
func (t *Transfer) begin(size int64, reserved bool, body io.ReadCloser, more Source, again Again) (*TransferReader, error) {
	s := t.store
	if !reserved {
		t.room.release()
		err := s.notKept()
		t.Abandon(err)
		return nil, err
	}
	answers := s.disk.answering()
	var err error
	if t.file, err = t.create(size); err != nil {
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
	if again != nil {
		t.again, t.until = again, time.Now().Add(holdTime)
		time.AfterFunc(holdTime, t.change.Broadcast)
	}
	r := t.reader()
	t.change.Broadcast()
	t.mu.Unlock()

	s.wg.Go(func() { t.run(body, answers) })
	return r, nil
}

// create makes the transfer's file for size bytes, or -1. It finds out now, and
// not in the middle, that the disk is full.
func (t *Transfer) create(size int64) (*os.File, error) {
	s := t.store
	return on(s.disk, func() (*os.File, error) {
		f, err := os.CreateTemp(s.path("ingest"), t.digest.Encoded()+".")
		if err != nil {
			return nil, err
		}
		if err = t.allocate(f, 1, size); err == nil && !t.promise(size-t.allocated) {
			err = unix.ENOSPC
		}
		if err != nil {
			t.promise(0)
			os.Remove(f.Name())
			f.Close()
			return nil, err
		}
		return f, nil
	}, func(f *os.File) {
		os.Remove(f.Name())
		f.Close()
		t.promise(0)
	})
}

// allocate has the blocks of the file for size bytes allocated up to an offset,
// if the size is known, and some of those that follow: all at once would take as
// long as writing zeros where there are no extents, in memory for one.
func (t *Transfer) allocate(f *os.File, to, size int64) error {
	for t.allocated < min(to, size) {
		n := min(allocateSize, size-t.allocated)
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, t.allocated, n)
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
			return err
		}
		t.allocated += n
		t.promise(size - t.allocated)
	}
	return nil
}

// promise takes in how many bytes the transfer will still need of the disk, and
// says whether they are there.
func (t *Transfer) promise(n int64) bool {
	n = max(n, 0)
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	t.store.promised += n - t.promised
	t.promised = n
	return t.store.free() >= 0
}

// Follow returns a reader of a running transfer for somebody who verifies the
// digest by himself: nothing is held back but the last byte, and a read fails
// when the transfer begins again. It waits until the transfer has begun. The
// error is [ErrNotFound] when there is none.
func (s *Store) Follow(ctx context.Context, d digest.Digest) (*TransferReader, error) {
	t := s.furthest(d)
	if t == nil {
		return nil, fmt.Errorf("%s: %w", d, ErrNotFound)
	}
	r, err := t.Wait(ctx)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	r.raw, r.round = true, t.round
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
func (t *Transfer) Wait(ctx context.Context) (*TransferReader, error) {
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

// AddSource adds a source to the transfer, for when those that it has break off.
func (r *TransferReader) AddSource(more Source) {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	if len(r.t.sources) < maxSources {
		r.t.sources = append(r.t.sources, more)
	}
}

var errFinished = errors.New("the transfer is over")

// reader counts one reader more. The caller holds t.mu.
func (t *Transfer) reader() *TransferReader {
	t.refs++
	if t.linger != nil {
		t.linger.Stop()
		t.linger = nil
	}
	r := &TransferReader{t: t}
	t.readers[r] = struct{}{}
	return r
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

// unkeep has the transfer go on in memory alone, as the disk hangs. Clients that
// come later begin another: the beginning may be gone. Nothing was given of one
// whose bytes are held back, which ends.
func (t *Transfer) unkeep() {
	t.forget()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state != arriving {
		return
	}
	t.unkept = true
	if len(t.readers) == 0 || t.holding() {
		t.cancel(ErrDiskHangs)
	}
	t.wake()
}

// run takes the blob in.
func (t *Transfer) run(body io.ReadCloser, answers context.Context) {
	stop := context.AfterFunc(answers, t.unkeep)
	defer stop()
	wake := t.wakeWith(t.ctx)
	defer wake()
	sum, err := t.takeIn(body)
	for err != nil && errors.Is(err, ErrCorrupt) && t.restart(&body, err) {
		sum, err = t.takeIn(body)
	}
	if cause := context.Cause(t.ctx); err != nil && cause != nil {
		err = cause
	}
	t.promise(0)
	stored := err == nil && t.keep(sum)
	var werr *writeError
	if !stored {
		if rerr := t.store.disk.remove(t.file.Name()); rerr != nil {
			t.store.log.Warn("can't remove an unfinished blob", "err", rerr)
		}
	}
	if err != nil && !errors.As(err, &werr) {
		// Readers have nothing more of it. When it can't be written, they read
		// on, and the file is there until they are done.
		t.room.release()
	}
	t.forget()
	t.over(stored)

	t.mu.Lock()
	defer t.mu.Unlock()
	t.state = kept
	if err != nil {
		t.state, t.err = failed, err
	}
	if t.linger != nil {
		t.linger.Stop()
	}
	t.tell.Stop()
	t.cancel(nil)
	if len(t.readers) == 0 || t.stored == t.arrived {
		t.clear()
	}
	t.unrefFile()
	t.change.Broadcast()
}

// keep makes a verified blob a kept one. When that fails the readers have the
// open file, or what is in memory, all the same.
func (t *Transfer) keep(sum *sums) bool {
	t.mu.Lock()
	err := error(nil)
	if t.unkept {
		err = ErrDiskHangs
	}
	t.mu.Unlock()
	if err == nil {
		err = t.room.confirm(t.arrived)
	}
	if err == nil {
		err = t.store.keep(t.digest, t.file.Name(), t.room, sum)
	}
	if err != nil {
		t.store.log.Warn("a blob could not be kept", "digest", t.digest, "err", err)
		t.room.release()
	}
	return err == nil
}

// takeIn takes the blob in once, and verifies it.
func (t *Transfer) takeIn(body io.ReadCloser) (*sums, error) {
	sum, h := newSums(), t.digest.Algorithm().Hash()
	t.mu.Lock()
	t.refs++
	t.mu.Unlock()
	hashed := t.start(sum, h, t.write, t.unrefFile)
	err := t.fill(body)
	t.end(err != nil, hashed)
	t.mu.Lock()
	werr := t.window.err
	t.mu.Unlock()
	switch {
	case err != nil:
	case werr != nil:
		err = &writeError{werr}
	case digest.NewDigest(t.digest.Algorithm(), h) != t.digest:
		err = fmt.Errorf("%s: what was sent has another digest: %w", t.digest, ErrCorrupt)
	}
	return sum, err
}

// write writes a piece of the file. Only the writer calls it.
func (t *Transfer) write(p []byte, off int64) error {
	return t.store.disk.within(func() error {
		if err := t.allocate(t.file, off+int64(len(p)), t.size); err != nil {
			return err
		}
		_, err := t.file.WriteAt(p, off)
		return err
	})
}

// restart begins again after what was read turned out to be wrong, if nobody
// was given any of it.
func (t *Transfer) restart(body *io.ReadCloser, cause error) bool {
	t.mu.Lock()
	again := t.again
	if t.given || t.round >= attempts || t.unkept {
		again = nil
	}
	t.mu.Unlock()
	if again == nil {
		return false
	}
	t.store.log.Warn("a blob that came from a peer is wrong, and is fetched again", "digest", t.digest, "err", cause)
	b, size, err := again(t.ctx)
	if err != nil {
		return false
	}
	*body = b
	t.mu.Lock()
	t.size, t.arrived, t.told = size, 0, 0
	t.clear()
	t.round++
	t.change.Broadcast()
	t.mu.Unlock()
	t.allocated = 0
	t.promise(size)
	if err := t.store.disk.do(func() error { return t.file.Truncate(0) }, nil); err != nil {
		b.Close()
		t.cancel(&writeError{err})
		return false
	}
	return true
}

// fill has the blob's bytes arrive.
func (t *Transfer) fill(body io.ReadCloser) error {
	failures := 0
	for {
		n, err := t.copy(body)
		if err == nil {
			return nil
		}
		var werr *writeError
		if cause := context.Cause(t.ctx); cause != nil {
			return cause
		}
		if errors.As(err, &werr) || errors.Is(err, ErrCorrupt) || errors.Is(err, ErrShort) {
			return err
		}
		if n > 0 {
			failures = 0
		}
		if body, err = t.reopen(&failures, err); err != nil {
			return err
		}
	}
}

// writeError is a failure on our side, which another source wouldn't mend.
type writeError struct{ err error }

func (e *writeError) Error() string { return "keeping a blob: " + e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// copy takes in what body gives, and returns nil when that was the rest.
func (t *Transfer) copy(body io.ReadCloser) (n int64, err error) {
	from := newBeside(body, t.arrived, t.source)
	// Reads can't be ended but by closing what is read.
	stop := context.AfterFunc(t.ctx, func() { from.Close() })
	defer func() { stop(); from.Close() }()
	for {
		t.mu.Lock()
		buf, err := t.place(t.stopped)
		kept := !t.unkept
		t.mu.Unlock()
		if err != nil {
			return n, err
		}
		k, rerr := from.Read(buf)
		if k > 0 {
			if t.size >= 0 && t.arrived+int64(k) > t.size {
				return n, fmt.Errorf("%s: more than the announced %d bytes: %w", t.digest, t.size, ErrCorrupt)
			}
			if kept {
				if err := t.room.reach(t.arrived + int64(k)); err != nil {
					return n, &writeError{err}
				}
			}
			n += int64(k)
			t.mu.Lock()
			t.append(int64(k))
			t.news()
			t.mu.Unlock()
		}
		switch {
		case t.size >= 0 && t.arrived == t.size:
			return n, nil
		case errors.Is(rerr, io.EOF) && t.size < 0:
			return n, nil
		case errors.Is(rerr, io.EOF):
			return n, io.ErrUnexpectedEOF
		case rerr != nil:
			return n, rerr
		}
	}
}

// stopped says why nothing more is to arrive. The caller holds t.mu.
func (t *Transfer) stopped() error {
	if t.window.err != nil {
		return &writeError{t.window.err}
	}
	return context.Cause(t.ctx)
}

// tellTime is how long readers that wait aren't told of less than a chunk: a
// source gives as little as a TLS record at a time, and waking a reader for each
// takes longer than what it does.
const tellTime = time.Millisecond

// news tells readers that wait of what has arrived, or sees to it that they are
// told soon. The caller holds t.mu.
func (t *Transfer) news() {
	switch {
	case t.waiting == 0:
	case t.told == 0, t.arrived-t.told >= chunkSize:
		t.told = t.arrived
		t.change.Broadcast()
	default:
		t.tell.Reset(tellTime)
	}
}

func (t *Transfer) tellReaders() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.told = t.arrived
	t.change.Broadcast()
}

// source returns a source for the rest, beside the one that is silent.
func (t *Transfer) source(try int, offset int64, instead bool) io.ReadCloser {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.sources)
	if n == 0 || try > attempts*n || instead && n < 2 {
		return nil
	}
	return newOpening(t.ctx, t.sources[try%n], offset)
}

// reopen finds a source for the rest.
func (t *Transfer) reopen(failures *int, cause error) (io.ReadCloser, error) {
	t.mu.Lock()
	var src Source
	if len(t.sources) > 0 {
		src = t.sources[*failures%len(t.sources)]
	}
	limit := attempts * len(t.sources)
	t.mu.Unlock()
	if src == nil || *failures >= limit {
		return nil, fmt.Errorf("%s broke off after %d bytes: %w", t.digest, t.arrived, cause)
	}
	if *failures > 0 {
		select {
		case <-t.ctx.Done():
			return nil, context.Cause(t.ctx)
		case <-time.After(100 * time.Millisecond << min(*failures, 5)):
		}
	}
	*failures++
	return newOpening(t.ctx, src, t.arrived), nil
}

// TransferReader reads a blob while it arrives. It is not for concurrent use.
type TransferReader struct {
	t      *Transfer
	off    int64
	at     int64 // off as the transfer knows it
	err    error // what kept it from reading what has arrived
	ctx    context.Context
	closed bool
	raw    bool // see [Store.Follow]
	round  int
}

var errRestarted = errors.New("the transfer began again: what came first was wrong")

// WithContext makes reads end with ctx. It returns r.
func (r *TransferReader) WithContext(ctx context.Context) *TransferReader {
	r.ctx = ctx
	return r
}

// Size is the blob's length in bytes, or -1 when the source didn't say.
func (r *TransferReader) Size() int64 {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	return r.t.size
}

// Verified says that the transfer has ended, and that the bytes are the digest's.
func (r *TransferReader) Verified() bool {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	return r.t.state == kept
}

// Arrived is how many bytes are there by now.
func (r *TransferReader) Arrived() int64 {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	return r.t.arrived
}

// Read implements io.Reader: it waits for bytes to arrive. The blob's last byte
// comes only when the digest has been verified; else the error says why not.
func (r *TransferReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	t := r.t
	t.mu.Lock()
	r.moved()
	visible := t.visible(r)
	if r.off >= visible && t.state == arriving && r.ctx != nil {
		defer t.wakeWith(r.ctx)()
	}
	for r.off >= visible && t.state == arriving && !r.closed && (!r.raw || r.round == t.round) && (r.ctx == nil || r.ctx.Err() == nil) {
		t.waiting++
		t.told = t.arrived
		t.change.Wait()
		t.waiting--
		visible = t.visible(r)
	}
	state, err := t.state, t.err
	stale := r.raw && r.round != t.round
	if !r.raw && r.off < visible && state == arriving {
		t.given = true
	}
	t.mu.Unlock()

	switch {
	case r.closed:
		return 0, os.ErrClosed
	case stale:
		return 0, errRestarted
	}
	if r.off >= visible {
		switch state {
		case kept:
			return 0, io.EOF
		case failed:
			return 0, err
		}
		return 0, r.ctx.Err()
	}
	n, err := arrivedAt{t}.ReadAt(p[:min(int64(len(p)), visible-r.off)], r.off)
	r.off += int64(n)
	switch {
	case n > 0:
		err = nil
	case errors.Is(err, io.EOF):
		err = errRestarted // cut just now
	case errors.Is(err, ErrDiskHangs):
		err = &writeError{err}
		r.err = err
	}
	return n, err
}

// moved says to the transfer where the reader is. The caller holds t.mu.
func (r *TransferReader) moved() {
	if r.at != r.off {
		r.at = r.off
		r.t.freed()
	}
}

// arrivedAt reads what has arrived of a transfer: from memory, or from the file.
type arrivedAt struct{ *Transfer }

func (t arrivedAt) ReadAt(p []byte, off int64) (int, error) {
	if n := t.readAt(p, off); n > 0 {
		return n, nil
	}
	return t.store.reading.readAt(t.file, p, off)
}

// visible is how many bytes a reader may have. The caller holds t.mu.
func (t *Transfer) visible(r *TransferReader) int64 {
	switch {
	case t.state == kept:
		return t.arrived
	case !r.raw && (t.holding() || t.state == failed && t.again != nil && !t.given):
		return 0
	}
	return max(t.arrived-1, 0)
}

// holding says whether bytes are held back. The caller holds t.mu.
func (t *Transfer) holding() bool {
	return t.state == arriving && t.again != nil && time.Now().Before(t.until)
}

// Settle waits until there is something to read, and the size is known to be
// right if it ever will be. The error is the transfer's, when it has failed, or
// ctx's.
func (r *TransferReader) Settle(ctx context.Context) error {
	t := r.t
	defer t.wakeWith(ctx)()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.holding() && ctx.Err() == nil {
		t.change.Wait()
	}
	if t.state == failed {
		return t.err
	}
	return ctx.Err()
}

// Ended waits until the transfer has ended. The error is the transfer's, when it
// has failed, or ctx's.
func (r *TransferReader) Ended(ctx context.Context) error {
	t := r.t
	defer t.wakeWith(ctx)()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.state == arriving && ctx.Err() == nil {
		t.change.Wait()
	}
	if t.state == arriving {
		return ctx.Err()
	}
	return t.err
}

// Seek implements io.Seeker. The end is known only when the size is.
func (r *TransferReader) Seek(offset int64, whence int) (int64, error) {
	size := r.Size()
	if whence == io.SeekEnd && size < 0 {
		return r.off, errors.New("seek from the end of a blob of unknown size")
	}
	off, err := seek(r.off, size, offset, whence)
	if err == nil {
		r.off = off
	}
	return off, err
}

// Rest continues by itself at the reader's offset, from src, when the transfer
// failed because its bytes could not be written. It is verified against the
// digest like the transfer, but not kept. The error is the transfer's when it
// failed for another reason.
func (r *TransferReader) Rest(ctx context.Context, src Source) (io.ReadCloser, error) {
	r.t.mu.Lock()
	err := cmp.Or(r.err, r.t.err, errFinished)
	r.t.mu.Unlock()
	var werr *writeError
	if !errors.As(err, &werr) {
		return nil, err
	}
	return r.Leave(ctx, src)
}

// Leave continues by itself at the reader's offset, from src, as Rest does,
// while the transfer goes on for others. What the reader would read next must
// not be beyond what has arrived.
func (r *TransferReader) Leave(ctx context.Context, src Source) (io.ReadCloser, error) {
	body, err := src(ctx, r.off)
	if err != nil {
		return nil, err
	}
	st := NewStream(ctx, r.t.digest, r.Size(), body, src)
	if st.read, err = io.Copy(st.hash, io.NewSectionReader(arrivedAt{r.t}, 0, r.off)); err != nil {
		body.Close()
		return nil, fmt.Errorf("reading back %s: %w", r.t.digest, err)
	}
	return st, nil
}

// Close gives the reader up. A transfer that nobody reads ends after a while.
func (r *TransferReader) Close() error {
	t := r.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	delete(t.readers, r)
	switch {
	case len(t.readers) > 0:
	case t.state != arriving:
		t.clear()
	case t.unkept:
		t.cancel(ErrDiskHangs)
	default:
		t.linger = time.AfterFunc(lingerTime, func() { t.cancel(nil) })
	}
	t.freed()
	t.unrefFile()
	return nil
}
