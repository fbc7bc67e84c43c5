// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// foreignInterval is how often it is looked at what is in the content stores of
// others.
const foreignInterval = 10 * time.Second

// foreign is a content store of others.
type foreign struct {
	*disk
	has map[digest.Digest]struct{} // guarded by the store's mutex; never changed in place
}

// AddForeign makes the store read blobs from dir too, laid out as
// ALGORITHM/HEX, which it never changes. It is looked at after the store's own.
func (s *Store) AddForeign(dir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.ContainsFunc(s.foreign, func(f *foreign) bool { return f.dir == dir }) {
		return
	}
	s.foreign = append(slices.Clone(s.foreign), &foreign{disk: newReading(dir, s.log)})
	select {
	case s.look <- struct{}{}:
	default:
	}
}

// RemoveForeign undoes [Store.AddForeign].
func (s *Store) RemoveForeign(dir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.foreign, func(f *foreign) bool { return f.dir == dir })
	if i < 0 {
		return
	}
	f := s.foreign[i]
	f.close()
	s.foreign = slices.Delete(slices.Clone(s.foreign), i, i+1)
	s.hold(f, nil)
}

// followForeign looks again and again at what is in the content stores of others: it
// is the first to make room, and peers are told of it.
func (s *Store) followForeign() {
	t := time.NewTicker(foreignInterval)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.look:
		case <-t.C:
		}
		s.lookAtForeign()
	}
}

// lookAtForeign looks at them once.
func (s *Store) lookAtForeign() {
	s.looking.Lock() // what was listed last counts
	defer s.looking.Unlock()
	s.mu.Lock()
	all := s.foreign
	s.mu.Unlock()
	for _, f := range all {
		has, err := on(f.disk, func() (map[digest.Digest]struct{}, error) { return digestsIn(f.dir) }, nil)
		if err != nil {
			continue // what was there is there, as far as is known
		}
		s.mu.Lock()
		if slices.Contains(s.foreign, f) {
			s.hold(f, has)
		}
		s.mu.Unlock()
	}
}

// digestsIn lists a content store.
func digestsIn(dir string) (map[digest.Digest]struct{}, error) {
	has := make(map[digest.Digest]struct{})
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		names, err := os.ReadDir(filepath.Join(dir, alg.String()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, n := range names {
			if d := digest.NewDigestFromEncoded(alg, n.Name()); d.Validate() == nil {
				has[d] = struct{}{}
			}
		}
	}
	return has, nil
}

// hold records what a content store of others has now. The caller holds s.mu.
func (s *Store) hold(f *foreign, has map[digest.Digest]struct{}) {
	had := f.has
	f.has = has
	for d := range has {
		if _, ok := had[d]; !ok {
			s.held(d, true)
		}
	}
	for d := range had {
		if _, ok := has[d]; !ok && !s.elsewhere(d) {
			s.held(d, false)
		}
	}
}

// held records whether others have a blob. The caller holds s.mu.
func (s *Store) held(d digest.Digest, is bool) {
	if el, ok := s.index[d]; ok {
		s.twice(el.Value.(*entry), is)
	} else {
		s.changed(d, is)
	}
}

// elsewhere says whether others have a blob, as far as is known. The caller holds s.mu.
func (s *Store) elsewhere(d digest.Digest) bool {
	return slices.ContainsFunc(s.foreign, func(f *foreign) bool { _, ok := f.has[d]; return ok })
}

// twice records whether a kept blob is held by others as well. The caller holds s.mu.
func (s *Store) twice(e *entry, is bool) {
	switch {
	case is == e.twice:
	case is:
		s.stats.Duplicate += e.size
	default:
		s.stats.Duplicate -= e.size
	}
	e.twice = is
}

// newReading returns the disk of a directory that is read.
func newReading(dir string, log *slog.Logger) *disk {
	return newDisk(dir, "no blobs are read from there", log, func() error { _, err := os.Stat(dir); return err })
}
