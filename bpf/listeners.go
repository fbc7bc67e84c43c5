// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// OpenListener has tracked processes of a network namespace redirected to the
// given listeners, which must be in that namespace, at 127.0.0.1 and ::1. The
// second may be nil. They are redirected only while these addresses work, so the
// listeners may be there before the loopback interface is up. A listener that was
// registered there is replaced. It returns the namespace's cookie.
func (k *Kernel) OpenListener(l4, l6 *net.TCPListener) (cookie uint64, err error) {
	d := kernelListener{Port4: uint16(l4.Addr().(*net.TCPAddr).Port)}
	err = withFD(l4, func(fd int) error {
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return errors.Join(err, k.objs.WeirMarks.Put(uint32(fd), uint8(1)))
	})
	if err == nil && l6 != nil {
		d.Port6 = uint16(l6.Addr().(*net.TCPAddr).Port)
		err = withFD(l6, func(fd int) error { return k.objs.WeirMarks.Put(uint32(fd), uint8(1)) })
	}
	if err != nil {
		return 0, fmt.Errorf("marking a redirect listener: %w", err)
	}
	if err := k.objs.WeirListeners.Put(cookie, d); err != nil {
		return 0, fmt.Errorf("registering a redirect listener: %w", err)
	}
	return cookie, nil
}

// SuspendListener ends redirecting to a listener for now, or begins it again.
func (k *Kernel) SuspendListener(cookie uint64, suspended bool) error {
	var d kernelListener
	err := k.objs.WeirListeners.Lookup(cookie, &d)
	if err == nil {
		d.Suspended = 0
		if suspended {
			d.Suspended = 1
		}
		err = k.objs.WeirListeners.Update(cookie, d, ebpf.UpdateExist)
	}
	if err != nil {
		return fmt.Errorf("suspending a redirect listener: %w", err)
	}
	return nil
}

// CloseListener ends redirecting in a network namespace. It is called before the
// listeners are closed, and for an [Arrival] that gets no listener: the next
// process that is started there is an arrival again.
func (k *Kernel) CloseListener(cookie uint64) error {
	if err := k.objs.WeirListeners.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("unregistering a redirect listener: %w", err)
	}
	return nil
}

// Arrival reports a network namespace without a listener: a process has been
// forked in it, or has started a program there.
type Arrival struct {
	Netns  uint64 // cookie
	PID    int    // of the process, in the initial PID namespace
	Parent int    // of its parent, if that is in there too; else 0
}

// NextArrival waits for the next network namespace. Each is reported once, until
// its listener is unregistered ([Kernel.CloseListener]). The error is [ErrClosed] once events
// are stopped. Only one goroutine may call it.
func (k *Kernel) NextArrival() (Arrival, error) {
	a, err := read[kernelArrival](k.arrivals)
	if err != nil {
		return Arrival{}, err
	}
	return Arrival{Netns: a.Netns, PID: int(a.Tgid), Parent: int(a.Parent)}, nil
}
