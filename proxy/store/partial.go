// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"container/list"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
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

// bootID is which boot of the kernel this is. After a crash of the machine there may be
// zeros where bytes were, so that partials are good for one boot. It is a variable for
// tests.
var bootID = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
})

// partial is what is there of a blob that has not arrived as a whole: a file, and which
// ranges of it were written. Beside the file a record names them, so that it is found
// again after a restart. Nothing has verified the bytes: they are given to nobody but
// those who share its origin.
type partial struct {
	key   running
	from  Origin
	path  string
	size  int64 // of the whole blob
	begun time.Time

	mu       sync.Mutex
	have     spans
	saved    int64 // how many bytes of have are written down
	recorded bool  // there is a record

	// Guarded by the store's mutex:
	idle  *list.Element // among those that no transfer has
	bytes int64         // that are counted
}

// record is what is written down of a partial.
type record struct {
	Boot   string        `json:"boot"`
	Digest digest.Digest `json:"digest"`
	Name   string        `json:"name"`
	Owner  string        `json:"owner,omitempty"`
	Free   bool          `json:"free,omitempty"`
	Size   int64         `json:"size"`
	Begun  time.Time     `json:"begun"`
	Have   [][2]int64    `json:"have"`
}

// at says whether the byte at off is there, and up to where that stays so.
func (p *partial) at(off int64) (to int64, in bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	to, in = p.have.at(off)
	return min(to, p.size), in
}

// wrote says that a range is in the file now, and writes it down now and then, in dir
// first. When it can't be, no more is lost than what a restart would have found.
func (p *partial) wrote(from, to int64, dir string) {
	p.mu.Lock()
	p.have = p.have.add(from, to)
	save := p.have.bytes()-p.saved >= saveStep
	p.mu.Unlock()
	if save {
		_ = p.save(dir)
	}
}

// save writes down what is there, in dir first, so that the record is whole or not there.
func (p *partial) save(dir string) error {
	p.mu.Lock()
	r := record{bootID(), p.key.digest, p.from.Name, p.from.Owner, p.from.Free, p.size, p.begun, make([][2]int64, len(p.have))}
	for i, e := range p.have {
		r.Have[i] = [2]int64{e.from, e.to}
	}
	p.saved, p.recorded = p.have.bytes(), true
	p.mu.Unlock()
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "record.")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), p.path+recordSuffix)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

var errRecord = errors.New("not the record of a partial")

// parseRecord reads what is written down of a partial.
func parseRecord(b []byte) (*partial, string, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return nil, "", fmt.Errorf("%w: %w", errRecord, err)
	}
	if r.Digest.Validate() != nil || r.Size <= 0 || len(r.Have) > maxSpans {
		return nil, "", errRecord
	}
	p := &partial{key: running{r.Digest, r.Name}, from: Origin{r.Name, r.Owner, r.Free}, size: r.Size, begun: r.Begun}
	for _, e := range r.Have {
		p.have = append(p.have, span{e[0], e[1]})
	}
	if !p.have.valid(p.size) {
		return nil, "", errRecord
	}
	p.saved, p.recorded = p.have.bytes(), true
	return p, r.Boot, nil
}

// loadPartials finds the partials in the directory of running transfers again, and removes all
// else that is there.
func (s *Store) loadPartials() error {
	dir := s.path("ingest")
	all, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("reading unfinished transfers: %w", err)
	}
	var found []*partial
	good := make(map[string]bool)
	for _, e := range all {
		path, ok := strings.CutSuffix(filepath.Join(dir, e.Name()), recordSuffix)
		if !ok || !e.Type().IsRegular() {
			continue
		}
		p, boot, err := readRecord(path)
		if err != nil || boot == "" || boot != bootID() || p.over() {
			continue
		}
		found = append(found, p)
		good[filepath.Base(path)], good[e.Name()] = true, true
	}
	for _, e := range all {
		if good[e.Name()] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("removing unfinished transfers: %w", err)
		}
	}
	slices.SortFunc(found, func(a, b *partial) int { return a.begun.Compare(b.begun) })
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range found {
		if !s.admit(p) {
			s.removePartial(p)
		}
	}
	return nil
}

// readRecord reads the record beside a file, of which all that it names must be there.
func readRecord(path string) (*partial, string, error) {
	f, err := os.Open(path + recordSuffix)
	if err != nil {
		return nil, "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, "", err
	}
	p, boot, err := parseRecord(b)
	if err != nil {
		return nil, "", err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, "", err
	}
	if n := len(p.have); !info.Mode().IsRegular() || n == 0 || p.have[n-1].to > info.Size() {
		return nil, "", errRecord
	}
	p.path = path
	return p, boot, nil
}

// over says that it is too old.
func (p *partial) over() bool { age := time.Since(p.begun); return age < 0 || age > partialTime }

// admit keeps a partial that no transfer has any more, if its bounds allow it: others that
// are older go, and no blob. The caller holds s.mu, and no room for it.
func (s *Store) admit(p *partial) bool {
	n, bound := p.there(), s.partialBound()
	owner := p.from.Owner
	owners := func(q *partial) bool { return q.from.Owner != "" }
	own := func(q *partial) bool { return q.from.Owner == owner }
	within := func(of func(*partial) bool, bound int64) bool {
		for n <= bound && s.partialBytes(of)+n > bound {
			s.dropPartial(of)
		}
		return n <= bound
	}
	switch {
	case n < minPartial || p.over() || len(s.partials) >= maxPartials && !s.dropPartial(anyPartial):
		return false
	case owner != "" && !(within(own, bound/4) && within(owners, bound/2)):
		return false
	case !within(anyPartial, bound) || s.opts.MaxBytes > 0 && s.stats.Bytes+n > s.opts.MaxBytes || !s.fits(0):
		return false // its bytes are on the disk already
	case owner != "" && s.opts.MaxBytes > 0 && (s.ownedBy(owner).bytes+n > s.opts.MaxBytes/ownerShare || s.owned+n > s.opts.MaxBytes/ownersShare):
		s.forgetOwner(owner)
		return false
	}
	if old := s.partials[p.key]; old != nil {
		s.takePartial(old)
		s.removePartial(old)
	}
	p.bytes, p.idle = n, s.idle.PushBack(p)
	s.partials[p.key] = p
	s.stats.Bytes += n
	s.stats.Partial += n
	s.own(owner, n)
	return true
}

// maxPartials bounds how many there are.
const maxPartials = 512

func anyPartial(*partial) bool { return true }

// hasRecord says whether it has a record.
func (p *partial) hasRecord() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.recorded
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
	if err := s.disk.remove(p.path, p.path+recordSuffix); err != nil {
		s.log.Warn("can't remove an unfinished blob", "err", err)
	}
}

// leavePartial keeps what has come of a transfer that has failed, and says whether it could.
func (t *Transfer) leavePartial(cause error) bool {
	p, s := t.part, t.store
	t.mu.Lock()
	unkept := t.unkept || t.window.err != nil
	t.mu.Unlock()
	if p == nil || unkept || errors.Is(cause, ErrCorrupt) || errors.Is(cause, ErrShort) || p.there() < minPartial {
		return false
	}
	if err := s.disk.do(func() error { return p.save(s.path("ingest")) }, nil); err != nil {
		s.log.Warn("what has come of a blob can't be kept", "digest", t.digest, "err", err)
		return false
	}
	t.room.release()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.admit(p)
}
