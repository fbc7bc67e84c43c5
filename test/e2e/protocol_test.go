// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"weir/test/lab"
)

// public waits until weir has found out that a repository is public, which it
// asks in the background.
func public(t *testing.T, r *lab.Registry, repo string) {
	t.Helper()
	r.Log.WaitFor(t, func(q lab.Request) bool {
		return q.UserAgent == "weir" && q.Method == "HEAD" && q.Status == 200 && strings.Contains(q.Path, "/"+repo+"/manifests/")
	})
}

// answer has every request answered by a status.
func answer(status int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if status == http.StatusTooManyRequests {
			w.Header().Set("Retry-After", "60")
		}
		w.WriteHeader(status)
		return true
	}
}

// A registry that gives no answer, in each way: what is kept can be pulled as
// ever, what isn't fails as it would without weir, and everything is well once
// the registry is back.
func TestRegistryFails(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	docker, containerd := node.Docker(), node.Containerd()
	docker.Pull(flyway)
	docker.Remove(flyway)
	public(t, w.hub, "flyway/flyway")
	requests := func(f func(http.ResponseWriter, *http.Request) bool) func(bool) {
		return func(broken bool) {
			if !broken {
				f = nil
			}
			w.hub.Fault(f)
		}
	}
	connections := func(how func(net.Conn)) func(bool) {
		return func(broken bool) {
			if !broken {
				how = nil
			}
			for _, host := range []string{"registry-1.docker.io", "auth.docker.io", "production.cloudflare.docker.com"} {
				w.Break(host, how)
			}
		}
	}
	for i, tt := range []struct {
		name string
		set  func(broken bool)
	}{
		{"429", requests(answer(429))},
		{"500", requests(answer(500))},
		{"503", requests(answer(503))},
		{"no answer", requests(func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); panic(http.ErrAbortHandler) })},
		{"down", connections(lab.Down)},
		{"silent", connections(lab.Silent)},
		{"not TLS", connections(lab.NotTLS)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ref := fmt.Sprintf("acme/cold:%d", i)
			cold := w.hub.Push(ref, lab.Image{Layers: []int{200_000}, Seed: uint64(100 + i)})
			tt.set(true)
			docker.Pull(flyway)
			docker.Same(flyway, w.flyway)
			docker.Remove(flyway)
			containerd.Pull(flyway)
			containerd.Same(flyway, w.flyway)
			containerd.Remove(flyway, w.flyway)
			if tt.name != "no answer" && tt.name != "silent" { // they would wait for long, as without weir
				if err := docker.TryPull(ref); err == nil {
					t.Error("an image was pulled that neither the registry nor the store gave")
				} else {
					t.Log(err)
				}
			}
			tt.set(false)
			docker.Pull(ref)
			docker.Same(ref, cold)
		})
	}
	// It fails dockerd's question whether to log in, and is back for the next.
	isBase := func(r *http.Request) bool { return r.URL.Path == "/v2/" }
	w.hub.Fault(func(rw http.ResponseWriter, r *http.Request) bool { return isBase(r) && answer(503)(rw, r) })
	docker.Pull(flyway)
	docker.Same(flyway, w.flyway)
	docker.Remove(flyway)
	// It has just been down, and is slow now. No client has pulled what is wanted, so
	// that dockerd has to hear that it must log in.
	w.hub.Fault(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
	docker.Pull(flyway)
	docker.Same(flyway, w.flyway)
	slow := w.hub.Push("acme/slow:1", lab.Image{Layers: []int{200_000}, Seed: 200})
	goesOn := make(chan struct{}) // the client, with another answer than the registry's
	var once sync.Once
	w.hub.Fault(func(_ http.ResponseWriter, r *http.Request) bool {
		switch {
		case isBase(r):
			select {
			case <-goesOn:
			case <-r.Context().Done():
			}
		case strings.Contains(r.URL.Path, "/acme/slow/manifests/"):
			once.Do(func() { close(goesOn) })
		}
		return false
	})
	docker.Pull("acme/slow:1")
	docker.Same("acme/slow:1", slow)
	w.hub.Fault(nil)
	s := agent.Status()
	for _, r := range s.Registries {
		if r.Registry == "registry-1.docker.io" && r.Stale == 0 {
			t.Errorf("%+v", r)
		}
	}
	metrics, err := agent.Get(t.Context(), "/metrics")
	if err != nil || !strings.Contains(string(metrics), `weir_registry_stale_answers_total{registry="registry-1.docker.io"}`) {
		t.Error(err)
	}
	if !strings.Contains(agent.Log(1<<20), "taken for what it was") {
		t.Error("the log doesn't tell")
	}
}

