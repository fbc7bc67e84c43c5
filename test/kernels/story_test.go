// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"weir/test/lab"
)

const image = "library/debian:12"

// What weir is for, on the kernel that this test runs on: containerd pulls from
// a registry, cold and warm; a dockerd in a box; the agent is killed in the
// middle of a pull; and taken off.
func TestStory(t *testing.T) {
	in := lab.NewInternet(t)
	hub := in.DockerHub()
	pushed := hub.Push(image, lab.Image{Layers: []int{1 << 20, 300_000}, Seed: 1})
	node := in.Node()
	box := node.Box()
	containerd, docker := node.Containerd(), box.Docker() // which make files of their own
	containerd.Stop()
	docker.Stop()
	files := func() string { return strings.Join(slices.Concat(node.Listing("/etc"), box.Listing("/etc")), "\n") }
	before := files()
	agent := node.Agent()
	programs := node.Programs()
	intercepted := func(pid int) {
		t.Helper()
		if rt := agent.Runtime(pid); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
	}

	containerd.Start()
	containerd.Pull(image)
	containerd.Same(image, pushed)
	if hub.Log.BlobGETs() == 0 {
		t.Errorf("nothing was fetched:\n%s", hub.Log)
	}
	intercepted(containerd.PID())
	containerd.Remove(image, pushed)
	hub.Log.Reset()
	containerd.Pull(image)
	containerd.Same(image, pushed)

	docker.Start()
	docker.Pull(image)
	docker.Same(image, pushed)
	intercepted(docker.PID())
	if gets := hub.Log.BlobGETs(); gets > 0 {
		t.Errorf("%d blobs were fetched of an image that is kept:\n%s", gets, hub.Log)
	}

	// A layer stops in the middle until the agent is dead.
	big := hub.Push("acme/big:1", lab.Image{Layers: []int{1 << 20}, Seed: 2})
	killed := make(chan struct{})
	var once sync.Once
	hub.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		mine := false
		if strings.Contains(r.URL.Path, big.Layers[0].String()) && r.Host == "production.cloudflare.docker.com" {
			once.Do(func() { mine = true })
		}
		if !mine {
			return false
		}
		w.Header().Set("Content-Length", "2000000")
		_, _ = w.Write(make([]byte, 1<<19))
		_ = http.NewResponseController(w).Flush()
		agent.Kill()
		close(killed)
		panic(http.ErrAbortHandler)
	})
	docker.Pull("acme/big:1")
	docker.Same("acme/big:1", big)
	select {
	case <-killed:
	default:
		t.Error("the pull has not gone through the agent")
	}
	if err := lab.Unloaded(programs); err != nil {
		t.Error(err)
	}
	containerd.Pull("acme/big:1") // there is no agent
	agent.Start()
	programs = node.Programs()
	docker.Remove("acme/big:1")
	docker.Pull("acme/big:1")

	if out := node.Run(lab.Weir(t), "uninstall"); !strings.Contains(out, "weir is gone") {
		t.Error(out)
	}
	if after := files(); after != before {
		t.Errorf("the files are not as before:\n%s\n--- instead of\n%s", after, before)
	}
	if err := lab.Unloaded(programs); err != nil {
		t.Error(err)
	}
}
