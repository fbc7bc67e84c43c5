// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"weir/test/lab"
)

var (
	chaosPulls = flag.Int("chaos.pulls", 1, "how often each runtime pulls while something is broken, and afterwards")
	chaosStop  = flag.Duration("chaos.stop", 2*time.Second, "for how long the agent, or its disk, is stopped")
	chaosAll   = flag.Bool("chaos.all", false, "also break what other tests break too, such as registries and peers")
	chaosOut   = flag.String("chaos.out", "", "file for the table; empty means the test's log")
)

// chaos is a node with three runtimes, whose agent has a disk of its own and a
// peer, and on which one thing after another is broken.
type chaos struct {
	*world
	t        *testing.T
	node     *lab.Node
	agent    *lab.Agent
	dockerd  *lab.Docker
	critical *lab.Containerd // that of the node
	box      *lab.Node
	runtimes []*puller
	images   atomic.Int64
	kept     map[string]lab.Pushed

	pulls atomic.Int64
	rows  strings.Builder

	mu sync.Mutex
	// usual is how long pulls take of what is kept, or comes from a peer, while
	// nothing is broken, by the runtime and the image, which is empty for those from
	// a peer. added is how much longer they took since the last row.
	usual map[[2]string][]time.Duration
	added []time.Duration
}

// breakage is something that can break.
type breakage struct {
	name string
	// set breaks it. What it returns, unless it is nil, mends it.
	set func() (mend func())
	// running has the runtimes be in the middle of a pull when it breaks. Those
	// pulls may fail only of the runtimes that are lost with it, and where cut says
	// that connections are lost whatever weir does.
	running bool
	lost    []string
	cut     bool
	// offline says that the registries don't answer meanwhile: only what is kept
	// can be pulled.
	offline bool
	// kept is the image that is pulled of what is kept; empty means flyway's.
	kept string
	// elsewhere says that other tests break it too.
	elsewhere bool
}

