// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"slices"
	"strings"
	"testing"

	"weir/test/lab"
)

// asUser is what leads to a program that an ordinary user of the node runs.
var asUser = []string{"setpriv", "--reuid=5000", "--regid=5000", "--init-groups", "env", "HOME=/var/lib/home/ci", "XDG_RUNTIME_DIR=/run/user/5000"}

// addUser makes the node one on which an ordinary user can run containers.
func addUser(node *lab.Node) {
	node.Run("sh", "-ec", `
echo ci:x:5000:5000::/var/lib/home/ci:/bin/sh >> /etc/passwd
echo ci:x:5000: >> /etc/group
echo ci:500000:65536 | tee /etc/subuid > /etc/subgid
install -d -o 5000 -g 5000 -m 700 /var/lib/home/ci /run/user/5000
mount -t tmpfs -o mode=755 tmpfs /dev/net
mknod -m 666 /dev/net/tun c 10 200`)
}

// A rootless dockerd: it is in a user, a mount and a network namespace of its
// own, which slirp4netns gives a way out. What it pulls it shares with a
// rootless podman.
func TestRootless(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	addUser(node)
	agent := node.Agent()
	script := lab.Debian(t, "/usr/share/docker.io/contrib/dockerd-rootless.sh", "docker.io")
	node.Spawn("rootless", slices.Concat(asUser, []string{script, "--storage-driver=vfs", "--bridge=none", "--iptables=false", "--ip6tables=false"})...)
	docker := func(args ...string) (string, error) {
		return node.Output(append([]string{"docker", "-H", "unix:///run/user/5000/docker.sock"}, args...)...)
	}
	if err := lab.Eventually(nil, func(context.Context) error { _, err := docker("version"); return err }); err != nil {
		t.Fatal(err)
	}
	pull := func() {
		t.Helper()
		for _, ref := range []string{flyway, renovate} {
			if out, err := docker("pull", "-q", ref); err != nil {
				t.Fatal(out, err)
			}
		}
		if out, err := docker("inspect", "--format={{.Id}}", flyway); err != nil || strings.TrimSpace(out) != w.flyway.Config.String() {
			t.Errorf("%s, %v; pushed was %s", out, err, w.flyway.Config)
		}
		if out, err := docker("rmi", flyway, renovate); err != nil {
			t.Fatal(out, err)
		}
	}
	pull()
	w.forget()
	pull()
	w.nothingFetched(t)
	if rt := ofKind(t, agent, "dockerd"); rt.Reach != "intercepted" {
		t.Errorf("%+v", rt)
	}
	for _, name := range []string{"docker.io/" + flyway, renovate} {
		node.Run(slices.Concat(asUser, []string{"podman", "--storage-driver=vfs", "pull", "-q", name})...)
	}
	w.nothingFetched(t)
	if files := node.Run("find", "/var/lib/home/ci", "-name", "*weir*"); files != "" {
		t.Errorf("in the user's images: %s", files)
	}
}
