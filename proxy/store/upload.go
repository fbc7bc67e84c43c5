// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Upload receives a blob whose digest is known only at its end, as that of a
// blob which passes by. It is for one goroutine at a time. As it may come to
// nothing, it takes only room that is free, whatever its origin.
//
// Write never fails, and waits for the disk a second at most: what is kept of a
// blob that passes by must not keep it from passing. Commit tells.
type Upload struct {
	store   *Store
	window  window
	hashed  <-chan struct{} // see [window.start]; nil before anything is written
	stop    func() bool     // of looking whether the disk hangs
	sums    *sums
	hash    digest.Digester
	written int64
	room    *room
	kept    bool
	once    sync.Once
	closed  bool // guarded by the window's mutex
}

// NewUpload begins an upload. Close it.
func (s *Store) NewUpload(from Origin) *Upload {
	u := &Upload{store: s, room: s.newRoom(from, true), sums: new(sums), hash: digest.Canonical.Digester()}
	u.window.init(s, chunkSize, func() int64 { return u.window.arrived })
	return u
}

// Size is how many bytes were written.
func (u *Upload) Size() int64 { return u.written }

// Write implements io.Writer, without ever failing.
func (u *Upload) Write(p []byte) (int, error) {
	if len(p) > 0 && u.failed() == nil {
		if err := u.write(p); err != nil {
			u.fail(err)
			u.Close()
		}
	}
	u.written += int64(len(p))
	return len(p), nil
}

func (u *Upload) write(p []byte) error {
	s, w := u.store, &u.window
	if err := s.refuse(); err != nil {
		return err
	}
	if err := u.room.reach(u.written + int64(len(p))); err != nil {
		return err
	}
	if u.hashed == nil {
		answers := s.disk.answering()
		if err := u.create(); err != nil {
			return err
		}
		u.hashed = w.start(u.sums, u.hash.Hash(), u.writeAt, u.left)
		u.stop = context.AfterFunc(answers, u.unkeep)
	}
	defer u.bounded()()
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(p) > 0 {
		to, err := w.place(u.why)
		if err != nil {
			return err
		}
		n := copy(to, p)
		w.append(int64(n))
		p = p[n:]
	}
	return nil
}

// create makes the file.
func (u *Upload) create() (err error) {
	s := u.store
	u.window.file, err = on(s.disk, func() (*os.File, error) { return os.CreateTemp(s.path("ingest"), "upload.") },
		func(f *os.File) {
			f.Close()
			os.Remove(f.Name())
		})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u.room.file = u.window.file
	return nil
}

// writeAt writes a piece of the file.
func (u *Upload) writeAt(p []byte, off int64) error {
	return u.store.disk.within(func() error {
		if u.room.lost.Load() {
			return ErrNoSpace
		}
		if _, err := u.window.file.WriteAt(p, off); err != nil {
			return fmt.Errorf("%w: %w", ErrNoSpace, err)
		}
		return nil
	})
}

// bounded gives up the copy, unless what it returns is called within the disk's
// time: what passes by doesn't wait longer.
func (u *Upload) bounded() (stop func() bool) {
	return time.AfterFunc(u.store.disk.timeout, u.unkeep).Stop
}

// unkeep gives up the copy, as the disk hangs, or is slower than what passes by.
func (u *Upload) unkeep() {
	u.window.mu.Lock()
	defer u.window.mu.Unlock()
	u.window.unkept = true
	u.window.wake()
}

// fail gives up the copy for another reason, if it has not failed already.
func (u *Upload) fail(err error) {
	u.window.mu.Lock()
	defer u.window.mu.Unlock()
	if u.window.err == nil {
		u.window.err = err
	}
	u.window.wake()
}

// failed says why there is no copy.
func (u *Upload) failed() error {
	u.window.mu.Lock()
	defer u.window.mu.Unlock()
	return u.why()
}

// why is failed. The caller holds the window's mutex.
func (u *Upload) why() error {
	if u.window.unkept {
		return ErrDiskHangs
	}
	return u.window.err
}

// Commit keeps what was written as the blob that it has to be. The error is
// [ErrCorrupt] when it is another one.
func (u *Upload) Commit(d digest.Digest) error {
	defer u.Close()
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%q: %w", d, err)
	}
	if u.hashed != nil {
		stop := u.bounded()
		u.window.end(false, u.hashed)
		stop()
	}
	if err := u.failed(); err != nil {
		return err
	}
	is := u.hash.Digest()
	if u.hashed != nil && d.Algorithm() != digest.Canonical {
		var err error
		if is, err = d.Algorithm().FromReader(io.NewSectionReader(fileAt{u.store.reading, u.window.file}, 0, u.written)); err != nil {
			return err
		}
	}
	if is != d || u.hashed == nil {
		return fmt.Errorf("%s: what was sent has another digest: %w", d, ErrCorrupt)
	}
	if u.store.keptAlready(d, u.room) {
		return nil
	}
	if err := u.room.confirm(u.written); err != nil {
		return err
	}
	if err := u.store.keep(d, u.window.file.Name(), u.room, u.sums); err != nil {
		return err
	}
	u.kept = true
	return nil
}

// Close gives up what was not committed.
func (u *Upload) Close() {
	u.once.Do(func() {
		u.fail(errors.New("the upload is over"))
		if u.hashed != nil {
			u.window.end(true, u.hashed)
			u.stop()
		}
		if !u.kept {
			u.room.release()
		}
		u.window.mu.Lock()
		defer u.window.mu.Unlock()
		u.window.clear()
		u.closed = true
		if !u.window.writing {
			u.left()
		}
	})
}

// left closes the file once the upload is over and its writer has gone. The
// caller holds the window's mutex.
func (u *Upload) left() {
	f := u.window.file
	if !u.closed || f == nil {
		return
	}
	f.Close()
	if !u.kept {
		if err := u.store.disk.remove(f.Name()); err != nil {
			u.store.log.Warn("can't remove an unfinished upload", "err", err)
		}
	}
}
