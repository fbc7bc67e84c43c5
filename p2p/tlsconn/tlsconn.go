// SPDX-License-Identifier: Apache-2.0

// Package tlsconn has the server's side of TLS connections over which much is sent.
//
// crypto/tls sends each record by a system call of its own, and the network gets
// it as a packet of its own, though four of them fit into one (a socket buffer
// carries 64 KiB). Here, those of one Write leave together.
package tlsconn

import (
	"crypto/tls"
	"net"
	"sync"
)

// maxRecord is what a TLS record carries (RFC 8446, section 5.1), and maxTogether
// what is sent together: records of 64 KiB in all, with what each has more.
const (
	maxRecord   = 16 << 10
	maxTogether = 64<<10 + 1<<10
)

// Conn is the server's side of a TLS connection.
type Conn struct {
	*tls.Conn
	raw *gather
}

// Server returns the server's side of a TLS connection over c, see [tls.Server].
func Server(c net.Conn, conf *tls.Config) *Conn {
	raw := &gather{Conn: c}
	return &Conn{tls.Server(raw, conf), raw}
}

// Raw is the connection that it is over.
func (c *Conn) Raw() net.Conn { return c.raw.Conn }

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	if len(p) <= maxRecord {
		return c.Conn.Write(p)
	}
	c.raw.begin()
	n, err := c.Conn.Write(p)
	if ferr := c.raw.end(); err == nil && ferr != nil {
		return 0, ferr
	}
	return n, err
}

// gather is a connection whose writes between begin and end are one.
type gather struct {
	net.Conn
	mu  sync.Mutex // an alert may be sent by whoever reads
	buf *[]byte    // nil outside
}

var together = sync.Pool{New: func() any { b := make([]byte, 0, maxTogether); return &b }}

func (g *gather) begin() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.buf = together.Get().(*[]byte)
}

// Write implements net.Conn.
func (g *gather) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.buf == nil {
		return g.Conn.Write(p)
	}
	if len(*g.buf)+len(p) > cap(*g.buf) {
		if err := g.flush(); err != nil {
			return 0, err
		}
	}
	*g.buf = append(*g.buf, p...)
	return len(p), nil
}

func (g *gather) end() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.flush()
	together.Put(g.buf)
	g.buf = nil
	return err
}

func (g *gather) flush() error {
	if len(*g.buf) == 0 {
		return nil
	}
	_, err := g.Conn.Write(*g.buf)
	*g.buf = (*g.buf)[:0]
	return err
}
