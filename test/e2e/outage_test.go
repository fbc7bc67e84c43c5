// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"weir/test/lab"
)

const (
	pause    = "registry.k8s.io/pause:3.10"
	private  = "corp.example/acme/private:1"
	user     = "alice"
	password = "wonderland"
)

// outages is a node with each kind of client, and two peers, whose registries fail
// one after another.
type outages struct {
	*world
	t         *testing.T
	k8s, corp *lab.Registry
	node      *lab.Node
	agents    []*lab.Agent
	images    map[string]lab.Pushed
	clients   []*puller
	crane     *puller
	// direct is the same on a node without weir.
	direct *puller
}

// outage is something outside the node that fails.
type outage struct {
	name string
	set  func() (mend func())
	refs []string // the images that are concerned
	// words are what a client is told of an image that isn't stored, with weir and
	// without. Empty where it would wait for long.
	words string
}

// TestOutage has images that are stored, and that their clients may have, be pulled
// whatever fails outside the node, alone and together with one of two peers. What
// isn't stored fails as without weir, and can be pulled as soon as all is mended.
func TestOutage(t *testing.T) {
	t.Parallel()
	o := newOutages(t)
	everything := []string{flyway, renovate, pause, private}
	faults := []outage{
		{"the token servers are down", o.tokens(lab.Down, reset), everything[:2], "/token?"},
		{"the token servers are silent", o.tokens(lab.Silent, mute), everything[:2], ""},
		{"the token servers answer 429", o.tokens(nil, answer(429)), everything[:2], "429 Too Many Requests"},
		{"the token servers answer 503", o.tokens(nil, answer(503)), everything[:2], "503 Service Unavailable"},
		{"registry.k8s.io is down", o.hosts(lab.Down, "registry.k8s.io"), []string{pause}, "registry.k8s.io"},
		{"its back end is down", o.hosts(lab.Down, lab.KubernetesBackend), []string{pause}, lab.KubernetesBackend},
		{"both are down", o.hosts(lab.Down, "registry.k8s.io", lab.KubernetesBackend), []string{pause}, "registry.k8s.io"},
		{"both are silent", o.hosts(lab.Silent, "registry.k8s.io", lab.KubernetesBackend), []string{pause}, ""},
		{"a registry with passwords is down", o.hosts(lab.Down, "corp.example"), []string{private}, "corp.example"},
		{"a registry with passwords is silent", o.hosts(lab.Silent, "corp.example"), []string{private}, ""},
		{"a registry with passwords answers 503", o.faults(answer(503)), []string{private}, "503 Service Unavailable"},
		{"a challenge page is in the registries' stead", o.faults(pageOf(http.StatusForbidden)), everything, "403 Forbidden"},
		{"a captive portal is in the registries' stead", o.faults(pageOf(http.StatusOK)), everything, "invalid character '<'"},
		{"the agent's name server refuses", o.names(false), everything, ""},
		{"the agent's name server is silent", o.names(true), everything, ""},
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) { o.run(t, f) })
	}
	o.agents[2].Signal(syscall.SIGSTOP)
	defer o.agents[2].Signal(syscall.SIGCONT)
	for _, f := range faults {
		t.Run(f.name+", and a peer is dead", func(t *testing.T) { o.run(t, f) })
	}
}

