// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"iter"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// shares is a bounded table whose entries belong to shares. When it is full, the
// largest share loses its least recently used entry: who fills the table makes
// room by itself.
type shares[K comparable, V any] struct {
	mu    sync.Mutex
	limit int
	n     int
	by    map[string]*simplelru.LRU[K, V]
}

func newShares[K comparable, V any](limit int) *shares[K, V] {
	return &shares[K, V]{limit: limit, by: make(map[string]*simplelru.LRU[K, V])}
}

func (s *shares[K, V]) get(share string, key K) (v V, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.by[share]; l != nil {
		return l.Get(key)
	}
	return v, false
}

// peek is get for a caller who holds s.mu, and doesn't count as use.
func (s *shares[K, V]) peek(share string, key K) (v V, ok bool) {
	if l := s.by[share]; l != nil {
		return l.Peek(key)
	}
	return v, false
}

func (s *shares[K, V]) put(share string, key K, v V) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(share, key, v)
}

// add is put for a caller who holds s.mu.
func (s *shares[K, V]) add(share string, key K, v V) {
	l := s.by[share]
	if l == nil {
		l, _ = simplelru.NewLRU[K, V](s.limit, nil)
		s.by[share] = l
	}
	if !l.Contains(key) {
		if s.n >= s.limit {
			s.makeRoom(share)
			s.by[share] = l
		}
		s.n++
	}
	l.Add(key, v)
}

// makeRoom takes an entry from the largest share: from the one that wants to grow
// where it is as large as any.
func (s *shares[K, V]) makeRoom(growing string) {
	largest := growing
	for share, l := range s.by {
		if l.Len() > s.by[largest].Len() {
			largest = share
		}
	}
	if s.by[largest].Len() == 0 {
		return
	}
	s.by[largest].RemoveOldest()
	s.removed(largest)
}

// removed counts an entry that was removed.
func (s *shares[K, V]) removed(share string) {
	s.n--
	if s.by[share].Len() == 0 {
		delete(s.by, share)
	}
}

func (s *shares[K, V]) remove(share string, key K) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.by[share]; l != nil && l.Remove(key) {
		s.removed(share)
	}
}

// expire removes the least recently used entries of a share for as long as they
// are over.
func (s *shares[K, V]) expire(share string, over func(V) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := s.by[share]; l != nil; {
		_, v, ok := l.GetOldest()
		if !ok || !over(v) {
			return
		}
		l.RemoveOldest()
		s.removed(share)
	}
}

// all returns the entries of a share as they are now, the least recently used
// first.
func (s *shares[K, V]) all(share string) iter.Seq2[K, V] {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.by[share]
	if l == nil {
		return func(func(K, V) bool) {}
	}
	keys, values := l.Keys(), l.Values()
	return func(yield func(K, V) bool) {
		for i, k := range keys {
			if !yield(k, values[i]) {
				return
			}
		}
	}
}

// names returns the shares.
func (s *shares[K, V]) names() (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for share := range s.by {
		all = append(all, share)
	}
	return all
}
