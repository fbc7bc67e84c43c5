// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"weir/bpf"
)

// A connection that the kernel has made with a door is served, also when the
// door is closed before anybody has accepted it.
func TestDoorClosedWithConnectionsWaiting(t *testing.T) {
	ds, _ := watchedDoors(t)
	ds.serve = func(_ *door, c *net.TCPConn, t turn) { _, _ = c.Write([]byte("x")); c.Close(); t.closed() }
	var served, reset atomic.Int64
	for range 20 {
		addr := ds.entered(t, os.Getpid()).l4.Addr().String()
		var made, wg sync.WaitGroup
		for range 20 {
			made.Add(1)
			wg.Go(func() {
				c, err := net.Dial("tcp", addr)
				made.Done()
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				if _, err := c.Read(make([]byte, 1)); err != nil {
					reset.Add(1)
				} else {
					served.Add(1)
				}
			})
		}
		made.Wait()
		ds.gone(os.Getpid())
		wg.Wait()
	}
	if reset.Load() > 0 {
		t.Errorf("%d connections were made with a door and then reset, %d were served", reset.Load(), served.Load())
	}
}

// What is asked of an ending agent doesn't use what it has closed. The race
// detector tells.
func TestAskedAtTheEnd(t *testing.T) {
	cgroup := ownCgroup(t)
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		ready, ended := make(chan *Agent, 1), make(chan error, 1)
		go func() {
			ended <- Run(ctx, Config{DataDir: t.TempDir(), RunDir: t.TempDir(), Cgroup: cgroup.Name(), Ports: []uint16{443}, Admin: "127.0.0.1:0",
				StoreSize: 1 << 20, Log: slog.New(slog.DiscardHandler)}, func(a *Agent) { ready <- a })
		}()
		var a *Agent
		select {
		case a = <-ready:
		case err := <-ended:
			t.Fatal(err)
		}
		url := "http://" + a.adminL.Addr().String() + "/api/status"
		var wg sync.WaitGroup
		asked := make(chan struct{}, 1)
		over := make(chan struct{})
		for range 4 {
			wg.Go(func() {
				for {
					select {
					case <-over:
						return
					default:
					}
					if resp, err := http.Get(url); err == nil {
						_, _ = io.Copy(io.Discard, resp.Body)
						resp.Body.Close()
						select {
						case asked <- struct{}{}:
						default:
						}
					}
				}
			})
		}
		<-asked
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		close(over)
		wg.Wait()
	}
}

// What has ended isn't tracked any more, whatever was still being found out
// about it: the next process of its number isn't it.
func TestNotTrackedAfterEnd(t *testing.T) {
	cgroup := ownCgroup(t)
	k, err := bpf.Load(bpf.Options{Cgroup: cgroup.Name(), Names: programs()})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	a := &Agent{kernel: k, log: log, ctx: ctx}
	rs := newRuntimes(a, openState(t.TempDir(), "x", log))
	a.runtimes = rs
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
	until(t, "tracking", func() bool { _, ok := k.Mode(pid); return ok })
	p, err := readProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	rt := &runtimeProc{process: p, kind: kindOf("buildkitd"), settled: make(chan struct{})}
	rt.ctx, rt.cancel = context.WithCancel(ctx)
	rs.all[pid] = rt
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if _, ok := k.Mode(pid); ok {
		t.Fatal("the kernel side didn't forget it")
	}
	// Before the news of its end is read, and after.
	rs.intercept(rt, trustByStart, ground{})
	if m, ok := k.Mode(pid); ok {
		t.Errorf("it is still tracked, as %d", m)
	}
	rs.ended(pid)
	rs.intercept(rt, trustByStart, ground{})
	if rs.state.remembers(rt) != rememberedNothing {
		t.Error("it is remembered")
	}
}

// What a killed agent was writing goes with the rest.
func TestRemoveOwnHalfWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "weir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{tagsFile, tagsFile + ".1234567", identityFile, identityFile + ".7654321"} {
		if err := os.WriteFile(filepath.Join(dir, n), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := removeOwn(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v, %v", left, err)
	}
}
