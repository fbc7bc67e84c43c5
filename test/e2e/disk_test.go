// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"weir/test/lab"
)

// The disk of the data directory hangs: a pull that runs, a cold one, a warm one
// and a push come to what they do without weir, and it says what is wrong. When the
// disk answers again, blobs are kept again.
func TestDiskHangs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Run("sh", "-ec", "mkdir -p /var/lib/weir; truncate -s 256M /var/lib/disk; mkfs.ext4 -qF /var/lib/disk; mount -o loop /var/lib/disk /var/lib/weir")
	agent := node.Agent()
	docker := node.Docker()
	docker.Pull(flyway)

	node.Shape(40)
	big := w.hub.Push("acme/big:1", lab.Image{Layers: []int{16 << 20}, Seed: 20})
	running := make(chan error, 1)
	go func() { running <- docker.TryPull("acme/big:1") }()
	if err := lab.Eventually(nil, func(context.Context) error {
		if s := agent.Status().Store; s.Bytes < 16<<20 {
			return fmt.Errorf("the large layer has not begun to arrive: %+v", s)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	node.Run("fsfreeze", "-f", "/var/lib/weir")
	var thawed atomic.Bool
	thaw := func() {
		if !thawed.Swap(true) {
			node.Run("fsfreeze", "-u", "/var/lib/weir")
		}
	}
	t.Cleanup(thaw)
	// The kernel ends no process with a thread that waits for the disk.
	timer := time.AfterFunc(90*time.Second, thaw)
	defer timer.Stop()
	if err := <-running; err != nil {
		t.Errorf("a pull that was running: %v", err)
	}
	docker.Same("acme/big:1", big)
	docker.Pull(renovate)
	docker.Same(renovate, w.renovate)
	docker.Push(flyway, "ghcr.io/acme/pushed:1")
	docker.Remove("ghcr.io/acme/pushed:1")
	docker.Remove(flyway)
	w.forget()
	docker.Pull(flyway)
	docker.Same(flyway, w.flyway)
	w.onlyManifests(t) // a frozen file system can be read

	const says = "does not answer since"
	if out := node.Run(lab.Weir(t), "status"); !strings.Contains(out, says) {
		t.Errorf("%q is not in\n%s", says, out)
	}
	if out, _ := node.Output(lab.Weir(t), "doctor", "--cgroup", node.Cgroup()); !strings.Contains(out, says) {
		t.Errorf("%q is not in\n%s", says, out)
	}
	if b, err := agent.Get(t.Context(), "/metrics"); err != nil || !strings.Contains(string(b), "\nweir_store_disk_hangs 1\n") {
		t.Errorf("the metric is not there: %v", err)
	}
	if thawed.Load() {
		t.Fatal("something waited for the disk until it answered again")
	}

	thaw()
	if err := lab.Eventually(nil, func(context.Context) error {
		if !agent.Status().Store.Hangs.IsZero() {
			return errors.New("the agent still takes the disk for hanging")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		docker.Remove(renovate)
		w.forget()
		docker.Pull(renovate)
	}
	w.onlyManifests(t)
	if s := agent.Status().Store; s.Corrupt > 0 {
		t.Errorf("%+v", s)
	}
}
