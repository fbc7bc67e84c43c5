// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"weir/agent/admin"
	"weir/agent/registries"
	"weir/test/lab"
)

// learned waits until the agent has learned a registry.
func learned(t *testing.T, a *lab.Agent, host string) (r admin.Registry) {
	t.Helper()
	if err := lab.Eventually(a.Ended(), func(ctx context.Context) error {
		all := knownTo(ctx, t, a)
		i := slices.IndexFunc(all, func(r admin.Registry) bool { return r.Host == host })
		if i < 0 {
			return fmt.Errorf("%s is not among %d registries", host, len(all))
		}
		r = all[i]
		return nil
	}); err != nil {
		t.Fatalf("%v\n%s", err, a.Log(4000))
	}
	return r
}

// knownTo are the registries that an agent knows, but for those that all know.
func knownTo(ctx context.Context, t *testing.T, a *lab.Agent) (all []admin.Registry) {
	t.Helper()
	b, err := a.Get(ctx, "/api/registries")
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(r admin.Registry) bool { return r.State == registries.StateKnown })
}

// A company's registry, that weir has never heard of: the first pull passes
// through, and what starts from then on is intercepted for it. That lasts over a
// restart of the agent, and until it is forgotten.
func TestRegistryIsLearned(t *testing.T) {
	const ref = "registry.corp.example/team/app:1"
	w := newWorld(t)
	r := w.Registry("registry.corp.example")
	im := r.Push("team/app:1", lab.Image{Layers: []int{2 << 20, 100_000}, Seed: 91})
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	docker.Pull(renovate) // its roots are read
	docker.Pull(ref)
	docker.Remove(ref)
	fetched(t, r)
	if got := learned(t, agent, r.Host); got.State != registries.StateLearned || got.By != "dockerd" || got.At.IsZero() || got.Runtimes != 0 || got.Of == 0 {
		t.Errorf("%+v", got)
	}
	if s := agent.Status(); len(s.Registries) != 1 {
		t.Errorf("it was intercepted: %+v", s.Registries)
	}
	// It has read its roots before. It goes on, and is intercepted once it has been
	// restarted.
	docker.Pull(ref)
	docker.Remove(ref)
	if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" || rt.Except[r.Host] == "" || len(rt.Except) != 1 {
		t.Errorf("%+v", rt)
	}
	docker.Stop()
	docker.Start()
	docker.Pull(ref)
	docker.Same(ref, im)
	docker.Remove(ref)
	warm := func(pull func()) {
		t.Helper()
		r.Log.Reset()
		pull()
		if n := r.Log.BlobGETs(); n > 0 {
			t.Errorf("%d blobs were fetched:\n%s", n, r.Log)
		}
	}
	warm(func() { docker.Pull(ref) })
	docker.Remove(ref)
	// So are a dockerd in a pod, and a containerd.
	box := node.Box().Docker()
	warm(func() { box.Pull(ref) })
	box.Same(ref, im)
	containerd := node.Box().Containerd()
	warm(func() { containerd.Pull(ref) })
	containerd.Same(ref, im)
	if got := learned(t, agent, r.Host); got.Runtimes < 3 {
		t.Errorf("%+v", got)
	}
	// What each trusts is known after a restart of the agent, too.
	agent.Stop()
	agent.Start()
	for _, pid := range []int{docker.PID(), box.PID(), containerd.PID()} {
		if rt := agent.Runtime(pid); rt.Reach != "intercepted" || len(rt.Except) > 0 {
			t.Errorf("%+v", rt)
		}
	}
	warm(func() { docker.Pull(ref) })
	docker.Remove(ref)
	// What isn't wanted is passed through, and stays so.
	if out := node.Run(lab.Weir(t), "registries", "forget", r.Host); out != "" {
		t.Error(out)
	}
	before := agent.Status().Connections
	docker.Pull(ref)
	docker.Remove(ref)
	if now := agent.Status().Connections; now.Intercepted != before.Intercepted || now.PassedThrough == before.PassedThrough {
		t.Errorf("%+v, before %+v", now, before)
	}
	if got := learned(t, agent, r.Host); got.State != registries.StateForgotten || got.Runtimes != 0 {
		t.Errorf("%+v", got)
	}
}
