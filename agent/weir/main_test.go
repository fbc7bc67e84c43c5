// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv("WEIR_TEST_LISTEN"); addr != "" {
		listen(addr)
	}
	if os.Getenv("WEIR_TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// listen takes connections and says nothing, until it is killed.
func listen(addr string) {
	l, err := net.Listen("tcp", addr)
	for err == nil {
		var c net.Conn
		if c, err = l.Accept(); err == nil {
			c.Close()
		}
	}
	os.Exit(1)
}

// binary is this test's binary where any user may run it.
func binary(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "weir")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "weir")
	b, err := os.ReadFile(os.Args[0])
	if err = errors.Join(err, os.Chmod(dir, 0o755), os.WriteFile(path, b, 0o755)); err != nil {
		t.Fatal(err)
	}
	return path
}

// weir runs the command and returns its exit code and what it printed.
func weir(t *testing.T, attr *syscall.SysProcAttr, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command(binary(t), args...)
	cmd.Env = append(append(os.Environ(), "WEIR_TEST_MAIN=1"), env...)
	cmd.SysProcAttr = attr
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// Each mistake gets an error of one line that says what to do.
func TestMistakes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dirs := []string{"--data-dir", filepath.Join(dir, "data"), "--run-dir", filepath.Join(dir, "run")}
	agentWith := func(args ...string) []string { return append(append([]string{"agent"}, dirs...), args...) }
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	broken := filepath.Join(dir, "broken")
	if err := os.MkdirAll(filepath.Join(broken, "ca"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(broken, "ca", "ca.key"), []byte("not a key"), 0o600); err != nil {
		t.Fatal(err)
	}

	for name, tt := range map[string]struct {
		attr *syscall.SysProcAttr
		env  []string
		args []string
		code int
		want []string // in the message
	}{
		"unknown command":     {args: []string{"frobnicate"}, code: 2, want: []string{"frobnicate", "--help"}},
		"unknown flag":        {args: []string{"agent", "--frobnicate"}, code: 2, want: []string{"--frobnicate", "weir agent --help"}},
		"stray argument":      {args: []string{"status", "now"}, code: 2, want: []string{`"now"`}},
		"not root":            {attr: nobody, args: agentWith(), code: 1, want: []string{"root", "sudo"}},
		"uninstall, not root": {attr: nobody, args: []string{"uninstall"}, code: 1, want: []string{"root", "sudo"}},
		"not a cgroup":        {args: agentWith("--cgroup", dir, "--admin", "127.0.0.1:0"), code: 1, want: []string{dir, "cgroup2", "--cgroup"}},
		"no such cgroup":      {args: agentWith("--cgroup", "/nowhere", "--admin", "127.0.0.1:0"), code: 1, want: []string{"/nowhere", "--cgroup"}},
		"port taken":          {args: agentWith("--admin", l.Addr().String()), code: 1, want: []string{l.Addr().String(), "in use", "--admin"}},
		"no CA file":          {args: agentWith("--registry", "a.test=/nowhere.pem"), code: 1, want: []string{"/nowhere.pem", "a.test"}},
		"not a CA file":       {args: agentWith("--registry", "a.test=/etc/passwd"), code: 1, want: []string{"/etc/passwd", "PEM"}},
		"empty registry":      {args: agentWith("--registry", "="), code: 1, want: []string{"--registry"}},
		"broken key":          {args: []string{"agent", "--data-dir", broken, "--run-dir", filepath.Join(dir, "run")}, code: 1, want: []string{"ca.key"}},
		"port number":         {args: agentWith("--ports", "70000"), code: 2, want: []string{"--ports", "70000"}},
		"store size":          {args: agentWith("--store-size", "many"), code: 2, want: []string{"--store-size", "20GiB"}},
		"log level":           {args: agentWith("--log-level", "loud"), code: 2, want: []string{"loud", "debug"}},
		"log format":          {args: agentWith("--log-format", "xml"), code: 2, want: []string{"xml", "json"}},
		"environment":         {env: []string{"WEIR_STORE_SIZE=lots"}, args: agentWith(), code: 2, want: []string{"lots"}},
		"environment, typed":  {env: []string{"WEIR_PORTS=x"}, args: agentWith(), code: 2, want: []string{"WEIR_PORTS"}},
		"no agent":            {args: []string{"status", "--admin", "127.0.0.1:1"}, code: 1, want: []string{"127.0.0.1:1", "weir agent"}},
		"no image":            {args: []string{"prefetch"}, code: 2, want: []string{"debian:12"}},
		"not an image":        {args: []string{"prefetch", "Not/An:Image:"}, code: 2, want: []string{"Not/An:Image:"}},
		"not a platform":      {args: []string{"prefetch", "--platform", "arm64", "debian"}, code: 2, want: []string{"arm64", "linux/arm64"}},
		"prefetch, no agent":  {args: []string{"prefetch", "--run-dir", dir, "debian:12"}, code: 1, want: []string{dir, "weir agent", "debian:12"}},
		"pulls, no agent":     {args: []string{"pulls", "--admin", "127.0.0.1:1"}, code: 1, want: []string{"127.0.0.1:1", "weir agent"}},
		"admin":               {args: []string{"status", "--admin", "nonsense"}, code: 2, want: []string{"--admin"}},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := weir(t, tt.attr, tt.env, tt.args...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			message, _, _ := strings.Cut(stderr, "\n")
			for _, w := range tt.want {
				if !strings.Contains(stderr, w) {
					t.Errorf("%q doesn't say %q", stderr, w)
				}
			}
			if !strings.HasPrefix(message, "weir: ") || strings.Count(stderr, "\n") > 2 {
				t.Errorf("not one line: %q", stderr)
			}
		})
	}
}
