// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// ErrNoOrigin says that a connection was not redirected here.
var ErrNoOrigin = errors.New("the connection was not redirected")

// Origin is what is known of a redirected connection.
type Origin struct {
	Dst    netip.AddrPort // the original destination
	PID    int            // of the client, in the initial PID namespace
	Mode   Mode           // that the client was in
	Netns  uint64         // cookie of the client's network namespace
	Cgroup uint64         // id of the client's cgroup
}

// Origin returns the original destination of an accepted connection. The error is
// [ErrNoOrigin] for one that was not redirected.
func (k *Kernel) Origin(c *net.TCPConn) (Origin, error) {
	var o kernelOrigin
	err := withFD(c, func(fd int) error {
		err := k.objs.WeirAccepted.Lookup(uint32(fd), &o)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			err = k.handedOver(c, fd, &o)
		}
		return err
	})
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return Origin{}, ErrNoOrigin
	}
	if err != nil {
		return Origin{}, fmt.Errorf("looking up a connection's original destination: %w", err)
	}
	addr := *(*[16]byte)(unsafe.Pointer(&o.Ip6)) // in network order, as are the ports
	port := *(*[2]byte)(unsafe.Pointer(&o.Port))
	return Origin{
		Dst:    netip.AddrPortFrom(netip.AddrFrom16(addr).Unmap(), uint16(port[0])<<8|uint16(port[1])),
		PID:    int(o.Tgid),
		Mode:   Mode(o.Mode),
		Netns:  o.Netns,
		Cgroup: o.Cgroup,
	}, nil
}

// handedOver takes the origin from where the client's side has put it. The
// programs see only the sockets of their cgroups: when the listener's is not
// among them, because this process is elsewhere, the origin is still there.
func (k *Kernel) handedOver(c *net.TCPConn, fd int, o *kernelOrigin) error {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return err
	}
	key := endpoint(cookie, c.RemoteAddr().(*net.TCPAddr).AddrPort())
	return k.objs.WeirHandover.LookupAndDelete(&key, o)
}

func withFD(c syscall.Conn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	return errors.Join(raw.Control(func(fd uintptr) { ferr = f(int(fd)) }), ferr)
}
