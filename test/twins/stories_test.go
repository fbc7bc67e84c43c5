// SPDX-License-Identifier: Apache-2.0

package twins

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"weir/test/lab"
)

const (
	proxyHost  = "proxy.corp"
	newAddress = "new.example"
	caFile     = "/etc/ssl/certs/weir-ca.pem"
	postinst   = "/var/lib/home/ca-certificates.postinst"
)

// fault is one of the network. set makes it, and returns what mends it.
type fault struct {
	name string
	set  func(p *play) (mend func())
	// fits says for which stories it is one; nil means all.
	fits func(c *client, st story) bool
}

// hosts changes what a client finds in its /etc/hosts, and the agent in the node's.
func (p *play) hosts(change func(string) string) (mend func()) {
	was := make(map[*lab.Node]string)
	for _, n := range []*lab.Node{p.c.node, p.Node} {
		if _, done := was[n]; done {
			continue
		}
		b, err := n.File("/etc/hosts")
		if err != nil {
			p.w.t.Fatal(err)
		}
		was[n] = string(b)
		n.WriteFile("/etc/hosts", change(string(b)))
	}
	return func() {
		for n, b := range was {
			n.WriteFile("/etc/hosts", b)
		}
		p.w.mu.Lock()
		defer p.w.mu.Unlock()
		p.w.hosts = time.Now()
	}
}

// blackHole drops what goes to a family's addresses. Who is left with the other one would go to where a
// name has been for as long as Go's resolver remembers /etc/hosts (net, cacheMaxAge).
func blackHole(prefix string) func(p *play) func() {
	return func(p *play) func() {
		p.w.mu.Lock()
		changed := p.w.hosts
		p.w.mu.Unlock()
		time.Sleep(time.Until(changed.Add(5 * time.Second)))
		return p.Drop(netip.MustParsePrefix(prefix))
	}
}

// warm has the client pull something else from the registry.
func (p *play) warm() {
	other := &play{side: p.side, story: p.story, c: p.c, reg: p.reg, repo: "base/warm", tag: "1", env: p.env, begun: make(chan struct{}), count: make(map[string]int)}
	other.op, other.im = "moved tag", p.im // nothing is compared
	if p.c.pull != nil {
		_ = p.c.pull(other)
		if p.c.forget != nil {
			p.c.forget(other)
		}
	}
}

var faults = []fault{
	{name: ""},
	{name: "established flows are forgotten", set: func(p *play) func() {
		p.warm()
		return p.ForgetFlows()
	}},
	{name: "IPv6 is a black hole", set: blackHole("2001:db8:113::/64")},
	{name: "IPv4 is a black hole", set: blackHole("203.0.113.0/24"), fits: func(c *client, _ story) bool { return !c.box }},
	{name: "a further address of the registry hangs", set: func(p *play) func() {
		mend := p.Drop(netip.MustParsePrefix("203.0.113.250/32"))
		undo := p.hosts(func(s string) string { return s + fmt.Sprintf("203.0.113.250 %s\n", p.reg.Host) })
		return func() { undo(); mend() }
	}},
	// What stays remembers for some seconds what /etc/hosts was, with and without weir.
	{name: "the registry's name has moved to another server", fits: func(c *client, st story) bool {
		w := find(ways, st.way, func(w way) string { return w.name })
		return c.restart == nil && w.registry == nil && !strings.Contains(st.way, "redirect") && !strings.Contains(st.way, "signed")
	}, set: func(p *play) func() {
		p.warm()
		v4, v6 := p.w.Host(newAddress)
		return p.hosts(func(s string) string {
			var b strings.Builder
			for line := range strings.Lines(s) {
				if !strings.HasSuffix(strings.TrimSpace(line), " ghcr.io") {
					b.WriteString(line)
				}
			}
			fmt.Fprintf(&b, "%s ghcr.io\n%s ghcr.io\n", v4, v6)
			return b.String()
		})
	}},
	{name: "name servers are silent", set: func(p *play) func() {
		mend := p.Drop(netip.MustParsePrefix("203.0.113.1/32"))
		if !p.c.box {
			return mend
		}
		// A container has its own files; the node, and the agent, has nothing.
		b, _ := p.File("/etc/hosts")
		p.WriteFile("/etc/hosts", "127.0.0.1 localhost\n")
		return func() { p.WriteFile("/etc/hosts", string(b)); mend() }
	}},
	{name: "1 Mbit/s", set: func(p *play) func() { p.Shape(1); return p.Unshape },
		fits: func(_ *client, st story) bool {
			return find(moments, st.moment, func(m moment) string { return m.name }).during == nil
		}},
	{name: "blobs can be had through the client's proxy alone", set: func(p *play) func() {
		v4, v6 := p.w.Host("production.cloudflare.docker.com")
		p.env = []string{"HTTPS_PROXY=http://" + proxyHost + ":3128", "NO_PROXY=registry-1.docker.io,index.docker.io,auth.docker.io"}
		a, b := p.Drop(netip.PrefixFrom(v4, 32)), p.Drop(netip.PrefixFrom(v6, 128))
		return func() { a(); b() }
	}, fits: func(c *client, st story) bool {
		return c.restart == nil && strings.HasPrefix(st.way, "Docker Hub") && !c.box
	}},
}

