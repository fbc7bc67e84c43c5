// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// AddPort has connections to a TCP port redirected, and destinations at it that were
// looked at before are not left alone any more.
func (k *Kernel) AddPort(port uint16) error {
	if err := k.objs.WeirPorts.Put(port, uint8(1)); err != nil {
		return fmt.Errorf("redirecting port %d: %w", port, err)
	}
	var key kernelEndpoint
	var until uint64
	var at []kernelEndpoint
	all := k.objs.WeirLeft.Iterate()
	for all.Next(&key, &until) {
		if key.Port == uint32(port) && until > 0 {
			at = append(at, key)
		}
	}
	for _, key := range at {
		_ = k.objs.WeirLeft.Delete(&key) // or it has been evicted
	}
	return nil
}

// Leave has connections to a destination in a network namespace go direct for some
// time, and not be looked at.
func (k *Kernel) Leave(netns uint64, dst netip.AddrPort, long time.Duration) error {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return fmt.Errorf("reading the clock: %w", err)
	}
	key := endpoint(netns, dst)
	if err := k.objs.WeirLeft.Put(&key, uint64(ts.Nano())+uint64(long)); err != nil {
		return fmt.Errorf("leaving %s alone: %w", dst, err)
	}
	return nil
}

// Want has connections to a destination in a network namespace redirected, whatever
// its port.
func (k *Kernel) Want(netns uint64, dst netip.AddrPort) error {
	key := endpoint(netns, dst)
	if err := k.objs.WeirLeft.Put(&key, uint64(0)); err != nil {
		return fmt.Errorf("redirecting %s: %w", dst, err)
	}
	return nil
}

// Unleave takes Leave back, and that the destination was looked at.
func (k *Kernel) Unleave(netns uint64, dst netip.AddrPort) error {
	key := endpoint(netns, dst)
	if err := k.objs.WeirLeft.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("leaving %s alone no more: %w", dst, err)
	}
	return nil
}

func endpoint(netns uint64, a netip.AddrPort) kernelEndpoint {
	addr := a.Addr().As16()
	return kernelEndpoint{Netns: netns, Ip6: *(*[4]uint32)(unsafe.Pointer(&addr)), Port: uint32(a.Port())}
}

// Said is what a client has said first to a destination that it wasn't redirected
// from.
type Said struct {
	Netns uint64 // cookie
	Dst   netip.AddrPort
	PID   int // of the client, in the initial PID namespace
	// Direct says that the client is no tracked process, or one in [ModeProbe]. It has
	// connected to a port that is redirected for others.
	Direct bool
	Comm   string // of such a client
	Data   []byte // its beginning
}

// NextSaid waits for the next destination that was looked at. Each is looked at once in
// an hour, those that are Direct at most a hundred times a second. The error is [ErrClosed] once events are stopped. Only one goroutine may call
// it.
func (k *Kernel) NextSaid() (Said, error) {
	s, err := read[kernelSaid](k.said)
	if err != nil {
		return Said{}, err
	}
	addr := *(*[16]byte)(unsafe.Pointer(&s.Ip6))
	data := unsafe.Slice((*byte)(unsafe.Pointer(&s.Data)), len(s.Data))
	return Said{Netns: s.Netns, PID: int(s.Tgid), Direct: s.Direct != 0, Comm: text(s.Comm), Dst: netip.AddrPortFrom(netip.AddrFrom16(addr).Unmap(), uint16(s.Port)), Data: data[:min(int(s.Length), len(data))]}, nil
}
