// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"path"
	"strings"
	"sync"
	"testing"

	"weir/agent"
	"weir/test/lab"
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
	const certsD = "/etc/containerd/certs.d"
	w := newWorld(t)
	given, corp := w.Registry("registry.given"), w.Registry("registry.corp")
	images := newCopies(w.hub, w.ghcr, given, corp)
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", `version = 3
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "`+certsD+`"
`)
	containerd := node.NewestContainerd()
	// rows plays all arrangements. check is called while one is in place.
	rows := func(t *testing.T, check func(*testing.T, arrangement)) {
		for _, tt := range arrangements(w.Roots()) {
			t.Run(tt.name, func(t *testing.T) {
				for name, content := range tt.files {
					node.WriteFile(path.Join(certsD, name), content)
					defer node.Run("sh", "-c", "rm "+path.Join(certsD, name)+"; rmdir --ignore-fail-on-non-empty "+path.Join(certsD, path.Dir(name)))
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
	unharmed := func(t *testing.T) agent.RuntimeStatus {
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
	containerd.Start()
	intercepted(t)
	t.Run("after", func(t *testing.T) { rows(t, func(t *testing.T, _ arrangement) { unharmed(t) }) })
}