// caCertificates puts the script of the package ca-certificates into a node or box,
// and the lab's CA to where the package looks for those that were added.
func (w *world) caCertificates(n *lab.Node) {
	script, err := os.ReadFile(lab.Debian(w.t, "/var/lib/dpkg/info/ca-certificates.postinst", "ca-certificates"))
	if err != nil {
		w.t.Fatal(err)
	}
	roots := w.Roots()
	n.WriteFile(postinst, string(script))
	n.WriteFile("/var/lib/home/added/lab.crt", roots[strings.LastIndex(roots, "-----BEGIN"):])
	n.Run("mount", "--bind", "/var/lib/home/added", "/usr/local/share/ca-certificates")
}

// moment is one in the agent's life. Nothing of it happens at the node without an
// agent, unless both is set.
type moment struct {
	name   string
	before func(p *play) (after func())
	during func(p *play) // once a blob has been asked for
	after  func(p *play) // during
	both   bool
	// fits says for which stories it is one; nil means all.
	fits func(c *client, st story) bool
	// cuts says that connections are lost, and that the client has to ask again:
	// at both nodes, if it fails.
	cuts bool
}

// settle waits until a client that stays is known to the agent again.
func settle(p *play) {
	if err := lab.Eventually(nil, func(ctx context.Context) error {
		s, err := p.agent.AskStatus(ctx)
		if err != nil {
			return err
		}
		for _, r := range s.Runtimes {
			if r.Reach == "starting" || strings.HasPrefix(r.Step, "wait") {
				return errors.New(r.Kind + " is " + r.Reach)
			}
		}
		return nil
	}); err != nil {
		p.w.t.Log(err)
	}
}

var moments = []moment{
	{name: ""},
	{name: "the agent is stopped in the middle", during: func(p *play) { p.agent.Stop() }, after: func(p *play) { p.agent.Start(); settle(p) }},
	{name: "the agent is upgraded in the middle", during: func(p *play) { p.agent.Stop(); p.agent.Start() }, after: settle},
	{name: "the agent is killed in the middle", cuts: true, during: func(p *play) { p.agent.Kill() }, after: func(p *play) { p.agent.Start(); settle(p) }},
	{name: "the agent has been killed", before: func(p *play) func() { p.agent.Kill(); return func() { p.agent.Start(); settle(p) } }},
	// What is pulled first uses up what a slow link lets through at once.
	{name: "the agent hangs", fits: func(_ *client, st story) bool { return st.fault != "1 Mbit/s" }, before: func(p *play) func() {
		p.agent.Signal(syscall.SIGSTOP)
		// Connections of the next moment still come to it, and wait with it.
		if err := lab.Eventually(nil, func(context.Context) error {
			_, err := p.Output("timeout", "1", p.raw, "raw", "pull", "ghcr.io", "base/warm", "1")
			return err
		}); err != nil {
			p.w.t.Error(err)
		}
		return func() { p.agent.Signal(syscall.SIGCONT) }
	}},
	{name: "the agent starts", before: func(p *play) func() {
		p.agent.Kill()
		var started sync.WaitGroup
		started.Go(p.agent.Start)
		return func() { started.Wait(); settle(p) }
	}},
	{name: "the client starts", both: true, before: func(p *play) func() {
		if p.c.restart != nil {
			p.c.restart()
		}
		return func() {}
	}},
	{name: "the agent and the client start", both: true, before: func(p *play) func() {
		var started sync.WaitGroup
		if p.agent != nil {
			p.agent.Kill()
			started.Go(p.agent.Start)
		}
		if p.c.restart != nil {
			p.c.restart()
		}
		return func() {
			started.Wait()
			if p.agent != nil {
				settle(p)
			}
		}
	}},
	{name: "the client starts while the agent is upgraded", both: true, fits: func(c *client, _ story) bool { return c.restart != nil }, before: func(p *play) func() {
		var upgraded sync.WaitGroup
		if p.agent != nil {
			upgraded.Go(func() { p.agent.Stop(); p.agent.Start() })
		}
		p.c.restart()
		return func() {
			upgraded.Wait()
			if p.agent != nil {
				settle(p)
			}
		}
	}},
	// What the package does when it is upgraded, and whoever adds a certificate.
	{name: "ca-certificates is upgraded in the middle", both: true, during: func(p *play) {
		for _, trigger := range []string{"update-ca-certificates-fresh", "update-ca-certificates"} {
			if _, err := p.c.node.Output("sh", postinst, "triggered", trigger); err != nil {
				p.w.t.Error(err)
			}
		}
	}},
	{name: "another agent, with another CA, comes", before: func(p *play) func() {
		p.agent.Stop()
		p.Run("sh", "-c", "mv /var/lib/weir/ca /var/lib/weir/ca-was; rm -f "+caFile)
		p.agent.Start()
		return func() {
			// And the one that was there comes back.
			p.agent.Stop()
			p.Run("sh", "-c", "rm -rf /var/lib/weir/ca; mv /var/lib/weir/ca-was /var/lib/weir/ca; rm -f "+caFile)
			p.agent.Start()
			if p.c.restart != nil {
				p.c.restart()
			}
			settle(p)
		}
	}},
	{name: "the CA's file is removed", before: func(p *play) func() {
		_, _ = p.c.node.Output("rm", "-f", caFile)
		return func() {}
	}},
	// What starts later sees the machine's clock.
	{name: "clocks are 20 hours ahead", both: true, fits: func(c *client, st story) bool {
		return c.restart != nil && (!c.pushesApart || !strings.Contains(st.op, "push"))
	}, before: func(p *play) func() {
		p.SetClock(20 * time.Hour)
		return func() { p.SetClock(0) }
	}},
}

