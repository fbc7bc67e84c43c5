// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"fmt"
	"os"
	"path/filepath"
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

// A node that has just come is the first steward of what others have told those
// before it.
func TestNewcomerIsSteward(t *testing.T) {
	all := swarm(t, 5)
	d := all[0].put(random(1000))
	k := must(keyOf(d))
	all[0].Provide(d)
	until(t, "the blob is found", func() bool { b, _ := all[1].Get(t.Context(), d, 1000); return b != nil })
	ids := make([]peer.ID, 0, len(all))
	for _, m := range all {
		ids = append(ids, m.host.ID())
	}
	file := filepath.Join(t.TempDir(), "identity")
	for {
		key := must(identity(file))
		id := must(peer.IDFromPrivateKey(key))
		if kb.SortClosestPeers(append(slices.Clone(ids), id), kb.ConvertKey(string(k)))[0] == id {
			break
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	newcomer := newMember(t, func(o *Options) { o.IdentityFile = file }, all[0].addr())
	for _, m := range append(all, newcomer) {
		until(t, "all know each other", func() bool { return len(m.Status().Peers) == 5 && m.Status().Known == 5 })
	}
	if a := newcomer.ledger.find(k, "somebody", nil, nil); len(a.Sources) > 0 {
		t.Fatalf("the newcomer knows %v already", a.Sources)
	}
	// The newcomer asks the others, who have 200 ms for it.
	until(t, "the one that has it is found", func() bool { s := all[2].Want(t.Context(), d, 0); return s != nil && !s.Mine() })
}

// Who knows one peer finds, through it, all that are close to a key, and where
// they are.
func TestSearch(t *testing.T) {
	all := swarm(t, 6)
	newcomer := newMember(t, nil, all[0].addr())
	until(t, "one peer is known", func() bool { return newcomer.Ready() })
	k := nameKey("something")
	target := kb.ConvertKey(string(k))
	var want []peer.ID
	for _, m := range all {
		want = append(want, m.host.ID())
	}
	want = kb.SortClosestPeers(want, target)
	if got := newcomer.search(t.Context(), k, target); !slices.Equal(got, want) {
		t.Errorf("found %v, want %v", got, want)
	}
	for _, p := range want {
		if len(newcomer.addrsOf(p)) == 0 {
			t.Errorf("where %s is isn't known", p)
		}
	}
	// One that has gone is left out.
	gone := want[0]
	for _, m := range all {
		if m.host.ID() == gone {
			m.Close()
		}
	}
	if got := newcomer.search(t.Context(), k, target); !slices.Equal(got, want[1:]) {
		t.Errorf("found %v, want %v", got, want[1:])
	}
}
