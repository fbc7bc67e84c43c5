// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
)

// tags remembers what tags were, for when the upstream can't say, and to know
// whether asking it with a HEAD is worth while.
type tags struct {
	mu      sync.Mutex
	lru     *lru.Cache[tag, []tagged] // most recently said first
	changed atomic.Bool
}

type tag struct {
	repository
	tag string
}

type tagged struct {
	digest digest.Digest
	when   time.Time // when the upstream said so
}

// maxTagged is how many digests of a tag are remembered: it may be another one
// for clients that accept other media types.
const maxTagged = 4

func newTags() *tags {
	t := &tags{}
	t.lru, _ = lru.New[tag, []tagged](1 << 14)
	return t
}

// get returns what a tag was, what was said last first.
func (t *tags) get(key tag) []tagged {
	all, _ := t.lru.Get(key)
	return all
}

func (t *tags) set(key tag, d digest.Digest, when time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old, _ := t.lru.Get(key)
	all := []tagged{{d, when}}
	for _, o := range old {
		if o.digest != d && len(all) < maxTagged {
			all = append(all, o)
		}
	}
	t.lru.Add(key, all)
	t.changed.Store(true)
}

// forget forgets the tags of a repository that are the reference: a tag, or a
// digest.
func (t *tags) forget(repo repository, ref string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changed.Store(true)
	for _, k := range t.lru.Keys() {
		if k.repository != repo {
			continue
		}
		if k.tag == ref {
			t.lru.Remove(k)
			continue
		}
		all, _ := t.lru.Peek(k)
		if left := slices.DeleteFunc(slices.Clone(all), func(v tagged) bool { return v.digest.String() == ref }); len(left) < len(all) {
			t.lru.Add(k, left)
		}
	}
}

// memory is what of a handler's knowledge outlives it: without it an agent
// that starts while a registry is down could not serve what it has.
type memory struct {
	Tags    []rememberedTag             `json:"tags"`
	Public  []rememberedRepo            `json:"public"`
	Members map[string]rememberedInRepo `json:"members"` // by registry
}

type rememberedTag struct {
	Registry, Repository, Tag string
	Digest                    digest.Digest
	When                      time.Time
}

type rememberedRepo struct {
	Registry, Repository string
	When                 time.Time
}

type rememberedInRepo map[string]map[digest.Digest]time.Time // by repository

// maxMemory bounds the file that is read.
const maxMemory = 64 << 20

// remember writes the memory to a file, as a whole or not at all.
func (h *Handler) remember() error {
	if h.file == "" || !h.tags.changed.Swap(false) {
		return nil
	}
	m := h.snapshot(func(repository) bool { return true })
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(h.file), filepath.Base(h.file)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), h.file)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// snapshot is what is known of some repositories.
func (h *Handler) snapshot(of func(repository) bool) memory {
	m := memory{Members: make(map[string]rememberedInRepo)}
	for _, k := range h.tags.lru.Keys() {
		if !of(k.repository) {
			continue
		}
		all, _ := h.tags.lru.Peek(k)
		for _, v := range slices.Backward(all) {
			m.Tags = append(m.Tags, rememberedTag{k.registry, k.name, k.tag, v.digest, v.when})
		}
	}
	for _, k := range h.rights.public.Keys() {
		if v, ok := h.rights.public.Peek(k); ok && v.is && of(k) {
			m.Public = append(m.Public, rememberedRepo{k.registry, k.name, v.when})
		}
	}
	for _, k := range h.rights.members.Keys() {
		if v, ok := h.rights.members.Peek(k); ok && of(k.repository) {
			in := m.Members[k.registry]
			if in == nil {
				in = make(rememberedInRepo)
				m.Members[k.registry] = in
			}
			if in[k.name] == nil {
				in[k.name] = make(map[digest.Digest]time.Time)
			}
			in[k.name][k.digest] = v
		}
	}
	return m
}

// recall reads what an earlier handler remembered. What can't be read is
// forgotten: it is only worth something in bad times.
func (h *Handler) recall() error {
	left, _ := filepath.Glob(h.file + ".*") // by a process that was killed
	for _, name := range left {
		os.Remove(name)
	}
	info, err := os.Stat(h.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && info.Size() > maxMemory {
		err = fmt.Errorf("it has %d bytes", info.Size())
	}
	if err != nil {
		return err
	}
	b, err := os.ReadFile(h.file)
	if err != nil {
		return err
	}
	var m memory
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	// The least recently used come first, as they were written.
	for _, t := range m.Tags {
		if t.Digest.Validate() == nil {
			repo := repository{t.Registry, t.Repository}
			h.tags.set(tag{repo, t.Tag}, t.Digest, t.When)
			h.knows(repo)
		}
	}
	for _, p := range m.Public {
		h.rights.public.Add(repository{p.Registry, p.Repository}, publicity{true, p.When})
	}
	for registry, repos := range m.Members {
		for repo, digests := range repos {
			for d, when := range digests {
				if d.Validate() == nil {
					h.rights.members.Add(member{repository{registry, repo}, d}, when)
				}
			}
		}
	}
	return nil
}

// Remembers says whether there may be something to serve of a registry even
// while it can't be reached.
func (h *Handler) Remembers(id string) bool {
	id = Upstream{Host: id}.ID()
	for _, k := range h.tags.lru.Keys() {
		if k.registry != id {
			continue
		}
		if all, _ := h.tags.lru.Peek(k); len(all) > 0 && h.rights.within(all[0].when, h.rights.stale) {
			return true
		}
	}
	return false
}
