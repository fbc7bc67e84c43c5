// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"path"
	"strings"
	"sync"
	"testing"

	"weir/agent/runtimes"
	"weir/test/lab"
)

const (
	certsD     = "/etc/containerd/certs.d"
	configPath = `version = 3
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "` + certsD + `"
`
)

// copies are four small images, the same on several registries.
type copies struct {
	images []lab.Pushed
}

func newCopies(registries ...*lab.Registry) (c copies) {
	for i := range 4 {
		for n, r := range registries {
			im := r.Push(fmt.Sprintf("acme/app:%d", i), lab.Image{Layers: []int{60_000, 30_000}, Seed: uint64(900 + i)})
			if n == 0 {
				c.images = append(c.images, im)
			}
		}
	}
	return c
}

// pull pulls all four at once, under a registry's name, and removes them.
func (c copies) pull(t *testing.T, containerd *lab.Containerd, name string) {
	t.Helper()
	errs := make([]error, len(c.images))
	var wg sync.WaitGroup
	for i := range c.images {
		wg.Go(func() { errs[i] = containerd.TryPull(fmt.Sprintf("%s/acme/app:%d", name, i)) })
	}
	wg.Wait()
	for i, im := range c.images {
		ref := fmt.Sprintf("%s/acme/app:%d", name, i)
		if errs[i] != nil {
			t.Errorf("pulling %s: %v", ref, errs[i])
			continue
		}
		containerd.Same(ref, im)
		containerd.Remove(ref, im)
	}
}

// arrangement is what a user has put into a certs.d.
type arrangement struct {
	name  string
	files map[string]string // content by name below the certs.d
	image string            // the registry in the images' names
	away  string            // the host that is not covered because of it
}

// arrangements lead pulls of one registry to another, or have settings of a
// user's of other sorts. Those that lead nowhere come first: for a while after
// the others everything they led to is passed through.
func arrangements(ca string) []arrangement {
	return []arrangement{
		{name: "the port spelled out", image: "ghcr.io:443"},
		{name: "a certificate beside weir's", files: map[string]string{"ghcr.io/own.crt": ca}, image: "ghcr.io"},
		{name: "upper case", image: "REGISTRY.given", away: "registry.given"},
		{name: "its own server", files: map[string]string{"ghcr.io_443_/hosts.toml": `server = "https://ghcr.io"`}, image: "ghcr.io", away: "ghcr.io"},
		{name: "no TOML", files: map[string]string{"docker.io/hosts.toml": "server ="}, image: "docker.io", away: "any registry"},
		{name: "server", files: map[string]string{"docker.io/hosts.toml": `server = "https://ghcr.io"`}, image: "docker.io", away: "ghcr.io"},
		{name: "server with a port", files: map[string]string{"docker.io/hosts.toml": `server = "https://ghcr.io:443"`}, image: "docker.io", away: "ghcr.io"},
		{name: "host", files: map[string]string{"docker.io/hosts.toml": `[host."https://ghcr.io"]`}, image: "docker.io", away: "ghcr.io"},
		{name: "host with a CA of its own", files: map[string]string{"docker.io/hosts.toml": "[host.\"https://ghcr.io\"]\n  ca = \"own.pem\"", "docker.io/own.pem": ca}, image: "docker.io", away: "ghcr.io"},
		{name: "a registry of a flag", files: map[string]string{"docker.io/hosts.toml": `[host."https://registry.given"]`}, image: "docker.io", away: "registry.given"},
		{name: "to a registry of a flag", files: map[string]string{"ghcr.io/hosts.toml": `server = "https://registry.given"`}, image: "ghcr.io", away: "registry.given"},
		{name: "several hosts, the first of which isn't there", image: "docker.io", away: "ghcr.io",
			files: map[string]string{"docker.io/hosts.toml": "[host.\"https://absent.test\"]\n[host.\"https://ghcr.io\"]"}},
		{name: "a host to fall back to", image: "registry.corp", away: "registry-1.docker.io",
			files: map[string]string{"registry.corp/hosts.toml": "server = \"https://registry-1.docker.io\"\n[host.\"https://ghcr.io/nothing\"]"}},
		{name: "a registry that weir doesn't know", files: map[string]string{"registry.corp/hosts.toml": `server = "ghcr.io"`}, image: "registry.corp", away: "ghcr.io"},
		{name: "_default", files: map[string]string{"_default/hosts.toml": `[host."https://ghcr.io"]`}, image: "registry.corp", away: "ghcr.io"},
	}
}

