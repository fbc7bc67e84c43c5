// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"weir/test/lab"
)

// puller is a runtime on a node.
type puller interface {
	TryPull(ref string, login ...string) error
	PID() int
}

// pullBy pulls the image by a runtime and removes it again. cpu, if it isn't nil, is
// read before and after.
func (w *world) pullBy(b *testing.B, node *lab.Node, p puller, cpu func() float64) (s sample) {
	b.Helper()
	if cpu == nil {
		cpu = func() float64 { return 0 }
	}
	ref := known + "/" + repo + ":1"
	before, used, start := received(b, node), cpu(), time.Now()
	if err := p.TryPull(ref); err != nil {
		b.Fatalf("pulling %s: %v", ref, err)
	}
	s = sample{seconds: time.Since(start).Seconds(), bytes: received(b, node) - before, cpu: (cpu() - used) / float64(w.content.image.Bytes) * (1 << 30)}
	switch p := p.(type) {
	case *lab.Docker:
		p.Remove(ref)
	case *lab.Containerd:
		p.Remove(ref, w.content.image)
	}
	return s
}

// emptied starts an agent again with an empty store, and waits for a runtime's trust.
func (w *world) emptied(a *lab.Agent, p puller) {
	w.restart(a)
	a.Runtime(p.PID())
}

func transferred(s sample) float64 { return float64(s.bytes) }

const boundedTitle = "Cold pulls from a registry that bounds each connection"

// BenchmarkSlowRegistry pulls what weir hasn't from a registry that bounds what one
// connection gets.
func BenchmarkSlowRegistry(b *testing.B) {
	s := section{title: boundedTitle, text: `An image is pulled and unpacked from nginx that gives 25 MB/s to each connection (limit_rate); weir's store is
empty each time. Bound, for one layer of 1 GiB: at most 0.35 times as long as on a node without weir.`,
		head: []string{"client", "image", "through weir, s", "without, s", "ratio", "received, weir / without", "≤ 0.35"}}
	for _, layers := range [][]int{{1 << 30}, slices.Repeat([]int{48 << 20}, 8)} {
		for i := range layers {
			layers[i] = part(layers[i])
		}
		c := newContent(b, layers...)
		w := newWorldWith(b, c, "25m")
		agent, other := w.agent(b, shared), w.Node()
		for _, runtime := range []struct {
			name       string
			with, less puller
		}{
			{"containerd 2.4.2 (CRI)", w.node.NewestContainerd(), other.NewestContainerd()},
			{"dockerd (Debian 12)", w.node.Docker(), other.Docker()},
		} {
			r := turns(rounds(3), func() sample { w.emptied(agent, runtime.with); return w.pullBy(b, w.node, runtime.with, nil) },
				func() sample { return w.pullBy(b, other, runtime.less, nil) })
			ratio, bound := compare(r[0], r[1], seconds), ""
			if len(layers) == 1 {
				bound = reached(quantile(ratio, 0.5) <= 0.35)
			}
			s.row(runtime.name, fmt.Sprintf("%d × %s", len(layers), sizeText(int64(layers[0]))), f3(median(r[0], seconds)), f3(median(r[1], seconds)), ratio, compare(r[0], r[1], transferred), bound)
		}
	}
	s.report(b)
}

const chunksTitle = "Cold pulls in chunks"

// BenchmarkChunks pulls what weir hasn't by a containerd that fetches layers in chunks.
func BenchmarkChunks(b *testing.B) {
	s := section{title: chunksTitle, text: `containerd 2.4.2 (CRI) with concurrent_layer_fetch_buffer of 8 MiB and six downloads at a time pulls an image of two layers over a
link of 400 Mbit/s, and again after it was removed; weir's store is empty at first. Bound: at most 1.02 times as long as on a node without weir, and the
registry sends at most 1.01 times as much; nothing the second time.`,
		head: []string{"what", "with weir, s", "without, s", "ratio", "received, weir / without", "again, MiB received", "≤ 1.02"}}
	const conf = `version = 3
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_downloads = 6
  concurrent_layer_fetch_buffer = 8388608
`
	c := newContent(b, part(128<<20), part(64<<20))
	w := newWorld(b, c)
	agent, other := w.agent(b, shared), w.Node()
	for _, node := range []*lab.Node{w.node, other} {
		node.WriteFile("/etc/containerd/config.toml", conf)
		node.Shape(400)
	}
	with, less := w.node.NewestContainerd(), other.NewestContainerd()
	var again []float64
	r := turns(rounds(3), func() sample {
		w.emptied(agent, with)
		first := w.pullBy(b, w.node, with, nil)
		again = append(again, float64(w.pullBy(b, w.node, with, nil).bytes)/(1<<20))
		return first
	}, func() sample { return w.pullBy(b, other, less, nil) })
	ratio := compare(r[0], r[1], seconds)
	s.row(sizeText(c.image.Bytes), f3(median(r[0], seconds)), f3(median(r[1], seconds)), ratio, compare(r[0], r[1], transferred), f2(quantile(again, 0.5)), reached(quantile(ratio, 0.5) <= 1.02))
	s.report(b)
}

