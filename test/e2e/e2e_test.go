// SPDX-License-Identifier: Apache-2.0

// Package e2e tells weir's stories, with real runtimes, registries and kernel
// hooks. Each test is one that a user could tell.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"weir/test/lab"
)

const (
	flyway   = "flyway/flyway:10.11.0"
	renovate = "ghcr.io/renovatebot/renovate:latest"
)

var flywayImage = lab.Image{Layers: []int{3 << 20, 100_000, 1 << 20}, Seed: 1, Index: true}

// world is an internet with Docker Hub and ghcr.io, and an image on each.
type world struct {
	*lab.Internet
	hub, ghcr        *lab.Registry
	flyway, renovate lab.Pushed
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{Internet: lab.NewInternet(t)}
	w.hub, w.ghcr = w.DockerHub(), w.Registry("ghcr.io")
	w.flyway = w.hub.Push(flyway, flywayImage)
	w.renovate = w.ghcr.Push("renovatebot/renovate:latest", lab.Image{Layers: []int{2 << 20, 500_000}, Seed: 2, OCI: true})
	return w
}

// forget empties the logs.
func (w *world) forget() {
	w.hub.Log.Reset()
	w.ghcr.Log.Reset()
}

// nothingFetched fails the test when a registry was asked for a blob or a
// manifest since the last forget.
func (w *world) nothingFetched(t *testing.T) {
	t.Helper()
	for _, r := range []*lab.Registry{w.hub, w.ghcr} {
		if b, m := r.Log.BlobGETs(), r.Log.ManifestGETs(); b+m > 0 {
			t.Errorf("%s was asked for %d blobs and %d manifests:\n%s", r.Host, b, m, r.Log)
		}
	}
}

// onlyManifests fails the test when a registry was asked for a blob since the last
// forget, or more than once for a manifest: what is in a repository each node has
// the registry show once, and a manifest is shown by being sent.
func (w *world) onlyManifests(t *testing.T) {
	t.Helper()
	for _, r := range []*lab.Registry{w.hub, w.ghcr} {
		sent := make(map[string]int)
		for _, m := range r.Log.All(func(m lab.Request) bool {
			return m.Method == "GET" && strings.Contains(m.Path, "/manifests/") && m.Status == 200
		}) {
			sent[m.Path]++
			if sent[m.Path] > 1 {
				t.Errorf("%s has sent %s twice:\n%s", r.Host, m.Path, r.Log)
			}
		}
		if b := r.Log.BlobGETs(); b > 0 {
			t.Errorf("%s was asked for %d blobs:\n%s", r.Host, b, r.Log)
		}
	}
}

// fetched fails the test unless a registry was asked for blobs.
func fetched(t *testing.T, r *lab.Registry) {
	t.Helper()
	if r.Log.BlobGETs() == 0 {
		t.Errorf("%s was not asked for any blob:\n%s", r.Host, r.Log)
	}
}

func TestDocker(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()

	docker.Pull(flyway)
	docker.Pull(renovate)
	docker.Same(flyway, w.flyway)
	docker.Same(renovate, w.renovate)
	fetched(t, w.hub)
	fetched(t, w.ghcr)
	if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" {
		t.Errorf("dockerd is %+v", rt)
	}

	docker.Remove(flyway)
	docker.Remove(renovate)
	w.forget()
	docker.Pull(flyway)
	docker.Pull(renovate)
	w.nothingFetched(t)
	docker.Same(flyway, w.flyway)
	docker.Same(renovate, w.renovate)
}

// Both of containerd's ways: a new one finds the CA among its system roots.
func TestContainerd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	containerd := node.Containerd()
	for range 2 {
		containerd.Pull(flyway)
		containerd.Pull(renovate)
		containerd.Same(flyway, w.flyway)
		containerd.Same(renovate, w.renovate)
		containerd.Remove(flyway, w.flyway)
		containerd.Remove(renovate, w.renovate)
		if rt := agent.Runtime(containerd.PID()); rt.Reach != "intercepted" {
			t.Errorf("containerd is %+v", rt)
		}
	}
	w.forget()
	containerd.Pull(flyway)
	containerd.Pull(renovate)
	w.nothingFetched(t)
	containerd.Same(flyway, w.flyway)
}

