// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// tools are programs that are built from their Go modules when a test first
// needs them, and kept.
var tools = map[string]string{
	"registry":                "github.com/distribution/distribution/v3/cmd/registry@v3.1.2",
	"crane":                   "github.com/google/go-containerregistry/cmd/crane@v0.22.1",
	"conformance":             "github.com/opencontainers/distribution-spec/conformance@v0.0.0-20260831232431-97274622c111",
	"dockerd":                 "github.com/moby/moby/v2/cmd/dockerd@v2.0.0-beta.24",
	"containerd":              "github.com/containerd/containerd/v2/cmd/containerd@v2.4.2",
	"ctr":                     "github.com/containerd/containerd/v2/cmd/ctr@v2.4.2",
	"containerd-shim-runc-v2": "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@v2.4.2",
}

// Tool returns the path of a program, building it if need be.
func Tool(t testing.TB, name string) string {
	t.Helper()
	return locked(t, name, func(dir string) string {
		path := filepath.Join(dir, filepath.Base(tools[name]))
		if _, err := os.Stat(path); err == nil {
			return path
		}
		out := filepath.Join(dir, "new")
		cmd := exec.Command("go", "install", tools[name])
		cmd.Dir = dir // of no module
		cmd.Env = append(os.Environ(), "GOBIN="+out, "CGO_ENABLED=0", "GOFLAGS=-mod=mod")
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("building %s: %v\n%s", tools[name], err, b)
		}
		if err := os.Rename(filepath.Join(out, name), path); err != nil {
			t.Fatal(err)
		}
		return path
	})
}

var weir struct {
	sync.Mutex
	path string
}

// Weir returns the path of the weir binary built from this tree.
func Weir(t testing.TB) string {
	t.Helper()
	weir.Lock()
	defer weir.Unlock()
	if weir.path == "" {
		weir.path = buildWeir(t)
	}
	return weir.path
}

func buildWeir(t testing.TB) string {
	t.Helper()
	return locked(t, "weir", func(dir string) string {
		path := filepath.Join(dir, "weir")
		cmd := exec.Command("go", "build", "-o", path, "weir/agent/weir")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("building weir: %v\n%s", err, b)
		}
		return path
	})
}

// locked calls f while no other test builds the same program.
func locked(t testing.TB, name string, f func(dir string) string) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "weir-test")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(dir, name+".lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return f(dir)
}

// debian returns the path of a program of a Debian package.
func debian(t testing.TB, path, pkg string) string {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(fmt.Errorf("%w: install the package %s", err, pkg))
	}
	return path
}
