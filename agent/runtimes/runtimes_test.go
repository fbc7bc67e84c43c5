// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
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

// seeing is a kernel side without one, and listeners of nothing.
type seeing struct {
	Kernel
	Listeners
	guests func(n int)
}

func (seeing) Mode(int) (bpf.Mode, bool)         { return bpf.ModeProbe, true }
func (seeing) Track(int, bpf.Mode) (bool, error) { return false, nil }
func (s seeing) SeededGuests(n int) error        { s.guests(n); return nil }
func (seeing) Arrived(bpf.Arrival)               {}
func (seeing) Enter(int) error                   { return fs.ErrNotExist }
func (seeing) AddForeign(string)                 {}
func (seeing) RemoveForeign(string)              {}

// When a containerd that is running is looked at, a ctr that is, whatever its place, is
// counted already.
func TestSeedCountsGuestsFirst(t *testing.T) {
	cgroup := agenttest.Cgroup(t)
	for dir, name := range map[string]string{"a": "containerd", "b": "ctr"} { // in that order they are found
		bin := filepath.Join(t.TempDir(), name)
		if err := errors.Join(os.Symlink("/bin/sleep", bin), os.Mkdir(filepath.Join(cgroup.Name(), dir), 0o755)); err != nil {
			t.Fatal(err)
		}
		below, err := os.Open(filepath.Join(cgroup.Name(), dir))
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(bin, "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, UseCgroupFD: true, CgroupFD: int(below.Fd())}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			below.Close()
			agenttest.Until(t, "removing a cgroup", func() bool { return os.Remove(below.Name()) == nil })
		})
	}
	ca, err := trust.OpenCA(t.TempDir(), []string{"ghcr.io"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var rs *Runtimes
	counted := 0
	k := seeing{guests: func(n int) {
		counted = n
		if len(rs.all) > 0 {
			t.Errorf("%d are looked at before", len(rs.all))
		}
	}}
	rs = New(ctx, Options{Kernel: k, Listeners: k, Content: k, CA: ca, RunDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	defer rs.Wait()
	defer cancel()
	if err := rs.Seed(cgroup.Name()); err != nil || counted != 1 || len(rs.all) != 2 {
		t.Errorf("%d are counted, %d are looked at: %v", counted, len(rs.all), err)
	}
}