// Users' settings that lead a pull to another registry than the image's, whose
// directory has the CA: each pull is as without weir. containerd reads them at
// each pull, and the connection doesn't say which image it is for. The same
// containerd runs before weir, proves that it reads certs.d, and is restarted.
func TestHostsFiles(t *testing.T) {
	t.Parallel()
	hostsFiles(t, "/etc/containerd/config.toml", certsD, (*lab.Node).NewestContainerd)
}

// The same as k3s and RKE2 have it, which empty the certs.d when they start.
func TestK3s(t *testing.T) {
	t.Parallel()
	hostsFiles(t, lab.K3s+"/etc/containerd/config.toml", lab.K3s+"/etc/containerd/certs.d", (*lab.Node).K3sContainerd)
}

// hostsFiles has a containerd with a configuration, whose config_path is dir.
func hostsFiles(t *testing.T, config, dir string, start func(*lab.Node) *lab.Containerd) {
	w := newWorld(t)
	given, corp := w.Registry("registry.given"), w.Registry("registry.corp")
	images := newCopies(w.hub, w.ghcr, given, corp)
	node := w.Node()
	node.WriteFile(config, "version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\n  config_path = \""+dir+"\"\n")
	containerd := start(node)
	// rows plays all arrangements. check is called while one is in place.
	rows := func(t *testing.T, check func(*testing.T, arrangement)) {
		for _, tt := range arrangements(w.Roots()) {
			t.Run(tt.name, func(t *testing.T) {
				for name, content := range tt.files {
					node.WriteFile(path.Join(dir, name), content)
					defer node.Run("sh", "-c", "rm "+path.Join(dir, name)+"; rmdir --ignore-fail-on-non-empty "+path.Join(dir, path.Dir(name)))
				}
				images.pull(t, containerd, tt.image)
				check(t, tt)
			})
		}
	}
	t.Run("without", func(t *testing.T) { rows(t, func(*testing.T, arrangement) {}) })

	a := node.Agent("--registry", "registry.given")
	intercepted := func(t *testing.T) {
		t.Helper()
		if rt := a.Runtime(containerd.PID()); rt.Reach != "intercepted" || len(rt.Except) > 0 {
			t.Fatalf("%+v", rt)
		}
		images.pull(t, containerd, "docker.io")
		w.forget()
		images.pull(t, containerd, "docker.io")
		w.nothingFetched(t)
	}
	unharmed := func(t *testing.T) runtimes.Status {
		t.Helper()
		rt := a.Runtime(containerd.PID())
		if rt.Reach != "intercepted" || strings.Contains(a.Log(1<<20), "refused weir's certificate") {
			t.Errorf("%+v", rt)
		}
		return rt
	}
	intercepted(t)
	t.Run("before", func(t *testing.T) {
		rows(t, func(t *testing.T, tt arrangement) {
			rt := unharmed(t)
			if tt.away == "" && len(rt.Except) > 0 || tt.away != "" && rt.Except[tt.away] == "" || tt.files != nil && tt.away != "" && !strings.Contains(rt.Except[tt.away], "/hosts.toml") {
				t.Errorf("except %q, want %s", rt.Except, tt.away)
			}
		})
	})
	containerd.Stop()
	if dir != certsD {
		node.Run("rm", "-rf", dir)
	}
	containerd.Start()
	intercepted(t)
	t.Run("after", func(t *testing.T) { rows(t, func(t *testing.T, _ arrangement) { unharmed(t) }) })
}

