// SPDX-License-Identifier: Apache-2.0

//go:build scale

package p2p

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	coremgr "github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/routing"
	"github.com/libp2p/go-libp2p/p2p/net/connmgr"
	mocknet "github.com/libp2p/go-libp2p/p2p/net/mock"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/opencontainers/go-digest"
)

var (
	scaleNodes   = flag.String("scale.nodes", "10,100,1000", "numbers of nodes, separated by commas")
	scaleDigests = flag.Int("scale.digests", 1000, "digests that each node has")
	scaleLookups = flag.Int("scale.lookups", 1000, "lookups")
	scaleOut     = flag.String("scale.out", "", "file for the table; empty means the test's log")
)

// linkLatency is the time that a message takes from node to node: half a
// round trip between machines of one site.
const linkLatency = 500 * time.Microsecond

// fewSimulated and manySimulated bound a node's connections, more tightly than
// fewConns and manyConns: those of a thousand nodes have to fit into one memory.
const fewSimulated, manySimulated = 250, 300

// idleSimulated is how long a stream is kept that is not used,
// instead of the DHT's minute, for the same reason.
const idleSimulated = 300 * time.Millisecond

// sampled is how many nodes refresh their routing tables for the measurement.
const sampled = 50

// traffic counts what hosts send, and delays it while lookups are measured.
type traffic struct {
	messages, bytes atomic.Int64
	delayed         atomic.Bool
}

// countedHost counts what is written to its streams. A message of the DHT and
// of the lease protocol is one write.
type countedHost struct {
	host.Host
	*traffic
	conns *connmgr.BasicConnMgr
}

func (h countedHost) ConnManager() coremgr.ConnManager { return h.conns }

type countedStream struct {
	network.Stream
	*traffic
	idle *time.Timer // of a stream that is answered
}

func (s countedStream) Write(b []byte) (int, error) {
	if s.idle != nil {
		s.idle.Reset(idleSimulated)
	}
	s.messages.Add(1)
	s.bytes.Add(int64(len(b)))
	if s.delayed.Load() {
		time.Sleep(linkLatency)
	}
	return s.Stream.Write(b)
}

func (h countedHost) NewStream(ctx context.Context, p peer.ID, pids ...protocol.ID) (network.Stream, error) {
	s, err := h.Host.NewStream(ctx, p, pids...)
	if err != nil {
		return nil, err
	}
	return countedStream{Stream: s, traffic: h.traffic}, nil
}

func (h countedHost) SetStreamHandler(pid protocol.ID, handler network.StreamHandler) {
	h.Host.SetStreamHandler(pid, func(s network.Stream) {
		idle := time.AfterFunc(idleSimulated, func() { _ = s.Reset() })
		handler(countedStream{s, h.traffic, idle})
	})
}

