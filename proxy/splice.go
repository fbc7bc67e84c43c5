// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// splice passes bytes between two connections. On Linux, io.Copy between TCP
// connections is splice(2): what the server sends doesn't come to user space.
type splice struct {
	client, server *net.TCPConn
	// asked is how much the server had sent when the client last sent something.
	asked  atomic.Uint64
	closed atomic.Bool
}

// run passes what was said already, and then whatever comes, until both
// directions have ended. An orderly end in one direction is passed on as such,
// a reset as a reset.
func (s *splice) run(fromClient, fromServer []byte) {
	var wg sync.WaitGroup
	wg.Go(func() { s.copy(s.server, watched{s}, fromClient) })
	s.copy(s.client, s.server, fromServer)
	wg.Wait()
	s.client.Close()
	s.server.Close()
}

func (s *splice) copy(dst *net.TCPConn, src io.Reader, first []byte) {
	if len(first) > 0 {
		if _, err := dst.Write(first); err != nil {
			s.cut()
			return
		}
	}
	if _, err := io.Copy(dst, src); err != nil {
		s.cut()
		return
	}
	if dst.CloseWrite() != nil {
		s.cut()
	}
}

func (s *splice) cut() {
	if s.closed.Load() {
		return
	}
	abort(s.client)
	abort(s.server)
}

// watched is a splice's client, whose words are noted in their order with the
// server's.
type watched struct{ s *splice }

// Read implements io.Reader.
func (w watched) Read(p []byte) (int, error) {
	n, err := w.s.client.Read(p)
	if n > 0 {
		if info, ierr := tcpInfo(w.s.server); ierr == nil {
			w.s.asked.Store(info.Bytes_received)
		}
	}
	return n, err
}

// idleFor says whether the connection has been idle for long: the server had the
// last word, the client has all of it, and neither has sent anything since. So are
// those that a client keeps for its next request. One whose server is still to
// answer is not.
func (s *splice) idleFor(long time.Duration) bool {
	client, err1 := tcpInfo(s.client)
	server, err2 := tcpInfo(s.server)
	if err1 != nil || err2 != nil || server.Bytes_received <= s.asked.Load() || client.Unacked > 0 || client.Notsent_bytes > 0 {
		return false
	}
	quiet := time.Duration(min(client.Last_data_recv, client.Last_data_sent, server.Last_data_recv)) * time.Millisecond
	return quiet >= long
}

// close ends both connections in order, as a server does with one that it has kept
// for long enough: the client dials again for its next request.
func (s *splice) close() {
	s.closed.Store(true)
	s.client.Close()
	s.server.Close()
}

// tcpInfo returns what the kernel knows of a connection.
func tcpInfo(c *net.TCPConn) (info *unix.TCPInfo, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	return info, errors.Join(cerr, err)
}

// abort closes a connection with a reset, as its peer would see it from a
// destination that is not there.
func abort(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
}