// op is what a client does.
type op struct {
	name string
	do   func(p *play) error
	fits func(c *client) bool
}

func pulls(c *client) bool { return c.pull != nil }

var ops = append([]op{
	{name: "pull", do: func(p *play) error { return p.c.pull(p) }, fits: pulls},
	{name: "push", do: func(p *play) error { return p.c.push(p) }, fits: func(c *client) bool { return c.push != nil }},
	{name: "pull twice", do: func(p *play) error {
		if err := p.c.pull(p); err != nil {
			return err
		}
		p.c.forget(p)
		return p.c.pull(p)
	}, fits: func(c *client) bool { return c.pull != nil && c.forget != nil }},
	{name: "pull and push", do: func(p *play) error { return errors.Join(p.c.pull(p), p.c.push(p)) }, fits: func(c *client) bool { return c.pull != nil && c.push != nil }},
	{name: "moved tag", do: func(p *play) error {
		if err := p.c.pull(p); err != nil {
			return err
		}
		if p.c.forget != nil {
			p.c.forget(p)
		}
		p.put(lab.Image{Layers: []int{100_000}, Seed: 77})
		return p.c.pull(p)
	}, fits: pulls},
}, special("delete", "copy", "push and pull at once", "HEAD with Range", "ranges", "Docker's types alone", "Expect: 100-continue", "monolithic POST", "chunks", "credentials in another field")...)

func special(names ...string) (all []op) {
	for _, name := range names {
		all = append(all, op{name: name, do: func(p *play) error { return p.c.own[name](p) }, fits: func(c *client) bool { return c.own[name] != nil }})
	}
	return all
}

// parse finds the story of a name.
func (w *world) parse(name string) (st story, ok bool) {
	parts := strings.Split(name, " · ")
	if len(parts) < 2 {
		return st, false
	}
	st.client, st.op = parts[0], parts[1]
	for _, p := range parts[2:] {
		switch {
		case slices.ContainsFunc(ways, func(w way) bool { return w.name == p }):
			st.way = p
		case slices.ContainsFunc(faults, func(f fault) bool { return f.name == p }):
			st.fault = p
		default:
			st.moment = p
		}
	}
	return st, w.sides[0].clients[st.client] != nil && slices.ContainsFunc(ops, func(o op) bool { return o.name == st.op }) &&
		slices.ContainsFunc(moments, func(m moment) bool { return m.name == st.moment })
}

// fits says whether a story makes sense.
func (w *world) fits(st story) bool {
	c := w.sides[0].clients[st.client]
	o := find(ops, st.op, func(o op) string { return o.name })
	f := find(faults, st.fault, func(f fault) string { return f.name })
	m := find(moments, st.moment, func(m moment) string { return m.name })
	y := find(ways, st.way, func(w way) string { return w.name })
	return o.fits(c) && (f.fits == nil || f.fits(c, st)) && (m.fits == nil || m.fits(c, st)) && (y.fits == nil || y.fits(st))
}