// simulated makes nodes with everything but the transport and the transfers.
// They have the real DHT, provider and leases, over a network in memory.
func simulated(t *testing.T, count int, sent *traffic) []*Node {
	t.Helper()
	network := mocknet.New()
	var all []*Node
	for i := range count {
		priv, _, err := crypto.GenerateEd25519Key(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		addr := ma.StringCast(fmt.Sprintf("/ip4/10.%d.%d.1/tcp/5053", i/250, i%250))
		h, err := network.AddPeer(priv, addr)
		if err != nil {
			t.Fatal(err)
		}
		conns, err := connmgr.NewConnManager(fewSimulated, manySimulated)
		if err != nil {
			t.Fatal(err)
		}
		h.Network().Notify(conns.Notifee())
		n := &Node{log: slog.New(slog.NewTextHandler(io.Discard, nil)), ledger: newLedger(), peers: newReputation(), serving: newServing(), host: countedHost{h, sent, conns}}
		n.ctx, n.cancel = context.WithCancel(context.Background())
		if err := n.join(dht.DisableAutoRefresh()); err != nil {
			t.Fatal(err)
		}
		all = append(all, n)
	}
	t.Cleanup(func() {
		var wg sync.WaitGroup
		for _, n := range all {
			wg.Go(n.Close)
		}
		wg.Wait()
		network.Close()
	})
	if err := network.LinkAll(); err != nil {
		t.Fatal(err)
	}
	// Each one is told of a few, as by DNS, and finds the others by itself.
	for i, n := range all {
		for range min(i, 3) {
			other := all[mrand.IntN(i)]
			if err := n.host.Connect(t.Context(), peer.AddrInfo{ID: other.host.ID(), Addrs: other.host.Addrs()}); err != nil {
				t.Fatal(err)
			}
		}
	}
	each(all, func(n *Node) { <-n.dht.RefreshRoutingTable() })
	return all
}

// each calls f for all nodes, as many at a time as there are processors.
func each(all []*Node, f func(*Node)) {
	slots := make(chan struct{}, 2*runtime.NumCPU())
	var wg sync.WaitGroup
	for _, n := range all {
		slots <- struct{}{}
		wg.Go(func() { defer func() { <-slots }(); f(n) })
	}
	wg.Wait()
}

func memory() (heap uint64) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}

func scaleDigest(node, i int) digest.Digest {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], uint64(node))
	binary.BigEndian.PutUint64(b[8:], uint64(i))
	return digest.FromBytes(b[:])
}

// hops is the length of the way on which a lookup learned of a peer: 1 for one
// that was known before.
func hops(events []*routing.QueryEvent, of peer.ID) int {
	depth := make(map[peer.ID]int)
	for _, e := range events {
		if e.Type != routing.PeerResponse {
			continue
		}
		for _, r := range e.Responses {
			if _, ok := depth[r.ID]; !ok {
				depth[r.ID] = max(depth[e.ID], 1) + 1
			}
		}
	}
	return max(depth[of], 1)
}

// row is a line of the table.
type row struct {
	nodes, known, conns          int
	p50, p99                     time.Duration
	hops50, hops99               int
	asked                        float64
	messages, bytes              float64 // per node per hour, for providing
	refreshMessages, refreshByte float64 // per node per hour, for the routing table
	empty, full                  float64 // MiB per node
	found                        int
}

