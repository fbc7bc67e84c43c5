// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"
	"github.com/opencontainers/go-digest"
)

// Memory is what is known of repositories, and nothing of who may read them but
// which are public. It outlives the process, and peers tell it to each other.
type Memory struct {
	Version      int     `json:"version"`
	Repositories []Known `json:"repositories"`
	// Tags are what version 0 has of use: it knew by what registries claimed
	// which content they have, and by clients' requests what is public.
	Tags []oldTag `json:"tags,omitempty"`
}

// Known is what is known of one repository.
type Known struct {
	Registry string `json:"registry"`
	Name     string `json:"name"`
	Network  string `json:"network,omitempty"`
	// Tags are what each tag was, what was said last first.
	Tags map[string][]Tagged `json:"tags,omitempty"`
	// Content is when each digest was proven to be in it.
	Content map[digest.Digest]time.Time `json:"content,omitempty"`
	// Public is when it was found to be public, by the network.
	Public map[string]Confirmed `json:"public,omitempty"`
}

// Confirmed is when a repository was found to be public, and by which tag or
// digest.
type Confirmed struct {
	When      time.Time `json:"when"`
	Reference string    `json:"reference"`
	Token     bool      `json:"token,omitempty"` // the registry wanted one
}

type oldTag struct {
	Registry, Repository, Tag string
	Digest                    digest.Digest
	When                      time.Time
}

const memoryVersion = 1

// maxMemory bounds the file that is read, in bytes.
const maxMemory = 64 << 20

// lasting says whether what is known of a repository is worth keeping: a network
// of a pod doesn't come again.
func (r Repository) lasting() bool { return r.Network == "" || r.Network == UnauthenticatedNetwork("") }

// UnauthenticatedNetwork is the Network of repositories whose registry's answers
// are not authenticated, by the name of the network from which it is reached,
// which is empty for the node's.
func UnauthenticatedNetwork(name string) string { return "network " + name }

// Export returns what is known of a repository, for peers.
func (r *Rights) Export(repo Repository) Memory {
	m := r.export(repo.share(), func(other Repository) bool { return other == repo })
	for i := range m.Repositories {
		m.Repositories[i].Public = nil
	}
	return m
}

// export returns what is known of the repositories of a share, or of all if it
// is empty.
func (r *Rights) export(share string, of func(Repository) bool) Memory {
	known := make(map[Repository]*Known)
	at := func(repo Repository) *Known {
		k := known[repo]
		if k == nil {
			k = &Known{Registry: repo.Registry, Name: repo.Name, Network: repo.Network, Tags: make(map[string][]Tagged),
				Content: make(map[digest.Digest]time.Time), Public: make(map[string]Confirmed)}
			known[repo] = k
		}
		return k
	}
	for _, s := range pick(share, r.tags.names) {
		for k, all := range r.tags.all(s) {
			if of(k.Repository) {
				at(k.Repository).Tags[k.tag] = all
			}
		}
	}
	for _, s := range pick(share, r.content.names) {
		for k, when := range r.content.all(s) {
			if k.From == "" && of(k.Repository) {
				at(k.Repository).Content[k.digest] = when
			}
		}
	}
	for _, s := range pick(share, r.public.names) {
		for k, p := range r.public.all(s) {
			if p.is && of(k.Repository) {
				at(k.Repository).Public[k.From] = Confirmed{p.when, p.reference, p.token}
			}
		}
	}
	m := Memory{Version: memoryVersion}
	for _, k := range known {
		m.Repositories = append(m.Repositories, *k)
	}
	return m
}

func pick(share string, all func() []string) []string {
	if share != "" {
		return []string{share}
	}
	return all()
}

// Merge records what a peer knows of a repository. It counts while the registry
// gives no answer.
func (r *Rights) Merge(m Memory, repo Repository) {
	for _, k := range m.Repositories {
		if (Repository{k.Registry, k.Name, k.Network}) != repo {
			continue
		}
		for name, all := range k.Tags {
			slices.SortStableFunc(all, func(a, b Tagged) int { return a.When.Compare(b.When) })
			for _, t := range all[max(len(all)-maxTagged, 0):] {
				own := r.Tag(repo, name)
				t.Read = t.Differs // else it would count while the registry gives answers
				if t.Digest.Validate() == nil && r.Fresh(t.When) && (len(own) == 0 || own[0].When.Before(t.When) || !r.Fresh(own[0].When)) {
					r.SetTag(repo, name, t)
				}
			}
		}
		for d, when := range k.Content {
			key := located{Vantage{Repository: repo}, d}
			was, _ := r.claimed.get(repo.share(), key)
			if d.Validate() == nil && r.Within(when, max(ContentTTL, r.opts.StaleIfError)) && was.Before(when) {
				r.claimed.put(repo.share(), key, when)
			}
		}
	}
}

// Save writes what is known to a file, as a whole or not at all, if something
// has changed since it was last written.
func (r *Rights) Save(file string) error {
	if !r.changed.Swap(false) {
		return nil
	}
	b, err := json.Marshal(r.export("", Repository.lasting))
	if err != nil {
		return err
	}
	return renameio.WriteFile(file, b, 0o600, renameio.WithTempDir(filepath.Dir(file)))
}

// Load reads what was saved. The error says that it can't be read; what is known
// stays as it is.
func (r *Rights) Load(file string) error {
	dir, name := filepath.Split(file)
	left, _ := filepath.Glob(dir + "." + name + "*") // by a process that was killed, see renameio
	for _, name := range left {
		os.Remove(name)
	}
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && info.Size() > maxMemory {
		err = fmt.Errorf("it has %d bytes", info.Size())
	}
	if err != nil {
		return err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// What it is of first: the rest may be of another form.
	var m Memory
	var form struct{ Version int }
	if err := json.Unmarshal(b, &form); err != nil {
		return err
	}
	if form.Version > memoryVersion {
		return fmt.Errorf("a later version of weir has written it: its format is %d, and this one reads up to %d", form.Version, memoryVersion)
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	for _, t := range m.Tags {
		if t.Digest.Validate() == nil {
			r.SetTag(Repository{Registry: t.Registry, Name: t.Repository}, t.Tag, Tagged{Digest: t.Digest, When: t.When})
		}
	}
	for _, k := range m.Repositories {
		repo := Repository{k.Registry, k.Name, k.Network}
		for name, all := range k.Tags {
			for _, t := range slices.Backward(all) {
				if t.Digest.Validate() == nil {
					r.SetTag(repo, name, t)
				}
			}
		}
		for d, when := range k.Content {
			if d.Validate() == nil {
				r.content.put(repo.share(), located{Vantage{Repository: repo}, d}, when)
			}
		}
		for from, c := range k.Public {
			v := Vantage{repo, from}
			r.public.put(v.share(), v, publicity{true, c.When, c.When, c.Reference, c.Token})
		}
	}
	return nil
}

// Repositories returns those of which a tag is known.
func (r *Rights) Repositories() []Repository {
	seen := make(map[Repository]struct{})
	var all []Repository
	for _, share := range r.tags.names() {
		for k := range r.tags.all(share) {
			if _, ok := seen[k.Repository]; !ok {
				seen[k.Repository] = struct{}{}
				all = append(all, k.Repository)
			}
		}
	}
	return all
}
