// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// FuzzRecall reads a memory file that somebody or something has damaged.
func FuzzRecall(f *testing.F) {
	d := digest.FromString("x")
	whole, _ := json.Marshal(memory{
		Tags:    []rememberedTag{{"r", "a/b", "1", d, time.Unix(1, 0)}},
		Public:  []rememberedRepo{{"r", "a/b", time.Now()}},
		Members: map[string]rememberedInRepo{"r": {"a/b": {d: time.Now()}}},
	})
	f.Add(whole)
	f.Add(whole[:len(whole)-9])
	f.Add([]byte(`{"tags":[{"Registry":"r","Repository":"","Tag":"","Digest":"sha256:1","When":"9999-12-31T23:59:59Z"}],"members":{"r":{"a":{"":"0001-01-01T00:00:00Z"}}}}`))
	file := filepath.Join(f.TempDir(), "tags.json")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		h := New(Options{StaleIfError: time.Hour})
		defer h.Close()
		h.file = file
		if h.recall() != nil {
			return
		}
		m := h.snapshot(func(repository) bool { return true })
		for _, tag := range m.Tags {
			if tag.Digest.Validate() != nil {
				t.Errorf("the tag %+v", tag)
			}
		}
		for _, repos := range m.Members {
			for _, digests := range repos {
				for d := range digests {
					if d.Validate() != nil {
						t.Errorf("the member %q", d)
					}
				}
			}
		}
		if _, err := json.Marshal(m); err != nil {
			t.Errorf("what was read can't be written: %v", err)
		}
	})
}

// FuzzMerge takes in what a peer says of a repository.
func FuzzMerge(f *testing.F) {
	d := digest.FromString("x")
	say := func(m memory) {
		b, _ := json.Marshal(m)
		f.Add(b)
	}
	say(memory{Tags: []rememberedTag{{"r", "a/b", "1", d, time.Now()}}, Members: map[string]rememberedInRepo{"r": {"a/b": {d: time.Now()}}}})
	say(memory{Tags: []rememberedTag{{"r", "else", "1", d, time.Now()}}, Members: map[string]rememberedInRepo{"r": {"else": {d: time.Now()}}}})
	say(memory{Tags: []rememberedTag{{"r", "a/b", "1", d, time.Now().Add(24 * 365 * time.Hour)}}, Public: []rememberedRepo{{"r", "a/b", time.Now()}}})
	repo := repository{"r", "a/b"}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m memory
		if json.Unmarshal(b, &m) != nil {
			return
		}
		h := New(Options{StaleIfError: time.Hour})
		defer h.Close()
		h.merge(m, repo)
		all := h.snapshot(func(repository) bool { return true })
		if len(all.Public) > 0 {
			t.Errorf("a peer says what is everybody's: %+v", all.Public)
		}
		for _, tag := range all.Tags {
			if tag.Registry != repo.registry || tag.Repository != repo.name || tag.Digest.Validate() != nil || time.Until(tag.When) > 2*time.Minute {
				t.Errorf("the tag %+v", tag)
			}
		}
		for registry, repos := range all.Members {
			for name, digests := range repos {
				for d, when := range digests {
					if registry != repo.registry || name != repo.name || d.Validate() != nil || time.Until(when) > 2*time.Minute {
						t.Errorf("the member %s/%s %q, %s", registry, name, d, when)
					}
				}
			}
		}
	})
}

// FuzzAccepts compares what a client accepts with what a manifest is.
func FuzzAccepts(f *testing.F) {
	f.Add("application/vnd.oci.image.index.v1+json, */*;q=0.1", []byte(`{"schemaVersion":2,"manifests":[]}`))
	f.Add("application/*", []byte(`{"schemaVersion":2,"config":{},"layers":[]}`))
	f.Add("", []byte(`{"schemaVersion":2,"mediaType":"a\r\nb"}`))
	f.Fuzz(func(t *testing.T, accept string, manifest []byte) {
		mt := mediaTypeOf(manifest)
		r := &http.Request{Header: http.Header{"Accept": {accept}}}
		if mt != "" && !accepts(&http.Request{}, mt) {
			t.Errorf("%q isn't accepted by who accepts everything", mt)
		}
		_ = accepts(r, mt)
	})
}
