// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"weir/test/lab"
)

const swarmKey = "/key/swarm/psk/1.0.0/\n/base16/\n%s\n"

// cluster makes nodes whose agents are peers of each other.
func cluster(t testing.TB, w *world, count int, args ...string) (nodes []*lab.Node, agents []*lab.Agent) {
	t.Helper()
	var peers []string
	for range count {
		n := w.Node()
		n.WriteFile("/etc/weir.key", fmt.Sprintf(swarmKey, strings.Repeat("5a", 32)))
		nodes = append(nodes, n)
		peers = append(peers, "--peer", n.Addr().String())
	}
	for _, n := range nodes {
		agents = append(agents, n.Agent(slices.Concat([]string{"--swarm-key", "/etc/weir.key"}, peers, args)...))
	}
	if err := known(agents); err != nil {
		t.Fatal(err)
	}
	return nodes, agents
}

// bytesFromPeers is what an agent's clients got from peers.
func bytesFromPeers(a *lab.Agent) (n int64) {
	for _, r := range a.Status().Registries {
		n += r.BytesFromPeers
	}
	return n
}

// known waits until all agents know each other.
func known(agents []*lab.Agent) error {
	for _, a := range agents {
		if err := lab.Eventually(nil, func(context.Context) error {
			if n := a.Status().Peers.Known; n < len(agents)-1 {
				return fmt.Errorf("%d peers known, want %d", n, len(agents)-1)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// The ways in which nodes find each other: a name that stands for all of them,
// as that of a headless Service does, and nothing but a common network.
func TestPeersFound(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var nodes []*lab.Node
	hosts := "127.0.0.1 localhost\n"
	for range 3 {
		n := w.Node()
		n.WriteFile("/etc/weir.key", fmt.Sprintf(swarmKey, strings.Repeat("5a", 32)))
		hosts += n.Addr().String() + " weir-peers.weir.svc\n"
		nodes = append(nodes, n)
	}
	w.LAN(nodes...)
	for way, args := range map[string][]string{"a name": {"--peer", "weir-peers.weir.svc"}, "a common network": nil} {
		var agents []*lab.Agent
		for _, n := range nodes {
			n.WriteFile("/etc/hosts", hosts)
			agents = append(agents, n.Agent(append([]string{"--swarm-key", "/etc/weir.key"}, args...)...))
		}
		if err := known(agents); err != nil {
			t.Errorf("%s: %v", way, err)
		}
		for _, a := range agents {
			a.Stop()
		}
	}
}

// What one node has pulled, another one gets from it.
func TestPeer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hub.User("alice", "wonderland")
	w.hub.Private("acme/secret", "alice")
	secret := w.hub.Push("acme/secret:1", lab.Image{Layers: []int{700_000}, Seed: 3})
	nodes, agents := cluster(t, w, 2)
	a, b := nodes[0].Docker(), nodes[1].Containerd()
	a.Pull(flyway)
	a.Pull(renovate)
	a.Pull("acme/secret:1", "alice", "wonderland")
	w.forget()
	b.Pull(flyway)
	b.Pull(renovate)
	b.Same(flyway, w.flyway)
	b.Same(renovate, w.renovate)
	w.onlyManifests(t)
	if bytesFromPeers(agents[1]) < 6<<20 {
		t.Errorf("%+v", agents[1].Status().Registries)
	}
	// A node asks for its own client's right.
	was := bytesFromPeers(agents[1])
	for who, login := range map[string][]string{"anonymous": nil, "another": {"mallory", "guess"}} {
		if err := b.TryPull("acme/secret:1", login...); err == nil {
			t.Errorf("%s got the private image", who)
		}
		if err := b.TryPull("acme/secret@"+secret.Digest.String(), login...); err == nil {
			t.Errorf("%s got the private image by its digest", who)
		}
	}
	crane := clientNamed(t, "crane")
	for _, path := range []string{"blobs/" + secret.Layers[0].String(), "manifests/" + secret.Digest.String()} {
		kind, ref, _ := strings.Cut(path, "/")
		if out := nodes[1].Run(crane, "client", "raw", "registry-1.docker.io", "acme/secret", kind, ref); !strings.Contains(out, "401 Unauthorized") {
			t.Errorf("%s: %s", path, out)
		}
	}
	if now := bytesFromPeers(agents[1]); now > was+1<<16 {
		t.Errorf("%d bytes came from the peer for a client without the right", now-was)
	}
	w.forget()
	b.Pull("acme/secret:1", "alice", "wonderland")
	b.Same("acme/secret:1", secret)
	w.onlyManifests(t)
}

// What the host's containerd holds is had from there too.
func TestPeersContainerd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	nodes, _ := cluster(t, w, 2)
	a := nodes[0].Containerd()
	a.Pull(flyway)
	w.forget()
	nodes[1].Docker().Pull(flyway)
	w.onlyManifests(t)
}

// Many nodes that pull the same at the same time: each blob leaves the registry
// once.
func TestPeersBurst(t *testing.T) {
	t.Parallel()
	const count = 4
	w := newWorld(t)
	im := w.hub.Push("acme/large:1", lab.Image{Layers: []int{24 << 20, 8 << 20, 3 << 20, 1 << 20, 300_000, 10_000}, Seed: 9})
	var size int64
	for _, n := range []int64{24 << 20, 8 << 20, 3 << 20, 1 << 20, 300_000, 10_000} {
		size += n
	}
	nodes, agents := cluster(t, w, count)
	var all []*lab.Containerd
	for _, n := range nodes {
		all = append(all, n.Containerd())
	}
	w.forget()
	var wg sync.WaitGroup
	for _, c := range all {
		wg.Go(func() {
			if err := c.TryPull("acme/large:1"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, c := range all {
		c.Same("acme/large:1", im)
	}
	if n := w.hub.Log.BlobBytes(); n > size*105/100 {
		t.Errorf("%d nodes took %d blob bytes from the registry, for an image of %d\n%s", count, n, size, w.hub.Log)
	}
	for _, a := range agents {
		t.Logf("from peers %d MiB", bytesFromPeers(a)>>20)
	}
}

// Nodes that come one after another, different images with the same layers, and
// the same image for different platforms: each blob leaves the registry once.
func TestPeersMixed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.hub.Push("acme/one:1", lab.Image{Layers: []int{12 << 20, 6 << 20, 2 << 20}, Seed: 31, Index: true})
	two := w.hub.Push("acme/two:1", lab.Image{Layers: []int{12 << 20, 6 << 20, 3 << 20}, Seed: 31})
	if one.Layers[1] != two.Layers[1] || one.Layers[2] == two.Layers[2] {
		t.Fatal("the images don't share what they should")
	}
	size := one.Bytes + two.Sizes[2]
	nodes, agents := cluster(t, w, 5)
	var all []*lab.Containerd
	for i, n := range nodes[:4] {
		c := n.Containerd()
		agents[i].Runtime(c.PID())
		n.Shape(100)
		all = append(all, c)
	}
	w.forget()
	var wg sync.WaitGroup
	for i, c := range all {
		// Each begins when the one before is in the middle of it.
		if i > 0 {
			if err := lab.Eventually(nil, func(context.Context) error {
				if s := agents[i-1].Status().Store; s.Running == 0 && s.Blobs == 0 {
					return errors.New("not begun")
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		im, ref := one, "acme/one:1"
		if i%2 == 1 {
			im, ref = two, "acme/two:1"
		}
		wg.Go(func() {
			if err := c.TryPull(ref); err != nil {
				t.Error(err)
			}
			c.Same(ref, im)
		})
	}
	// Another platform's, which has one of the layers.
	wg.Go(func() {
		if out, err := nodes[4].Output(nodes[4].As(lab.Tool(t, "crane"), "crane"), "pull", "--platform=linux/s390x", "acme/one:1", "/var/lib/other.tar"); err != nil {
			t.Error(out, err)
		}
	})
	wg.Wait()
	if n := w.hub.Log.BlobBytes(); n > size*105/100 {
		t.Errorf("%d blob bytes left the registry, for %d\n%s", n, size, w.hub.Log)
	}
}

// A registry is down: what its tags are and what is in them, peers know, for a
// client whose right this node still knows.
func TestPeersOutage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	nodes, _ := cluster(t, w, 2)
	a, b := nodes[0].Docker(), nodes[1].Docker()
	two := w.hub.Push("flyway/flyway:two", lab.Image{Layers: []int{400_000}, Seed: 21})
	other := w.hub.Push("acme/other:1", lab.Image{Layers: []int{400_000}, Seed: 22})
	b.Pull(flyway)
	public(t, w.hub, "flyway/flyway")
	a.Pull("flyway/flyway:two")
	a.Pull("acme/other:1")
	w.hub.Fault(answer(503))
	b.Pull("flyway/flyway:two")
	b.Same("flyway/flyway:two", two)
	if err := b.TryPull("acme/other@" + other.Digest.String()); err == nil {
		t.Error("an image of a repository that this node knows nothing of was pulled in an outage")
	}
}

// A node that has no key, or another one, is no peer.
func TestPeerStranger(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	nodes, agents := cluster(t, w, 2)
	stranger := w.Node()
	stranger.WriteFile("/etc/weir.key", fmt.Sprintf(swarmKey, strings.Repeat("a5", 32)))
	outside := stranger.Agent("--swarm-key", "/etc/weir.key", "--peer", nodes[0].Addr().String(), "--peer", nodes[1].Addr().String())
	if err := lab.Eventually(nil, func(context.Context) error {
		if agents[0].Status().Peers.Unauthenticated == 0 {
			return errors.New("the stranger hasn't come")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	nodes[0].Docker().Pull(flyway)
	w.forget()
	d := stranger.Docker()
	d.Pull(flyway)
	if n := len(outside.Status().Peers.Peers); n > 0 || w.hub.Log.BlobGETs() == 0 {
		t.Errorf("the stranger has %d peers, and took %d blobs from the registry", n, w.hub.Log.BlobGETs())
	}
	// Without a key there is no peer port.
	alone := w.Node()
	agent := alone.Agent()
	if s := agent.Status(); s.Peers != nil {
		t.Errorf("%+v", s.Peers)
	}
	if c, err := alone.Dial(t.Context(), "tcp", netip.AddrPortFrom(alone.Addr(), 5053).String()); err == nil {
		c.Close()
		t.Error("something listens on the peers' port")
	}
}

// The identity survives a restart, and uninstall takes it away.
func TestPeerIdentity(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	nodes, agents := cluster(t, w, 2)
	id := agents[0].Status().Peers.ID
	agents[0].Stop()
	agents[0].Start()
	if now := agents[0].Status().Peers.ID; now != id {
		t.Errorf("%s was %s before the restart", now, id)
	}
	if err := lab.Eventually(nil, func(context.Context) error {
		for _, p := range agents[1].Status().Peers.Peers {
			if p.ID == id {
				return nil
			}
		}
		return errors.New("not known again")
	}); err != nil {
		t.Error(err)
	}
	agents[0].Stop()
	nodes[0].Run(lab.Weir(t), "uninstall")
	if _, err := nodes[0].File(filepath.Join("/var/lib/weir", "peer.key")); err == nil {
		t.Error("the identity is left after uninstall")
	}
}
