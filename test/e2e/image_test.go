// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"weir/test/lab"
)

// BuildKit's linter has nothing to say about the Dockerfile.
func TestDockerfile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hub.Push("library/golang:1.27", lab.Image{Layers: []int{1000}})
	node := w.Node()
	buildkit := node.BuildKit()
	b, err := os.ReadFile("../../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	check := func(dockerfile string) string { return buildkit.Build(dockerfile, "--opt=requestid=frontend.lint") }
	if out := check("from golang:1.27 as Build\nMAINTAINER nobody\n"); !strings.Contains(out, "MaintainerDeprecated") {
		t.Errorf("the linter doesn't see what is wrong with another one:\n%s", out)
	}
	if out := check(string(b)); strings.Contains(out, "WARNING") || strings.Contains(out, "rror") {
		t.Errorf("Dockerfile:\n%s", out)
	}
}

// The image that is made without a container engine has less than 40 MB, is the
// same each time, and runs.
func TestImage(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command("make", "-C", "../..", "build").CombinedOutput(); err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}
	dir := t.TempDir()
	binary := filepath.Join(dir, "weir-linux-"+runtime.GOARCH)
	weir, err := os.ReadFile("../../bin/weir")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(binary, weir, 0o755); err != nil {
		t.Fatal(err)
	}
	roots, err := os.ReadFile("/etc/ssl/certs/ca-certificates.crt")
	if err != nil {
		t.Fatal(err)
	}
	if size := len(weir) + len(roots); size >= 40_000_000 {
		t.Errorf("the image has %d bytes", size)
	}
	var sums [2]string
	for i := range sums {
		out := filepath.Join(dir, string(rune('a'+i)))
		if out, err := exec.Command("go", "run", "../../deploy/image", "-out", out, binary).CombinedOutput(); err != nil {
			t.Fatalf("making the image: %v\n%s", err, out)
		}
		b, err := os.ReadFile(filepath.Join(out, "index.json"))
		if err != nil {
			t.Fatal(err)
		}
		sums[i] = string(b) // has the digests of all
	}
	if sums[0] != sums[1] {
		t.Errorf("two images of the same files differ:\n%s\n%s", sums[0], sums[1])
	}
	w := newWorld(t)
	node := w.Node()
	node.Run("skopeo", "copy", "oci:"+filepath.Join(dir, "a"), "docker-archive:/var/lib/home/weir.tar:weir:made")
	node.Docker()
	node.Run("docker", "load", "-i", "/var/lib/home/weir.tar")
	out := node.Run("docker", "run", "--rm", "--network=none", "--cgroup-parent="+filepath.Base(node.Cgroup()), "weir:made", "--version")
	if !strings.HasPrefix(out, "weir version") {
		t.Error(out)
	}
}
