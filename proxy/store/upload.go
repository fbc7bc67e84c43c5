// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/opencontainers/go-digest"
)

// Upload takes in a blob whose digest is known only at its end, as that of a
// blob which passes by. It is for one goroutine at a time. As it may come to
// nothing, it takes only room that is free, whatever its origin.
//
// Write never fails: what is kept of a blob that passes by must not keep it
// from passing. Commit tells.
type Upload struct {
	store    *Store
	file     *os.File
	sums     *sums
	digester digest.Digester
	written  int64
	room     *room
	err      error
	kept     bool
	once     sync.Once
}

// NewUpload begins an upload. Close it.
func (s *Store) NewUpload(from Origin) *Upload {
	return &Upload{store: s, room: s.newRoom(from, true), sums: newSums(), digester: digest.Canonical.Digester()}
}

// Size is how many bytes were written.
func (u *Upload) Size() int64 { return u.written }

// Write implements io.Writer, without ever failing.
func (u *Upload) Write(p []byte) (int, error) {
	if u.err == nil && len(p) > 0 {
		u.err = u.write(p)
		if u.err != nil {
			u.Close()
		}
	}
	u.written += int64(len(p))
	return len(p), nil
}

func (u *Upload) write(p []byte) (err error) {
	s := u.store
	if err := s.ctx.Err(); err != nil {
		return err
	}
	if u.file == nil {
		if u.file, err = os.CreateTemp(s.path("ingest"), "upload."); err != nil {
			return err
		}
		s.mu.Lock()
		u.room.file = u.file
		s.mu.Unlock()
	}
	if err := u.room.reach(u.written + int64(len(p))); err != nil {
		return err
	}
	if _, err := u.file.Write(p); err != nil {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	_, _ = u.sums.Write(p)
	_, _ = u.digester.Hash().Write(p)
	return nil
}

// Commit keeps what was written as the blob that it has to be. The error is
// [ErrCorrupt] when it is another one.
func (u *Upload) Commit(d digest.Digest) error {
	defer u.Close()
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%q: %w", d, err)
	}
	if u.err != nil {
		return u.err
	}
	is := u.digester.Digest()
	if u.file != nil && d.Algorithm() != digest.Canonical {
		if _, err := u.file.Seek(0, io.SeekStart); err != nil {
			return err
		}
		var err error
		if is, err = d.Algorithm().FromReader(u.file); err != nil {
			return err
		}
	}
	if is != d || u.file == nil {
		return fmt.Errorf("%s: what was sent has another digest: %w", d, ErrCorrupt)
	}
	if u.store.keptAlready(d, u.room) {
		return nil
	}
	if err := u.room.confirm(u.written); err != nil {
		return err
	}
	if err := u.store.keep(d, u.file.Name(), u.room, u.sums); err != nil {
		return err
	}
	u.kept = true
	return nil
}

// Close gives up what was not committed.
func (u *Upload) Close() {
	u.once.Do(func() {
		if u.err == nil {
			u.err = errors.New("the upload is over")
		}
		if !u.kept {
			u.room.release()
		}
		if u.file == nil {
			return
		}
		u.file.Close()
		if !u.kept {
			os.Remove(u.file.Name())
		}
	})
}
