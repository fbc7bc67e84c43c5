// SPDX-License-Identifier: Apache-2.0

// Package agenttest has what tests of several of the agent's parts need.
package agenttest

import (
	"fmt"
	"os"
	"testing"
	"time"

	"weir/bpf"
)

// Root fails a test that root doesn't run.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
}

// Cgroup makes a cgroup for the test.
func Cgroup(t testing.TB) *os.File {
	t.Helper()
	Root(t)
	root, err := bpf.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(root, fmt.Sprintf("weir-test-%d-", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		Until(t, "removing the cgroup", func() bool { return os.Remove(dir) == nil })
	})
	cgroup, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cgroup.Close() })
	return cgroup
}

// Until waits until something is so.
func Until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what, " doesn't come to an end")
		}
	}
}
