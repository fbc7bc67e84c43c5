// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"weir/test/lab"
)

// More tools that pull by themselves, from Docker Hub and from ghcr.io: what
// one has pulled, the others get from the node.
func TestMoreTools(t *testing.T) {
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	tool := func(name string) string { return node.As(lab.Tool(t, name), name) }
	regctl, helm, cosign := tool("regctl"), tool("helm"), tool("cosign")
	node.Spawn("door", node.As(lab.Tool(t, "crane"), "crane"), "registry", "serve", "--address=127.0.0.1:0") // keeps the door open
	node.Run(regctl, "image", "copy", flyway, "ocidir:///var/lib/home/regctl:1")
	node.Run(regctl, "image", "copy", renovate, "ocidir:///var/lib/home/regctl:2")
	for name, pull := range map[string][]string{
		"regctl": {regctl, "image", "copy", flyway, "ocidir:///var/lib/home/again:1"},
		"cosign": {cosign, "save", "--dir=/var/lib/home/cosign", renovate},
	} {
		w.forget()
		before := agent.Status().Connections.Intercepted
		node.Run(pull...)
		w.nothingFetched(t)
		if n := agent.Status().Connections.Intercepted - before; n == 0 {
			t.Errorf("%s was not intercepted", name)
		}
	}
	// A chart.
	node.Run("sh", "-ec", "cd /var/lib/home && "+helm+" create chart && "+helm+" package chart && "+helm+" push chart-0.1.0.tgz oci://ghcr.io/acme")
	w.forget()
	node.Run(helm, "pull", "oci://ghcr.io/acme/chart", "--version=0.1.0", "--destination=/var/lib/home/pulled")
	w.nothingFetched(t)
	node.Run("cmp", "/var/lib/home/chart-0.1.0.tgz", "/var/lib/home/pulled/chart-0.1.0.tgz")
}

// nerdctl, which pulls by itself and keeps it in containerd.
func TestNerdctl(t *testing.T) {
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	nerdctl := lab.Tool(t, "nerdctl")
	for i := range 2 {
		box := node.Box()
		c := box.NewestContainerd()
		w.forget()
		for _, ref := range []string{flyway, renovate} {
			box.Run(box.As(nerdctl, "nerdctl"), "pull", "--quiet", ref)
		}
		if i > 0 {
			w.nothingFetched(t)
		}
		if out := box.Run(nerdctl, "images", "--digests", "--no-trunc"); !strings.Contains(out, w.flyway.Digest.String()) || !strings.Contains(out, w.renovate.Digest.String()) {
			t.Errorf("%s", out)
		}
		if rt := agent.Runtime(c.PID()); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
	}
}

// kaniko's executor, in the environment of its image: the base comes from Docker
// Hub and is unpacked over the executor's own root file system, certificates and
// all; a step pulls there; and what was built is pushed to another registry. The
// second job gets the base from the node. Nothing of weir's is in the image.
func TestKaniko(t *testing.T) {
	w := newWorld(t)
	crane, roots := filepath.Join(t.TempDir(), "crane"), filepath.Join(t.TempDir(), "roots.pem")
	if err := errors.Join(os.Symlink(lab.Tool(t, "crane"), crane), os.WriteFile(roots, []byte(w.Roots()), 0o644)); err != nil {
		t.Fatal(err)
	}
	w.hub.Push("acme/base:1", lab.Image{Layers: []int{700_000}, Seed: 71, Program: crane, Files: map[string]string{"/etc/ssl/certs/ca-certificates.crt": roots}})
	node := w.Node()
	agent := node.Agent()
	for i := range 2 {
		box := node.Box()
		root := fmt.Sprintf("/var/lib/kaniko%d", i)
		box.Run("sh", "-ec", fmt.Sprintf(`
mkdir -p %[1]s
mount -t tmpfs tmpfs %[1]s
cd %[1]s
mkdir -p kaniko/ssl/certs kaniko/.docker kaniko/files workspace etc/ssl root tmp proc dev sys var
cp %[2]s kaniko/executor
cp /etc/ssl/certs/ca-certificates.crt kaniko/ssl/certs/
cp /etc/hosts /etc/resolv.conf /etc/passwd /etc/group /etc/nsswitch.conf etc/
mount --rbind /dev dev
mount --rbind /sys sys
printf 'FROM acme/base:1\nCOPY Dockerfile /a\nRUN ["/crane", "pull", "%[3]s", "/renovate.tar"]\n' > workspace/Dockerfile
`, root, lab.Tool(t, "executor"), renovate))
		w.forget()
		out := box.Run("unshare", "--mount", "--pid", "--fork", "sh", "-ec", fmt.Sprintf(`
mount -t proc proc %[1]s/proc
exec env -i HOME=/root USER=root PATH=/usr/local/bin:/kaniko SSL_CERT_DIR=/kaniko/ssl/certs DOCKER_CONFIG=/kaniko/.docker container=docker \
	/usr/sbin/chroot %[1]s /kaniko/executor --force --context=dir:///workspace --destination=ghcr.io/acme/kaniko:%[2]d
`, root, i))
		if n := w.hub.Log.BlobGETs(); (n == 0) != (i == 1) {
			t.Errorf("job %d: %d blobs were fetched\n%s", i, n, out)
		}
		files := node.Run("sh", "-ec", fmt.Sprintf("%s export ghcr.io/acme/kaniko:%d - | tar -t", crane, i))
		if strings.Contains(files, "weir") || !strings.Contains(files, "ca-certificates.crt\n") || !strings.Contains(files, "\na\n") || !strings.Contains(files, "renovate.tar\n") {
			t.Errorf("the image has %q", files)
		}
		if !strings.Contains(agent.Log(1<<20), "it runs in a step of a build") {
			t.Error("the step was not seen to be one")
		}
	}
	if s := agent.Status(); s.Connections.Intercepted == 0 || s.Connections.Failed > 0 {
		t.Errorf("%+v", s.Connections)
	}
}
