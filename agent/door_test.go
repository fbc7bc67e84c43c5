// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"weir/agent/procfs"
	"weir/bpf"
	"weir/proxy/upstream"
)

// ownCgroup makes a cgroup for the test.
func ownCgroup(t *testing.T) *os.File {
	t.Helper()
	needRoot(t)
	root, err := bpf.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(root, fmt.Sprintf("weir-doors-%d-", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		until(t, "removing the cgroup", func() bool { return os.Remove(dir) == nil })
	})
	cgroup, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cgroup.Close() })
	return cgroup
}

// watchedDoors are doors as an agent has them, for a cgroup of the test's own.
func watchedDoors(t *testing.T) (ds *doors, cgroup *os.File) {
	t.Helper()
	cgroup = ownCgroup(t)
	k, err := bpf.Load(bpf.Options{Cgroup: cgroup.Name()})
	if err != nil {
		t.Fatal(err)
	}
	ds = newDoors(k, upstream.Config{}, func(_ *door, c *net.TCPConn, t turn) { c.Close(); t.closed() }, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		ds.closeAll()
		ds.wg.Wait()
		k.Close()
	})
	go ds.ahead(t.Context())
	go func() {
		for {
			ev, err := k.Next()
			if err != nil {
				return
			}
			if ev.Kind == bpf.Gone {
				ds.gone(ev.PID)
			}
		}
	}()
	return ds, cgroup
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what, " doesn't come to an end")
		}
	}
}

func (ds *doors) of(ino uint64) *door {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	return ds.open[ino]
}

// entered is a process's door.
func (ds *doors) entered(t *testing.T, pid int) *door {
	t.Helper()
	err := ds.enter(pid)
	ino, nerr := procfs.Netns(pid)
	if err = errors.Join(err, nerr); err != nil {
		t.Fatal(err)
	}
	return ds.of(ino)
}

// A shell in a network namespace of its own, whose loopback interface is down.
func shellIn(t *testing.T, cgroup *os.File) (pid int, say func(string) string) {
	t.Helper()
	cmd := exec.Command("sh")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL, UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	lines := bufio.NewReader(out)
	return cmd.Process.Pid, func(s string) string {
		t.Helper()
		_, _ = io.WriteString(in, s+"\n")
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		return line
	}
}

// A namespace has a door from its first process on, the same until the last one
// that it is open for has ended, and nothing is left then.
func TestDoorAhead(t *testing.T) {
	ds, cgroup := watchedDoors(t)
	pid, say := shellIn(t, cgroup)
	ino, err := procfs.Netns(pid)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "waiting for a door", func() bool { return ds.of(ino) != nil })
	d := ds.of(ino)
	for range 5 {
		say("sh -c true; echo")
	}
	if ds.of(ino) != d {
		t.Error("the door didn't stay")
	}
	// It is closed with this shell, and opened again by what another program
	// that has stayed there starts.
	var stayed int
	if _, err := fmt.Sscan(say("sh -c 'while sleep 0.01; do :; done' >/dev/null & echo $!"), &stayed); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() { _ = syscall.Kill(stayed, syscall.SIGKILL) })
	t.Cleanup(stop)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "waiting for another door", func() bool { now := ds.of(ino); return now != nil && now != d })
	stop()
	until(t, "closing the door", func() bool {
		ds.mu.Lock()
		defer ds.mu.Unlock()
		return len(ds.open)+len(ds.at) == 0
	})
}

// A process that has gone elsewhere, or ended without a word, keeps no door.
func TestDoorReconcile(t *testing.T) {
	ds, cgroup := watchedDoors(t)
	pid, say := shellIn(t, cgroup)
	if err := ds.enter(pid); err != nil {
		t.Fatal(err)
	}
	before, _ := procfs.Netns(pid)
	say("echo; exec unshare -n sh")
	until(t, "going elsewhere", func() bool { now, err := procfs.Netns(pid); return err == nil && now != before })
	say("echo")
	until(t, "noticing that it has gone", func() bool { ds.reconcile(); return ds.of(before) == nil })
	if err := ds.enter(1 << 22); err == nil {
		t.Error("a process that isn't there has a door")
	}
	ds.arrived(bpf.Arrival{Netns: 1 << 40, PID: 1 << 22})
}

