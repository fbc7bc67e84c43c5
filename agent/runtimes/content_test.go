// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"weir/agent/internal/agenttest"
	"weir/agent/trust"
)

// Blobs are read in place where root of the node keeps them, and nowhere else.
func TestIsNodes(t *testing.T) {
	agenttest.Root(t)
	lasting := trust.LastingRoots()
	one := []syscall.SysProcIDMap{{HostID: 1000, Size: 1}}
	for name, c := range map[string]struct {
		as   syscall.SysProcAttr
		want bool
	}{
		"root":                       {syscall.SysProcAttr{}, true},
		"an ordinary user":           {syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}, false},
		"root in another directory":  {syscall.SysProcAttr{Chroot: "/usr"}, false},
		"root in other mounts":       {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}, false},
		"who is root in a namespace": {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: one, GidMappings: one, Credential: &syscall.Credential{NoSetGroups: true}}, false},
		"root in another network":    {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, true},
	} {
		cmd := &exec.Cmd{Path: "/bin/sleep", Args: []string{"sleep", "60"}, SysProcAttr: &c.as}
		if err := cmd.Start(); err != nil {
			t.Fatal(name, err)
		}
		if got := isNodes(cmd.Process.Pid, lasting); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if isNodes(cmd.Process.Pid, lasting) {
			t.Errorf("%s: and when it has ended", name)
		}
	}
}
