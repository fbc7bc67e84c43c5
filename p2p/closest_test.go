// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"fmt"
	"slices"
	"testing"

	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
)

// What is remembered of a search gives other keys exactly those peers that are
// closest to them.
func TestRegions(t *testing.T) {
	var all []peer.ID
	for i := range 1000 {
		all = append(all, peer.ID(fmt.Sprintf("peer %d", i)))
	}
	var r regions
	hits := 0
	for i := range 2000 {
		target := kb.ConvertKey(string(must(keyOf(digest.FromString(fmt.Sprint(i))))))
		want := kb.SortClosestPeers(slices.Clone(all), target)
		got, ok := r.get(target)
		if !ok {
			r.put(target, want[:bucketSize])
			continue
		}
		hits++
		if got = kb.SortClosestPeers(got, target); !slices.Equal(got[:replicas], want[:replicas]) {
			t.Fatalf("key %d: %v are closest, not %v", i, want[:replicas], got[:replicas])
		}
	}
	if hits < 1900 {
		t.Errorf("%d of 2000 keys were in a region that was known", hits)
	}
}

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
