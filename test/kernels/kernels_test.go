// SPDX-License-Identifier: Apache-2.0

// Package kernels runs weir on other kernels than this machine's, and on another
// architecture.
package kernels

import (
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"weir/test/lab"
)

// TestMain is also a machine's first process, and what it runs the steps with.
func TestMain(m *testing.M) {
	switch {
	case os.Getpid() == 1:
		boot()
	case len(os.Args) == 2 && os.Args[1] == "steps":
		if err := runSteps(); err != nil {
			fmt.Println(mark, "steps", err)
		}
		return
	case os.Getuid() != 0:
		fmt.Fprintln(os.Stderr, "these tests need root: they make namespaces and load eBPF programs")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// build builds the programs that a machine runs, static ones.
func build(t testing.TB, arch string) map[string]string {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{"/etc/ssl/certs/ca-certificates.crt": "/etc/ssl/certs/ca-certificates.crt"}
	for to, args := range map[string][]string{
		"/root/weir":     {"build", "-trimpath", "weir/agent/weir"},
		"/root/bpf.test": {"test", "-c", "weir/bpf"},
		"/init":          {"test", "-c", "weir/test/kernels"},
	} {
		out := filepath.Join(dir, filepath.Base(to))
		cmd := exec.Command("go", append([]string{args[0], "-o", out}, args[1:]...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %v: %v\n%s", args, err, b)
		}
		files[to] = out
	}
	// The lab's registry, where the lab looks for it.
	mods, err := exec.Command("go", "env", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	source := lab.Source("registry")
	cmd := exec.Command("go", "install", source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch, "GOBIN=", "GOPATH="+dir, "GOMODCACHE="+strings.TrimSpace(string(mods)))
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", source, err, b)
	}
	built, _ := filepath.Glob(filepath.Join(dir, "bin/registry"))
	other, _ := filepath.Glob(filepath.Join(dir, "bin/*/registry"))
	files["/root/.cache/weir-test/"+path.Base(source)] = append(built, other...)[0]
	return files
}

// The kernel side's own tests, and a story of pulls, on the oldest kernel that
// weir supports, on those of Debian 12 and 13, and on the newest that Debian has.
// One is too old. Their cgroups are of version 2 alone.
func TestKernels(t *testing.T) {
	files := build(t, "amd64")
	for _, k := range []struct{ suite, release string }{{"jammy", "5.15."}, {"bookworm", "6.1."}, {"trixie", "6.12."}, {"sid", ""}} {
		t.Run(k.suite, func(t *testing.T) {
			m := newMachine(t, k.suite, "amd64", "containerd", "docker.io") // one after the other: they have packages in common
			t.Parallel()
			runAll(t, m, files, k.release)
		})
	}
	t.Run("bullseye", func(t *testing.T) {
		m := newMachine(t, "bullseye", "amd64")
		t.Parallel()
		tooOld(t, m, files)
	})
}

// The same on arm64.
func TestARM64(t *testing.T) {
	runAll(t, newMachine(t, "bookworm", "arm64", "containerd", "docker.io"), build(t, "arm64"), "6.1.")
}

// runAll runs what there is to be run on a kernel whose release begins so, but
// for what bpf does thousands of times, which takes too long.
func runAll(t *testing.T, m *machine, files map[string]string, release string) {
	t.Helper()
	results, console := m.run(files,
		step{Name: "kernel", Args: []string{"uname", "-r"}},
		step{Name: "doctor", Args: []string{"/root/weir", "doctor"}},
		step{Name: "bpf", Args: []string{"/root/bpf.test", "-test.v", "-test.skip=^TestArrivalsLost$"}, Dir: "/root"},
		step{Name: "story", Args: []string{"/init", "-test.v", "-test.run=^TestStory$"}, Dir: "/root"})
	for _, s := range []string{"kernel", "doctor", "bpf", "story"} {
		if results[s] != passed {
			t.Errorf("%s: %q", s, results[s])
		}
	}
	_, after, _ := strings.Cut(console, "uname -r\n")
	is, _, _ := strings.Cut(after, "\n")
	if t.Log("Linux ", is); !strings.HasPrefix(is, release) {
		t.Errorf("it isn't %s", release)
	}
	if t.Failed() {
		t.Logf("--- console\n%s", console)
	}
}

// tooOld runs what says that a kernel is too old, and which is needed.
func tooOld(t *testing.T, m *machine, files map[string]string) {
	t.Helper()
	results, console := m.run(files,
		step{Name: "doctor", Args: []string{"/root/weir", "doctor"}},
		step{Name: "agent", Args: []string{"/root/weir", "agent"}})
	for _, s := range []string{"doctor", "agent"} {
		if results[s] == passed || results[s] == "" {
			t.Errorf("%s: %q", s, results[s])
		}
	}
	if n := strings.Count(console, "this kernel is Linux 5.10, which is too old; use Linux 5.15 or later"); n < 2 {
		t.Errorf("it is said %d times", n)
	}
	if strings.Contains(console, "CAP_BPF") {
		t.Error("capabilities are said to be missing")
	}
	if t.Failed() {
		t.Logf("--- console\n%s", console)
	}
}