// Who comes to a door by itself, past the programs that refuse it, gets nothing
// there.
func TestDoorWithoutOrigin(t *testing.T) {
	ds, _ := watchedDoors(t)
	ds.serve = (&Agent{kernel: ds.kernel}).serve // which has nothing to serve it with
	d := ds.entered(t, os.Getpid())
	c, err := net.Dial("tcp", d.l4.Addr().String())
	var said []byte
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, werr := io.WriteString(c, "GET /v2/ HTTP/1.1\r\nHost: ghcr.io\r\n\r\n")
		said, err = io.ReadAll(c)
		err = errors.Join(werr, err) // a socket tells of it once
	}
	// It may be so soon that the connection isn't even seen.
	if len(said) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v", said, err)
	}
}

// What is an address in one network is another's in the next, but for the node's.
func TestDoorPlace(t *testing.T) {
	ds, cgroup := watchedDoors(t)
	one, _ := shellIn(t, cgroup)
	two, _ := shellIn(t, cgroup)
	places := []string{ds.entered(t, os.Getpid()).place, ds.entered(t, one).place, ds.entered(t, two).place}
	if places[0] != "" || places[1] == "" || places[2] == "" || places[1] == places[2] || !strings.HasSuffix(places[1], procfs.BootID()[:8]) {
		t.Errorf("%q", places)
	}
}

// One network namespace gets so many connections served and no more, until it
// has fewer again; others have doors of their own.
func TestDoorIsShut(t *testing.T) {
	ds, cgroup := watchedDoors(t)
	pid, _ := shellIn(t, cgroup)
	d, own := ds.entered(t, pid), ds.entered(t, os.Getpid())
	for _, step := range []struct {
		n    int
		shut bool
	}{{511, false}, {1, true}, {-1, true}, {-127, false}, {127, false}, {1, true}, {-512, false}} {
		for range max(step.n, -step.n) {
			ds.count(d, step.n/max(step.n, -step.n))
		}
		if d.shut != step.shut || own.shut {
			t.Errorf("with %d connections it is shut: %v; another: %v", d.active, d.shut, own.shut)
		}
	}
}

// Where there are too many connections in all, those network namespaces are shut
// that have more than their share, however many they are; the others notice
// nothing.
func TestDoorsShare(t *testing.T) {
	ds, _ := watchedDoors(t)
	fake := func(n int) (all []*door) {
		for i := range n {
			all = append(all, &door{cookie: 1<<40 + uint64(i), ns: &netns{}})
		}
		return all
	}
	quiet := fake(1)[0]
	for range 20 {
		ds.count(quiet, 1)
	}
	for _, pods := range []int{1, 3, 20, 150, 900} {
		greedy := fake(pods)
		served, direct := 0, 0
		for range 600 {
			for _, d := range greedy {
				if ds.count(d, 1) {
					served++
				} else {
					direct++
				}
			}
			if quiet.shut {
				t.Fatalf("with %d others, who have %d, one with %d is shut", pods, served, quiet.active)
			}
		}
		// What is over the share was there before.
		if most := maxAll*3/2 + pods*leastActive; served > most || direct != 600*pods-served || ds.flow.all != served+20 {
			t.Errorf("%d pods have %d connections served and %d direct; %d in all", pods, served, direct, ds.flow.all)
		}
		late := fake(1)[0]
		for range 5 {
			if !ds.count(late, 1) {
				t.Errorf("with %d pods, one that comes late is shut", pods)
			}
		}
		for _, d := range append(greedy, late) {
			for d.active > 0 {
				ds.count(d, -1)
			}
			if d.shut {
				t.Error("shut without a connection")
			}
		}
		if quiet.shut || ds.flow.crowded || ds.flow.all != 20 || len(ds.flow.busy) != 1 {
			t.Errorf("after %d pods: %+v", pods, ds.flow.all)
		}
	}
}

// A connection counts until what serves it says that it is closed.
func TestDoorCountsUntilClosed(t *testing.T) {
	ds, _ := watchedDoors(t)
	turns := make(chan turn, 1)
	ds.serve = func(_ *door, c *net.TCPConn, t turn) { c.Close(); turns <- t }
	d := ds.entered(t, os.Getpid())
	c, err := net.Dial("tcp", d.l4.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	active := func() int {
		ds.flow.mu.Lock()
		defer ds.flow.mu.Unlock()
		return d.active
	}
	turn := <-turns
	if n := active(); n != 1 || turn.direct {
		t.Errorf("%d connections", n)
	}
	turn.closed()
	turn.closed()
	if n := active(); n != 0 {
		t.Errorf("%d connections", n)
	}
}

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
