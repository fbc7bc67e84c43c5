// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
)

// What is new is put at once, and everything once in as many sweeps as there are.
func TestProvidedIsDue(t *testing.T) {
	p := newProvided()
	var all []key
	for i := range 500 {
		all = append(all, must(keyOf(digest.FromString(fmt.Sprint(i)))))
	}
	p.add(all...)
	if n := len(p.due(-1, false)); n != len(all) {
		t.Errorf("%d of %d new keys are due", n, len(all))
	}
	if n := len(p.due(-1, false)); n != 0 {
		t.Errorf("%d keys are due again at once", n)
	}
	p.remove(all[0])
	seen := make(map[key]int)
	for part := range sweeps {
		for _, k := range p.due(part, false) {
			seen[k]++
		}
	}
	if len(seen) != len(all)-1 || seen[all[0]] > 0 {
		t.Errorf("%d of %d keys were swept", len(seen), len(all)-1)
	}
	for k, n := range seen {
		if n != 1 {
			t.Errorf("%x was swept %d times", k, n)
		}
	}
}

// A peer's records are bounded.
func TestProvidesBound(t *testing.T) {
	r := newReputation()
	for n := 0; n < maxProvided; n += maxKeys {
		if !r.provides("a", maxKeys) {
			t.Fatalf("refused after %d", n)
		}
	}
	if r.provides("a", 1) || !r.provides("b", 1) {
		t.Error("a peer may put any number of records, or not any")
	}
}

func TestNames(t *testing.T) {
	all := swarm(t, 2)
	all[0].names[HashName("a repository")] = []byte(`{"known":1}`)
	all[0].ProvideName("a repository")
	until(t, "the name is known", func() bool {
		got := all[1].LoadName(t.Context(), "a repository")
		return len(got) == 1 && string(got[0]) == `{"known":1}`
	})
	if got := all[1].LoadName(t.Context(), "another"); len(got) != 0 {
		t.Errorf("%q", got)
	}
}

func TestProvideAll(t *testing.T) {
	all := swarm(t, 4)
	var ds []digest.Digest
	for range 200 {
		ds = append(ds, all[0].put(random(100)))
	}
	all[0].ProvideAll(ds)
	for _, d := range ds {
		until(t, "a blob is found", func() bool { b, _ := all[3].Get(t.Context(), d, 1000); return b != nil })
	}
}