// readsCertsD is a configuration of containerd with a certs.d.
const readsCertsD = `version = 2
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
`

// A containerd that was running before, with a certs.d that its user has named,
// proves that it reads it.
func TestContainerdCertsD(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", readsCertsD)
	containerd := node.Containerd()
	containerd.Pull(renovate) // its roots are read
	containerd.Remove(renovate, w.renovate)
	agent := node.Agent()
	rt := agent.Runtime(containerd.PID())
	if rt.Reach != "intercepted" {
		t.Fatalf("containerd is %+v", rt)
	}
	t.Log(rt)
	for range 2 {
		containerd.Pull(flyway)
		containerd.Pull(renovate)
		containerd.Same(flyway, w.flyway)
		containerd.Remove(flyway, w.flyway)
		containerd.Remove(renovate, w.renovate)
	}
	w.forget()
	containerd.Pull(flyway)
	containerd.Pull(renovate)
	w.nothingFetched(t)
}

// A runtime that was running before and doesn't trust the CA is left alone;
// once it is restarted it is intercepted.
func TestRunningBefore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	docker := node.Docker()
	docker.Pull(renovate)
	docker.Remove(renovate)
	agent := node.Agent()
	rt := agent.Runtime(docker.PID())
	if rt.Reach != "passthrough" || rt.Reason == "" || rt.Step == "" {
		t.Errorf("dockerd is %+v", rt)
	}
	t.Log(rt.Reason, "/", rt.Step)
	for range 3 {
		docker.Pull(flyway)
		docker.Pull(renovate)
		docker.Remove(flyway)
		docker.Remove(renovate)
	}
	if s := agent.Status(); len(s.Registries) != 0 {
		t.Errorf("it was intercepted: %+v", s.Registries)
	}

	docker.Stop()
	docker.Start()
	if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" {
		t.Errorf("restarted, dockerd is %+v", rt)
	}
	docker.Pull(flyway)
	docker.Remove(flyway)
	w.forget()
	docker.Pull(flyway)
	w.nothingFetched(t)
}

// A runtime that was running before and has not verified anything yet proves
// that it trusts the CA.
func TestRunningButNew(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	docker := node.Docker()
	agent := node.Agent()
	if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" {
		t.Fatalf("dockerd is %+v", rt)
	}
	docker.Pull(flyway)
	docker.Remove(flyway)
	w.forget()
	docker.Pull(flyway)
	w.nothingFetched(t)
}

// What one runtime has pulled is served to the other.
func TestShared(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Agent()
	containerd := node.Containerd()
	docker := node.Docker()
	docker.Pull(flyway)
	containerd.Pull(renovate)
	w.forget()
	containerd.Pull(flyway)
	docker.Pull(renovate)
	for _, r := range []*lab.Registry{w.hub, w.ghcr} {
		if n := r.Log.BlobGETs(); n > 0 {
			t.Errorf("%s was asked for %d blobs:\n%s", r.Host, n, r.Log)
		}
	}
	containerd.Same(flyway, w.flyway)
	docker.Same(renovate, w.renovate)
}

// What containerd had before weir came is served from where it is.
func TestContainerdsContent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	containerd := node.Containerd()
	containerd.Pull(flyway)
	agent := node.Agent()
	docker := node.Docker()
	agent.Runtime(docker.PID())
	agent.Says("reading a containerd's content store")
	for _, d := range []*lab.Docker{docker, node.Box().Docker()} { // beside it, and a dind
		w.forget()
		d.Pull(flyway)
		d.Same(flyway, w.flyway)
		if n := w.hub.Log.BlobGETs(); n > 0 {
			t.Errorf("%d blobs were fetched:\n%s", n, w.hub.Log)
		}
	}
	if s := agent.Status(); s.Store.Bytes > 100_000 {
		t.Errorf("blobs were copied: %+v", s.Store)
	}
}