// Mirrors, and CAs beside the system's, as other runtimes are told of them: what
// those start with has weir's CA too, so all is intercepted, and no pull fails.
func TestMirrorSettings(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	images := newCopies(w.ghcr)
	node := w.Node()
	node.WriteFile("/var/lib/certs/own.crt", w.Roots())
	for name, content := range map[string]string{
		"/etc/containers/registries.conf": `
[[registry]]
prefix = "docker.io/acme"
location = "registry-1.docker.io:443/acme"
[[registry.mirror]]
location = "absent.test"
[[registry.mirror]]
location = "ghcr.io:443/acme"
`,
		"/etc/docker/certs.d/docker.io/hosts.toml":  "[host.\"https://ghcr.io\"]\n  ca = \"/var/lib/certs/own.crt\"\n",
		"/etc/docker/certs.d/docker.io/nothing.txt": "",
		"/var/lib/home/buildkitd.toml":              "[registry.\"docker.io\"]\n  mirrors = [\"ghcr.io\"]\n[registry.\"ghcr.io\"]\n  ca = [\"/var/lib/certs/own.crt\"]\n",
	} {
		node.WriteFile(name, content)
	}
	a := node.Agent()
	docker := node.NewestDocker()
	a.Runtime(docker.PID())
	atOnce := func(command string) {
		t.Helper()
		node.Run("sh", "-ec", fmt.Sprintf(`
pids=
for i in 0 1 2 3; do %s & pids="$pids $!"; done
for p in $pids; do wait $p; done`, command))
	}
	for _, tt := range []struct {
		name string
		pull func()
	}{
		{"skopeo", func() { atOnce("skopeo copy docker://docker.io/acme/app:$i dir:/var/lib/home/skopeo$i") }},
		{"skopeo with a directory", func() {
			atOnce("skopeo copy --src-cert-dir=/var/lib/certs docker://ghcr.io/acme/app:$i dir:/var/lib/home/skopeo$i")
		}},
		{"podman", func() {
			for i := range images.images {
				node.Run("podman", "--storage-driver=vfs", "--root=/var/lib/podman", "--runroot=/run/podman", "pull", fmt.Sprintf("docker.io/acme/app:%d", i))
			}
		}},
		{"buildah with a directory", func() {
			node.Run("buildah", "--storage-driver=vfs", "--root=/var/lib/buildah", "--runroot=/run/buildah", "pull", "--cert-dir=/var/lib/certs", "ghcr.io/acme/app:0")
		}},
		{"dockerd", func() {
			for i, im := range images.images {
				docker.Pull(fmt.Sprintf("acme/app:%d", i))
				docker.Same(fmt.Sprintf("acme/app:%d", i), im)
			}
		}},
		{"buildkitd", func() {
			b := node.Spawn("buildkitd", node.As(lab.Tool(t, "buildkitd"), "buildkitd"), "--config=/var/lib/home/buildkitd.toml", "--containerd-worker=false", "--root=/var/lib/buildkit", "--addr=unix:///run/buildkit/buildkitd.sock")
			a.Runtime(b.PID())
			node.WriteFile("/var/lib/home/build/Dockerfile", "FROM docker.io/acme/app:0\nENV A=1\n")
			build := []string{lab.Tool(t, "buildctl"), "build", "--progress=plain", "--frontend=dockerfile.v0", "--local=context=/var/lib/home/build", "--local=dockerfile=/var/lib/home/build"}
			if err := lab.Eventually(b.Ended(), func(context.Context) error {
				_, err := node.Output(lab.Tool(t, "buildctl"), "debug", "workers")
				return err
			}); err != nil {
				t.Fatal(err)
			}
			node.Run(build...)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := a.Status().Connections.Intercepted
			w.ghcr.Log.Reset()
			tt.pull()
			if n := a.Status().Connections.Intercepted - before; n == 0 {
				t.Error("nothing was intercepted")
			}
			if strings.Contains(a.Log(1<<20), "refused weir's certificate") {
				t.Errorf("it refused weir's certificate:\n%s", a.Log(2<<10))
			}
		})
	}
}

