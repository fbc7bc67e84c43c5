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