// Whatever breaks, pulls that are started afterwards succeed, and weir is back in
// use once it is mended. `make chaos` makes over a thousand pulls of it, and a
// table.
func TestChaos(t *testing.T) {
	t.Parallel()
	c := &chaos{t: t, world: newWorld(t), usual: make(map[[2]string][]time.Duration)}
	k8s := c.KubernetesRegistry()
	c.kept = map[string]lab.Pushed{flyway: c.flyway, pause: k8s.Push("pause:3.10", lab.Image{Layers: []int{300_000}, Seed: 3, Index: true})}
	nodes, agents := cluster(t, c.world, 3)
	c.node, c.agent = nodes[0], agents[0]
	peer, peerAgent := nodes[1], agents[1]
	c.box = c.node.Box() // it must not have the disk among its mounts, or it can't be taken off
	c.agent.Stop()
	c.node.Run("sh", "-ec", "truncate -s 256M /var/lib/disk; mkfs.ext4 -qF /var/lib/disk; mkdir -p /var/lib/weir")
	c.mountDisk()
	c.agent.Start()
	c.critical = c.node.Containerd()
	c.dockerd = c.node.Docker()
	c.runtimes = []*puller{dockerPuller("dockerd 20.10", 0, c.dockerd), containerdPuller("containerd 1.6", 0, c.critical),
		containerdPuller("containerd 2", 0, c.box.NewestContainerd())}
	c.node.Shape(100)
	for _, p := range c.runtimes {
		for ref, im := range c.kept {
			c.pull(p, ref, im)
		}
	}
	public(t, c.hub, "flyway/flyway")
	public(t, k8s, "pause")
	for ref, im := range c.kept {
		for range 5 { // all at once, as later
			var wg sync.WaitGroup
			for _, p := range c.runtimes {
				wg.Go(func() { c.measure(p, ref, c.pull(p, ref, im)) })
			}
			wg.Wait()
		}
	}
	c.added = nil

	restart := func() { c.agent.Kill(); c.agent.Start() }
	network := func(how func(net.Conn)) func() {
		set := func(how func(net.Conn)) {
			for _, h := range []string{"registry-1.docker.io", "auth.docker.io", "production.cloudflare.docker.com"} {
				c.Break(h, how)
			}
		}
		set(how)
		return func() { set(nil) }
	}
	host := func(how func(net.Conn), name string) func() {
		c.Break(name, how)
		return func() { c.Break(name, nil) }
	}
	for _, b := range []breakage{
		{name: "nothing", set: func() func() { return nil }},
		{name: "the agent is killed", running: true, cut: true, set: func() func() { c.agent.Kill(); return restart }},
		{name: "the agent is stopped, for a while", running: true, set: func() func() {
			c.agent.Signal(syscall.SIGSTOP)
			c.bypassed()
			return c.later(func() { c.agent.Signal(syscall.SIGCONT) })
		}},
		{name: "the agent gets SIGTERM", running: true, elsewhere: true, set: func() func() { c.agent.Stop(); return c.agent.Start }},
		{name: "the agent is upgraded", running: true, elsewhere: true, set: func() func() { c.agent.Upgrade(lab.NextWeir(t)); return nil }},
		{name: "a second agent is started", set: func() func() {
			if out, err := c.node.Output(lab.Weir(t), "agent", "--cgroup", c.node.Cgroup()); err == nil || !strings.Contains(err.Error(), "another weir agent") {
				t.Errorf("a second agent runs: %s %v", out, err)
			}
			return nil
		}},
		{name: "the agent has no descriptors left", set: func() func() {
			// All at once, where else they are used up one by one.
			lift := c.agent.LimitDescriptors(0)
			if err := lab.Eventually(nil, func(context.Context) error {
				if !strings.Contains(c.agent.Log(1<<20), "few descriptors are left") {
					return errors.New("it hasn't noticed")
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Second) // its last heartbeat gets too old
			return lift
		}},
		{name: "the agent's memory is at its limit, and it is killed", running: true, cut: true, set: func() func() {
			c.agent.LimitMemory(1 << 16)
			// More and more of them, as what its heap has free is used up first.
			for round := 1; !c.ended(); round++ {
				if round > 8 {
					t.Error("the agent lives with 64 KiB more memory than it had: the row shows nothing")
					break
				}
				var wg sync.WaitGroup
				for _, p := range c.runtimes {
					for range round {
						wg.Go(func() {
							ref, im := c.image(1 << 20)
							if p.pull(ref) == nil { // some run when it is killed
								p.check(ref, im)
							}
						})
					}
				}
				wg.Wait()
			}
			return restart
		}},
		// A day and more, and containerd itself loses what it is pulling: its lease ends.
		{name: "the clock is set 20 hours ahead, and then back", running: true, set: func() func() { return c.setClock(20 * time.Hour) }},
		{name: "the clock is set a month ahead, and then back", set: func() func() { return c.setClock(30 * 24 * time.Hour) }},
		{name: "the clock is set two days back, to before the CA was made, and then right", running: true, set: func() func() { return c.setClock(-2 * 24 * time.Hour) }},
		{name: "the kernel side's map of processes is full", set: func() func() { return c.agent.FillMap("weir_tracked") }},
		{name: "the kernel side's map of listeners is full", set: func() func() { return c.agent.FillMap("weir_listeners") }},
		{name: "containerd is restarted", running: true, lost: []string{"containerd 1.6", "dockerd 20.10"}, set: func() func() {
			c.critical.Kill()
			c.critical.Start()
			return nil
		}},
		{name: "dockerd is restarted", running: true, lost: []string{"dockerd 20.10"}, set: func() func() {
			c.dockerd.Kill()
			c.dockerd.Start()
			return nil
		}},
		{name: "a container ends in the middle of a pull, with its namespaces and its cgroup", running: true, set: func() func() {
			c.endContainer()
			return nil
		}},
		{name: "the disk is full", running: true, set: func() func() {
			_, _ = c.node.Output("dd", "if=/dev/zero", "of=/var/lib/weir/fill", "bs=1M") // until it is
			return func() { c.node.Run("rm", "-f", "/var/lib/weir/fill") }
		}},
		{name: "the disk is slow: 2 MB/s", set: func() func() {
			c.node.Run("mount", "-o", "remount,sync", "/var/lib/weir")
			c.agent.LimitWrites("/var/lib/weir", 2<<20)
			return func() {
				c.node.Run("mount", "-o", "remount,async", "/var/lib/weir")
				restart()
			}
		}},
		{name: "the disk hangs, for a while", running: true, set: func() func() {
			c.node.Run("fsfreeze", "-f", "/var/lib/weir")
			return c.later(func() { c.node.Run("fsfreeze", "-u", "/var/lib/weir") })
		}},
		{name: "the disk fails, and is read-only", running: true, set: func() func() {
			source := strings.TrimSpace(c.node.Run("findmnt", "-no", "SOURCE", "/var/lib/weir"))
			trigger := filepath.Join("/sys/fs/ext4", filepath.Base(source), "trigger_fs_error")
			if err := os.WriteFile(trigger, []byte("test"), 0); err != nil {
				t.Fatal(err)
			}
			return func() {
				c.agent.Stop()
				c.node.Run("umount", "/var/lib/weir")
				c.mountDisk()
				c.agent.Start()
			}
		}},
		{name: "names can't be resolved", offline: true, set: c.namesGone},
		{name: "names can't be resolved, and the name server is silent", offline: true, elsewhere: true, set: func() func() {
			mend, answers := c.namesGone(), c.node.Drop(netip.MustParsePrefix("203.0.113.1/32"))
			return func() { answers(); mend() }
		}},
		{name: "the token server is down", offline: true, elsewhere: true, set: func() func() { return host(lab.Down, "auth.docker.io") }},
		{name: "the token server is half-open", offline: true, elsewhere: true, set: func() func() { return host(lab.Silent, "auth.docker.io") }},
		{name: "the token server answers 429", offline: true, elsewhere: true, set: func() func() { c.hub.FaultTokens(answer(429)); return func() { c.hub.FaultTokens(nil) } }},
		{name: "the token server answers 503", offline: true, elsewhere: true, set: func() func() { c.hub.FaultTokens(answer(503)); return func() { c.hub.FaultTokens(nil) } }},
		{name: "a challenge page is in the registries' stead", offline: true, elsewhere: true, set: func() func() { c.hub.Fault(pageOf(403)); return func() { c.hub.Fault(nil) } }},
		{name: "a captive portal is in the registries' stead", offline: true, elsewhere: true, set: func() func() { c.hub.Fault(pageOf(200)); return func() { c.hub.Fault(nil) } }},
		{name: "registry.k8s.io is down", offline: true, elsewhere: true, kept: pause, set: func() func() { return host(lab.Down, "registry.k8s.io") }},
		{name: "registry.k8s.io's back end is down", offline: true, elsewhere: true, kept: pause, set: func() func() { return host(lab.Down, lab.KubernetesBackend) }},
		{name: "registry.k8s.io's back end is half-open", offline: true, elsewhere: true, kept: pause, set: func() func() { return host(lab.Silent, lab.KubernetesBackend) }},
		{name: "the registries are down", offline: true, elsewhere: true, set: func() func() { return network(lab.Down) }},
		{name: "the registries are half-open: they take connections and say nothing", offline: true, elsewhere: true, set: func() func() { return network(lab.Silent) }},
		{name: "the registries are half-open, and so is one of two peers", offline: true, elsewhere: true, set: func() func() {
			agents[2].Signal(syscall.SIGSTOP)
			mend := network(lab.Silent)
			return func() { mend(); agents[2].Signal(syscall.SIGCONT) }
		}},
		{name: "the registries answer 503", offline: true, elsewhere: true, set: func() func() { c.hub.Fault(answer(503)); return func() { c.hub.Fault(nil) } }},
		{name: "the registries are slow: a second for each answer", elsewhere: true, set: func() func() {
			c.hub.Fault(func(http.ResponseWriter, *http.Request) bool { time.Sleep(time.Second); return false })
			return func() { c.hub.Fault(nil) }
		}},
		{name: "the registries reset their connections", running: true, elsewhere: true, set: func() func() { network(lab.Down)(); return nil }},
	} {
		if b.elsewhere && !*chaosAll {
			continue
		}
		c.run(b)
	}
	if *chaosAll {
		feed := peer.Containerd()
		for _, b := range []breakage{
			{name: "nothing, and the peer has what is wanted", set: func() func() { return func() {} }},
			{name: "the peer's agent is killed", set: func() func() { peerAgent.Kill(); return peerAgent.Start }},
			{name: "the peer is half-open: its agent is stopped", set: func() func() {
				peerAgent.Signal(syscall.SIGSTOP)
				return func() { peerAgent.Signal(syscall.SIGCONT) }
			}},
			{name: "the peer is slow: 1 Mbit/s", set: func() func() { return peer.ShapeOut(1) }},
			{name: "the network to the peer is parted", set: func() func() { return c.Part(c.node) }},
			{name: "connections to the peer are reset", set: func() func() { return c.Refuse(c.node, peer) }},
		} {
			c.runPeer(b, peerAgent, feed)
		}
	}
	c.attachedRemoved()
	c.report()
}

// namesGone has names of the registries that only weir resolves be unknown. Those
// that a runtime resolves have to be known, or it couldn't pull at all.
func (c *chaos) namesGone() (mend func()) {
	hosts, err := c.node.File("/etc/hosts")
	if err != nil {
		c.t.Fatal(err)
	}
	var left []string
	for line := range strings.Lines(string(hosts)) {
		if !strings.Contains(line, "production.cloudflare") {
			left = append(left, line)
		}
	}
	c.node.WriteFile("/etc/hosts", strings.Join(left, ""))
	return func() { c.node.WriteFile("/etc/hosts", string(hosts)) }
}

// mountDisk gives the agent a file system of its own.
func (c *chaos) mountDisk() {
	c.t.Helper()
	c.node.Run("mount", "-o", "loop,errors=remount-ro", "/var/lib/disk", "/var/lib/weir")
}

// later mends something after a while. What it returns waits for that.
func (c *chaos) later(mend func()) (wait func()) {
	done := make(chan struct{})
	time.AfterFunc(*chaosStop, func() { mend(); close(done) })
	return func() { <-done }
}

// setClock sets the clock of all that runs on the node.
func (c *chaos) setClock(ahead time.Duration) func() {
	c.node.SetClock(ahead)
	c.all(flyway, false) // with something to log
	var at time.Time
	for line := range strings.Lines(c.agent.Log(1 << 12)) {
		if _, rest, ok := strings.Cut(line, "time="); ok {
			stamp, _, _ := strings.Cut(rest, " ")
			if t, err := time.Parse(time.RFC3339, stamp); err == nil {
				at = t
			}
		}
	}
	if off := time.Until(at) - ahead; off.Abs() > time.Minute {
		c.t.Errorf("the agent's clock says %v: the row shows nothing", at)
	}
	return func() { c.node.SetClock(0) }
}

// bypassed waits until connections go direct.
func (c *chaos) bypassed() {
	c.t.Helper()
	crane := clientNamed(c.t, "crane")
	if err := lab.Eventually(nil, func(context.Context) error {
		out, err := c.node.Output("timeout", "1", crane, "client", "get", "https://registry-1.docker.io/v2/", "HTTP/1.1")
		if err == nil && strings.Contains(out, "weir") {
			err = errors.New("still redirected")
		}
		return err
	}); err != nil {
		c.t.Error(err)
	}
}

func (c *chaos) ended() bool {
	select {
	case <-c.agent.Ended():
		return true
	default:
		return false
	}
}

// endContainer has a container pull, and ends it in the middle of that.
func (c *chaos) endContainer() {
	box := c.node.Box()
	containerd := box.NewestContainerd()
	cgroup := filepath.Join(c.node.Cgroup(), "container")
	if err := errors.Join(os.Mkdir(cgroup, 0o755), os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), fmt.Append(nil, containerd.PID()), 0)); err != nil {
		c.t.Fatal(err)
	}
	ref, _ := c.image(12 << 20)
	pulled := make(chan error, 1)
	go func() { pulled <- containerd.TryPull(ref) }()
	begun(c.t, c.agent)
	containerd.Kill()
	box.End()
	<-pulled
	if err := lab.Eventually(nil, func(context.Context) error { return os.Remove(cgroup) }); err != nil {
		c.t.Error(err)
	}
}

