// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// netns is a network namespace, held by descriptor. Holding one keeps it
// alive, so it is closed with the last process that a listener is open for.
type netns struct {
	file *os.File
	ino  uint64
	own  bool // the agent's own
}

// openNetns opens the network namespace of a process.
func openNetns(pid int) (*netns, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
	if err != nil {
		return nil, fmt.Errorf("opening the network namespace of process %d: %w", pid, err)
	}
	var st, self unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &st), unix.Stat("/proc/self/ns/net", &self)); err != nil {
		f.Close()
		return nil, err
	}
	return &netns{f, st.Ino, st.Ino == self.Ino && st.Dev == self.Dev}, nil
}

func (n *netns) Close() error { return n.file.Close() }

// do runs f on a thread that is in the namespace. Sockets that f makes belong
// to the namespace for good; f must not start goroutines that make some.
func (n *netns) do(f func() error) error {
	if n.own {
		return f()
	}
	done := make(chan error, 1)
	go func() { done <- n.inside(f) }()
	return <-done
}

// inside is do, on a goroutine of its own.
func (n *netns) inside(f func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := n.enter(); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("entering a network namespace: %w", err)
	}
	err = f()
	// A thread that can't come back stays locked, and so ends with this
	// goroutine.
	if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}

// enter has the thread enter the namespace. It may be closed meanwhile: its
// descriptor is not another's before the thread is there. The error is
// [os.ErrClosed] when it is closed already.
func (n *netns) enter() error {
	raw, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	var entered error
	if raw.Control(func(fd uintptr) { entered = unix.Setns(int(fd), unix.CLONE_NEWNET) }) != nil {
		return os.ErrClosed
	}
	return entered
}

// A redirect listener's port is one of those that are assigned to nothing (IANA) and that the
// kernel doesn't give out by itself, so that no program finds its own taken.
const firstPort, lastPort = 29170, 29998

// listen opens listeners on 127.0.0.1 and ::1, the second of which may be nil.
// They can be had before the loopback interface is up.
func (n *netns) listen() (l4, l6 *net.TCPListener, err error) {
	err = n.do(func() (err error) {
		if l4, err = listenOn("tcp4", "127.0.0.1"); err != nil {
			return err
		}
		l6, _ = listenOn("tcp6", "::1") // there may be no IPv6 here
		return nil
	})
	return l4, l6, err
}

// listenOn listens on a free port of those.
func listenOn(network, host string) (*net.TCPListener, error) {
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) (err error) {
		if network != "tcp6" {
			return nil
		}
		// ::1 appears when the interface comes up.
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1) })
		return errors.Join(cerr, err)
	}}
	lc.SetMultipathTCP(false) // the kernel side marks plain TCP sockets
	for try := 0; ; try++ {
		port := firstPort + rand.IntN(lastPort-firstPort+1)
		if try == 20 {
			port = 0 // most of them are taken
		}
		l, err := lc.Listen(context.Background(), network, net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			return l.(*net.TCPListener), nil
		}
		if !errors.Is(err, unix.EADDRINUSE) || port == 0 {
			return nil, err
		}
	}
}

// dial connects to addr from inside the namespace. Only the socket's creation
// needs a thread there; waiting for the connection holds none.
func (n *netns) dial(ctx context.Context, addr netip.AddrPort) (*net.TCPConn, error) {
	var fd int
	err := n.do(func() (err error) {
		family := unix.AF_INET6
		if addr.Addr().Is4() {
			family = unix.AF_INET
		}
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dialling %s: %w", addr, err)
	}
	f := os.NewFile(uintptr(fd), "") // pollable, because it doesn't block
	defer f.Close()
	if err := connect(ctx, f, addr); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("dialling %s: %w", addr, err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("dialling %s: %w", addr, err)
	}
	return c.(*net.TCPConn), nil
}

func connect(ctx context.Context, f *os.File, addr netip.AddrPort) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sa unix.Sockaddr
	if addr.Addr().Is4() {
		sa = &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	} else {
		sa = &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	}
	// A deadline in the past wakes the wait below.
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(past) })
	defer stop()
	started := false
	var cerr error
	err = raw.Write(func(fd uintptr) bool {
		if !started {
			started = true
			cerr = unix.Connect(int(fd), sa)
			return !errors.Is(cerr, unix.EINPROGRESS)
		}
		var soerr int
		if soerr, cerr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); cerr != nil {
			return true
		}
		switch syscall.Errno(soerr) {
		case 0:
			// Writable without an error may still be too early.
			_, perr := unix.Getpeername(int(fd))
			return perr == nil
		case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
			return false
		}
		cerr = syscall.Errno(soerr)
		return true
	})
	return errors.Join(err, cerr)
}

// past is a deadline that is over.
var past = time.Unix(1, 0)