// Blobs that come wrong: cut off, they are resumed; with other bytes or of
// another length, no client gets them as a whole, and aren't kept.
func TestBlobsComeWrong(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Agent()
	docker, containerd := node.Docker(), node.Containerd()
	// A fault says whether it has answered the n-th request for the layer.
	blobFault := func(layer string, fault func(rw http.ResponseWriter, n int) bool) {
		n := 0
		w.ghcr.Fault(func(rw http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, layer) {
				return false
			}
			n++
			return fault(rw, n)
		})
	}
	const size = 3 << 20
	for i, tt := range []struct {
		name  string
		fault func(rw http.ResponseWriter, n int) bool
		heals bool // by itself
	}{
		{"cut once", func(rw http.ResponseWriter, n int) bool {
			if n > 1 {
				return false
			}
			rw.Header().Set("Content-Length", strconv.Itoa(size+1000))
			panic(http.ErrAbortHandler)
		}, true},
		{"503 once", func(rw http.ResponseWriter, n int) bool {
			if n == 1 {
				rw.WriteHeader(http.StatusServiceUnavailable)
			}
			return n == 1
		}, false}, // runtimes don't ask again
		{"other bytes", func(rw http.ResponseWriter, n int) bool { _, _ = rw.Write(make([]byte, size)); return true }, false},
		{"too short", func(rw http.ResponseWriter, n int) bool { _, _ = rw.Write([]byte("short")); return true }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ref := fmt.Sprintf("ghcr.io/acme/wrong:%d", i)
			im := w.ghcr.Push(strings.TrimPrefix(ref, "ghcr.io/"), lab.Image{Layers: []int{size}, Seed: uint64(200 + i)})
			layer := im.Layers[0].Encoded()
			blobFault(layer, tt.fault)
			pulls := []func(string, ...string) error{containerd.TryPull}
			if tt.heals { // else dockerd tries it five times, for a minute
				pulls = append(pulls, docker.TryPull)
			}
			for _, pull := range pulls {
				err := pull(ref)
				if tt.heals && err != nil {
					t.Error(err)
				}
				if !tt.heals && err == nil && tt.name != "503 once" {
					t.Error("it was pulled")
				}
			}
			if _, err := node.File("/var/lib/weir/store/blobs/sha256/" + layer); (err == nil) != tt.heals && tt.name != "503 once" {
				t.Errorf("kept: %v", err == nil)
			}
			w.ghcr.Fault(nil)
			docker.Pull(ref)
			docker.Same(ref, im)
			containerd.Pull(ref)
			containerd.Same(ref, im)
		})
	}
	if left, _ := node.Output("ls", "/var/lib/weir/store/ingest"); strings.TrimSpace(left) != "" {
		t.Errorf("left in the store: %s", left)
	}
}

// Docker Hub's limit: 200 pulls of what is kept, with every GET of a manifest
// answered by 429.
func TestRateLimited(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Agent()
	docker := node.Docker()
	const ref = "acme/small:1" // most of the time that a larger one takes is dockerd's, to unpack it
	small := w.hub.Push(ref, lab.Image{Layers: []int{1000, 1000}, Seed: 5})
	docker.Pull(ref)
	limited := 0
	w.hub.Fault(func(rw http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/") {
			limited++
			return answer(429)(rw, r)
		}
		return false
	})
	w.forget()
	for range 200 {
		docker.Remove(ref)
		docker.Pull(ref)
	}
	docker.Same(ref, small)
	if limited > 0 {
		t.Errorf("the registry was asked for %d manifests", limited)
	}
	w.nothingFetched(t)
}