// What containerd keeps itself makes room in the store first, and is read there.
func TestOnceOnDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent("--store-size", "5MiB")
	node.Containerd().Pull(flyway)
	docker := node.Docker()
	agent.Runtime(docker.PID())
	if err := lab.Eventually(agent.Ended(), func(context.Context) error {
		if s := agent.Status().Store; s.Duplicate < 4<<20 {
			return fmt.Errorf("%d bytes of the store are in containerd, want all blobs", s.Duplicate)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	docker.Pull(renovate)
	w.forget()
	next := node.Box().Docker()
	next.Pull(renovate)
	next.Pull(flyway)
	next.Same(flyway, w.flyway)
	for _, r := range []*lab.Registry{w.hub, w.ghcr} {
		if n := r.Log.BlobGETs(); n > 0 {
			t.Errorf("%s was asked for %d blobs:\n%s", r.Host, n, r.Log)
		}
	}
	if s := agent.Status().Store; s.Evicted == 0 || s.Bytes > 5<<20 {
		t.Errorf("no room was made: %+v", s)
	}
}

// A dockerd in a box of its own, as in a dind pod.
func TestDockerInBox(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	box := node.Box()
	docker := box.Docker()
	for range 2 {
		docker.Pull(flyway)
		docker.Pull(renovate)
		docker.Same(flyway, w.flyway)
		docker.Remove(flyway)
		docker.Remove(renovate)
	}
	w.forget()
	docker.Pull(flyway)
	docker.Pull(renovate)
	w.nothingFetched(t)
	if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" || rt.Netns == 0 {
		t.Errorf("dockerd is %+v", rt)
	}
	// The next job starts with an empty disk, and gets it from the node.
	// So does one with a containerd image store.
	for _, next := range []*lab.Docker{node.Box().Docker(), node.Box().NewestDocker()} {
		w.forget()
		next.Pull(flyway)
		next.Same(flyway, w.flyway)
		if n := w.hub.Log.BlobGETs(); n > 0 {
			t.Errorf("%d blobs were fetched:\n%s", n, w.hub.Log)
		}
		if rt := agent.Runtime(next.PID()); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
	}
}

// A dockerd in a container of a dockerd in a container.
func TestDockerInBoxInBox(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	box := node.Box()
	box.Docker().Pull(flyway)
	inner := box.Box().Docker()
	w.forget()
	inner.Pull(flyway)
	w.nothingFetched(t)
	inner.Same(flyway, w.flyway)
	if rt := agent.Runtime(inner.PID()); rt.Reach != "intercepted" {
		t.Errorf("dockerd is %+v", rt)
	}
}

// A private repository is kept for those who may read it, and for no other client.
func TestPrivate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hub.User("alice", "wonderland")
	w.hub.User("mallory", "guess")
	w.hub.Private("acme/secret", "alice")
	secret := w.hub.Push("acme/secret:1", lab.Image{Layers: []int{700_000}, Seed: 3})
	node := w.Node()
	agent := node.Agent()
	docker, containerd := node.Docker(), node.Box().Containerd()

	docker.Pull("acme/secret:1", "alice", "wonderland")
	docker.Remove("acme/secret:1")
	w.forget()
	docker.Pull("acme/secret:1", "alice", "wonderland")
	w.nothingFetched(t)
	docker.Same("acme/secret:1", secret)
	docker.Remove("acme/secret:1")

	for who, pull := range map[string]func() error{
		"docker, anonymous":          func() error { return docker.TryPull("acme/secret:1") },
		"docker as another":          func() error { return docker.TryPull("acme/secret:1", "mallory", "guess") },
		"docker by digest":           func() error { return docker.TryPull("acme/secret@" + secret.Digest.String()) },
		"containerd, anonymous":      func() error { return containerd.TryPull("acme/secret:1") },
		"containerd as another":      func() error { return containerd.TryPull("acme/secret:1", "mallory", "guess") },
		"containerd by digest":       func() error { return containerd.TryPull("acme/secret@" + secret.Digest.String()) },
		"docker with wrong password": func() error { return docker.TryPull("acme/secret:1", "alice", "rabbit") },
	} {
		if err := pull(); err == nil {
			t.Errorf("%s got the private image", who)
		}
	}
	// A kept blob, asked for by its digest: the registry's own refusal.
	crane := clientNamed(t, "crane")
	for _, path := range []string{"blobs/" + secret.Layers[0].String(), "manifests/" + secret.Digest.String()} {
		kind, ref, _ := strings.Cut(path, "/")
		out := node.Run(crane, "client", "raw", "registry-1.docker.io", "acme/secret", kind, ref)
		if !strings.Contains(out, "401 Unauthorized") || !strings.Contains(out, "authentication required") || !strings.Contains(out, "Bearer realm=") || !strings.Contains(out, "weir") {
			t.Errorf("%s: %s", path, out)
		}
	}
	containerd.Pull("acme/secret:1", "alice", "wonderland")

	for _, secret := range append(w.hub.Secrets(), "wonderland", "rabbit", "Bearer ", "Basic ", "sig=") {
		if strings.Contains(agent.Log(1<<20), secret) {
			t.Errorf("the log has %q", secret)
		}
	}
}

