// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"weir/test/lab"
)

// shape is an image as few are.
type shape struct {
	name, repo string
	image      lab.Image
	// absent says of what isn't at the registry, though the image names it.
	absent func(p lab.Pushed, path string) bool
	// pulled are the clients that can pull it without weir.
	pulled []string
}

func shapes() []shape {
	return []shape{
		{name: "100 layers", repo: "many", image: lab.Image{Layers: slices.Repeat([]int{2000}, 100), OCI: true}, pulled: []string{"containerd", "crane", "dockerd", "skopeo"}},
		{name: "a foreign layer", repo: "elsewhere", image: lab.Image{Layers: []int{200_000, 100_000}, Foreign: "elsewhere.example"},
			absent: func(p lab.Pushed, path string) bool { return strings.Contains(path, p.Layers[0].String()) }, pulled: []string{"containerd", "crane", "skopeo"}},
		{name: "a manifest of 6 MiB", repo: "large", image: lab.Image{Layers: []int{200_000}, OCI: true, Annotation: 6 << 20}, pulled: []string{"crane", "dockerd"}},
		{name: "an index with a missing child", repo: "index", image: lab.Image{Layers: []int{200_000, 100_000}, Index: true},
			absent: func(p lab.Pushed, path string) bool { // another platform's
				_, digest, named := strings.Cut(path, "/manifests/")
				return named && strings.HasPrefix(digest, "sha256:") && digest != p.Manifest.String() && digest != p.Digest.String()
			}, pulled: []string{"containerd", "crane", "dockerd"}},
	}
}

// oddClient is a client: how it pulls an image, and what it has then, and how it has it
// no more.
type oddClient struct {
	pull   func(ref string, p lab.Pushed) (string, error)
	remove func(ref string, p lab.Pushed)
}

// oddClients are clients on a node.
func oddClients(t *testing.T, node *lab.Node) map[string]oddClient {
	docker, containerd := node.Docker(), node.Box().NewestContainerd()
	return map[string]oddClient{
		"dockerd": {func(ref string, p lab.Pushed) (string, error) {
			err := docker.TryPull(ref)
			if err == nil {
				docker.Same(ref, p)
			}
			return p.Config.String(), err
		}, func(ref string, _ lab.Pushed) { docker.Remove(ref) }},
		"containerd": {func(ref string, p lab.Pushed) (string, error) {
			err := containerd.TryPull(ref)
			if err == nil {
				containerd.Same(ref, p)
			}
			return p.Config.String(), err
		}, containerd.Remove},
		"skopeo": filesOf(node, "skopeo", "copy", "--all", "docker://REF", "dir:/var/lib/home/pulled"),
		"crane":  filesOf(node, node.As(lab.Tool(t, "crane"), "crane"), "pull", "--platform=linux/amd64", "REF", "/var/lib/home/pulled"),
	}
}

// filesOf is a client that puts what it pulls into files.
func filesOf(node *lab.Node, command ...string) oddClient {
	return oddClient{func(ref string, _ lab.Pushed) (string, error) {
		pull := strings.Replace(strings.Join(command, " "), "REF", ref, 1)
		out, err := node.Output("sh", "-ec", "rm -rf /var/lib/home/pulled; "+pull+" >/var/lib/home/pull.log 2>&1; find /var/lib/home/pulled -type f | sort | xargs sha256sum")
		if err != nil {
			out = ""
		}
		return out, err
	}, func(string, lab.Pushed) {}}
}

// Images as few are, by clients of which some can't have them: each has with weir what
// it has without, or fails as it does without, cold and warm; and warm no blob is
// fetched.
func TestShapes(t *testing.T) {
	t.Parallel()
	in := lab.NewInternet(t)
	registry := in.CraneRegistry("registry.example.com")
	in.HTTPS("elsewhere.example", false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = "/v2/foreign/blobs" + r.URL.Path
		registry.Open().ServeHTTP(w, r)
	}))
	bare, node := in.Node(), in.Node()
	agent := node.Agent("--registry=registry.example.com")
	without, with := oddClients(t, bare), oddClients(t, node)
	for i, s := range shapes() {
		t.Run(s.name, func(t *testing.T) {
			for j, name := range slices.Sorted(maps.Keys(without)) {
				im := s.image
				im.Seed = uint64(1000 + 10*i + j)
				p := registry.Push("acme/"+s.repo+"-"+name+":1", im)
				registry.Fault(func(w http.ResponseWriter, r *http.Request) bool {
					if s.absent == nil || !s.absent(p, r.URL.Path) {
						return false
					}
					http.NotFound(w, r)
					return true
				})
				ref := "registry.example.com/" + p.Ref
				// Without weir, and cold, at the same time.
				var want, got string
				var err, failed error
				var wg sync.WaitGroup
				wg.Go(func() { want, err = without[name].pull(ref, p) })
				wg.Go(func() { got, failed = with[name].pull(ref, p) })
				wg.Wait()
				if (err == nil) != slices.Contains(s.pulled, name) {
					t.Errorf("without weir %s has %q, %v", name, want, err)
				}
				same := func(what string) {
					t.Helper()
					if got != want || (failed == nil) != (err == nil) {
						t.Errorf("%s, %s, has %q, %v; without weir %q, %v", name, what, got, failed, want, err)
					}
				}
				if same("cold"); failed == nil {
					with[name].remove(ref, p)
				}
				registry.Log.Reset()
				got, failed = with[name].pull(ref, p)
				same("warm")
				if sent := registry.Log.All(func(r lab.Request) bool {
					return r.Method == "GET" && strings.Contains(r.Path, "/blobs/") && r.Status == http.StatusOK
				}); len(sent) > 0 {
					t.Errorf("%s: %d blobs were fetched again:\n%s", name, len(sent), registry.Log)
				}
				registry.Fault(nil)
			}
		})
	}
	if s := agent.Status(); s.Connections.Intercepted == 0 || s.Connections.Failed > 0 {
		t.Errorf("%+v", s.Connections)
	}
}
