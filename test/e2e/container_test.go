// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"weir/agent/admin"
	"weir/agent/runtimes"
	"weir/test/lab"
)

// dockerRun are the lines of the README that run weir in a container, and that
// take it off.
func dockerRun(t *testing.T) (run, remove, uninstall string) {
	t.Helper()
	for _, c := range lab.Commands(t, "../../README.md") {
		switch {
		case strings.HasPrefix(c, "docker run --detach --name=weir "):
			run = c
		case strings.HasPrefix(c, "docker rm "):
			remove = c
		case strings.HasPrefix(c, "docker run --rm ") && strings.HasSuffix(c, " uninstall"):
			uninstall = c
		}
	}
	if run == "" || remove == "" || uninstall == "" {
		t.Fatal("the README doesn't say how to run weir with docker, and how to take it off")
	}
	return run, remove, uninstall
}

// image makes what the Dockerfile makes: the binary, and the roots of the world.
// Its agent is for the node alone.
func image(t *testing.T, node *lab.Node) {
	t.Helper()
	node.Run("sh", "-ec", fmt.Sprintf(`
mkdir -p /var/lib/home/image/etc/ssl/certs
cp %s /var/lib/home/image/weir
cp /etc/ssl/certs/ca-certificates.crt /var/lib/home/image/etc/ssl/certs/
tar -C /var/lib/home/image -c . | docker import --change 'ENTRYPOINT ["/weir"]' --change 'CMD ["agent"]' --change 'ENV WEIR_CGROUP=%s' - weir`, lab.Weir(t), node.Cgroup()))
}

// The agent in a container of its own, started and taken off by the
// README's lines: it serves the dockerd that runs it once that is restarted, a containerd beside it, and a
// dockerd in another container; and leaves nothing when it is uninstalled.
func TestAgentInContainer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	docker := node.Docker("--cgroup-parent=" + filepath.Base(node.Cgroup()))
	image(t, node)
	run, remove, uninstall := dockerRun(t)
	id := strings.TrimSpace(node.Run("sh", "-ec", run))
	t.Cleanup(func() { _, _ = node.Output("sh", "-c", outerDocker+"rm -f weir") })
	status := func() (s admin.Status, err error) {
		out, err := node.Output(lab.Weir(t), "status", "--json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &s)
		}
		return s, err
	}
	ready := func() {
		t.Helper()
		if err := lab.Eventually(nil, func(context.Context) error { _, err := status(); return err }); err != nil {
			out, _ := node.Output("sh", "-c", outerDocker+"logs "+id)
			t.Fatal(err, out)
		}
	}
	ready()
	intercepted := func(pid int) {
		t.Helper()
		if err := lab.Eventually(nil, func(context.Context) error {
			s, err := status()
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(s.Runtimes, func(r runtimes.Status) bool { return r.PID == pid && r.Reach == runtimes.ReachIntercepted }) {
				return fmt.Errorf("process %d is not intercepted: %+v", pid, s.Runtimes)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	box := node.Box()
	inner := box.Docker()
	inner.Pull(flyway)
	intercepted(inner.PID())
	inner.Remove(flyway)
	w.forget()
	inner.Pull(flyway)
	inner.Same(flyway, w.flyway)
	w.nothingFetched(t)
	// The dockerd that runs weir has its certificate at its next start; weir
	// comes back with it.
	docker.Stop()
	docker.Start()
	ready()
	intercepted(docker.PID())
	w.forget()
	docker.Pull(flyway)
	w.nothingFetched(t)
	node.Run("sh", "-ec", remove)
	node.Run("sh", "-ec", uninstall)
	for _, n := range []*lab.Node{node, box} {
		for _, f := range n.Listing("/etc") {
			if strings.Contains(f, "weir") {
				t.Errorf("%s is left", f)
			}
		}
	}
	inner.Remove(flyway)
	inner.Pull(flyway)
}

// The systemd unit is right, and what it leaves the agent is enough: these
// capabilities, and a file system of its own in which it can write nothing but
// its two directories.
func TestUnit(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../../deploy/weir.service")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	unit := strings.Replace(string(b), "/usr/local/bin/weir", lab.Weir(t), 1)
	if err := os.WriteFile(filepath.Join(dir, "weir.service"), []byte(unit), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("systemd-analyze", "verify", filepath.Join(dir, "weir.service")).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	set := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindStringSubmatch(unit)
	if set == nil {
		t.Fatal("the unit bounds no capabilities")
	}
	bounding := "-all"
	for c := range strings.FieldsSeq(set[1]) {
		bounding += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	w := newWorld(t)
	node := w.Node()
	node.Run("mkdir", "-p", "/var/lib/weir", "/run/weir")
	node.Spawn("weir", "unshare", "--mount", "sh", "-ec", fmt.Sprintf(`
mount --bind /var/lib/weir /var/lib/weir
mount --bind /run/weir /run/weir
for m in / /etc /run /var/lib; do mount -o remount,bind,ro $m; done
exec setpriv --bounding-set=%s --inh-caps=-all --no-new-privs %s agent --cgroup %s`, bounding, lab.Weir(t), node.Cgroup()))
	if err := lab.Eventually(nil, func(context.Context) error { _, err := node.Output(lab.Weir(t), "status"); return err }); err != nil {
		t.Fatal(err)
	}
	c := node.Box().Containerd()
	c.Pull(flyway)
	c.Remove(flyway, w.flyway)
	d := node.Docker()
	w.forget()
	c.Pull(flyway)
	d.Pull(flyway)
	w.nothingFetched(t)
}
