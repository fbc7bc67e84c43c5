// SPDX-License-Identifier: Apache-2.0

// Package e2e tells weir's stories, with real runtimes, registries and kernel
// hooks. Each test is one that a user could tell.
package e2e

import (
	"testing"

	"weir/test/lab"
)

const (
	flyway   = "flyway/flyway:10.11.0"
	renovate = "ghcr.io/renovatebot/renovate:latest"
)

// world is an internet with Docker Hub and ghcr.io, and an image on each.
type world struct {
	*lab.Internet
	hub, ghcr        *lab.Registry
	flyway, renovate lab.Pushed
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Internet: lab.NewInternet(t)}
	w.hub, w.ghcr = w.DockerHub(), w.Registry("ghcr.io")
	w.flyway = w.hub.Push(flyway, lab.Image{Layers: []int{3 << 20, 100_000, 1 << 20}, Seed: 1, Index: true})
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

// fetched fails the test unless a registry was asked for blobs.
func fetched(t *testing.T, r *lab.Registry) {
	t.Helper()
	if r.Log.BlobGETs() == 0 {
		t.Errorf("%s was not asked for any blob:\n%s", r.Host, r.Log)
	}
}

func TestDocker(t *testing.T) {
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

// A containerd that was running before, with a certs.d that its user has named,
// proves that it reads it.
func TestContainerdCertsD(t *testing.T) {
	w := newWorld(t)
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", `version = 2
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
`)
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
	w := newWorld(t)
	node := w.Node()
	containerd := node.Containerd()
	containerd.Pull(flyway)
	agent := node.Agent()
	docker := node.Docker()
	agent.Runtime(docker.PID())
	w.forget()
	docker.Pull(flyway)
	docker.Same(flyway, w.flyway)
	if n := w.hub.Log.BlobGETs(); n > 0 {
		t.Errorf("%d blobs were fetched:\n%s", n, w.hub.Log)
	}
	if s := agent.Status(); s.Store.Bytes > 100_000 {
		t.Errorf("blobs were copied: %+v", s.Store)
	}
}

// A dockerd in a box of its own, as in a dind pod.
func TestDockerInBox(t *testing.T) {
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
	next := node.Box().Docker()
	w.forget()
	next.Pull(flyway)
	next.Same(flyway, w.flyway)
	if n := w.hub.Log.BlobGETs(); n > 0 {
		t.Errorf("%d blobs were fetched:\n%s", n, w.hub.Log)
	}
}