// What a pull of what is kept, and is public, costs the registry. dockerd asks for a
// token of its own, which only the registry can judge, and a tag is only the
// registry's to say: one HEAD does both. That it must log in it is told from memory,
// while weir sees whether the token server answers. containerd begins without a
// token, and needs none: weir asks what the tag is.
func TestWarmPullCosts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Agent()
	docker, containerd := node.Docker(), node.Containerd()
	docker.Pull(flyway)
	docker.Remove(flyway)
	public(t, w.hub, "flyway/flyway")
	cost := func() (requests []string, tokens int) {
		for _, r := range w.hub.Log.All(nil) {
			switch {
			case r.UserAgent == "weir" && r.Host == "auth.docker.io":
				tokens++
			case r.Path != "/v2/" || r.UserAgent != "weir": // whether an unknown host is a registry weir asks once
				path, _, _ := strings.Cut(r.Path, "sha256:")
				requests = append(requests, fmt.Sprintf("%s %s%s %d", r.Method, r.Host, path, r.Status))
			}
		}
		return requests, tokens
	}
	const (
		token = "GET auth.docker.io/token 200"
		tag   = "HEAD registry-1.docker.io/v2/flyway/flyway/manifests/10.11.0 200"
	)
	w.forget()
	docker.Pull(flyway)
	if got, tokens := cost(); !slices.Equal(got, []string{token, tag}) || tokens > 1 {
		t.Errorf("docker pull costs %q, and %d questions whether there are tokens:\n%s", got, tokens, w.hub.Log)
	}
	w.forget()
	containerd.Pull(flyway)
	if got, tokens := cost(); !slices.Equal(got, []string{tag}) || tokens > 0 {
		t.Errorf("a pull through CRI costs %q:\n%s", got, w.hub.Log)
	}
	// What isn't kept is asked for in the client's name, and counted for that.
	cold := w.hub.Push("flyway/flyway:cold", lab.Image{Layers: []int{100_000}, Seed: 33})
	w.forget()
	containerd.Pull("flyway/flyway:cold")
	containerd.Same("flyway/flyway:cold", cold)
	for _, r := range w.hub.Log.All(nil) {
		if r.UserAgent == "weir" && r.Method == "GET" && r.Host != "auth.docker.io" || r.Method == "GET" && strings.Contains(r.Path, "/manifests/") && r.UserAgent == "weir" {
			t.Errorf("weir pulls for itself: %s", r)
		}
	}
	if n := len(w.hub.Log.All(func(r lab.Request) bool { return r.Host == "auth.docker.io" && r.UserAgent != "weir" })); n == 0 {
		t.Errorf("containerd didn't ask for a token of its own:\n%s", w.hub.Log)
	}
}

// What docker has pushed is served to who pulls it next, and a push of a
// gigabyte needs no memory.
func TestPushThenPull(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent("--store-size", "4GiB")
	docker, containerd := node.Docker(), node.Containerd()
	docker.Pull(flyway)
	for _, ref := range []string{"ghcr.io/acme/pushed:1", "acme/pushed:1"} {
		docker.Push(flyway, ref)
		w.forget()
		containerd.Pull(ref)
		for _, r := range []*lab.Registry{w.hub, w.ghcr} {
			if n := r.Log.BlobGETs(); n > 0 {
				t.Errorf("%s was asked for %d blobs:\n%s", r.Host, n, r.Log)
			}
		}
	}
	if s := agent.Status(); s.Registries[0].Pushed == 0 {
		t.Errorf("%+v", s.Registries)
	}

	crane := clientNamed(t, "crane")
	idle := residentMemory(t, agent.PID())
	out := node.Run(crane, "client", "push", "ghcr.io", "acme/huge", strconv.Itoa(1<<30))
	if got := peakMemory(t, agent.PID()); got > idle+64<<20 {
		t.Errorf("%d MiB at its peak, %d MiB idle", got>>20, idle>>20)
	} else {
		t.Logf("a push of 1 GiB: %d MiB resident at its peak, %d MiB idle", got>>20, idle>>20)
	}
	digest := strings.TrimSpace(out)
	w.forget()
	if out := node.Run(crane, "client", "fetch", "ghcr.io", "acme/huge", digest); !strings.Contains(out, strconv.Itoa(1<<30)) {
		t.Error(out)
	}
	if n := w.ghcr.Log.BlobGETs(); n > 0 {
		t.Errorf("the blob that was pushed was fetched:\n%s", w.ghcr.Log)
	}
}

