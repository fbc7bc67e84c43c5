// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"weir/p2p"
	"weir/proxy/registry"
)

func said(f NodeFigures) []byte {
	b, err := json.Marshal(f)
	if err != nil {
		panic(err)
	}
	return b
}

// What several nodes say is added up, each registry and each quarter of an hour
// for itself.
func TestSum(t *testing.T) {
	now := stepStart(stepOf(time.Now()))
	a := NodeFigures{Version: "v1", Figures: Figures{Runtimes: 2, Intercepted: 1, Pulling: 1, StoreBytes: 5,
		Registries: []registry.Stats{{Registry: "a.example", Hits: 1, BytesFromStore: 10}, {Registry: "b.example", Misses: 2, BytesFromUpstream: 7}},
		History:    []Step{{now.Add(-historyStep), traffic{1, 0, 0}}, {now, traffic{0, 2, 0}}}}}
	b := NodeFigures{Version: "v1", Figures: Figures{Runtimes: 1, Intercepted: 1, StoreBytes: 6,
		Registries: []registry.Stats{{Registry: "b.example", Hits: 3, BytesFromPeers: 4}},
		// One whose clock is wrong.
		History: []Step{{now.Add(7 * time.Minute), traffic{0, 0, 3}}, {now.Add(48 * time.Hour), traffic{9, 9, 9}}, {time.Time{}, traffic{9, 9, 9}}}}}
	got := sum([]NodeFigures{a, b})
	if got.Runtimes != 3 || got.Intercepted != 2 || got.Pulling != 1 || got.StoreBytes != 11 {
		t.Errorf("%+v", got)
	}
	if want := []registry.Stats{{Registry: "a.example", Hits: 1, BytesFromStore: 10}, {Registry: "b.example", Hits: 3, Misses: 2, BytesFromPeers: 4, BytesFromUpstream: 7}}; !slices.Equal(got.Registries, want) {
		t.Errorf("%+v, want %+v", got.Registries, want)
	}
	if want := []Step{{now.Add(-historyStep), traffic{1, 0, 0}}, {now, traffic{0, 2, 3}}}; !slices.Equal(got.History, want) {
		t.Errorf("%+v, want %+v", got.History, want)
	}
}

// However many registries nodes name, the sum names a bounded number, and loses
// nothing.
func TestSumIsBounded(t *testing.T) {
	var nodes []NodeFigures
	for n := range 10 {
		f := NodeFigures{Version: "v1"}
		for r := range maxRegistries {
			f.Registries = append(f.Registries, registry.Stats{Registry: fmt.Sprintf("r%d-%d.example", n, r), BytesFromStore: int64(n)})
		}
		f.Registries[5].Registry = registry.Other
		nodes = append(nodes, f)
	}
	got := sum(nodes)
	if len(got.Registries) > maxRegistries || trafficOf(got.Registries).All() != 45*maxRegistries {
		t.Errorf("%d registries with %+v", len(got.Registries), trafficOf(got.Registries))
	}
	if !slices.ContainsFunc(got.Registries, func(r registry.Stats) bool { return r.Registry == "r9-0.example" }) {
		t.Errorf("the largest aren't named: %+v", got.Registries)
	}
	// What this node says of itself is what others take.
	if f, err := readFigures(said(NodeFigures{Version: "(devel)", Figures: got})); err != nil || len(f.Registries) != len(got.Registries) {
		t.Error(err)
	}
}

// A node's figures are read, whatever its clients call registries.
func TestFiguresOfEveryNodeAreRead(t *testing.T) {
	for name, as := range map[string]string{
		"registry-1.docker.io":                      "registry-1.docker.io",
		"[2001:db8::1]:5000":                        "[2001:db8::1]:5000",
		"http://registry.lan:5000@192.0.2.1:5000":   "http://registry.lan:5000@192.0.2.1:5000",
		"registry.corp#" + strings.Repeat("0a", 32): "registry.corp#" + strings.Repeat("0a", 32),
		"http://<b>@192.0.2.1:80":                   registry.Other,
		"http://" + strings.Repeat("a", 300) + "@x": registry.Other,
	} {
		f, err := readFigures(said(NodeFigures{Version: "v1", Figures: Figures{Registries: topRegistries([]registry.Stats{{Registry: name, Hits: 3}, {Registry: "ghcr.io"}})}}))
		if err != nil || len(f.Registries) != 2 || !slices.Contains(f.Registries, registry.Stats{Registry: as, Hits: 3}) {
			t.Errorf("%s: %+v, %v", name, f.Registries, err)
		}
	}
}

