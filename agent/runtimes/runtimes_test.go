// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"weir/agent/internal/agenttest"
	"weir/agent/procfs"
	"weir/agent/trust"
	"weir/bpf"
)

// What has ended isn't tracked any more, whatever was still being found out
// about it: the next process of its number isn't it.
func TestNotTrackedAfterEnd(t *testing.T) {
	cgroup := agenttest.Cgroup(t)
	names, guests := Programs()
	k, err := bpf.Load(bpf.Options{Cgroup: cgroup.Name(), Names: names, Guests: guests})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	ca, err := trust.OpenCA(t.TempDir(), []string{"ghcr.io"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	rs := New(ctx, Options{Kernel: k, CA: ca, RunDir: t.TempDir(), Log: log})
	bin := filepath.Join(t.TempDir(), "buildkitd")
	if err := os.Symlink("/bin/sleep", bin); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	agenttest.Until(t, "tracking", func() bool { _, ok := k.Mode(pid); return ok })
	p, err := procfs.Read(pid)
	if err != nil {
		t.Fatal(err)
	}
	rt := &Runtime{Process: p, kind: kindOf("buildkitd"), settled: make(chan struct{})}
	rt.ctx, rt.cancel = context.WithCancel(ctx)
	rs.all[pid] = rt
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if _, ok := k.Mode(pid); ok {
		t.Fatal("the kernel side didn't forget it")
	}
	// Before the event of its end is read, and after.
	rs.intercept(rt, trustByStart, basis{}, 1)
	if m, ok := k.Mode(pid); ok {
		t.Errorf("it is still tracked, as %d", m)
	}
	rs.Ended(pid)
	rs.intercept(rt, trustByStart, basis{}, 1)
	if rs.state.savedTrust(rt) != 0 {
		t.Error("it is remembered")
	}
}

// A program that ends with its pull may be started without end: why it is passed
// through is logged once, and each time of a daemon.
func TestPassThroughIsLogged(t *testing.T) {
	cgroup := agenttest.Cgroup(t)
	names, guests := Programs()
	k, err := bpf.Load(bpf.Options{Cgroup: cgroup.Name(), Names: names, Guests: guests})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ca, err := trust.OpenCA(t.TempDir(), []string{"ghcr.io"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	rs := New(t.Context(), Options{Kernel: k, CA: ca, RunDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil))})
	for name, want := range map[string]int{"crane": 2, "dockerd": 6} {
		log.Reset()
		for _, reason := range []string{"one reason", "another"} {
			for range 3 {
				rt := &Runtime{kind: kindOf(name), settled: make(chan struct{}), ctx: t.Context()}
				rs.passThrough(rt, reason, "")
			}
		}
		if n := strings.Count(log.String(), "passed through"); n != want {
			t.Errorf("%s: %d lines, want %d:\n%s", name, n, want, log.String())
		}
	}
}