// A build by dockerd takes its base from the store, and its cache too.
func TestBuild(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Agent()
	docker := node.Docker()
	const dockerfile = "FROM ghcr.io/renovatebot/renovate:latest\nCOPY Dockerfile /a\nENV A=b\n"
	docker.Build(dockerfile, "--build-arg", "BUILDKIT_INLINE_CACHE=1", "-t", "built:1")
	docker.Push("built:1", "ghcr.io/acme/built:1")
	// The next job starts with an empty disk.
	next := node.Box().Docker()
	w.forget()
	out := next.Build(dockerfile, "--cache-from", "ghcr.io/acme/built:1", "-t", "built:1")
	if n := w.ghcr.Log.BlobGETs(); n > 0 {
		t.Errorf("%d blobs were fetched:\n%s\n%s", n, w.ghcr.Log, out)
	}
	if !strings.Contains(out, "CACHED") {
		t.Errorf("the cache was not used:\n%s", out)
	}
}

// A buildkitd by itself: its base, and the cache that it keeps in a registry.
func TestBuildKit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	first := node.BuildKit()
	if rt := agent.Runtime(first.PID()); rt.Reach != "intercepted" {
		t.Errorf("buildkitd is %+v", rt)
	}
	const dockerfile = "FROM ghcr.io/renovatebot/renovate:latest\nCOPY Dockerfile /a\nENV A=b\n"
	const cache = "type=registry,ref=ghcr.io/acme/built:cache"
	first.Build(dockerfile, "--output=type=image,name=ghcr.io/acme/built:1,push=true", "--export-cache="+cache+",mode=max")
	// The next job starts with an empty disk.
	next := node.Box().BuildKit()
	w.forget()
	out := next.Build(dockerfile, "--import-cache="+cache, "--output=type=oci,dest=/var/lib/home/image.tar")
	if n := w.ghcr.Log.BlobGETs(); n > 0 {
		t.Errorf("%d blobs were fetched:\n%s\n%s", n, w.ghcr.Log, out)
	}
	// The layer of the COPY came from there.
	if !strings.Contains(out, "inferred cache manifest type") || !regexp.MustCompile(`COPY Dockerfile /a\n#\d+ (.*\n#\d+ )*sha256:`).MatchString(out) {
		t.Errorf("the cache was not used:\n%s", out)
	}
}

// dockerd and containerd, told to use weir as a mirror, where it redirects
// nothing.
func TestMirror(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	const hosts = "server = \"https://%s\"\n[host.\"http://127.0.0.1:5051\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
	node.WriteFile("/etc/containerd/certs.d/docker.io/hosts.toml", fmt.Sprintf(hosts, "registry-1.docker.io"))
	node.WriteFile("/etc/containerd/certs.d/ghcr.io/hosts.toml", fmt.Sprintf(hosts, "ghcr.io"))
	node.WriteFile("/etc/containerd/config.toml", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc/containerd/certs.d\"\n")
	agent := node.Agent("--mirror-listen", ":5051", "--cgroup", node.EmptyCgroup())
	containerd := node.Containerd()
	docker := node.Docker("--registry-mirror=http://127.0.0.1:5051")
	for range 2 {
		docker.Pull(flyway)
		docker.Same(flyway, w.flyway)
		docker.Remove(flyway)
		containerd.Pull(renovate)
		containerd.Same(renovate, w.renovate)
		containerd.Remove(renovate, w.renovate)
	}
	w.forget()
	docker.Pull(flyway)
	containerd.Pull(renovate)
	containerd.Pull(flyway)
	w.nothingFetched(t)
	s := agent.Status()
	if s.Connections.Intercepted != 0 {
		t.Errorf("%+v", s.Connections)
	}
	for _, r := range s.Registries {
		if r.Hits == 0 {
			t.Errorf("%+v", r)
		}
	}
}

