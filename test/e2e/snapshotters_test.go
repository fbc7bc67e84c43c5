// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"weir/test/lab"
)

// snapshotter is one that pulls layers by itself, by ranges.
type snapshotter struct {
	name, program, config, text, socket string
	image                               string // that it does that with
}

var snapshotters = []snapshotter{
	{name: "SOCI, parallel", program: "soci-snapshotter-grpc", image: "ghcr.io/acme/plain:1",
		config: "/etc/soci-snapshotter-grpc/config.toml", socket: "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock",
		text: "[content_store]\n  type = \"containerd\"\n[pull_modes.parallel_pull_unpack]\n  enable = true\n  max_concurrent_downloads_per_image = 10\n  concurrent_download_chunk_size = \"1mb\"\n  max_concurrent_unpacks_per_image = 10\n"},
	{name: "SOCI, lazy", program: "soci-snapshotter-grpc", image: "ghcr.io/acme/soci:1",
		config: "/etc/soci-snapshotter-grpc/config.toml", socket: "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock",
		text: "min_layer_size = 0\n[background_fetch]\n  disable = true\n[pull_modes.soci_v2]\n  enable = true\n"},
	{name: "stargz", program: "containerd-stargz-grpc", image: "ghcr.io/acme/estargz:1",
		config: "/etc/containerd-stargz-grpc/config.toml", socket: "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock",
		text: "no_background_fetch = true\nnoprefetch = true\n"},
}

const remoteConfig = `version = 3
[proxy_plugins.remote]
  type = "snapshot"
  address = %q
[proxy_plugins.remote.exports]
  enable_remote_snapshot_annotations = "true"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "remote"
  disable_snapshot_annotations = false
  use_local_image_pull = true
`

// pull pulls the snapshotter's image on a fresh machine or box as the kubelet does,
// and returns what is in its files.
func (s snapshotter) pull(t *testing.T, node *lab.Node, agent *lab.Agent) string {
	t.Helper()
	node.WriteFile(s.config, s.text)
	node.WriteFile("/etc/containerd/config.toml", fmt.Sprintf(remoteConfig, s.socket))
	p := node.Spawn(s.program, node.As(lab.Tool(t, s.program), s.program))
	if err := lab.Eventually(p.Ended(), func(context.Context) error {
		names, err := node.ReadDir(filepath.Dir(s.socket))
		if err == nil && !slices.Contains(names, filepath.Base(s.socket)) {
			err = errors.New("it doesn't listen")
		}
		return err
	}); err != nil {
		t.Fatal(err, p.Log(2<<10))
	}
	c := node.NewestContainerd()
	if agent != nil {
		for _, pid := range []int{p.PID(), c.PID()} {
			if rt := agent.Runtime(pid); rt.Reach != "intercepted" {
				t.Errorf("%s: %+v", s.name, rt)
			}
		}
	}
	c.Pull(s.image)
	ctr := lab.Tool(t, "ctr") // by a name that isn't ctr's: it pulls nothing
	node.Run("mkdir", "/var/lib/home/mounted")
	node.Run(ctr, "-n", "k8s.io", "images", "mount", "--snapshotter=remote", s.image, "/var/lib/home/mounted")
	out := node.Run("sh", "-ec", "cd /var/lib/home/mounted && find . -type f | sort | xargs sha256sum")
	node.Run("umount", "/var/lib/home/mounted")
	return out
}

