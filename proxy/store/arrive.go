// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// run has the blob arrive, and keeps it.
func (t *Transfer) run(body io.ReadCloser, answers context.Context) {
	stop := context.AfterFunc(answers, t.unkeep)
	defer stop()
	wake := t.wakeWith(t.ctx)
	defer wake()
	sum, err := t.receive(body)
	again := false
	for errors.Is(err, ErrCorrupt) {
		if body, err = t.restart(err); err != nil {
			break
		}
		again = true
		sum, err = t.receive(body)
	}
	if cause := context.Cause(t.ctx); err != nil && cause != nil {
		err = cause
	}
	t.promise(0)
	if err == nil && t.part != nil {
		t.part.leaveAll(true) // nobody else writes what is verified
	}
	stored := err == nil && t.keep(sum)
	var werr *writeError
	left := err != nil && t.leavePartial(err)
	t.removeFiles(stored, left)
	if err != nil && !left && !errors.As(err, &werr) {
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
	if errors.Is(err, ErrCorrupt) && t.fromPeer() && t.unverified.Believed && !again {
		t.err = errors.New(err.Error()) // it says nothing of the registry
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

// removeFiles removes the files that are needed no more: when the blob is stored, its own
// is another one now.
func (t *Transfer) removeFiles(stored, left bool) {
	var paths []string
	if !stored && !left {
		paths = append(paths, t.file.Name())
		if t.part != nil {
			t.part.clear()
			t.part.leaveAll(true)
		}
	}
	if t.part != nil && !left && t.part.hasRecord() {
		paths = append(paths, t.file.Name()+recordSuffix)
	}
	if err := t.store.disk.remove(paths...); err != nil {
		t.store.log.Warn("can't remove an unfinished blob", "err", err)
	}
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

// receive has the blob arrive once, and verifies it.
func (t *Transfer) receive(body io.ReadCloser) (*sums, error) {
	sum, h := new(sums), t.digest.Algorithm().Hash()
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
	part, end := t.part, off+int64(len(p))
	if part != nil && part.has(off, end) {
		return nil
	}
	return t.store.disk.within(func() error {
		if err := t.allocate(t.file, end, t.size); err != nil {
			return err
		}
		_, err := t.file.WriteAt(p, off)
		if err == nil && part != nil {
			part.wrote(off, end)
		}
		return err
	})
}

// restart begins again after what was read turned out to be wrong, if no
// reader was given any of it, and returns what is to be read then. The error is the one that the transfer
// ends with: cause, and why it can't be fetched again.
func (t *Transfer) restart(cause error) (body io.ReadCloser, err error) {
	t.mu.Lock()
	u, again := t.unverified, !t.given && t.round < attempts && !t.unkept
	if u != nil && again { // nothing of it is given while it is fetched
		t.arrived, t.told = 0, 0
		t.clear()
		t.round++
	}
	t.mu.Unlock()
	if u == nil {
		return nil, cause
	}
	if u.Wrong != nil {
		u.Wrong()
	}
	t.store.log.Warn("what came of a blob is wrong", "digest", t.digest, "again", again, "err", cause)
	if !again {
		return nil, cause
	}
	body, size, err := u.Refetch(t.ctx)
	if err != nil {
		return nil, fmt.Errorf("%w, and it can't be fetched again: %w", cause, err)
	}
	t.mu.Lock()
	if t.fromPeer() && t.until.IsZero() { // the next source need not be believed
		t.until = time.Now().Add(holdTime)
		time.AfterFunc(holdTime, t.change.Broadcast)
	}
	t.size = size
	t.change.Broadcast()
	t.mu.Unlock()
	if p := t.part; p != nil { // others may be reading, and writing, what was there
		p.clear()
		p.leaveAll(true)
		t.setPart(nil, t.file)
		if p.hasRecord() {
			_ = t.store.disk.remove(p.path + recordSuffix)
		}
	}
	t.allocated = 0
	t.promise(size)
	if err := t.store.disk.do(func() error { return t.file.Truncate(0) }, nil); err != nil {
		body.Close()
		t.cancel(&writeError{err})
		return nil, cause
	}
	return body, nil
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
		if body, err = t.reopen(failures, err); err != nil {
			return err
		}
		failures++
	}
}

// writeError is a failure on our side, which another source wouldn't mend.
type writeError struct{ err error }

func (e *writeError) Error() string { return "keeping a blob: " + e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// copy reads what body gives, and returns nil when that was the rest.
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
	return t.opening(t.sources[try%n], offset)
}

// reopen finds a source for the rest, after so many failures in a row and cause.
func (t *Transfer) reopen(failures int, cause error) (io.ReadCloser, error) {
	t.mu.Lock()
	var src Source
	if len(t.sources) > 0 {
		src = t.sources[failures%len(t.sources)]
	}
	limit := attempts * len(t.sources)
	t.mu.Unlock()
	if src == nil || failures >= limit {
		return nil, fmt.Errorf("%s broke off after %d bytes: %w", t.digest, t.arrived, cause)
	}
	if failures > 0 {
		select {
		case <-t.ctx.Done():
			return nil, context.Cause(t.ctx)
		case <-time.After(100 * time.Millisecond << min(failures, 5)):
		}
	}
	return t.opening(src, t.arrived), nil
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
		if t.part != nil {
			t.part.path = f.Name()
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

// promise records how many bytes the transfer will still need of the disk, and
// says whether they are there.
func (t *Transfer) promise(n int64) bool {
	n = max(n, 0)
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	t.store.promised += n - t.promised
	t.promised = n
	return t.store.free() >= 0
}