// The agent is killed at the worst moments, and no pull fails.
func TestKill(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	pulls := 0
	pull := func(ref string, p lab.Pushed) {
		t.Helper()
		docker.Pull(ref)
		docker.Same(ref, p)
		docker.Remove(ref)
		pulls++
	}
	for i := range 4 {
		ref := fmt.Sprintf("acme/big:%d", i)
		big := w.hub.Push(ref, lab.Image{Layers: []int{4 << 20}, Seed: uint64(10 + i)})
		half, killed := make(chan struct{}), make(chan struct{})
		var once sync.Once
		// The layer stops in the middle until the agent is dead.
		w.hub.Fault(func(rw http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, big.Layers[0].String()) || r.Host != "production.cloudflare.docker.com" {
				return false
			}
			mine := false
			once.Do(func() { mine = true })
			if !mine {
				return false
			}
			rw.Header().Set("Content-Length", "4200000")
			_, _ = rw.Write(make([]byte, 1<<20))
			_ = http.NewResponseController(rw).Flush()
			close(half)
			<-killed
			panic(http.ErrAbortHandler)
		})
		go func() { <-half; agent.Kill(); close(killed) }()
		pull(ref, big)
		w.hub.Fault(nil)
		for range 5 { // there is no agent
			pull(flyway, w.flyway)
		}
		agent.Start()
		for range 6 {
			pull(flyway, w.flyway)
		}
		pull(ref, big)
	}
	if pulls < 50 {
		t.Errorf("only %d pulls", pulls)
	}
	if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" {
		t.Errorf("after the agent's restart dockerd is %+v", rt)
	}
	w.forget()
	pull(flyway, w.flyway)
	w.nothingFetched(t)
}