// Snapshotters that pull by themselves, as SOCI and stargz do, in parallel ranges or
// when a file is read: what is read is as without weir, on a node that has nothing,
// and on one that has the image, from which then no blob is fetched.
func TestSnapshotters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.ghcr.Push("acme/plain:1", lab.Image{Layers: []int{5 << 20, 2 << 20}, Seed: 91, OCI: true})
	bare := w.Node()
	publish(t, bare)
	node := w.Node()
	agent := node.Agent()
	for _, s := range snapshotters {
		t.Run(s.name, func(t *testing.T) {
			w.forget()
			want := s.pull(t, bare.Box(), nil)
			if strings.Count(want, "\n") < 2 {
				t.Fatalf("the image has no files: %q", want)
			}
			ranges := w.ghcr.Log.All(func(r lab.Request) bool { return strings.Contains(r.Path, "/blobs/") && r.Status == 206 })
			if len(ranges) == 0 {
				t.Fatalf("it asks for no ranges:\n%s", w.ghcr.Log)
			}
			if got := s.pull(t, node.Box(), agent); got != want {
				t.Errorf("cold it reads\n%s\nand without weir\n%s", got, want)
			}
			// Of what was asked for in ranges alone not all may be here.
			node.Run(node.As(lab.Tool(t, "crane"), "crane"), "pull", s.image, "/var/lib/home/whole.tar")
			w.forget()
			if got := s.pull(t, node.Box(), agent); got != want {
				t.Errorf("warm it reads\n%s\nand without weir\n%s", got, want)
			}
			if n := w.ghcr.Log.BlobGETs(); n > 0 {
				t.Errorf("%d blobs were fetched:\n%s", n, w.ghcr.Log)
			}
		})
	}
}

// publish makes the images for lazy loading, and pushes them.
func publish(t *testing.T, node *lab.Node) {
	t.Helper()
	node.NewestContainerd()
	node.Convert("estargz", "ghcr.io/acme/plain:1", "ghcr.io/acme/estargz:1")
	node.Run(lab.Tool(t, "soci-snapshotter-grpc"), "convert", "ghcr.io/acme/plain:1", "ghcr.io/acme/soci:1")
	node.Run(lab.Tool(t, "ctr"), "images", "push", "ghcr.io/acme/soci:1")
}

// podman's partial pulls of layers in zstd:chunked, of which it fetches what it has no
// file of, by several ranges in one request: what it has then is as without weir. What has come for one podman
// another one has from there: the registry sends no byte again, and nothing of what has come as a whole.
func TestZstdChunked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const image, later = "ghcr.io/acme/zstd:1", "ghcr.io/acme/zstd:2" // which share files
	bare, node := w.Node(), w.Node()
	bare.NewestContainerd()
	for i, ref := range []string{image, later} {
		files := make(map[string]string)
		for n := range 20 {
			content := make([]byte, 150_000)
			r := rand.NewChaCha8([32]byte{byte(n), byte(i * (n % 3 / 2))}) // each third is another one
			_, _ = r.Read(content)
			files[fmt.Sprintf("/file%02d", n)] = filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(files[fmt.Sprintf("/file%02d", n)], content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		plain := strings.Replace(ref, "zstd", "plain", 1)
		w.ghcr.Push(strings.TrimPrefix(plain, "ghcr.io/"), lab.Image{Layers: []int{5 << 20}, Seed: uint64(92 + i), OCI: true, Program: files["/file00"], Files: files})
		bare.Convert("zstdchunked", plain, ref)
	}
	w.forget()
	want, wantLater := bare.PodmanPartly(image, "bare"), bare.PodmanPartly(later, "bare")
	several := func(r lab.Request) bool { return r.Status == 206 && strings.Count(r.Range, ",") > 3 }
	if len(w.ghcr.Log.All(several)) == 0 {
		t.Fatalf("it asks for no ranges:\n%s", w.ghcr.Log)
	}
	agent := node.Agent()
	w.forget()
	pull := func(image, store, want string) {
		t.Helper()
		if got := node.PodmanPartly(image, store); got != want {
			t.Errorf("%s, into %s: it has\n%s\nand without weir\n%s", image, store, got, want)
		}
	}
	pull(image, "cold", want)
	agent.Stored()
	asked := w.ghcr.Log.BlobGETs()
	pull(image, "second", want)
	if n := w.ghcr.Log.BlobGETs() - asked; n > 0 {
		t.Errorf("%d blobs were fetched again:\n%s", n, w.ghcr.Log)
	}
	pull(later, "cold", wantLater)
	if len(w.ghcr.Log.All(several)) == 0 {
		t.Errorf("the registry was asked for no ranges:\n%s", w.ghcr.Log)
	}
	pull(later, "third", wantLater) // of which a third has come
	if twice := w.ghcr.Log.SentTwice(); len(twice) > 0 {
		t.Errorf("was sent again: %v\n%s", twice, w.ghcr.Log)
	}
	if s := agent.Status(); s.Connections.Intercepted == 0 || s.Connections.Failed > 0 {
		t.Errorf("%+v", s.Connections)
	}
}
