// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"weir/test/lab"
)

// The runtimes of Debian 13, with its libraries, each cold and then from what is
// kept.
func TestTrixie(t *testing.T) {
	all := func(string) bool { return true }
	root := debian(t, "trixie", runtime.GOARCH).unpack(all, append([]string{"buildah", "containerd", "docker.io", "docker-cli", "podman", "skopeo"}, userland...)...)
	in := lab.NewInternet(t)
	hub := in.DockerHub()
	ghcr := in.Registry("ghcr.io")
	ghcr.Push("acme/plain:1", lab.Image{Layers: []int{5 << 20, 2 << 20}, Seed: 92, OCI: true})
	bare, node := in.Node(), in.Node()
	for _, n := range []*lab.Node{bare, node} {
		n.Run("mount", "--bind", filepath.Join(root, "usr"), "/usr")
		n.Run("sh", "-ec", "rm -rf /etc/containers; cp -a "+filepath.Join(root, "etc/containers")+" /etc/")
	}
	for program, want := range map[string]string{"containerd": " 1.7.", "dockerd": " 26.", "podman": " 5.", "buildah": " 1.39", "skopeo": " 1.18"} {
		if out := node.Run(program, "--version"); !strings.Contains(out, want) {
			t.Errorf("%s isn't Debian 13's: %s", program, out)
		} else {
			t.Log(strings.TrimSpace(out))
		}
	}
	agent := node.Agent()
	containerd := node.Containerd()
	docker := node.Docker()
	store := func(name string, args ...string) {
		t.Helper()
		node.Run(append([]string{name, "--storage-driver=vfs", "--root=/var/lib/" + name, "--runroot=/run/" + name}, args...)...)
	}
	for i, c := range []struct {
		name         string
		pull, forget func(ref string, p lab.Pushed)
		pid          int
	}{
		{"containerd", func(ref string, p lab.Pushed) { containerd.Pull(ref); containerd.Same(ref, p) }, containerd.Remove, containerd.PID()},
		{"dockerd", func(ref string, p lab.Pushed) { docker.Pull(ref); docker.Same(ref, p) }, func(ref string, _ lab.Pushed) { docker.Remove(ref) }, docker.PID()},
		{"podman", func(ref string, _ lab.Pushed) { store("podman", "pull", ref) }, func(ref string, _ lab.Pushed) { store("podman", "rmi", ref) }, 0},
		{"buildah", func(ref string, _ lab.Pushed) { store("buildah", "pull", ref) }, func(ref string, _ lab.Pushed) { store("buildah", "rmi", ref) }, 0},
		{"skopeo", func(ref string, _ lab.Pushed) {
			node.Run("skopeo", "copy", "docker://"+ref, "dir:/var/lib/home/skopeo")
		},
			func(string, lab.Pushed) { node.Run("rm", "-r", "/var/lib/home/skopeo") }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			pushed := hub.Push("acme/"+c.name+":1", lab.Image{Layers: []int{1 << 20, 300_000}, Seed: uint64(i)})
			ref := "docker.io/" + pushed.Ref
			hub.Log.Reset()
			c.pull(ref, pushed)
			if hub.Log.BlobGETs() == 0 {
				t.Errorf("nothing was fetched:\n%s", hub.Log)
			}
			c.forget(ref, pushed)
			hub.Log.Reset()
			c.pull(ref, pushed)
			if gets := hub.Log.BlobGETs(); gets > 0 {
				t.Errorf("%d blobs were fetched again:\n%s", gets, hub.Log)
			}
			if c.pid == 0 {
				return
			}
			if rt := agent.Runtime(c.pid); rt.Reach != "intercepted" {
				t.Errorf("%+v", rt)
			}
		})
	}
	// Partial pulls, by several ranges in one request. What they have brought together is stored.
	t.Run("podman, zstd:chunked", func(t *testing.T) {
		bare.Run("skopeo", "copy", "--dest-compress", "--dest-compress-format=zstd:chunked", "docker://ghcr.io/acme/plain:1", "docker://ghcr.io/acme/zstd:1")
		ghcr.Log.Reset()
		want := bare.PodmanPartly("ghcr.io/acme/zstd:1", "bare")
		if ranges := ghcr.Log.All(func(r lab.Request) bool { return r.Status == 206 }); len(ranges) == 0 {
			t.Fatalf("it asks for no ranges:\n%s", ghcr.Log)
		}
		ghcr.Log.Reset()
		if got := node.PodmanPartly("ghcr.io/acme/zstd:1", "cold"); got != want {
			t.Errorf("cold it has\n%s\nand without weir\n%s", got, want)
		}
		agent.Stored()
		asked := ghcr.Log.BlobGETs()
		if got := node.PodmanPartly("ghcr.io/acme/zstd:1", "warm"); got != want {
			t.Errorf("warm it has\n%s\nand without weir\n%s", got, want)
		}
		if gets := ghcr.Log.BlobGETs() - asked; gets > 0 {
			t.Errorf("%d blobs were fetched again:\n%s", gets, ghcr.Log)
		}
		if twice := ghcr.Log.SentTwice(); len(twice) > 0 {
			t.Errorf("was sent again: %v\n%s", twice, ghcr.Log)
		}
	})
}
