// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"weir/agent/admin"
	"weir/agent/registries"
	"weir/test/lab"
)

// learned waits until the agent has learned a registry.
func learned(t *testing.T, a *lab.Agent, host string) (r admin.Registry) {
	t.Helper()
	if err := lab.Eventually(a.Ended(), func(ctx context.Context) error {
		all := knownTo(ctx, t, a)
		i := slices.IndexFunc(all, func(r admin.Registry) bool { return r.Host == host })
		if i < 0 {
			return fmt.Errorf("%s is not among %d registries", host, len(all))
		}
		r = all[i]
		return nil
	}); err != nil {
		t.Fatalf("%v\n%s", err, a.Log(4000))
	}
	return r
}

// knownTo are the registries that an agent knows, but for those that all know.
func knownTo(ctx context.Context, t *testing.T, a *lab.Agent) (all []admin.Registry) {
	t.Helper()
	b, err := a.Get(ctx, "/api/registries")
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(r admin.Registry) bool { return r.State == registries.StateKnown })
}

// A company's registry, that weir has never heard of: the first pull passes
// through, and what starts from then on is intercepted for it. That lasts over a
// restart of the agent, and until it is forgotten.
func TestRegistryIsLearned(t *testing.T) {
	t.Parallel()
	const ref = "registry.corp.example/team/app:1"
	w := newWorld(t)
	r := w.Registry("registry.corp.example")
	im := r.Push("team/app:1", lab.Image{Layers: []int{2 << 20, 100_000}, Seed: 91})
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	docker.Pull(renovate) // its roots are read
	docker.Pull(ref)
	docker.Remove(ref)
	fetched(t, r)
	if got := learned(t, agent, r.Host); got.State != registries.StateLearned || got.By != "dockerd" || got.At.IsZero() || got.Runtimes != 0 || got.Of == 0 {
		t.Errorf("%+v", got)
	}
	if s := agent.Status(); len(s.Registries) != 1 {
		t.Errorf("it was intercepted: %+v", s.Registries)
	}
	// It has read its roots before. It goes on, and is intercepted once it has been
	// restarted.
	docker.Pull(ref)
	docker.Remove(ref)
	if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" || rt.Except[r.Host] == "" || len(rt.Except) != 1 {
		t.Errorf("%+v", rt)
	}
	docker.Stop()
	docker.Start()
	docker.Pull(ref)
	docker.Same(ref, im)
	docker.Remove(ref)
	warm := func(pull func()) {
		t.Helper()
		r.Log.Reset()
		pull()
		if n := r.Log.BlobGETs(); n > 0 {
			t.Errorf("%d blobs were fetched:\n%s", n, r.Log)
		}
	}
	warm(func() { docker.Pull(ref) })
	docker.Remove(ref)
	// So are a dockerd in a pod, and a containerd.
	box := node.Box().Docker()
	warm(func() { box.Pull(ref) })
	box.Same(ref, im)
	containerd := node.Box().Containerd()
	warm(func() { containerd.Pull(ref) })
	containerd.Same(ref, im)
	if got := learned(t, agent, r.Host); got.Runtimes < 3 {
		t.Errorf("%+v", got)
	}
	// What each trusts is known after a restart of the agent, too.
	agent.Stop()
	agent.Start()
	for _, pid := range []int{docker.PID(), box.PID(), containerd.PID()} {
		if rt := agent.Runtime(pid); rt.Reach != "intercepted" || len(rt.Except) > 0 {
			t.Errorf("%+v", rt)
		}
	}
	warm(func() { docker.Pull(ref) })
	docker.Remove(ref)
	// What isn't wanted is passed through, and stays so.
	if out := node.Run(lab.Weir(t), "registries", "forget", r.Host); out != "" {
		t.Error(out)
	}
	before := agent.Status().Connections
	docker.Pull(ref)
	docker.Remove(ref)
	if now := agent.Status().Connections; now.Intercepted != before.Intercepted || now.PassedThrough == before.PassedThrough {
		t.Errorf("%+v, before %+v", now, before)
	}
	if got := learned(t, agent, r.Host); got.State != registries.StateForgotten || got.Runtimes != 0 {
		t.Errorf("%+v", got)
	}
}

