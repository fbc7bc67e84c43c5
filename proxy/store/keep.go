// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
)

// Put keeps a small blob that is in memory. The error is [ErrCorrupt] when
// the bytes aren't those of the digest.
func (s *Store) Put(d digest.Digest, b []byte, from Origin) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%q: %w", d, err)
	}
	if d.Algorithm().FromBytes(b) != d {
		return fmt.Errorf("%s: %w", d, ErrCorrupt)
	}
	r := s.newRoom(from, false)
	if s.keptAlready(d, r) {
		return nil
	}
	if err := s.refuse(); err != nil {
		return fmt.Errorf("keeping %s: %w", d, err)
	}
	if !r.reserve(int64(len(b))) {
		return fmt.Errorf("keeping %s: %w", d, s.notKept())
	}
	err := s.keepNew(d, r, func() (string, *sums, error) {
		f, err := os.CreateTemp(s.path("ingest"), d.Encoded()+".")
		if err != nil {
			return "", nil, err
		}
		_, err = f.Write(b)
		sum := new(sums)
		_, _ = sum.Write(b)
		return f.Name(), sum, errors.Join(err, f.Close())
	})
	if err != nil {
		r.release()
		return fmt.Errorf("keeping %s: %w", d, err)
	}
	return nil
}

// refuse says why nothing can be kept just now, before room is made for it.
func (s *Store) refuse() error {
	err := s.ctx.Err()
	if err == nil && !s.disk.hangs().IsZero() {
		err = fmt.Errorf("%s: %w", s.dir, ErrDiskHangs)
	}
	return err
}

// notKept counts a blob that there was no room for.
func (s *Store) notKept() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.NotKept++
	return ErrNoSpace
}

// keep makes a finished file a kept blob, and its room the blob's. When the
// blob is kept already, the file and the room are given up.
func (s *Store) keep(d digest.Digest, tmp string, r *room, sum *sums) error {
	if s.keptAlready(d, r) {
		return s.disk.remove(tmp)
	}
	return s.keepNew(d, r, func() (string, *sums, error) { return tmp, sum, nil })
}

// keepNew is keep for a file that file returns, with its checksums. It is one
// operation on the disk.
func (s *Store) keepNew(d digest.Digest, r *room, file func() (tmp string, sum *sums, err error)) error {
	err := s.disk.do(func() error {
		tmp, sum, err := file()
		for _, p := range []string{s.blobPath(d), s.sumsPath(d)} {
			if err == nil {
				err = os.MkdirAll(filepath.Dir(p), 0o700)
			}
		}
		if err == nil {
			// The checksums come first: a blob without them would have to be hashed.
			// When they can't be written that is what happens.
			if serr := sum.save(s.sumsPath(d), s.path("ingest")); serr != nil {
				s.log.Warn("checksums not kept", "digest", d, "err", serr)
			}
			err = os.Rename(tmp, s.blobPath(d))
		}
		if err != nil && tmp != "" {
			os.Remove(tmp)
		}
		return err
	}, func() {
		// Nothing else is kept before this has returned.
		if !s.kept(d) {
			_ = removeAll([]string{s.blobPath(d), s.sumsPath(d)})
		}
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.index[d]; ok { // renamed over its twin
		s.forget(old)
	}
	e := &entry{digest: d, size: r.bytes, touched: time.Now(), owner: r.from.Owner}
	if e.owner != "" {
		e.own = s.ownedBy(e.owner).blobs.PushFront(e)
	}
	s.index[d] = s.recent.PushFront(e)
	s.twice(e, s.elsewhere(d))
	s.changed(d, true)
	for s.dropPartial(func(p *partial) bool { return p.key.digest == d }) {
	}
	return nil
}

// keptAlready says whether a blob is kept, and gives up the room for it if it
// is. A blob that an authenticated registry has too isn't an owner's any more.
func (s *Store) keptAlready(d digest.Digest, r *room) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	el, ok := s.index[d]
	if !ok {
		return false
	}
	if e := el.Value.(*entry); r.from.Owner == "" && e.owner != "" {
		s.disown(e)
		s.own("", e.size)
	}
	s.giveUp(r)
	return true
}

// disown takes a blob from its owner. The caller holds s.mu.
func (s *Store) disown(e *entry) {
	s.own(e.owner, -e.size)
	if e.own != nil {
		s.owners[e.owner].blobs.Remove(e.own)
	}
	s.forgetOwner(e.owner)
	e.owner, e.own = "", nil
}
