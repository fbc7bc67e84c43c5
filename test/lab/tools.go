// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
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
	"oras":                    "oras.land/oras/cmd/oras@v1.3.6",
	"dockerd":                 "github.com/moby/moby/v2/cmd/dockerd@v2.0.0-beta.24",
	"containerd":              "github.com/containerd/containerd/v2/cmd/containerd@v2.4.2",
	"ctr":                     "github.com/containerd/containerd/v2/cmd/ctr@v2.4.2",
	"containerd-shim-runc-v2": "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@v2.4.2",
	"helm":                    "helm.sh/helm/v4/cmd/helm@v4.3.1",
	"regctl":                  "github.com/regclient/regclient/cmd/regctl@v0.11.7",
	"buildx":                  "github.com/docker/buildx/cmd/buildx@v0.38.2",
	"coredns":                 "github.com/coredns/coredns@v1.15.0",
	"cosign":                  "github.com/sigstore/cosign/v3/cmd/cosign@v3.1.3",
	"ko":                      "github.com/google/ko@v0.19.1",
	"trivy":                   "github.com/aquasecurity/trivy/cmd/trivy@v0.74.0",
	"kube-router":             "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router@v2.1.0",
	"docker-compose":          compose + "/cmd@v2.40.3",
	"soci-snapshotter-grpc":   soci + "@v0.16.1",
	"containerd-stargz-grpc":  stargz + "@v0.19.1",
}

// mains are programs whose own main is in a module that isn't released, by the module
// with all the rest of them.
var mains = map[string]string{soci: sociMain, stargz: stargzMain}

var (
	//go:embed snapshotters/soci/main.go
	sociMain string
	//go:embed snapshotters/stargz/main.go
	stargzMain string
)

// Programs of these modules can't be installed from outside, because their
// go.mod excludes or replaces modules: they are built in a module that requires
// them.
const (
	buildkit     = "github.com/moby/buildkit"
	kubernetes   = "k8s.io/kubernetes"
	containerdV1 = "github.com/containerd/containerd"
	kaniko       = "github.com/GoogleContainerTools/kaniko"
	nerdctl      = "github.com/containerd/nerdctl/v2"
	compose      = "github.com/docker/compose/v2"
	soci         = "github.com/awslabs/soci-snapshotter"
	stargz       = "github.com/containerd/stargz-snapshotter"
)

func init() {
	for _, name := range []string{"buildkitd", "buildctl"} {
		tools[name] = buildkit + "/cmd/" + name + "@v0.34.2"
	}
	tools["containerd-1.7"] = containerdV1 + "/cmd/containerd@v1.7.35"
	tools["executor"] = kaniko + "/cmd/executor@v1.24.0"
	tools["nerdctl"] = nerdctl + "/cmd/nerdctl@v2.2.1"
	for _, name := range []string{"kubelet", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"} {
		tools[name] = kubernetes + "/cmd/" + name + "@v1.34.2"
	}
}

// stagingRE finds the modules that Kubernetes has in its own repository, and
// releases as v0 what is v1 there.
var stagingRE = regexp.MustCompile(`(?m)^\s*(k8s\.io/\S+) => \./staging/`)

// scratch makes a module from which programs of a module can be built.
func scratch(t testing.TB, module, version string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	mod := fmt.Sprintf("module scratch\n\ngo 1.26\n\nrequire %s %s\n", module, version)
	switch module {
	case soci:
		mod += "replace github.com/hashicorp/golang-lru => github.com/ktock/golang-lru v0.5.5-0.20211029085301-ec551be6f75c\n" +
			"replace cyphar.com/go-pathrs => github.com/cyphar/libpathrs/go-pathrs v0.2.1\n"
	case kubernetes:
		out, err := exec.Command("go", "mod", "download", "-json", module+"@"+version).Output()
		var downloaded struct{ GoMod string }
		if err == nil {
			err = json.Unmarshal(out, &downloaded)
		}
		if err != nil {
			t.Fatalf("getting %s %s: %v", module, version, err)
		}
		b, err := os.ReadFile(downloaded.GoMod)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range stagingRE.FindAllSubmatch(b, -1) {
			mod += fmt.Sprintf("replace %[1]s => %[1]s %[2]s\n", m[1], "v0"+strings.TrimPrefix(version, "v1"))
		}
	}
	files := map[string]string{"go.mod": mod}
	if mains[module] != "" {
		files["main.go"] = mains[module]
	}
	if module == nerdctl {
		// It replaces a module for tests by one in its own repository, and its
		// command needs one declaration of that.
		const tests = "github.com/containerd/nerdctl/mod/tigron"
		files["go.mod"] += "replace " + tests + " => ./tests\n"
		files["tests/go.mod"] = "module " + tests + "\n\ngo 1.26\n"
		files["tests/tig/tig.go"] = "package tig\n\ntype T interface {\n\tLog(...any)\n\tFailNow()\n}\n"
	}
	for name, content := range files {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// install makes the command that builds a program into out.
func install(t testing.TB, name, dir, out string) *exec.Cmd {
	program, version, _ := strings.Cut(tools[name], "@")
	env := append(os.Environ(), "GOBIN="+out, "CGO_ENABLED=0", "GOFLAGS=-mod=mod -trimpath")
	cmd := exec.Command("go", "install", tools[name])
	module, _, _ := strings.Cut(program, "/cmd")
	switch {
	case name == "trivy": // it has encoding/json/v2 as that was before it was released
		env = append(env, "GOTOOLCHAIN=go1.26.8", "GOEXPERIMENT=jsonv2")
	case mains[module] != "":
		dir = scratch(t, module, version)
		env = append(env, "CGO_ENABLED=1") // SOCI reads layers by zlib
		cmd = exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(out, executable(name)), "main.go")
	case slices.Contains([]string{buildkit, kubernetes, containerdV1, kaniko, nerdctl, compose}, module):
		dir = scratch(t, module, version)
		flags := "-s -w"
		if module == kubernetes { // it tells clients which one it is
			for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
				flags += fmt.Sprintf(" -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=1 -X %[1]s.gitMinor=%[3]s", pkg, version, strings.Split(version, ".")[1])
			}
		}
		cmd = exec.Command("go", "build", "-ldflags", flags, "-o", filepath.Join(out, executable(name)), program)
	}
	cmd.Dir, cmd.Env = dir, env // of no module, or of the scratch one
	return cmd
}