// Registries at a port of their own: with a public CA, and with one that only the
// node's runtimes have in their certs.d. No flag says where. Each runtime gets what
// another has pulled, once it trusts the CA for it.
func TestPortIsLearned(t *testing.T) {
	t.Parallel()
	const publicRef, ownRef = "registry.corp.example:8443/team/app:1", "harbor.corp.example:9443/team/app:2"
	w := newWorld(t)
	public, _ := w.RegistryAt("registry.corp.example", 8443, false)
	own, ca := w.RegistryAt("harbor.corp.example", 9443, true)
	im := public.Push("team/app:1", lab.Image{Layers: []int{2 << 20, 100_000}, Seed: 92})
	im2 := own.Push("team/app:2", lab.Image{Layers: []int{1 << 20}, Seed: 93})
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", readsCertsD)
	for _, dir := range []string{"/etc/docker/certs.d", "/etc/containerd/certs.d"} {
		node.WriteFile(dir+"/harbor.corp.example:9443/ca.crt", string(ca))
	}
	containerd := node.Containerd()
	containerd.Pull(renovate) // its roots are read
	agent := node.Agent()
	if rt := agent.Runtime(containerd.PID()); rt.Reach != "intercepted" {
		t.Fatalf("%+v", rt)
	}
	// It reads its certs.d at each pull, and is intercepted without a restart as soon
	// as no pull runs that began before.
	for ref, im := range map[string]lab.Pushed{publicRef: im, ownRef: im2} {
		containerd.Pull(ref)
		containerd.Same(ref, im)
		host, _, _ := strings.Cut(ref, "/")
		learned(t, agent, host)
		if err := lab.Eventually(agent.Ended(), func(ctx context.Context) error {
			if rt := agent.Runtime(containerd.PID()); len(rt.Except) > 0 {
				return fmt.Errorf("%+v", rt)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		containerd.Remove(ref, im)
		containerd.Pull(ref)
		containerd.Remove(ref, im)
	}
	nothing := func(what string) {
		t.Helper()
		for _, r := range []*lab.Registry{public, own} {
			if n := r.Log.BlobGETs(); n > 0 {
				t.Errorf("%s: %d blobs were fetched:\n%s", what, n, r.Log)
			}
			r.Log.Reset()
		}
	}
	public.Log.Reset()
	own.Log.Reset()
	containerd.Pull(publicRef)
	containerd.Pull(ownRef)
	nothing("containerd")
	docker := node.Box().Docker() // it has the node's certs.d
	docker.Pull(publicRef)
	docker.Same(publicRef, im)
	nothing("dockerd in a box")
	buildkit := node.Box().BuildKit()
	buildkit.Build("FROM " + publicRef + "\nCOPY Dockerfile /d\n")
	nothing("buildkitd")
	if s := agent.Status(); len(s.UnknownHosts) > 0 {
		t.Errorf("%+v", s.UnknownHosts)
	}
}

// A pull that runs as its registry is learned has read its certs.d before the CA was
// there: it passes through to its end, however long that takes.
func TestPullRunsAsRegistryIsLearned(t *testing.T) {
	t.Parallel()
	const ref = "registry.corp.example/team/app:1"
	w := newWorld(t)
	r := w.Registry("registry.corp.example")
	im := r.Push("team/app:1", lab.Image{Layers: []int{1 << 20}, Seed: 96})
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", readsCertsD)
	containerd := node.Containerd()
	containerd.Pull(renovate) // its roots are read
	agent := node.Agent()
	if rt := agent.Runtime(containerd.PID()); rt.Reach != "intercepted" {
		t.Fatalf("%+v", rt)
	}
	r.Fault(func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Connection", "close") // each request has its own
		if req.Method == http.MethodGet && strings.HasSuffix(req.URL.Path, "/manifests/"+im.Digest.String()) {
			<-time.After(8 * time.Second) // longer than a runtime has to be without a connection
		}
		return false
	})
	containerd.Pull(ref)
	containerd.Same(ref, im)
	if rt := agent.Runtime(containerd.PID()); rt.Reach != "intercepted" {
		t.Errorf("%+v", rt)
	}
}

// A pod has a registry of the same name with a CA of its own, and one that only it
// knows: neither is learned, and nothing of either is given to others. What the node
// can verify is learned from a pod, too.
func TestPodsOwnRegistryIsNotLearned(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own, ca := w.RegistryAt("private.corp.example", 443, true)
	im := own.Push("team/app:1", lab.Image{Layers: []int{1 << 20}, Seed: 94})
	theirs := w.Registry("attacker.example.net")
	theirs.Push("team/app:1", lab.Image{Layers: []int{1 << 20}, Seed: 95})
	node := w.Node()
	agent := node.Agent()
	box := node.Box()
	box.Run("mkdir", "-p", "/etc/docker")
	box.Run("mount", "-t", "tmpfs", "tmpfs", "/etc/docker")
	box.WriteFile("/etc/docker/certs.d/private.corp.example/ca.crt", string(ca))
	docker := box.Docker()
	docker.Pull("private.corp.example/team/app:1")
	docker.Same("private.corp.example/team/app:1", im)
	docker.Pull("attacker.example.net/team/app:1")
	learned(t, agent, "attacker.example.net")
	if err := lab.Eventually(agent.Ended(), func(ctx context.Context) error {
		for _, u := range agent.Status().UnknownHosts {
			if u.Host == "private.corp.example" && u.Registry && strings.Contains(u.Problem, "only a pod's own CA verifies it") {
				return nil
			}
		}
		return fmt.Errorf("%+v", agent.Status().UnknownHosts)
	}); err != nil {
		t.Error(err)
	}
	for _, r := range knownTo(t.Context(), t, agent) {
		if r.Host != "attacker.example.net" {
			t.Errorf("%+v", r)
		}
	}
}

// A host that serves more than a registry is learned, and what else it serves passes
// as it is: pages, websockets. So does another service at an unknown port,
// where the server speaks first, and of which a program opens many connections: none
// of them is redirected.
func TestMixedHost(t *testing.T) {
	t.Parallel()
	const many = 10_000
	w := newWorld(t)
	r := w.Registry("git.corp.example")
	r.Push("team/app:1", lab.Image{Layers: []int{100_000}, Seed: 96})
	r.Front(func(rw http.ResponseWriter, req *http.Request, next http.Handler) {
		switch req.URL.Path {
		case "/ws":
			if c, rest, err := http.NewResponseController(rw).Hijack(); err == nil {
				defer c.Close()
				fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				_, _ = io.Copy(c, rest)
			}
		case "/":
			fmt.Fprint(rw, "hello from ", req.Host)
		default:
			next.ServeHTTP(rw, req)
		}
	})
	w.TCP("service.corp.example", 2222, func(c net.Conn) { fmt.Fprint(c, "220 ready\n"); _, _ = io.Copy(c, c) })
	addr, _ := w.Host("service.corp.example")
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	docker.Pull("git.corp.example/team/app:1")
	learned(t, agent, r.Host)
	crane := clientNamed(t, "crane")
	if out := node.Run(crane, "client", "get", "https://git.corp.example/", "HTTP/1.1"); !strings.Contains(out, `hello from git.corp.example, certificate of "weir node CA`) {
		t.Error(out)
	}
	node.Run(crane, "client", "websocket", "git.corp.example")
	before := agent.Status()
	node.Run(crane, "client", "server-first", "service.corp.example:2222")
	node.Run(crane, "client", "dials", addr.String()+":2222", strconv.Itoa(many))
	now := agent.Status()
	if n := now.Kernel.Redirected - before.Kernel.Redirected; n != 0 || now.Connections != before.Connections {
		t.Errorf("%d connections were redirected: %+v, before %+v", n, now.Connections, before.Connections)
	}
}