const blobFromPeerTitle = "A client's blob from a peer"

// BenchmarkPeerBlob has a client get a blob that weir on another node has, from weir on
// its own, which keeps it. There is nothing else that does that.
func BenchmarkPeerBlob(b *testing.B) {
	c := newContent(b, 1000)
	size := part(256 << 20)
	d := c.add(b, random(size, 3))
	w := newWorld(b, c)
	key, has := swarmKey(b), w.Node()
	agent := w.agent(b, shared, "--swarm-key", key, "--peer", has.Addr().String())
	source := has.Agent("--swarm-key", key, "--peer", w.node.Addr().String(), "--log-level", "warn")
	run(b, has, program(b, has, "crane"), shared, "fetch", "https://"+known, blobPath(d), "1", "cold")
	empty := func() { w.node.Run("sh", "-c", "rm -rf /var/lib/weir/store/blobs/*/*") }
	get := func() sample {
		empty()
		return w.fetch(b, w.crane, shared, "https://"+known, blobPath(d), 1, "warm", agent.PID(), source.PID())
	}
	if err := lab.Eventually(agent.Ended(), func(context.Context) error {
		get()
		if p := agent.Status().Peers.Peers; len(p) == 0 || !p[0].Believed {
			return fmt.Errorf("the peer isn't believed yet: %+v", p)
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	r := turns(rounds(9), get)
	s := section{title: blobFromPeerTitle, text: fmt.Sprintf(`A client gets a blob of %s from weir on its node, which gets it from weir on another one, and keeps it; all on two processors. The
peer has been right before, and the registry has shown to have the blob. CPU is that of weir on both nodes.`, sizeText(int64(size))),
		head: []string{"MiB/s", "CPU-s/GiB", "first byte p50, ms", "≥ 500 MiB/s", "≤ 3.0 CPU-s/GiB", "≤ 20 ms"}}
	pace, cpu, begun := median(r[0], throughput), median(r[0], cpuPerGiB), first(r[0])
	s.row(f0(pace), f2(cpu), ms(begun), reached(pace >= 500), reached(cpu <= 3), reached(begun <= 0.020))
	s.report(b)
}

const fromPeerTitle = "Pulls from a peer"

// BenchmarkPeerPulls pulls what a peer has, and the same without weir from a registry
// over the same link.
func BenchmarkPeerPulls(b *testing.B) {
	s := section{title: fromPeerTitle, text: `An image of 512 MiB is pulled and unpacked by containerd 2.4.2 (CRI) on a node whose link has 1 Gbit/s: from a peer that has it,
and on a node without weir from the registry. CPU is that of weir on both nodes. Bound: at most 1.03 times as long.`,
		head: []string{"what", "from a peer, s", "from the registry, s", "ratio", "received, weir / without", "weir, CPU-s/GiB", "≤ 1.03"}}
	key := swarmKey(b)
	for _, layers := range [][]int{{512 << 20}, {128 << 20, 128 << 20, 128 << 20, 128 << 20}} {
		for i := range layers {
			layers[i] = part(layers[i])
		}
		c := newContent(b, layers...)
		w := newWorld(b, c)
		has, less := w.Node(), w.Node()
		agent := w.agent(b, shared, "--swarm-key", key, "--peer", has.Addr().String())
		source := has.Agent("--swarm-key", key, "--peer", w.node.Addr().String(), "--log-level", "warn")
		at := has.NewestContainerd()
		source.Runtime(at.PID())
		w.pullBy(b, has, at, nil)
		for _, node := range []*lab.Node{w.node, less} {
			node.Shape(1000)
		}
		with, without := w.node.NewestContainerd(), less.NewestContainerd()
		cpu := func() float64 { return cpuTime(b, agent.PID(), source.PID()) }
		agent.Runtime(with.PID())
		if err := lab.Eventually(agent.Ended(), func(context.Context) error {
			if n := agent.Status().Peers.Known; n == 0 {
				return errors.New("the peer isn't known yet")
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
		// The agent goes on: a peer is a stranger to one that has got nothing from it yet.
		empty := func() { w.node.Run("sh", "-c", "rm -rf /var/lib/weir/store/blobs/*/*") }
		w.pullBy(b, w.node, with, nil)
		r := turns(rounds(3), func() sample { empty(); return w.pullBy(b, w.node, with, cpu) }, func() sample { return w.pullBy(b, less, without, nil) })
		ratio := compare(r[0], r[1], seconds)
		s.row(fmt.Sprintf("%s, %d layers", sizeText(c.image.Bytes), len(layers)), f3(median(r[0], seconds)), f3(median(r[1], seconds)), ratio,
			compare(r[0], r[1], transferred), f2(median(r[0], func(s sample) float64 { return s.cpu })), reached(quantile(ratio, 0.5) <= 1.03))
	}
	s.report(b)
}