// image makes a new image.
func (c *chaos) image(size int) (string, lab.Pushed) {
	c.t.Helper()
	n := c.images.Add(1)
	ref := fmt.Sprintf("acme/chaos:%d", n)
	return ref, c.hub.Push(ref, lab.Image{Layers: []int{size, 1000}, Seed: uint64(9000 + n)})
}

// pull pulls an image, which must succeed, and removes it. It returns how long the
// pull took.
func (c *chaos) pull(p *puller, ref string, im lab.Pushed) time.Duration {
	c.t.Helper()
	c.pulls.Add(1)
	start := time.Now()
	if err := p.pull(ref); err != nil {
		c.t.Errorf("%s: the pull of %s failed: %v", p.name, ref, err)
		return time.Since(start)
	}
	took := time.Since(start)
	p.check(ref, im)
	return took
}

// measure records how long a pull took.
func (c *chaos) measure(p *puller, ref string, took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := [2]string{p.name, ref}
	if usual := c.usual[key]; len(usual) < 5 {
		c.usual[key] = append(usual, took)
		return
	}
	usual := slices.Sorted(slices.Values(c.usual[key]))
	c.added = append(c.added, took-usual[len(usual)/2])
}

// fresh pulls a new image.
func (c *chaos) fresh(p *puller) {
	c.t.Helper()
	ref, im := c.image(1 << 20)
	c.pull(p, ref, im)
}