// A tool that is told of a file with all the roots that it trusts is passed
// through, from its first run on.
func TestOwnRoots(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	newCopies(w.hub, w.ghcr)
	node := w.Node()
	const roots = "/var/lib/own-roots.pem"
	node.WriteFile(roots, w.Roots())
	a := node.Agent()
	tool := func(name string) string { return node.As(lab.Tool(t, name), name) }
	oras, helm, cosign := tool("oras"), tool("helm"), tool("cosign")
	node.WriteFile("/var/lib/home/artifact.txt", "an artifact\n")
	passed := func(script string) {
		t.Helper()
		before := a.Status().Connections
		node.Run("sh", "-ec", "cd /var/lib/home\n"+script)
		if s := a.Status().Connections; s.Intercepted != before.Intercepted || s.Failed > 0 {
			t.Errorf("%s: %+v, %+v before", script, s, before)
		}
	}
	passed(oras + " push --ca-file " + roots + " ghcr.io/acme/artifact:1 artifact.txt:text/plain")
	passed(oras + " pull --ca-file=" + roots + " --output=pulled ghcr.io/acme/artifact:1")
	passed(oras + " copy --from-ca-file " + roots + " --to-ca-file " + roots + " ghcr.io/acme/app:0 docker.io/acme/copy:0")
	node.Run("sh", "-ec", "cd /var/lib/home && "+helm+" create chart && "+helm+" package chart")
	passed(helm + " push --ca-file=" + roots + " chart-0.1.0.tgz oci://ghcr.io/acme")
	passed(helm + " pull --ca-file " + roots + " oci://ghcr.io/acme/chart --version=0.1.0 --destination=.")
	passed(cosign + " save --registry-cacert=" + roots + " --dir=cosign ghcr.io/acme/app:1")
	if strings.Contains(a.Log(1<<20), "refused weir's certificate") {
		t.Error("one refused weir's certificate")
	}
	for _, flag := range []string{"--ca-file", "--from-ca-file", "--registry-cacert"} {
		if !strings.Contains(a.Log(1<<20), flag+" on its command line") {
			t.Errorf("the log doesn't say that %s is the reason", flag)
		}
	}
	// And without the flag as ever.
	before := a.Status().Connections.Intercepted
	node.Run(oras, "pull", "--output=/var/lib/home/pulled", "ghcr.io/acme/artifact:1")
	if a.Status().Connections.Intercepted == before {
		t.Error("oras without a file of its own was not intercepted")
	}
}

// A program that has roots of its own, of which nothing tells: what it refuses is
// remembered for the program, so that its next runs don't fail, nor after the
// agent's restart. Another program is not concerned.
func TestRefusalIsRemembered(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.WriteFile("/var/lib/own-roots.pem", w.Roots())
	a := node.Agent()
	krane, other := node.As(clientNamed(t, "krane"), "krane"), node.As(clientNamed(t, "gcrane"), "gcrane")
	run := func(program, host string) error {
		out, err := node.Output(program, "client", "pinned", "/var/lib/own-roots.pem", "raw", host, "acme/app", "manifests", "1")
		if err == nil && !strings.Contains(out, "the lab's internet CA") {
			t.Errorf("%s was intercepted: %s", program, out)
		}
		return err
	}
	if run(krane, "ghcr.io") == nil {
		t.Error("it wasn't shown weir's certificate, so this test shows nothing")
	}
	check := func() {
		t.Helper()
		for range 3 {
			if err := run(krane, "ghcr.io"); err != nil {
				t.Error(err)
			}
		}
		p := node.Spawn("stay", krane, "client", "stay")
		defer p.Kill()
		if rt := a.Runtime(p.PID()); !strings.Contains(rt.Except["ghcr.io"], "refused weir's certificate") || len(rt.Except) != 1 {
			t.Errorf("%+v", rt)
		}
	}
	check()
	a.Stop()
	a.Start()
	check()
	if run(other, "ghcr.io") == nil {
		t.Error("another program was taken for the one that had refused the certificate")
	}
}