// A registry without TLS is cached too, with nothing configured in weir.
func TestPlainRegistry(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	plain := w.PlainRegistry("registry.lan", 5000)
	im := plain.Push("team/app:1", lab.Image{Layers: []int{800_000, 1000}, Seed: 7})
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker("--insecure-registry=registry.lan:5000")
	const ref = "registry.lan:5000/team/app:1"
	docker.Pull(ref)
	docker.Same(ref, im)
	docker.Remove(ref)
	plain.Log.Reset()
	docker.Pull(ref)
	docker.Same(ref, im)
	if b, m := plain.Log.BlobGETs(), plain.Log.ManifestGETs(); b+m > 0 {
		t.Errorf("%d blobs and %d manifests were fetched:\n%s", b, m, plain.Log)
	}
	docker.Push(ref, "registry.lan:5000/team/app:2")
	if s := agent.Status(); len(s.Registries) != 1 || !strings.HasPrefix(s.Registries[0].Registry, "http://registry.lan:5000@") {
		t.Errorf("%+v", s.Registries)
	}
}

// A company's registry, with a CA that only dockerd's certs.d knows and
// certificates for its clients: dockerd's are what weir uses, and only for
// those who have them.
func TestOwnCA(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	corp, ca, cert, key := w.OwnCA("registry.corp")
	im := corp.Push("team/app:1", lab.Image{Layers: []int{800_000}, Seed: 8})
	node := w.Node()
	for name, content := range map[string][]byte{"ca.crt": ca, "client.cert": cert, "client.key": key} {
		node.WriteFile("/etc/docker/certs.d/registry.corp/"+name, string(content))
	}
	agent := node.Agent("--registry", "registry.corp")
	containerd := node.Containerd()
	agent.Runtime(containerd.PID())
	tick() // dockerd has settings for a registry
	docker := node.Docker()
	const ref = "registry.corp/team/app:1"
	docker.Pull(ref)
	docker.Same(ref, im)
	docker.Remove(ref)
	corp.Log.Reset()
	docker.Pull(ref)
	docker.Same(ref, im)
	if b, m := corp.Log.BlobGETs(), corp.Log.ManifestGETs(); b+m > 0 {
		t.Errorf("%d blobs and %d manifests were fetched:\n%s", b, m, corp.Log)
	}
	if err := containerd.TryPull(ref); err == nil {
		t.Error("containerd, which has no certificate to show, got the image")
	}
	if s := agent.Status(); len(s.Registries) != 1 {
		t.Errorf("%+v", s.Registries)
	}
}

