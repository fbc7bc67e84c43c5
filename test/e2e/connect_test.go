// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"weir/test/lab"
)

// Connections that are made in other ways than by connect(2) in the process that
// uses them: by io_uring, by its worker threads, on a device, and in another process
// that hands them over. They are intercepted when the process that connects is
// followed, and pass through otherwise; either way what is private needs credentials.
// What is public needs no token where they are intercepted: any client is given one.
func TestConnectedOtherwise(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hub.User("alice", "wonderland")
	w.hub.Private("acme/secret", "alice")
	secret := w.hub.Push("acme/secret:1", lab.Image{Layers: []int{700_000}, Seed: 3})
	open := w.hub.Push("acme/open:1", lab.Image{Layers: []int{700_000}, Seed: 4})
	node := w.Node()
	agent := node.Agent()
	docker := node.Docker()
	docker.Pull("acme/secret:1", "alice", "wonderland")
	docker.Pull("acme/open:1")
	crane, other := clientNamed(t, "crane"), clientNamed(t, "teapot")
	for _, tt := range []struct {
		program, how string
		intercepted  bool
	}{
		{crane, "connect", true},
		{crane, "io_uring", true},
		{crane, "io_uring worker", true},
		{crane, "device", false},
		{crane, "hands over to " + other, true},
		{other, "hands over to " + crane, false},
	} {
		before := agent.Status().Connections.Intercepted
		out, err := node.Output(tt.program, "client", "connected", tt.how, "registry-1.docker.io",
			"acme/secret/blobs/"+secret.Layers[0].String(), "acme/secret/manifests/"+secret.Digest.String(), "acme/open/blobs/"+open.Layers[0].String())
		want := "401 401 401 "
		if tt.intercepted {
			want = "401 401 200 "
		}
		if err != nil || out != want {
			t.Errorf("%s: %v, %.300q", tt.how, err, out)
		}
		if did := agent.Status().Connections.Intercepted > before; did != tt.intercepted {
			t.Errorf("%s: intercepted: %v", tt.how, did)
		}
	}
}

// connected connects to a host in some way, and asks there for what is below /v2/,
// without credentials.
func connected(how, host string, paths []string) error {
	ips, err := net.LookupHost(host)
	if err != nil {
		return err
	}
	addr := netip.AddrPortFrom(netip.MustParseAddr(ips[0]), 443)
	var c net.Conn
	program, handsOver := strings.CutPrefix(how, "hands over to ")
	switch how {
	case "io_uring":
		c, err = uring(addr, 0)
	case "io_uring worker":
		c, err = uring(addr, ioAsync)
	case "device":
		c, err = onDevice(addr)
	case "handed over":
		c, err = takeOver(3)
	default:
		c, err = net.Dial("tcp", addr.String())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", how, err)
	}
	defer c.Close()
	if handsOver {
		return handOver(c.(*net.TCPConn), program, append([]string{"client", "connected", "handed over", host}, paths...))
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }, MaxConnsPerHost: 1}}
	for _, p := range paths {
		resp, err := client.Get("https://" + host + "/v2/" + p)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		fmt.Print(resp.StatusCode, " ")
	}
	return nil
}

// onDevice connects on a network device, SO_BINDTODEVICE in socket(7).
func onDevice(addr netip.AddrPort) (net.Conn, error) {
	devices, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range devices {
		if i.Flags&(net.FlagLoopback|net.FlagUp) != net.FlagUp {
			continue
		}
		d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
			return errors.Join(raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), i.Name) }), err)
		}}
		return d.Dial("tcp", addr.String())
	}
	return nil, errors.New("no device but loopback")
}

// handOver hands a connection over to another program, SCM_RIGHTS in unix(7).
func handOver(c *net.TCPConn, program string, args []string) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()
	defer unix.Close(pair[0])
	f, err := c.File()
	if err != nil {
		return err
	}
	err = unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0)
	if err = errors.Join(err, f.Close(), c.Close()); err != nil {
		return err
	}
	cmd := exec.Command(program, args...)
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = []*os.File{theirs}, os.Stdout, os.Stderr
	return cmd.Run()
}

// takeOver returns the connection that was handed over.
func takeOver(socket int) (net.Conn, error) {
	rights := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), rights, 0)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("%d messages, %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	return fileConn(fds[0])
}

func fileConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close()
	return net.FileConn(f)
}

// ioAsync has a worker thread do it (IOSQE_ASYNC).
const ioAsync = 1 << 4

// uring connects by io_uring(7).
func uring(addr netip.AddrPort, flags byte) (net.Conn, error) {
	const (
		setup, enter = 425, 426 // the numbers are the same on all architectures
		opConnect    = 16
		getEvents    = 1
		cqRing, sqes = 0x8000000, 0x10000000 // offsets for mmap
	)
	host := binary.NativeEndian
	var params [120]byte // struct io_uring_params
	ring, _, errno := unix.Syscall(setup, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	defer unix.Close(int(ring))
	var maps [3][]byte
	for i, offset := range []int64{0, cqRing, sqes} {
		m, err := unix.Mmap(int(ring), offset, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return nil, err
		}
		defer func() { _ = unix.Munmap(m) }()
		maps[i] = m
	}
	sq, cq, sqe := maps[0], maps[1], maps[2]
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// The address is behind the entry, where nothing moves it.
	const at = 2048
	host.PutUint16(sqe[at:], unix.AF_INET)
	binary.BigEndian.PutUint16(sqe[at+2:], addr.Port())
	ip := addr.Addr().As4()
	copy(sqe[at+4:], ip[:])
	sqe[0], sqe[1] = opConnect, flags
	host.PutUint32(sqe[4:], uint32(fd))
	host.PutUint64(sqe[8:], unix.SizeofSockaddrInet4)
	host.PutUint64(sqe[16:], uint64(uintptr(unsafe.Pointer(&sqe[at]))))
	tail, array := host.Uint32(params[40+4:]), host.Uint32(params[40+24:])
	host.PutUint32(sq[array:], 0)
	host.PutUint32(sq[tail:], host.Uint32(sq[tail:])+1)
	if _, _, errno := unix.Syscall6(enter, ring, 1, 1, getEvents, 0, 0); errno != 0 {
		return nil, fmt.Errorf("io_uring_enter: %w", errno)
	}
	cqe := cq[host.Uint32(params[80+20:]):]
	if res := int32(host.Uint32(cqe[8:])); res < 0 {
		return nil, fmt.Errorf("connecting: %w", unix.Errno(-res))
	}
	return fileConn(fd)
}