// random composes a story.
func (w *world) random(rng *rand.Rand) story {
	var names []string
	for name := range w.sides[0].clients {
		names = append(names, name)
	}
	slices.Sort(names)
	for {
		st := story{client: names[rng.IntN(len(names))], op: ops[rng.IntN(len(ops))].name}
		way := ways[rng.IntN(len(ways))]
		st.way = way.name
		if rng.IntN(2) == 0 {
			st.fault = faults[rng.IntN(len(faults))].name
		}
		if rng.IntN(2) == 0 {
			st.moment = moments[rng.IntN(len(moments))].name
		}
		if !way.slow && w.fits(st) {
			return st
		}
	}
}

// all are all clients with all ways, and all faults and moments with some.
func (w *world) all() (sts []story) {
	var names []string
	for name := range w.sides[0].clients {
		names = append(names, name)
	}
	slices.Sort(names)
	// A client does the k-th of some things. One that only pulls does the next one
	// that it can do.
	add := func(st story, k int, do ...string) {
		for i := range do {
			st.op = do[(k+i)%len(do)]
			if w.fits(st) {
				sts = append(sts, st)
				return
			}
			if w.sides[0].clients[st.client].push != nil {
				return
			}
		}
	}
	for i, way := range ways {
		for j, c := range names {
			if !way.slow {
				add(story{client: c, way: way.name}, i+j, "pull twice", "pull and push", "pull", "push")
			}
		}
	}
	for i, c := range names {
		for _, f := range faults {
			way := ""
			if strings.Contains(f.name, "proxy") {
				way = ways[1].name
			}
			add(story{client: c, way: way, fault: f.name}, i, "pull", "push", "pull twice")
		}
		for j, m := range moments {
			add(story{client: c, moment: m.name}, i+j, "pull", "push", "pull twice")
		}
	}
	return sts
}

// fixed are the stories that `make test` plays. The first are ways in which weir
// once did harm.
var fixed = []story{
	{client: "oras --ca-file", op: "pull and push"},
	{client: "helm --ca-file", op: "pull"},
	{client: "cosign --registry-cacert", op: "pull"},
	{client: "dockerd 20.10", op: "pull", fault: "established flows are forgotten"},
	{client: "containerd 2.4", op: "pull", fault: "established flows are forgotten"},
	{client: "crane", op: "pull and push", fault: "established flows are forgotten"},
	{client: "raw", op: "moved tag", fault: "the registry's name has moved to another server"},
	{client: "containerd 1.7", op: "pull", fault: "a further address of the registry hangs"},
	{client: "crane", op: "pull twice", way: "Docker Hub: a token server and a CDN of their own", fault: "blobs can be had through the client's proxy alone"},
	{client: "raw", op: "push", way: "closes each connection after its answer, and doesn't say so"},
	{client: "crane where lo has no address", op: "pull"},
	{client: "dockerd 29", op: "pull", way: "announces 1 % more of a blob than there is"},
	{client: "dockerd 20.10", op: "pull", way: "another file under the digest"},
	{client: "containerd 1.6", op: "pull twice", moment: "the CA's file is removed"},
	{client: "crane", op: "pull", moment: "the CA's file is removed"},
}

// slow are fixed stories that take minutes, of clients that wait that long. They are
// played beside the others.
var slow = []story{
	{client: "containerd 1.6", op: "pull", way: "slow head: 125 s"},
	{client: "containerd 1.7", op: "pull", way: "slow body: 35 s after its head"},
}

// fixed returns stories, one for each way and for what clients do besides, and then
// those and one for each fault and moment.
func (w *world) fixed() (byWay, others []story) {
	var all []story
	cheap := []string{"raw", "crane", "containerd 2.4", "skopeo", "dockerd 20.10", "regctl", "containerd 1.6", "oras", "dockerd 29", "podman", "buildah", "helm", "cosign", "buildkitd", "containerd 1.7", "nerdctl", "kaniko", "trivy", "trivy --download-db-only"}
	n := 0
	add := func(st story, do ...string) {
		for range cheap {
			st.client, st.op = cheap[n%len(cheap)], do[n%len(do)]
			n++
			if w.fits(st) {
				all = append(all, st)
				return
			}
		}
	}
	for _, way := range ways {
		if !way.slow {
			do := []string{"pull twice", "pull and push", "pull"}
			if strings.Contains(way.name, "upload") {
				do = []string{"push"}
			}
			add(story{way: way.name}, do...)
		}
	}
	for _, o := range ops {
		st := story{op: o.name}
		if o.name == "monolithic POST" {
			st.way = "monolithic POST is taken"
		}
		for _, c := range cheap {
			if st.client = c; w.fits(st) {
				all = append(all, st)
				break
			}
		}
	}
	byWay, all = all, slices.Clone(fixed)
	for _, f := range faults {
		add(story{fault: f.name}, "pull", "pull and push")
	}
	for _, m := range moments {
		add(story{moment: m.name}, "pull", "pull twice")
	}
	return byWay, all
}
