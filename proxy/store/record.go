// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
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

// bootID is which boot of the kernel this is. After a crash of the machine there may be
// zeros where bytes were, so that partials are good for one boot. It is a variable for
// tests.
var bootID = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
})

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

// save writes down what is there.
func (p *partial) save() error {
	p.mu.Lock()
	r := record{bootID(), p.key.digest, p.from.Name, p.from.Owner, p.from.Free, p.size, p.begun, make([][2]int64, len(p.have))}
	for i, e := range p.have {
		r.Have[i] = [2]int64{e.From, e.To}
	}
	p.saved, p.recorded = p.have.bytes(), true
	path := p.path + recordSuffix
	p.mu.Unlock()
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	err = replaceFile(path, filepath.Dir(path), b)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead { // it was removed meanwhile
		os.Remove(path)
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
	p := newPartial(running{r.Digest, r.Name}, Origin{r.Name, r.Owner, r.Free}, r.Size)
	p.begun = r.Begun
	for _, e := range r.Have {
		p.have = append(p.have, Span{e[0], e[1]})
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
	if n := len(p.have); !info.Mode().IsRegular() || n == 0 || p.have[n-1].To > info.Size() {
		return nil, "", errRecord
	}
	p.path = path
	return p, boot, nil
}