// executable is the file that a program is built as.
func executable(name string) string {
	program, _, _ := strings.Cut(tools[name], "@")
	if base := filepath.Base(program); base != "cmd" {
		return base
	}
	return name
}

// Source is what Tool builds a program from, as "PATH@VERSION".
func Source(name string) string { return tools[name] }

// Tool returns the path of a program, building it if need be.
func Tool(t testing.TB, name string) string {
	t.Helper()
	return locked(t, name, func(dir string) string {
		module, version, _ := strings.Cut(tools[name], "@")
		path := filepath.Join(dir, executable(name)+"@"+version)
		if main := mains[module]; main != "" {
			path += fmt.Sprintf("-%.8x", sha256.Sum256([]byte(main)))
		}
		if _, err := os.Stat(path); err == nil {
			return path
		}
		out := filepath.Join(dir, "new")
		cmd := install(t, name, dir, out)
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("building %s: %v\n%s", tools[name], err, b)
		}
		if err := os.Rename(filepath.Join(out, executable(name)), path); err != nil {
			t.Fatal(err)
		}
		return path
	})
}

var weir struct {
	sync.Mutex
	paths map[string]string // by version
}

// Weir returns the path of the weir binary built from this tree. With WEIR_RACE in
// the environment it has the race detector in it, and a test fails whose agent
// prints what that finds.
func Weir(t testing.TB) string {
	t.Helper()
	return weirVersion(t, "devel")
}

// NextWeir returns the path of another one, whose version is "next".
func NextWeir(t testing.TB) string {
	t.Helper()
	return weirVersion(t, "next")
}

func weirVersion(t testing.TB, version string) string {
	t.Helper()
	if path := os.Getenv("WEIR_BINARY"); path != "" && version == "devel" {
		return path // there is no Go where this runs
	}
	weir.Lock()
	defer weir.Unlock()
	if weir.paths == nil {
		weir.paths = make(map[string]string)
	}
	if weir.paths[version] == "" {
		weir.paths[version] = buildWeir(t, version)
	}
	return weir.paths[version]
}

func buildWeir(t testing.TB, version string) string {
	t.Helper()
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "weir").Output()
	if err != nil {
		t.Fatalf("finding weir's source: %v", err)
	}
	// One for each checkout, whose tests may run at the same time.
	name := fmt.Sprintf("weir-%.8x-%s", sha256.Sum256(root), version)
	// As the Makefile has it, and so from one cache.
	flags, env := "-X main.version="+version, "CGO_ENABLED=0"
	args := []string{"build", "-trimpath"}
	if os.Getenv("WEIR_RACE") != "" {
		name += "-race"
		// Static as well, for the image that has nothing else.
		args, env = append(args, "-race", "-tags", "netgo,osusergo"), "CGO_ENABLED=1"
		flags += " -linkmode external -extldflags=-static"
	}
	return locked(t, name, func(dir string) string {
		path := filepath.Join(dir, name, "weir")
		cmd := exec.Command("go", append(args, "-ldflags", flags, "-o", path, "weir/agent/weir")...)
		cmd.Env = append(os.Environ(), env)
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

// Debian returns the path of a program of a Debian package.
func Debian(t testing.TB, path, pkg string) string {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(fmt.Errorf("%w: install the package %s", err, pkg))
	}
	return path
}