func newOutages(t *testing.T) *outages {
	o := &outages{world: newWorld(t), t: t}
	o.k8s, o.corp = o.KubernetesRegistry(), o.PasswordRegistry("corp.example")
	o.corp.User(user, password)
	o.images = map[string]lab.Pushed{flyway: o.flyway, renovate: o.renovate,
		pause:   o.k8s.Push("pause:3.10", lab.Image{Layers: []int{300_000}, Seed: 3, Index: true}),
		private: o.corp.Push("acme/private:1", lab.Image{Layers: []int{400_000, 1000}, Seed: 4})}
	nodes, agents := cluster(t, o.world, 3, "--registry", "corp.example", "--rights-ttl", "1h")
	o.node, o.agents = nodes[0], agents
	// Each in a container, so that the agent's names are its own.
	old := o.node.Box()
	o.containerd("containerd 1.6", old.Containerd())
	o.docker("dockerd 20.10", old.Docker())
	o.containerd("containerd 2.4", o.node.Box().NewestContainerd())
	o.docker("dockerd 29", o.node.Box().NewestDocker())
	o.buildkit(o.node.Box())
	tools := o.node.Box()
	o.clients = append(o.clients, o.tool("skopeo", tools), o.tool("podman", tools), o.tool("crane", tools))
	o.crane, o.direct = o.clients[len(o.clients)-1], o.tool("crane", o.Node())
	o.pull(t, flyway, renovate, pause, private)
	public(t, o.hub, "flyway/flyway")
	public(t, o.ghcr, "renovatebot/renovate")
	public(t, o.k8s, "pause")
	return o
}

// login is what a client shows to a registry.
func login(ref string) []string {
	if strings.HasPrefix(ref, "corp.example/") {
		return []string{user, password}
	}
	return nil
}

func (o *outages) containerd(name string, c *lab.Containerd) {
	o.clients = append(o.clients, &puller{name: name, pull: func(ref string) error { return c.TryPull(ref, login(ref)...) },
		check: func(ref string, im lab.Pushed) { c.Same(ref, im); c.Remove(ref, im) }})
}

func (o *outages) docker(name string, d *lab.Docker) {
	o.clients = append(o.clients, &puller{name: name, pull: func(ref string) error { return d.TryPull(ref, login(ref)...) },
		check: func(ref string, im lab.Pushed) { d.Same(ref, im); d.Remove(ref) }})
}

// loggedIn has the programs of a node be logged in.
func loggedIn(n *lab.Node) {
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	n.WriteFile("/var/lib/home/.docker/config.json", fmt.Sprintf(`{"auths": {"corp.example": {"auth": %q}}}`, auth))
}

func (o *outages) buildkit(n *lab.Node) {
	loggedIn(n)
	b := n.BuildKit()
	o.clients = append(o.clients, &puller{name: "BuildKit", pull: func(ref string) error {
		_, err := b.TryBuild("FROM "+ref+"\nENV A=1\n", "--no-cache", "--output=type=oci,dest=/var/lib/home/image.tar")
		return err
	}, check: func(string, lab.Pushed) { n.Run(lab.Tool(o.t, "buildctl"), "prune", "--all") }})
}

// tool is a program that is new each time, and verifies what it gets.
func (o *outages) tool(name string, n *lab.Node) *puller {
	loggedIn(n)
	command := map[string]string{
		"crane":  n.As(lab.Tool(o.t, "crane"), "crane") + " pull $1 /var/lib/home/crane.tar",
		"skopeo": "exec skopeo copy --authfile=/var/lib/home/.docker/config.json docker://$1 dir:/var/lib/home/skopeo",
		"podman": "exec podman --storage-driver=vfs --root=/var/lib/podman --runroot=/run/podman pull --authfile=/var/lib/home/.docker/config.json $1",
	}[name]
	return &puller{name: name, pull: func(ref string) error {
		if ref == flyway || strings.HasPrefix(ref, "acme/") {
			ref = "docker.io/" + ref
		}
		_, err := n.Output("sh", "-ec", command, "sh", ref)
		return err
	}, check: func(ref string, _ lab.Pushed) {
		if name == "podman" {
			n.Run("podman", "--storage-driver=vfs", "--root=/var/lib/podman", "--runroot=/run/podman", "rmi", "--all")
		}
	}}
}