func scale(t *testing.T, count, digests, lookups int) row {
	var sent traffic
	before := memory()
	start := time.Now()
	all := simulated(t, count, &sent)
	r := row{nodes: count}
	r.empty = float64(memory()-before) / float64(count) / (1 << 20)
	for _, n := range all {
		r.known += n.dht.RoutingTable().Size()
		r.conns += len(n.host.Network().Conns())
	}
	r.known /= count
	r.conns /= count
	t.Logf("%d nodes stand after %s", count, time.Since(start).Round(time.Second))
	// The routing table is refreshed each 10 minutes.
	m, b := sent.messages.Load(), sent.bytes.Load()
	some := all[:min(sampled, count)]
	each(some, func(n *Node) { <-n.dht.RefreshRoutingTable() })
	per := func(now, was int64, nodes int) float64 { return float64(now-was) / float64(nodes) }
	r.refreshMessages, r.refreshByte = 6*per(sent.messages.Load(), m, len(some)), 6*per(sent.bytes.Load(), b, len(some))
	for i, n := range all {
		var mine []key
		for k := range digests {
			mine = append(mine, must(keyOf(scaleDigest(i, k))))
		}
		n.provided.add(mine...)
	}
	for _, n := range all {
		n.provided.due(-1, true) // it isn't new any more
	}
	// All that each node has is provided once an hour.
	m, b = sent.messages.Load(), sent.bytes.Load()
	each(all, func(n *Node) {
		for part := range sweeps {
			n.putRecords(t.Context(), n.provided.due(part, false))
		}
	})
	r.messages, r.bytes = per(sent.messages.Load(), m, count), per(sent.bytes.Load(), b, count)
	r.full = float64(memory()-before) / float64(count) / (1 << 20)
	t.Logf("%d nodes have provided after %s", count, time.Since(start).Round(time.Second))
	// Lookups, one after another: this machine's processors are no cluster's.
	var times []time.Duration
	var ways []int
	m = sent.messages.Load()
	sent.delayed.Store(true)
	for range lookups {
		holder := mrand.IntN(count)
		from := all[(holder+1+mrand.IntN(count-1))%count]
		k := must(keyOf(scaleDigest(holder, mrand.IntN(digests))))
		ctx, cancel := context.WithCancel(t.Context())
		ctx, ch := routing.RegisterForQueryEvents(ctx)
		var events []*routing.QueryEvent
		done := make(chan struct{})
		go func() {
			defer close(done)
			for e := range ch {
				events = append(events, e)
			}
		}()
		began := time.Now()
		a, _ := from.consult(ctx, question{Op: opFind, Key: k})
		times = append(times, time.Since(began))
		steward := from.closest(t.Context(), k, 1)[0]
		cancel()
		<-done
		way := 1
		if from.dht.RoutingTable().Find(steward) == "" {
			way = hops(events, steward)
		}
		ways = append(ways, way)
		if slices.ContainsFunc(a.Sources, func(s source) bool { return s.ID == all[holder].host.ID() }) {
			r.found++
		}
	}
	r.asked = float64(sent.messages.Load()-m) / float64(lookups)
	slices.Sort(times)
	slices.Sort(ways)
	at := func(p int) int { return (lookups - 1) * p / 100 }
	r.p50, r.p99, r.hops50, r.hops99 = times[at(50)], times[at(99)], ways[at(50)], ways[at(99)]
	r.found = r.found * 1000 / lookups
	return r
}

// TestScale simulates swarms of different sizes and makes a table of what they
// cost: `make scale`.
func TestScale(t *testing.T) {
	var out strings.Builder
	fmt.Fprintf(&out, `# What a swarm costs as it grows

Made by `+"`make scale`"+`: the real DHT, provider and leases of each node, in one
process, over a network in memory with %s from node to node. Each node
provides %d digests. %d lookups, one after another, of random digests at random
nodes: from the question to the answer that names a holder. "Hops" are the
steps from the asking node to the first steward that is asked, "messages" of a lookup
all that is sent until it is done. Providing
is what it costs to put all records, as happens once an hour, and refreshing
what the routing table costs, which is looked after each 10 minutes. Memory is
the Go heap and stacks. A node has at most %d connections here, and %d else; streams that are not used are closed
after %s, and a minute else. All nodes share this machine's %d processors: from some hundreds
on, times and messages are also those of a simulation that is short of them.

| nodes | known peers | connections | lookup p50 | p99 | hops p50 | p99 | messages a lookup | found | providing: messages/node/h | bytes/node/h | refreshing: messages/node/h | bytes/node/h | memory/node, empty | with the digests |
|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
`, linkLatency, *scaleDigests, *scaleLookups, manySimulated, manyConns, idleSimulated, runtime.NumCPU())
	for s := range strings.SplitSeq(*scaleNodes, ",") {
		count, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(s, func(t *testing.T) {
			r := scale(t, count, *scaleDigests, *scaleLookups)
			ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", d.Seconds()*1000) }
			fmt.Fprintf(&out, "| %d | %d | %d | %s | %s | %d | %d | %.0f | %.1f %% | %.0f | %.0f KiB | %.0f | %.0f KiB | %.1f MiB | %.1f MiB |\n",
				r.nodes, r.known, r.conns, ms(r.p50), ms(r.p99), r.hops50, r.hops99, r.asked, float64(r.found)/10,
				r.messages, r.bytes/1024, r.refreshMessages, r.refreshByte/1024, r.empty, r.full)
			t.Log("\n" + out.String())
		})
	}
	if *scaleOut != "" {
		if err := os.WriteFile(*scaleOut, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