// Nothing is taken that no node says.
func TestReadFigures(t *testing.T) {
	good := NodeFigures{Version: "v1.2.3-4-gabc+dirty", Figures: Figures{Runtimes: 1, Registries: []registry.Stats{{Registry: "[::1]:5000", Hits: 1}}}}
	if _, err := readFigures(said(good)); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*NodeFigures){
		"a negative number":  func(f *NodeFigures) { f.StoreBytes = -1 },
		"too large a number": func(f *NodeFigures) { f.Registries[0].Hits = maxFigures + 1 },
		"too large a sum": func(f *NodeFigures) {
			f.Runtimes, f.Intercepted, f.Pulling, f.StoreBlobs = maxFigures, maxFigures, maxFigures, maxFigures
		},
		"no version":          func(f *NodeFigures) { f.Version = "" },
		"a registry of HTML":  func(f *NodeFigures) { f.Registries[0].Registry = "<b>" },
		"an escape sequence":  func(f *NodeFigures) { f.Version = "v1\x1b[2J" },
		"a long name":         func(f *NodeFigures) { f.Registries[0].Registry = strings.Repeat("a", 256) },
		"too many registries": func(f *NodeFigures) { f.Registries = slices.Repeat(f.Registries, maxRegistries+1) },
		"too long a history":  func(f *NodeFigures) { f.History = make([]Step, historySteps+1) },
	} {
		f := good
		f.Registries = slices.Clone(good.Registries)
		change(&f)
		if _, err := readFigures(said(f)); err == nil {
			t.Errorf("%s is taken", what)
		}
	}
	for _, b := range []string{"", "null", "[]", `{"version":"v1","runtimes":1e30}`, `{"version":"v1","runtimes":"1"}`} {
		if _, err := readFigures([]byte(b)); err == nil {
			t.Errorf("%q is taken", b)
		}
	}
}

func FuzzReadFigures(f *testing.F) {
	f.Add(said(NodeFigures{Version: "v1", Figures: Figures{Runtimes: 1, Registries: []registry.Stats{{Registry: "a", Hits: 1}}, History: []Step{{At: time.Now()}}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := readFigures(b)
		if err != nil {
			return
		}
		nodes := slices.Repeat([]NodeFigures{n}, 500) // as many as there may be connections
		if got := sum(nodes); got.Runtimes < 0 || trafficOf(got.Registries).All() < 0 || got.StoreBytes < n.StoreBytes || len(got.Registries) > maxRegistries || len(got.History) > historySteps {
			t.Errorf("%+v", got)
		}
	})
}

// Peers are asked for no more often than each few seconds; what one said counts
// a while when it is silent, and no longer than it is connected.
func TestPeerStats(t *testing.T) {
	var h peerStats
	asked := 0
	answers := map[string][]byte{"a": said(NodeFigures{ID: "forged", Address: "forged", Version: "v1", Figures: Figures{Runtimes: 1}}), "b": []byte("nonsense"), "d": said(NodeFigures{Version: "v1"})}
	ask := func() map[string][]byte { asked++; return answers }
	connected := []p2p.Peer{{ID: "a", Address: "10.0.0.1:1"}, {ID: "b", Address: "10.0.0.2:1"}, {ID: "c", Address: "10.0.0.3:1"}}
	now := time.Now()
	check := func(after time.Duration, wantAsked, wantNodes, wantSilent int) {
		t.Helper()
		nodes, silent := h.from(now.Add(after), connected, ask)
		if asked != wantAsked || len(nodes) != wantNodes || silent != wantSilent {
			t.Errorf("after %v: asked %d times, %d silent, %+v", after, asked, silent, nodes)
		}
		for _, n := range nodes {
			if n.ID != "a" || n.Address != "10.0.0.1:1" || n.Runtimes != 1 {
				t.Errorf("%+v", n)
			}
		}
	}
	check(0, 1, 1, 2)
	check(peersMaxAge-1, 1, 1, 2)
	delete(answers, "a")
	check(peersMaxAge, 2, 1, 2)
	check(peersKeepAge-1, 3, 1, 2)
	check(peersKeepAge+peersMaxAge, 4, 0, 3)
	connected = connected[:0]
	check(peersKeepAge+2*peersMaxAge, 5, 0, 0)
}