// pull has all clients pull images at the same time, each of which must succeed.
func (o *outages) pull(t *testing.T, refs ...string) {
	t.Helper()
	var wg sync.WaitGroup
	for _, c := range o.clients {
		wg.Go(func() {
			for _, ref := range refs {
				start := time.Now()
				if err := c.pull(ref); err != nil {
					t.Errorf("%s: %s: %v", c.name, ref, err)
					continue
				}
				if long := time.Since(start); long > time.Second {
					t.Logf("%s: %s took %v", c.name, ref, long.Round(time.Millisecond))
				}
				c.check(ref, o.images[ref])
			}
		})
	}
	wg.Wait()
}

// run has something fail.
func (o *outages) run(t *testing.T, f outage) {
	cold := make([]string, len(f.refs))
	for i, ref := range f.refs {
		cold[i] = o.push(ref)
	}
	mend := f.set()
	o.pull(t, f.refs...)
	for i, ref := range f.refs {
		if f.words == "" || len(f.refs) > 2 && i > 0 {
			continue
		}
		for _, c := range []*puller{o.crane, o.direct} {
			if err := c.pull(cold[i]); err == nil || !strings.Contains(err.Error(), f.words) {
				t.Errorf("%s, direct %v: %s, which isn't stored: %v; want %q", c.name, c == o.direct, ref, err, f.words)
			}
		}
	}
	mend()
	o.pull(t, cold...)
}

// push makes another image in the registry of one.
func (o *outages) push(like string) (ref string) {
	n := len(o.images)
	ref = fmt.Sprintf("acme/cold%d:1", n) // of a repository that nothing is known of
	r := o.hub
	switch like {
	case renovate:
		r = o.ghcr
	case pause:
		r = o.k8s
	case private:
		r = o.corp
	}
	im := r.Push(ref, lab.Image{Layers: []int{100_000}, Seed: uint64(1000 + n)})
	if r != o.hub {
		ref = r.Host + "/" + ref
	}
	o.images[ref] = im
	return ref
}

// tokens breaks the token servers: that which is a host of its own by what happens
// to connections, unless how is nil, the others by what happens to requests.
func (o *outages) tokens(how func(net.Conn), answer func(http.ResponseWriter, *http.Request) bool) func() func() {
	return func() func() {
		o.Break("auth.docker.io", how)
		if how == nil {
			o.hub.FaultTokens(answer)
		}
		o.ghcr.FaultTokens(answer)
		return func() {
			o.Break("auth.docker.io", nil)
			o.hub.FaultTokens(nil)
			o.ghcr.FaultTokens(nil)
		}
	}
}

// hosts breaks hosts.
func (o *outages) hosts(how func(net.Conn), hosts ...string) func() func() {
	return func() func() {
		for _, h := range hosts {
			o.Break(h, how)
		}
		return func() {
			for _, h := range hosts {
				o.Break(h, nil)
			}
		}
	}
}

// faults has all registries answer so.
func (o *outages) faults(answer func(http.ResponseWriter, *http.Request) bool) func() func() {
	return func() func() {
		set := func(f func(http.ResponseWriter, *http.Request) bool) {
			for _, r := range []*lab.Registry{o.hub, o.ghcr, o.k8s, o.corp} {
				r.Fault(f)
			}
		}
		set(answer)
		return func() { set(nil) }
	}
}

// names takes the agent's names away, which clients, that couldn't begin to pull
// otherwise, have of their own.
func (o *outages) names(silent bool) func() func() {
	return func() func() {
		hosts, err := o.node.File("/etc/hosts")
		if err != nil {
			o.t.Fatal(err)
		}
		o.node.WriteFile("/etc/hosts", "127.0.0.1 localhost\n")
		answers := func() {}
		if silent {
			answers = o.node.Drop(netip.MustParsePrefix("203.0.113.1/32"))
		}
		return func() {
			answers()
			o.node.WriteFile("/etc/hosts", string(hosts))
		}
	}
}

// The ways in which a request can be answered.
func reset(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }

func mute(_ http.ResponseWriter, r *http.Request) bool {
	<-r.Context().Done()
	panic(http.ErrAbortHandler)
}

// pageOf answers with one for people.
func pageOf(status int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "<html><body>One moment, please.</body></html>")
		return true
	}
}