// all has each runtime pull an image that is kept and, if it can be had, what is new.
func (c *chaos) all(kept string, offline bool) {
	var wg sync.WaitGroup
	for _, p := range c.runtimes {
		wg.Go(func() {
			if !offline {
				c.fresh(p)
			}
			for range *chaosPulls {
				c.measure(p, kept, c.pull(p, kept, c.kept[kept]))
			}
		})
	}
	wg.Wait()
}

// inUse waits until each runtime's pulls of what is kept take nothing from the
// registries.
func (c *chaos) inUse() error {
	for _, p := range c.runtimes {
		if err := lab.Eventually(nil, func(context.Context) error {
			c.forget()
			c.pull(p, flyway, c.flyway)
			if n := c.hub.Log.BlobGETs(); n > 0 && !c.t.Failed() {
				return fmt.Errorf("%s gets %d blobs from the registry", p.name, n)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// run breaks something, and writes a row of the table.
func (c *chaos) run(b breakage) {
	c.t.Run(b.name, func(t *testing.T) {
		was := c.t
		c.t = t
		defer func() { c.t = was }()
		before := c.pulls.Load()
		var finish []func() error
		if b.running {
			ref, im := c.image(12 << 20)
			for _, p := range c.runtimes {
				done := make(chan error, 1)
				go func() { done <- p.pull(ref) }()
				finish = append(finish, func() error {
					err := <-done
					if err == nil {
						p.check(ref, im)
						return nil
					}
					if b.cut || slices.Contains(b.lost, p.name) {
						return fmt.Errorf("%s: %w", p.name, err)
					}
					t.Errorf("%s: the running pull failed: %v", p.name, err)
					return nil
				})
			}
			begun(t, c.agent)
			someTime()
		}
		kept := flyway
		if b.kept != "" {
			kept = b.kept
			for _, p := range c.runtimes { // what was known of it is of another time: the clock was set, the disk failed
				c.pull(p, kept, c.kept[kept])
			}
		}
		mend := b.set()
		c.added = nil
		c.all(kept, b.offline)
		added := c.added
		if mend != nil {
			mend()
		}
		start := time.Now()
		if err := c.inUse(); err != nil {
			t.Error(err)
		}
		back := time.Since(start)
		running := "–"
		if b.running {
			failed := 0
			for _, f := range finish {
				if err := f(); err != nil {
					t.Log("a running pull: ", err)
					failed++
				}
			}
			running = fmt.Sprintf("%d of %d", failed, len(finish))
		}
		c.all(flyway, false)
		c.row(b.name, running, before, back, added)
	})
}

// runPeer breaks something of a peer that has what the runtimes want.
func (c *chaos) runPeer(b breakage, peer *lab.Agent, feed *lab.Containerd) {
	c.t.Run(b.name, func(t *testing.T) {
		was := c.t
		c.t = t
		defer func() { c.t = was }()
		before := c.pulls.Load()
		type image struct {
			ref string
			lab.Pushed
		}
		give := func(size int) image {
			ref, im := c.image(size)
			feed.Pull(ref)
			feed.Remove(ref, im)
			return image{ref, im}
		}
		var images []image
		for range *chaosPulls * len(c.runtimes) {
			images = append(images, give(3<<20))
		}
		mend := b.set()
		c.added = nil
		var wg sync.WaitGroup
		for i, p := range c.runtimes {
			wg.Go(func() {
				for k := i; k < len(images); k += len(c.runtimes) {
					c.measure(p, "", c.pull(p, images[k].ref, images[k].Pushed))
				}
			})
		}
		wg.Wait()
		added := c.added
		mend()
		start := time.Now()
		if err := lab.Eventually(nil, func(context.Context) error {
			had := bytesFromPeers(c.agent)
			im := give(1 << 20)
			c.pull(c.runtimes[0], im.ref, im.Pushed)
			if bytesFromPeers(c.agent) == had && !t.Failed() {
				return errors.New("nothing came from the peer")
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		back := time.Since(start)
		c.all(flyway, false)
		c.row(b.name, "–", before, back, added)
	})
}

// attachedRemoved removes the cgroup that the agent is attached to.
func (c *chaos) attachedRemoved() {
	const name = "the cgroup that the agent is attached to is removed"
	c.t.Run(name, func(t *testing.T) {
		was := c.t
		c.t = t
		defer func() { c.t = was }()
		before := c.pulls.Load()
		c.agent.Stop()
		empty := c.node.EmptyCgroup()
		attached := c.node.Agent("--cgroup", empty)
		if err := os.Remove(empty); err != nil {
			t.Error(err)
		}
		c.added = nil
		c.all(flyway, false)
		added := c.added
		attached.Stop()
		c.agent.Start()
		start := time.Now()
		if err := c.inUse(); err != nil {
			t.Error(err)
		}
		c.row(name, "–", before, time.Since(start), added)
	})
}

func (c *chaos) row(name, running string, before int64, back time.Duration, added []time.Duration) {
	c.t.Helper()
	failed := "none"
	if c.t.Failed() {
		failed = "**some**"
	}
	slices.Sort(added)
	at := func(percent int) string {
		if len(added) == 0 {
			return "–"
		}
		return fmt.Sprintf("%.1f s", max(0, added[(len(added)-1)*percent/100]).Seconds())
	}
	row := fmt.Sprintf("| %s | %s | %d | %.1f s | %s | %s | %s |\n", name, running, c.pulls.Load()-before, back.Seconds(), at(50), at(99), failed)
	c.t.Log(row)
	c.rows.WriteString(row)
}

func (c *chaos) report() {
	table := fmt.Sprintf(`# What breaks, and what then happens to pulls

Made by `+"`make chaos`"+`: a node with dockerd 20.10, containerd 1.6, and containerd 2 in a container.
While something is broken, each of them pulls what is kept and, unless the registries can't be
had, something new; and again when it is mended. Each image was compared with what had been
pushed: %d pulls in all. A stopped agent takes connections for up to three quarters of a second more, which then
wait for it: "while" begins after that.

"Running" are pulls that were in their middle when it broke. A killed agent's connections end
with it: runtimes go on with a blob whose answer had begun, directly, but containerd 1.6
doesn't ask again for one whose answer had not. "Back in use" is the time from when it
is mended until each runtime has pulled without a byte of a blob from a registry, one
after another, which takes a second by itself; for peers, until a blob came from one.

"Added" is how much longer pulls took than the median of the same runtime's while nothing is broken:
of what is kept, while it is broken, and in the rows of the peer of what only the peer has.
Where there is no agent to speak of, all of a pull comes from the registry, over the 100 Mbit/s that the
node has here: the row of SIGTERM, while which there is no weir at all, says what that takes.

| what breaks | running pulls that failed | other pulls | back in use after | added, p50 | added, p99 | other pulls that failed |
|---|--:|--:|--:|--:|--:|--:|
%s`, c.pulls.Load(), c.rows.String())
	if *chaosOut == "" {
		c.t.Log(table)
		return
	}
	if err := os.WriteFile(*chaosOut, []byte(table), 0o644); err != nil {
		c.t.Error(err)
	}
}
