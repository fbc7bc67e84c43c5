// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"weir/test/lab"
)

// TestDemo is `make demo`: the main job, as a table of what came from where.
func TestDemo(t *testing.T) {
	t.Parallel()
	in := lab.NewInternet(t)
	hub, ghcr := in.DockerHub(), in.Registry("ghcr.io")
	const size = 24 << 20
	hub.Push(flyway, lab.Image{Layers: []int{size / 2, size / 4, size / 4}, Seed: 1, Index: true})
	ghcr.Push("renovatebot/renovate:latest", lab.Image{Layers: []int{size / 2, size / 2}, Seed: 2, OCI: true})
	node := in.Node()
	node.Shape(100) // Mbit/s, the uplink
	node.Agent()
	docker, containerd, job := node.Docker(), node.Box().Containerd(), node.Box().Docker()

	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "WHO PULLS\tIMAGE\tSECONDS\tBLOBS FROM THE REGISTRY\tBYTES")
	var cold, warm int64
	step := func(who, ref string, bytes *int64, pull func(string, ...string)) {
		hub.Log.Reset()
		ghcr.Log.Reset()
		start := time.Now()
		pull(ref)
		took := time.Since(start)
		n := hub.Log.BlobBytes() + ghcr.Log.BlobBytes()
		*bytes += n
		blobs := 0
		for _, r := range append(hub.Log.All(nil), ghcr.Log.All(nil)...) {
			if strings.Contains(r.Path, "/blobs/") && r.Status == 200 && r.Method == "GET" {
				blobs++
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%.2f\t%d\t%d\n", who, ref, took.Seconds(), blobs, n)
	}
	step("dockerd, cold", flyway, &cold, docker.Pull)
	step("dockerd, cold", renovate, &cold, docker.Pull)
	docker.Remove(flyway)
	docker.Remove(renovate)
	step("dockerd, again", flyway, &warm, docker.Pull)
	step("dockerd, again", renovate, &warm, docker.Pull)
	step("containerd, in another container", flyway, &warm, containerd.Pull)
	step("containerd, in another container", renovate, &warm, containerd.Pull)
	step("dockerd, in a new CI job's pod", flyway, &warm, job.Pull)
	step("dockerd, in a new CI job's pod", renovate, &warm, job.Pull)
	w.Flush()
	fmt.Printf("\nAn uplink of 100 Mbit/s, two images of %d MiB:\n\n%s\n", size>>20, table.String())
	fmt.Println(node.Run(lab.Weir(t), "status"))
	if cold < 2*size || warm != 0 {
		t.Errorf("%d bytes of blobs came from the registries cold, %d warm", cold, warm)
	}
}
