// SPDX-License-Identifier: Apache-2.0

package redirect

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
	"weir/agent/internal/agenttest"
	"weir/agent/procfs"
	"weir/bpf"
	"weir/proxy/upstream"
)

// watchedListeners are listeners as an agent has them, for a cgroup of the test's own.
func watchedListeners(t *testing.T) (ls *Listeners, cgroup *os.File) {
	t.Helper()
	cgroup = agenttest.Cgroup(t)
	k, err := bpf.Load(bpf.Options{Cgroup: cgroup.Name()})
	if err != nil {
		t.Fatal(err)
	}
	ls = New(k, upstream.Config{}, func(_ *Listener, c *net.TCPConn, t Admission) { c.Close(); t.Closed() }, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		ls.CloseAll()
		ls.wg.Wait()
		k.Close()
	})
	go ls.Follow(t.Context())
	go func() {
		for {
			ev, err := k.Next()
			if err != nil {
				return
			}
			if ev.Kind == bpf.Gone {
				ls.Gone(ev.PID)
			}
		}
	}()
	return ls, cgroup
}

func (ls *Listeners) of(ino uint64) *Listener {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return ls.open[ino]
}

// entered is a process's listener.
func (ls *Listeners) entered(t *testing.T, pid int) *Listener {
	t.Helper()
	err := ls.Enter(pid)
	ino, nerr := procfs.Netns(pid)
	if err = errors.Join(err, nerr); err != nil {
		t.Fatal(err)
	}
	return ls.of(ino)
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

// A namespace has a listener from its first process on, the same until the last one
// that it is open for has ended, and nothing is left then.
func TestOpensAhead(t *testing.T) {
	ls, cgroup := watchedListeners(t)
	pid, say := shellIn(t, cgroup)
	ino, err := procfs.Netns(pid)
	if err != nil {
		t.Fatal(err)
	}
	agenttest.Until(t, "waiting for a listener", func() bool { return ls.of(ino) != nil })
	rl := ls.of(ino)
	for range 5 {
		say("sh -c true; echo")
	}
	if ls.of(ino) != rl {
		t.Error("the listener didn't stay")
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
	agenttest.Until(t, "waiting for another listener", func() bool { now := ls.of(ino); return now != nil && now != rl })
	stop()
	agenttest.Until(t, "closing the listener", func() bool {
		ls.mu.Lock()
		defer ls.mu.Unlock()
		return len(ls.open)+len(ls.at) == 0
	})
}

// A process that has gone elsewhere, or ended without an event, keeps no listener.
func TestReconcile(t *testing.T) {
	ls, cgroup := watchedListeners(t)
	pid, say := shellIn(t, cgroup)
	if err := ls.Enter(pid); err != nil {
		t.Fatal(err)
	}
	before, _ := procfs.Netns(pid)
	say("echo; exec unshare -n sh")
	agenttest.Until(t, "going elsewhere", func() bool { now, err := procfs.Netns(pid); return err == nil && now != before })
	say("echo")
	agenttest.Until(t, "noticing that it has gone", func() bool { ls.Reconcile(); return ls.of(before) == nil })
	if err := ls.Enter(1 << 22); err == nil {
		t.Error("a process that isn't there has a listener")
	}
	ls.Arrived(bpf.Arrival{Netns: 1 << 40, PID: 1 << 22})
}

// What is an address in one network is another's in the next, but for the node's.
func TestNetworkID(t *testing.T) {
	ls, cgroup := watchedListeners(t)
	one, _ := shellIn(t, cgroup)
	two, _ := shellIn(t, cgroup)
	places := []string{ls.entered(t, os.Getpid()).NetworkID, ls.entered(t, one).NetworkID, ls.entered(t, two).NetworkID}
	if places[0] != "" || places[1] == "" || places[2] == "" || places[1] == places[2] || !strings.HasSuffix(places[1], procfs.BootID()[:8]) {
		t.Errorf("%q", places)
	}
}

// One network namespace gets so many connections served and no more, until it
// has fewer again; others have listeners of their own.
func TestNamespaceIsLimited(t *testing.T) {
	ls, cgroup := watchedListeners(t)
	pid, _ := shellIn(t, cgroup)
	rl, own := ls.entered(t, pid), ls.entered(t, os.Getpid())
	for _, step := range []struct {
		n       int
		limited bool
	}{{511, false}, {1, true}, {-1, true}, {-127, false}, {127, false}, {1, true}, {-512, false}} {
		for range max(step.n, -step.n) {
			ls.count(rl, step.n/max(step.n, -step.n))
		}
		if rl.limited != step.limited || own.limited {
			t.Errorf("with %d connections it is limited: %v; another: %v", rl.active, rl.limited, own.limited)
		}
	}
}

// Where there are too many connections in all, those network namespaces are
// limited that have more than their share, however many they are; the others notice
// nothing.
func TestNamespacesShare(t *testing.T) {
	ls, _ := watchedListeners(t)
	fake := func(n int) (all []*Listener) {
		for i := range n {
			all = append(all, &Listener{cookie: 1<<40 + uint64(i), ns: &netns{}})
		}
		return all
	}
	quiet := fake(1)[0]
	for range 20 {
		ls.count(quiet, 1)
	}
	for _, pods := range []int{1, 3, 20, 150, 900} {
		greedy := fake(pods)
		served, direct := 0, 0
		for range 600 {
			for _, rl := range greedy {
				if ls.count(rl, 1) {
					served++
				} else {
					direct++
				}
			}
			if quiet.limited {
				t.Fatalf("with %d others, who have %d, one with %d is limited", pods, served, quiet.active)
			}
		}
		// What is over the share was there before.
		if most := maxAll*3/2 + pods*leastActive; served > most || direct != 600*pods-served || ls.load.all != served+20 {
			t.Errorf("%d pods have %d connections served and %d direct; %d in all", pods, served, direct, ls.load.all)
		}
		late := fake(1)[0]
		for range 5 {
			if !ls.count(late, 1) {
				t.Errorf("with %d pods, one that comes late is limited", pods)
			}
		}
		for _, rl := range append(greedy, late) {
			for rl.active > 0 {
				ls.count(rl, -1)
			}
			if rl.limited {
				t.Error("limited without a connection")
			}
		}
		if quiet.limited || ls.load.overloaded || ls.load.all != 20 || len(ls.load.busy) != 1 {
			t.Errorf("after %d pods: %+v", pods, ls.load.all)
		}
	}
}

// A connection counts until what serves it says that it is closed.
func TestCountsUntilClosed(t *testing.T) {
	ls, _ := watchedListeners(t)
	turns := make(chan Admission, 1)
	ls.serve = func(_ *Listener, c *net.TCPConn, t Admission) { c.Close(); turns <- t }
	rl := ls.entered(t, os.Getpid())
	c, err := net.Dial("tcp", rl.l4.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	active := func() int {
		ls.load.mu.Lock()
		defer ls.load.mu.Unlock()
		return rl.active
	}
	turn := <-turns
	if n := active(); n != 1 || turn.Direct {
		t.Errorf("%d connections", n)
	}
	turn.Closed()
	turn.Closed()
	if n := active(); n != 0 {
		t.Errorf("%d connections", n)
	}
}

// A connection that the kernel has made with a listener is served, also when the
// listener is closed before it was accepted.
func TestClosedWithConnectionsWaiting(t *testing.T) {
	ls, _ := watchedListeners(t)
	ls.serve = func(_ *Listener, c *net.TCPConn, t Admission) { _, _ = c.Write([]byte("x")); c.Close(); t.Closed() }
	var served, reset atomic.Int64
	for range 20 {
		addr := ls.entered(t, os.Getpid()).l4.Addr().String()
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
		ls.Gone(os.Getpid())
		wg.Wait()
	}
	if reset.Load() > 0 {
		t.Errorf("%d connections were made with a listener and then reset, %d were served", reset.Load(), served.Load())
	}
}