// An agent that hangs is bypassed.
func TestHang(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	docker.Pull(flyway)
	docker.Remove(flyway)
	agent.Signal(syscall.SIGSTOP)
	defer agent.Signal(syscall.SIGCONT)
	crane := clientNamed(t, "crane")
	// Until its heartbeat is too old, connections still go to it.
	err := lab.Eventually(nil, func(context.Context) error {
		out, err := node.Output("timeout", "1", crane, "client", "get", "https://registry-1.docker.io/v2/", "HTTP/1.1")
		if err == nil && strings.Contains(out, "weir") {
			err = errors.New("a stopped process answers")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	w.forget()
	docker.Pull(flyway)
	fetched(t, w.hub)
	docker.Remove(flyway)
	agent.Signal(syscall.SIGCONT)
	if err := lab.Eventually(nil, func(context.Context) error {
		w.forget()
		docker.Pull(flyway)
		docker.Remove(flyway)
		if w.hub.Log.BlobGETs() > 0 {
			return errors.New("still not back in use")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// held pushes acme/big:1, whose layer the hub doesn't send to the first who asks
// for it: half is closed when it is asked for, and whoever closes resume has it
// sent.
func (w *world) held() (big lab.Pushed, half <-chan struct{}, resume chan<- struct{}) {
	big = w.hub.Push("acme/big:1", lab.Image{Layers: []int{4 << 20}, Seed: 20})
	asked, send := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.hub.Fault(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Host == "production.cloudflare.docker.com" && strings.Contains(r.URL.Path, big.Layers[0].String()) {
			once.Do(func() { close(asked); <-send })
		}
		return false
	})
	return big, asked, send
}

// SIGTERM detaches first, and what runs is finished.
func TestDrain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	big, half, stopping := w.held()
	pulled := make(chan error, 1)
	go func() { pulled <- docker.TryPull("acme/big:1") }()
	<-half
	agent.Signal(syscall.SIGTERM)
	// It goes on serving, but no connection is redirected any more.
	if err := lab.Eventually(nil, func(context.Context) error {
		out, err := node.Output(clientNamed(t, "crane"), "client", "get", "https://registry-1.docker.io/v2/", "HTTP/1.1")
		if err == nil && strings.Contains(out, "weir") {
			err = errors.New("still redirected")
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	w.forget()
	close(stopping)
	if err := <-pulled; err != nil {
		t.Error("the pull that ran:", err)
	}
	if n := w.hub.Log.BlobGETs(); n > 1 {
		t.Errorf("the running transfer was cut:\n%s", w.hub.Log)
	}
	agent.Stop()
	docker.Same("acme/big:1", big)
}

// What isn't a registry's comes through unchanged, for a process that is
// followed and for one that is not; the latter is never redirected.
func TestOtherTraffic(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	otherHosts(w.Internet)
	w.OnlyIPv6("ghcr.io")
	v4, _ := w.Host("first.example")
	node := w.Node()
	agent := node.Agent()
	for _, tt := range []struct {
		name    string
		tracked bool
	}{{"crane", true}, {"someprogram", false}} {
		bin := clientNamed(t, tt.name)
		before := agent.Status().Kernel.Redirected
		expect := func(want string, args ...string) {
			t.Helper()
			if out := node.Run(append([]string{bin, "client"}, args...)...); !strings.Contains(out, want) {
				t.Errorf("%s %q: %q, want %q", tt.name, args, out, want)
			}
		}
		internet := `certificate of "the lab's internet CA"`
		expect("hello from other.example, "+internet, "get", "https://other.example/", "HTTP/1.1")
		expect("hello from other.example, "+internet, "get", "https://other.example/", "HTTP/2.0")
		expect("hello from plain.example", "get", "http://plain.example/", "HTTP/1.1")
		expect("", "websocket", "other.example")
		expect("", "server-first", "first.example:5000")
		expect(v4.String()+":5000", "peer", v4.String()+":5000")
		who := "the lab's internet CA"
		if tt.tracked {
			who = "weir node CA"
		}
		expect(who, "pull", "registry-1.docker.io", "flyway/flyway", "10.11.0")
		expect(who, "pull", "ghcr.io", "renovatebot/renovate", "latest") // over IPv6
		redirected := agent.Status().Kernel.Redirected - before
		// Where it was seen that there is no registry, it goes direct.
		if tt.tracked && redirected < 5 || !tt.tracked && redirected != 0 {
			t.Errorf("%s: %d connections were redirected", tt.name, redirected)
		}
	}
}

// Nonsense sent to the listener does no harm.
func TestHostile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	docker.Pull(flyway)
	docker.Remove(flyway)
	before := residentMemory(t, agent.PID())
	crane := clientNamed(t, "crane")
	for range 5 {
		if out, err := node.Output(crane, "client", "hostile", "registry-1.docker.io"); err != nil {
			t.Error(out, err)
		}
		docker.Pull(flyway)
		docker.Remove(flyway)
	}
	if after := residentMemory(t, agent.PID()); after > before+64<<20 {
		t.Errorf("%d MiB resident, %d before", after>>20, before>>20)
	}
	if err := lab.Eventually(nil, func(context.Context) error {
		if n := sockets(t, agent.PID()); n > 20 {
			return fmt.Errorf("%d sockets are open", n)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func residentMemory(t testing.TB, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	var size, resident int64
	fmt.Sscan(string(b), &size, &resident)
	return resident * int64(os.Getpagesize())
}

// sockets counts the sockets that a process holds. Its pipes aren't counted:
// Go keeps those that splice(2) went through for the next one, until two
// garbage collections have passed.
func sockets(t *testing.T, pid int) int {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// A damaged file in the store is noticed, dropped and fetched again.
func TestDamagedStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	docker.Pull(renovate)
	docker.Remove(renovate)
	path := "/var/lib/weir/store/blobs/sha256/" + w.renovate.Layers[0].Encoded()
	b, err := node.File(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	node.WriteFile(path, string(b))
	w.forget()
	docker.Pull(renovate)
	docker.Same(renovate, w.renovate)
	if n := w.ghcr.Log.BlobGETs(); n != 1 {
		t.Errorf("%d blobs were fetched, want the damaged one:\n%s", n, w.ghcr.Log)
	}
	if s := agent.Status(); s.Store.Corrupt != 1 {
		t.Errorf("%+v", s.Store)
	}
	docker.Remove(renovate)
	w.forget()
	docker.Pull(renovate)
	w.nothingFetched(t)
}

// A full disk means serving without keeping.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Run("mkdir", "-p", "/var/lib/weir")
	node.Run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/var/lib/weir")
	agent := node.Agent("--store-size", "1GiB")
	docker := node.Docker()
	for range 2 {
		docker.Pull(flyway)
		docker.Pull(renovate)
		docker.Same(flyway, w.flyway)
		docker.Same(renovate, w.renovate)
		docker.Remove(flyway)
		docker.Remove(renovate)
	}
	if s := agent.Status(); s.Store.NotKept == 0 || s.Store.Bytes > 1<<20 {
		t.Errorf("%+v", s.Store)
	}
}

// After uninstall, nothing is left: no file, no program, no process.
func TestUninstall(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", readsCertsD)
	containerd := node.Containerd()
	containerd.Pull(renovate)
	box := node.Box()
	docker := box.Docker()
	files := func() string {
		return strings.Join(slices.Concat(node.Listing("/etc"), node.Listing("/run"), box.Listing("/etc")), "\n")
	}
	before := files()

	agent := node.Agent()
	if rt := agent.Runtime(containerd.PID()); rt.Reach != "intercepted" {
		t.Errorf("containerd is %+v", rt)
	}
	agent.Runtime(docker.PID())
	docker.Pull(flyway)
	programs := node.Programs()
	if files() == before || len(programs) == 0 {
		t.Fatal("the agent has left no trace while it runs: the test is blind")
	}
	if _, err := node.Output(lab.Weir(t), "agent", "--cgroup", "/sys/fs/cgroup/unified"); err == nil {
		t.Error("a second agent runs")
	}
	out := node.Run(lab.Weir(t), "uninstall")
	if !strings.Contains(out, "weir is gone") {
		t.Error(out)
	}
	if after := files(); after != before {
		t.Errorf("the files are not as before:\n%s\n--- instead of\n%s", after, before)
	}
	if err := lab.Unloaded(programs); err != nil {
		t.Error(err)
	}
	if _, err := node.File("/var/lib/weir"); !errors.Is(err, os.ErrNotExist) {
		t.Error("/var/lib/weir is still there")
	}
	if state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", agent.PID())); err == nil && !strings.Contains(string(state), ") Z ") {
		t.Errorf("the agent is still there: %s", state)
	}
	docker.Remove(flyway)
	docker.Pull(flyway)
	containerd.Pull(flyway)
	node.Run(lab.Weir(t), "uninstall") // again: nothing to do
}

// The ways in which containerd pulls through CRI: 1.7; 2 with its transfer
// service; 2 with the client's resolver.
func TestContainerdPaths(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	for i, path := range []string{"1.7", "transfer", "resolver"} {
		box := node.Box()
		start := box.NewestContainerd
		switch path {
		case "1.7":
			start = box.OlderContainerd
		case "resolver":
			box.WriteFile("/etc/containerd/config.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  use_local_image_pull = true\n")
		}
		c := start()
		w.forget()
		c.Pull(flyway)
		c.Pull(renovate)
		if i > 0 {
			w.nothingFetched(t)
		}
		c.Same(flyway, w.flyway)
		c.Same(renovate, w.renovate)
		if rt := agent.Runtime(c.PID()); rt.Reach != "intercepted" {
			t.Errorf("%s: %+v", path, rt)
		}
	}
	// And by itself, with the client that comes with it.
	box := node.Box()
	box.NewestContainerd()
	w.forget()
	ctr := box.As(lab.Tool(t, "ctr"), "ctr")
	box.Run(ctr, "images", "pull", "--platform=linux/amd64", "docker.io/"+flyway)
	box.Run(ctr, "images", "pull", "--local", "--platform=linux/amd64", renovate)
	// It reads the other platforms' manifests too.
	if n := w.hub.Log.BlobGETs() + w.ghcr.Log.BlobGETs(); n > 0 {
		t.Errorf("%d blobs were fetched:\n%s\n%s", n, w.hub.Log, w.ghcr.Log)
	}
}

// The newest dockerd, with its containerd image store, and the newest
// containerd.
func TestNewest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	containerd := node.NewestContainerd()
	docker := node.NewestDocker()
	docker.Pull(flyway)
	docker.Same(flyway, w.flyway)
	containerd.Pull(renovate)
	containerd.Same(renovate, w.renovate)
	containerd.Remove(renovate, w.renovate)
	docker.Remove(flyway)
	w.forget()
	docker.Pull(flyway)
	containerd.Pull(renovate)
	w.nothingFetched(t)
	docker.Same(flyway, w.flyway)
	for _, pid := range []int{docker.PID(), containerd.PID()} {
		if rt := agent.Runtime(pid); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
	}
}

// The newest containerd, running before, whose default pull path reads a
// directory with a colon in its name. While a ctr runs, whose pulls read none,
// it is passed through.
func TestNewestContainerdBefore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	containerd := node.NewestContainerd()
	containerd.Pull(renovate)
	containerd.Remove(renovate, w.renovate)
	agent := node.Agent()
	rt := agent.Runtime(containerd.PID())
	if rt.Reach != "intercepted" {
		t.Fatalf("%+v", rt)
	}
	for range 2 {
		containerd.Pull(flyway)
		containerd.Remove(flyway, w.flyway)
	}
	w.forget()
	containerd.Pull(flyway)
	w.nothingFetched(t)
	containerd.Remove(flyway, w.flyway)

	ctr := lab.Tool(t, "ctr")
	bin := filepath.Join(t.TempDir(), "ctr")
	if err := os.Symlink(ctr, bin); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		node.Run(bin, "-n", "test", "images", "pull", renovate)
		node.Run(bin, "-n", "test", "images", "rm", "--sync", renovate)
	}
	if err := lab.Eventually(nil, func(context.Context) error {
		for _, rt := range agent.Status().Runtimes {
			if rt.Kind == "ctr" {
				return errors.New("the end of the last ctr hasn't been heard of")
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	w.forget()
	containerd.Pull(flyway)
	w.nothingFetched(t)
}
