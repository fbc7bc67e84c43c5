// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"weir/agent/internal/agenttest"
)

// inNewNetns runs a process in a network namespace of its own, with lo up or
// not, and returns its pid.
func inNewNetns(t *testing.T, loUp bool) int {
	t.Helper()
	agenttest.Root(t)
	script := "echo; exec sleep 1000"
	if loUp {
		script = "ip link set lo up && ip addr add 203.0.113.7/32 dev lo && " + script
	}
	cmd := exec.Command("sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal("setting up a network namespace: ", err)
	}
	return cmd.Process.Pid
}

func listenIn(t *testing.T, ns *netns, addr string) (l *net.TCPListener) {
	t.Helper()
	if err := ns.do(func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err := lc.Listen(context.Background(), "tcp", addr)
		if err == nil {
			l = ln.(*net.TCPListener)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestNetns(t *testing.T) {
	ns, err := openNetns(inNewNetns(t, true))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if ns.own {
		t.Error("another namespace is taken for the own one")
	}
	l := listenIn(t, ns, "203.0.113.7:0")
	addr := netip.MustParseAddrPort(l.Addr().String())
	// It is there, and only there.
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "hello")
			c.Close()
		}
	}()
	for range 50 {
		c, err := ns.dial(t.Context(), addr)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := c.Read(b); err != nil || string(b) != "hello" {
			t.Fatalf("%q, %v", b, err)
		}
		c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr.String()); err == nil {
		c.Close()
		t.Error("it can be reached from outside")
	}
	if _, err := ns.dial(t.Context(), netip.MustParseAddrPort("203.0.113.7:1")); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a port without a listener: %v", err)
	}
	if _, err := ns.dial(t.Context(), netip.MustParseAddrPort("198.51.100.1:443")); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("no route: %v", err)
	}
	if _, err := ns.dial(t.Context(), netip.MustParseAddrPort("[2001:db8::1]:443")); err == nil {
		t.Error("no IPv6 route, and yet a connection")
	}
	// No thread has stayed behind.
	tasks, _ := filepath.Glob("/proc/self/task/*/ns/net")
	home, _ := os.Readlink("/proc/self/ns/net")
	for _, task := range tasks {
		if at, err := os.Readlink(task); err == nil && at != home {
			t.Errorf("%s is in %s", task, at)
		}
	}
}

// A listener's network namespace may be closed while a connection is being opened
// there, whose result isn't awaited. It is opened there, or not at all: never where
// the descriptor's number leads next.
func TestNetnsClosedMeanwhile(t *testing.T) {
	pid := inNewNetns(t, true)
	for range 200 {
		ns, err := openNetns(pid)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				err := ns.do(func() error {
					var st unix.Stat_t
					if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil || st.Ino != ns.ino {
						t.Errorf("in the network namespace %d instead of %d: %v", st.Ino, ns.ino, err)
					}
					return nil
				})
				if err != nil && !errors.Is(err, os.ErrClosed) {
					t.Error(err)
				}
			})
		}
		wg.Go(func() { ns.Close() })
		wg.Go(func() { // whose descriptor may get the same number
			if other, err := openNetns(os.Getpid()); err == nil {
				other.Close()
			}
		})
		wg.Wait()
		if err := ns.do(func() error { t.Error("in a closed network namespace"); return nil }); !errors.Is(err, os.ErrClosed) {
			t.Errorf("a closed network namespace: %v", err)
		}
	}
}

// A dial that gets no answer ends with its context, and holds no thread.
func TestNetnsDialCancelled(t *testing.T) {
	pid := inNewNetns(t, true)
	ns, err := openNetns(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	l := listenIn(t, ns, "127.0.0.1:0")
	// Nothing accepts: once the backlog is full, SYNs get no answer.
	raw, _ := l.SyscallConn()
	_ = raw.Control(func(fd uintptr) { _ = unix.Listen(int(fd), 0) })
	addr := netip.MustParseAddrPort(l.Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	for {
		c, err := ns.dial(ctx, addr)
		if err == nil {
			defer c.Close()
			continue
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		break
	}
}

// A listener's listeners are there before the loopback interface is, and are reached
// once it is up; their ports are none that a program is given.
func TestListenBeforeLoopback(t *testing.T) {
	pid := inNewNetns(t, false)
	ns, err := openNetns(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	l4, l6, err := ns.listen()
	if err != nil || l6 == nil {
		t.Fatal(l6, err)
	}
	defer l4.Close()
	defer l6.Close()
	for _, l := range []*net.TCPListener{l4, l6} {
		addr := l.Addr().(*net.TCPAddr).AddrPort()
		if p := addr.Port(); p < firstPort || p > lastPort {
			t.Errorf("port %d", p)
		}
		if c, err := ns.dial(t.Context(), addr); err == nil {
			c.Close()
			t.Errorf("%s can be reached while the interface is down", addr)
		}
	}
	if out, err := exec.Command("nsenter", "-n", "-t", fmt.Sprint(pid), "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	for _, l := range []*net.TCPListener{l4, l6} {
		c, err := ns.dial(t.Context(), l.Addr().(*net.TCPAddr).AddrPort())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// A program that takes all the ports that redirect listeners have doesn't keep an
// agent from starting.
func TestListenWhereAllIsTaken(t *testing.T) {
	ns, err := openNetns(inNewNetns(t, true))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	for port := firstPort; port <= lastPort; port++ {
		listenIn(t, ns, fmt.Sprintf("127.0.0.1:%d", port))
		listenIn(t, ns, fmt.Sprintf("[::1]:%d", port))
	}
	l4, l6, err := ns.listen()
	if err != nil || l6 == nil {
		t.Fatal(l6, err)
	}
	l4.Close()
	l6.Close()
}

// The descriptors of many listeners' namespaces are given back.
func TestDescriptorsAreGivenBack(t *testing.T) {
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	pid := inNewNetns(t, true)
	before := 0
	for i := range 100 {
		if i == 1 { // the runtime has its own descriptors by now
			before = count()
		}
		ns, err := openNetns(pid)
		if err != nil {
			t.Fatal(err)
		}
		l4, l6, err := ns.listen()
		if err != nil {
			t.Fatal(err)
		}
		l4.Close()
		l6.Close()
		ns.Close()
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}