// A registry that weir doesn't know is passed through and shown, and cached once
// it is in the file of registries, if the CA may speak for it.
func TestUnknownRegistry(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.Registry("registry.corp.example")
	im := r.Push("team/app:1", lab.Image{Layers: []int{100_000}, Seed: 9})
	node := w.Node()
	node.WriteFile("/etc/weir-registries", "corp.example # and those below, if need be\n")
	agent := node.Agent("--learn=false", "--registry-file", "/etc/weir-registries")
	docker := node.Docker()
	const ref = "registry.corp.example/team/app:1"
	docker.Pull(ref)
	docker.Same(ref, im)
	docker.Remove(ref)
	if err := lab.Eventually(nil, func(context.Context) error {
		for _, u := range agent.Status().UnknownHosts {
			if u.Host == "registry.corp.example" && u.Registry {
				return nil
			}
		}
		return fmt.Errorf("not recognised: %+v", agent.Status().UnknownHosts)
	}); err != nil {
		t.Error(err)
	}
	if out := node.Run(lab.Weir(t), "status"); !strings.Contains(out, "--registry registry.corp.example") {
		t.Error(out)
	}
	node.WriteFile("/etc/weir-registries", "corp.example\nregistry.corp.example\n")
	if err := lab.Eventually(nil, func(context.Context) error {
		r.Log.Reset()
		docker.Pull(ref)
		docker.Remove(ref)
		if n := r.Log.BlobGETs(); n > 0 {
			return fmt.Errorf("%d blobs were fetched:\n%s", n, r.Log)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// The tools that pull by themselves: each run is a new process, and each finds
// what another has left.
func TestTools(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	crane := node.As(lab.Tool(t, "crane"), "crane")
	runs := 0
	run := func(args ...string) {
		t.Helper()
		runs++
		node.Run(args...)
	}
	run("skopeo", "copy", "--all", "docker://docker.io/"+flyway, "dir:/var/lib/home/flyway")
	run(crane, "pull", "--format=oci", "ghcr.io/renovatebot/renovate:latest", "/var/lib/home/renovate")
	w.forget()
	run(crane, "pull", "--format=oci", flyway, "/var/lib/home/flyway2")
	run("skopeo", "copy", "docker://ghcr.io/renovatebot/renovate:latest", "dir:/var/lib/home/renovate2")
	run("skopeo", "copy", "docker://docker.io/flyway/flyway@"+w.flyway.Digest.String(), "dir:/var/lib/home/flyway3")
	w.nothingFetched(t)
	// And what they push.
	run(crane, "push", "/var/lib/home/renovate", "ghcr.io/acme/copied:1")
	run("skopeo", "copy", "--all", "dir:/var/lib/home/flyway", "docker://docker.io/acme/copied:1")
	w.forget()
	run("skopeo", "copy", "docker://ghcr.io/acme/copied:1", "dir:/var/lib/home/copied")
	run(crane, "pull", "acme/copied:1", "/var/lib/home/copied.tar")
	w.nothingFetched(t)
	// An artifact that isn't an image.
	oras := node.As(lab.Tool(t, "oras"), "oras")
	node.WriteFile("/var/lib/home/artifact.txt", strings.Repeat("an artifact\n", 10_000))
	run("sh", "-c", "cd /var/lib/home && "+oras+" push ghcr.io/acme/artifact:1 artifact.txt:text/plain")
	w.forget()
	run(oras, "pull", "--output=/var/lib/home/pulled", "ghcr.io/acme/artifact:1")
	w.nothingFetched(t)
	node.Run("cmp", "/var/lib/home/artifact.txt", "/var/lib/home/pulled/artifact.txt")
	if s := agent.Status(); s.Connections.Intercepted < int64(runs) {
		t.Errorf("%d runs, %+v", runs, s.Connections)
	}
}

// podman and buildah, as root and with nothing configured: cold, and then from
// what the other has left.
func TestPodman(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Agent()
	run := func(disk, name string, args ...string) string {
		t.Helper()
		return node.Run(append([]string{name, "--storage-driver=vfs", "--root=/var/lib/" + disk, "--runroot=/run/" + disk}, args...)...)
	}
	const hubFlyway = "docker.io/" + flyway
	run("podman", "podman", "pull", hubFlyway)
	run("buildah", "buildah", "pull", renovate)
	w.forget()
	run("buildah", "buildah", "pull", hubFlyway)
	run("podman", "podman", "pull", renovate)
	w.nothingFetched(t)
	if id := strings.TrimSpace(run("podman", "podman", "inspect", "--format={{.ID}}", hubFlyway)); id != w.flyway.Config.Encoded() {
		t.Errorf("podman has %s, pushed was %s", id, w.flyway.Config)
	}
	// A build from what is kept.
	node.WriteFile("/var/lib/home/build/Dockerfile", "FROM "+hubFlyway+"\nLABEL built=1\n")
	run("fresh", "buildah", "build", "--isolation=chroot", "/var/lib/home/build")
	w.nothingFetched(t)
}

// A node whose only way out is a proxy: the mirror and the forward proxy go through
// it. While it gives no answer, what is stored and public is pulled all the same, and
// waits for it once.
func TestHTTPSProxy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tunnels := w.Proxy("proxy.corp", 3128)
	proxy, _ := w.Host("proxy.corp")
	node := w.Node()
	agent := node.Agent("--mirror-listen", ":5051", "--proxy-listen", ":5052", "--cgroup", node.EmptyCgroup())
	agent.Stop()
	agent.Env = []string{"HTTPS_PROXY=http://" + proxy.String() + ":3128"}
	agent.Start()
	for _, r := range []string{"registry-1.docker.io", "auth.docker.io", "production.cloudflare.docker.com"} {
		v4, v6 := w.Host(r)
		node.Run("ip", "route", "add", "unreachable", v4.String())
		node.Run("ip", "-6", "route", "add", "unreachable", v6.String())
	}
	node.Run("cp", "/var/lib/weir/ca/ca.crt", "/etc/ssl/certs/weir.pem") // what its user would do
	docker := node.Docker("--registry-mirror=http://127.0.0.1:5051")
	clients := []struct {
		name string
		pull func(ref string, im lab.Pushed)
	}{
		{"skopeo", func(ref string, _ lab.Pushed) {
			node.Run("env", "HTTPS_PROXY=http://127.0.0.1:5052", "skopeo", "copy", "--all", "docker://docker.io/"+ref, "dir:/var/lib/home/copy")
		}},
		{"dockerd", func(ref string, im lab.Pushed) {
			docker.Pull(ref)
			docker.Same(ref, im)
			docker.Remove(ref)
		}},
	}
	// all has each client pull an image, and returns how long the slowest took.
	all := func(what, ref string, im lab.Pushed) (longest time.Duration) {
		for _, c := range clients {
			start := time.Now()
			c.pull(ref, im)
			took := time.Since(start)
			t.Logf("%s: %s took %v", what, c.name, took.Round(time.Millisecond))
			longest = max(longest, took)
		}
		return longest
	}
	all("cold", flyway, w.flyway)
	if tunnels.Load() == 0 {
		t.Error("nothing went through the proxy")
	}
	public(t, w.hub, "flyway/flyway")
	w.forget()
	usual := all("stored", flyway, w.flyway)
	w.nothingFetched(t)
	for i, fault := range []struct {
		name string
		set  func() (mend func())
	}{
		{"down", func() func() { w.Break("proxy.corp", lab.Down); return func() { w.Break("proxy.corp", nil) } }},
		{"silent", func() func() { w.Break("proxy.corp", lab.Silent); return func() { w.Break("proxy.corp", nil) } }},
		{"dropping packets", func() func() { return node.Drop(netip.PrefixFrom(proxy, 32)) }},
	} {
		ref := fmt.Sprintf("acme/cold%d:1", i)
		cold := w.hub.Push(ref, lab.Image{Layers: []int{100_000}, Seed: uint64(100 + i)})
		mend := fault.set()
		time.Sleep(200 * time.Millisecond) // for half of that, a token server that has answered just now isn't asked
		for range 2 {
			if took := all("the proxy is "+fault.name, flyway, w.flyway); took > usual+5*time.Second {
				t.Errorf("the proxy is %s: a pull took %v, usually %v", fault.name, took, usual)
			}
		}
		mend()
		all("the proxy is back", ref, cold)
	}
}

// Runtimes behind a company's proxy, which wants a name and a password, and without any
// other way out: what they pull is kept, and given to those alone who may have it.
func TestBehindProxy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hub.User("alice", "wonderland")
	secret := w.hub.Push("acme/secret:1", lab.Image{Layers: []int{1 << 20}, Seed: 97})
	w.hub.Private("acme/secret", "alice")
	tunnels := w.Proxy("proxy.corp", 3128, "ci:secret")
	proxy, _ := w.Host("proxy.corp")
	node := w.Node()
	agent := node.Agent()
	for _, r := range []string{"registry-1.docker.io", "auth.docker.io", "production.cloudflare.docker.com", "ghcr.io"} {
		v4, v6 := w.Host(r)
		node.Run("ip", "route", "add", "unreachable", v4.String())
		node.Run("ip", "-6", "route", "add", "unreachable", v6.String())
	}
	env := []string{"HTTPS_PROXY=http://ci:secret@" + proxy.String() + ":3128"}
	containerd := node.Containerd()
	containerd.Stop()
	containerd.Env = append(containerd.Env, env...)
	containerd.Start()
	docker := node.Docker()
	docker.Stop()
	docker.Env = env
	docker.Start()

	// The proxy is seen in the first pull, and what goes there intercepted from then on.
	docker.Pull(renovate)
	docker.Remove(renovate)
	for range 2 {
		docker.Pull(flyway)
		docker.Same(flyway, w.flyway)
		docker.Remove(flyway)
	}
	docker.Pull("acme/secret:1", "alice", "wonderland")
	docker.Remove("acme/secret:1")
	if s := agent.Status().Connections; s.Intercepted == 0 || tunnels.Load() == 0 {
		t.Errorf("%+v, %d tunnels", s, tunnels.Load())
	}
	w.forget()
	docker.Pull(flyway)
	docker.Same(flyway, w.flyway)
	docker.Pull("acme/secret:1", "alice", "wonderland")
	docker.Same("acme/secret:1", secret)
	containerd.Pull(flyway)
	if n := w.hub.Log.BlobGETs(); n > 0 {
		t.Errorf("%d blobs were fetched:\n%s", n, w.hub.Log)
	}
	for who, login := range map[string][]string{"a wrong password": {"alice", "rabbit"}, "nobody": nil} {
		if docker.TryPull("acme/secret:1", login...) == nil || containerd.TryPull("acme/secret:1", login...) == nil {
			t.Errorf("%s has pulled a private image", who)
		}
	}
	docker.Push(flyway, "docker.io/acme/pushed:1")
	containerd.Pull("docker.io/acme/pushed:1")

	// With the wrong password for the proxy it is as without weir.
	docker.Stop()
	docker.Env = []string{"HTTPS_PROXY=http://ci:wrong@" + proxy.String() + ":3128"}
	docker.Start()
	docker.Remove(flyway)
	if err := docker.TryPull(flyway); err == nil || !strings.Contains(err.Error(), "Proxy Authentication Required") {
		t.Errorf("with a wrong password for the proxy: %v", err)
	}
	if log := agent.Log(1 << 20); strings.Contains(log, "Y2k6c2VjcmV0") || strings.Contains(log, "ci:secret") {
		t.Error("the log has the password for the proxy")
	}
}

// skopeo with weir as its HTTPS_PROXY, where weir redirects nothing.
func TestForwardProxy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hub.User("alice", "wonderland")
	node := w.Node()
	agent := node.Agent("--proxy-listen", ":5052", "--cgroup", node.EmptyCgroup())
	node.Run("cp", "/var/lib/weir/ca/ca.crt", "/etc/ssl/certs/weir.pem") // what its user would do
	copyTo := func(dir string) {
		t.Helper()
		node.Run("env", "HTTPS_PROXY=http://127.0.0.1:5052", "skopeo", "copy", "--all", "--src-creds=alice:wonderland", "docker://docker.io/"+flyway, "dir:/var/lib/home/"+dir)
	}
	copyTo("a")
	fetched(t, w.hub)
	w.forget()
	copyTo("b")
	w.nothingFetched(t)
	node.Run("diff", "-r", "/var/lib/home/a", "/var/lib/home/b")
	if s := agent.Status(); s.Connections.Intercepted == 0 {
		t.Errorf("%+v", s.Connections)
	}
	everything := agent.Log(1 << 20)
	metrics, err := agent.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	everything += string(metrics)
	for _, secret := range append(w.hub.Secrets(), "wonderland", base64.StdEncoding.EncodeToString([]byte("alice:wonderland")), "sig=") {
		if strings.Contains(everything, secret) {
			t.Errorf("log or metrics have %q", secret)
		}
	}
}
