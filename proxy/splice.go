// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"io"
	"net"
	"sync"
)

// splice passes bytes between two connections. On Linux, io.Copy between TCP
// connections is splice(2): the bytes don't come to user space.
type splice struct {
	client, server *net.TCPConn
}

// run passes what was said already, and then whatever comes, until both
// directions have ended. An orderly end in one direction is passed on as such,
// a reset as a reset.
func (s *splice) run(fromClient, fromServer []byte) {
	var wg sync.WaitGroup
	wg.Go(func() { s.copy(s.server, s.client, fromClient) })
	s.copy(s.client, s.server, fromServer)
	wg.Wait()
	s.client.Close()
	s.server.Close()
}

func (s *splice) copy(dst, src *net.TCPConn, first []byte) {
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
	abort(s.client)
	abort(s.server)
}