// The CA's file is removed after a runtime has started, and put there again with
// the next program: the runtime may have read its roots in between. Its pulls go
// on, and the status says what happened.
func TestCAIsRemoved(t *testing.T) {
	t.Parallel()
	const file = "/etc/ssl/certs/weir-ca.pem"
	w := newWorld(t)
	node := w.Node()
	a := node.Agent()
	containerd, docker, buildkit := node.Containerd(), node.Docker(), node.BuildKit()
	for _, pid := range []int{containerd.PID(), docker.PID(), buildkit.PID()} {
		if rt := a.Runtime(pid); rt.Reach != "intercepted" {
			t.Fatalf("%+v", rt)
		}
	}
	build := func(a int) {
		t.Helper()
		buildkit.Build(fmt.Sprintf("FROM ghcr.io/renovatebot/renovate:latest\nENV A=%d\n", a), "--no-cache", "--output=type=oci,dest=/var/lib/home/image.tar")
		node.Run(lab.Tool(t, "buildctl"), "prune", "--all")
	}
	build(1) // it has read its roots
	node.Run("rm", file)
	docker.Pull(renovate)
	crane := node.Spawn("crane", node.As(lab.Tool(t, "crane"), "crane"), "registry", "serve", "--address=127.0.0.1:0")
	if rt := a.Runtime(crane.PID()); rt.Reach != "intercepted" {
		t.Errorf("%+v", rt)
	}
	if _, err := node.File(file); err != nil {
		t.Fatal(err)
	}
	docker.Pull(flyway)
	docker.Same(flyway, w.flyway)
	containerd.Pull(flyway)
	containerd.Same(flyway, w.flyway)
	for _, pid := range []int{containerd.PID(), docker.PID()} {
		if rt := a.Runtime(pid); rt.Reach != "passthrough" || !strings.Contains(rt.Reason, "weir's CA was") || !strings.Contains(rt.Step, "restart") {
			t.Errorf("%+v", rt)
		}
	}
	build(2)
	if rt := a.Runtime(buildkit.PID()); rt.Reach != "intercepted" {
		t.Errorf("%+v", rt)
	}
	if s := a.Status(); s.Connections.Failed > 0 || strings.Contains(a.Log(1<<20), "refused weir's certificate") {
		t.Errorf("%+v", s.Connections)
	}
}

// The node's roots, and a container's, are put together anew, as an upgrade of
// the package ca-certificates does: weir's CA stays, and nothing fails.
func TestUpdateCACertificates(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	a := node.Agent()
	for i, m := range []*lab.Node{node, node.Box()} {
		m.WriteFile("/var/lib/home/local/lab.crt", w.CA())
		docker := m.Docker()
		if rt := a.Runtime(docker.PID()); rt.Reach != "intercepted" {
			t.Fatalf("%+v", rt)
		}
		for _, fresh := range []string{"", "--fresh"} {
			m.Run("sh", "-ec", "mkdir -p /var/lib/home/hooks; update-ca-certificates --localcertsdir /var/lib/home/local --hooksdir /var/lib/home/hooks "+fresh)
			if _, err := m.File("/etc/ssl/certs/weir-ca.pem"); err != nil {
				t.Error(err)
			}
			w.forget()
			docker.Pull(flyway)
			docker.Same(flyway, w.flyway)
			docker.Remove(flyway)
			m.Run(m.As(lab.Tool(t, "crane"), "crane"), "pull", flyway, "/dev/null")
			if i > 0 || fresh != "" {
				w.nothingFetched(t)
			}
		}
		if rt := a.Runtime(docker.PID()); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
	}
}

// A file system below a certs.d that gives no answer: containerd, which reads
// other directories there, goes on pulling, and so does the agent in its place as
// soon as there is an answer.
func TestCertsDHangs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", configPath)
	containerd := node.NewestContainerd()
	containerd.Pull(renovate) // its roots are read
	containerd.Remove(renovate, w.renovate)
	a := node.Agent()
	if rt := a.Runtime(containerd.PID()); rt.Reach != "intercepted" || !strings.Contains(rt.Trust, "certs.d") {
		t.Fatalf("%+v", rt)
	}
	containerd.Pull(renovate)
	containerd.Remove(renovate, w.renovate)

	node.Run("mkdir", certsD+"/corp.test")
	fuse := node.Spawn("fuse", "sh", "-ec", "exec 3<>/dev/fuse; mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 silent "+certsD+"/corp.test; echo mounted; exec sleep 1000")
	fuse.Says("mounted")
	w.forget()
	containerd.Pull(flyway)
	containerd.Same(flyway, w.flyway)
	containerd.Pull(renovate)
	containerd.Remove(renovate, w.renovate)
	fetched(t, w.hub)
	fetched(t, w.ghcr)
	if rt := a.Runtime(containerd.PID()); rt.Reach != "intercepted" || !strings.Contains(rt.Except["any registry"], "NFS, FUSE") {
		t.Errorf("%+v", rt)
	}
	fuse.Kill()
	node.Run("umount", certsD+"/corp.test")
	if err := lab.Eventually(nil, func(context.Context) error {
		if rt := a.Runtime(containerd.PID()); len(rt.Except) > 0 {
			return fmt.Errorf("except %q", rt.Except)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	w.forget()
	containerd.Pull(renovate)
	w.nothingFetched(t)
}
