// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"weir/proxy/registry"
)

// protocol is what a client's first bytes are.
type protocol int

const (
	opaque    protocol = iota // not understood
	tlsHello                  // a whole TLS ClientHello
	plainHTTP                 // a whole HTTP/1 request head
)

// hello is what a client said before it was answered.
type hello struct {
	protocol protocol
	// host is the TLS server name or the HTTP Host, in canonical form and
	// without a port; empty when the client named none.
	host string
	// registry is the Host header, in canonical form, of a request to the
	// distribution API without TLS; empty for all else.
	registry string
	// connect is the HOST:PORT that a proxy is asked to connect to, in canonical form,
	// and asked the header of that request; empty for all else.
	connect string
	asked   http.Header
	// spelled is the TLS server name, or the host to connect to, as the client wrote it.
	spelled string
	// http1 says that the client can speak HTTP/1.1 over this TLS connection.
	http1 bool
	// bytes are what was read to find this out.
	bytes []byte
}

// maxHello bounds what is read of a client before it is understood. A TLS
// handshake message has at most 64 KiB in Go, and net/http's own bound for a
// request's head is 1 MiB; more than this is opaque.
const maxHello = 64 << 10

// maxName is how long a host's name is at most (RFC 1035, section 2.3.4), and
// maxAuthority the same with a port. What is longer is no registry: names are kept
// in tables, which have bounds for the number of their entries.
const (
	maxName      = 255
	maxAuthority = maxName + len(":65535")
)

// peek reads the client's first bytes until it knows what they are, or that it
// doesn't. It never fails: what it can't make sense of is opaque. The caller
// bounds its time with r's deadline.
func peek(r io.Reader) hello {
	rec := &recorder{r: r}
	var first [1]byte
	if _, err := io.ReadFull(rec, first[:]); err != nil {
		return hello{}
	}
	h := hello{}
	rec.replay = 1
	switch c := first[0]; {
	case c == 22: // a TLS record with a handshake, RFC 8446 section 5.1
		h = peekTLS(rec)
	case c >= 'A' && c <= 'Z':
		h = peekHTTP(rec)
	}
	h.bytes = rec.bytes
	return h
}

// peekTLS lets crypto/tls parse the ClientHello, however it is cut into
// records and segments, and stops it before it answers.
func peekTLS(rec *recorder) (h hello) {
	stop := errors.New("seen enough")
	_ = tls.Server(rec, &tls.Config{
		GetConfigForClient: func(chi *tls.ClientHelloInfo) (*tls.Config, error) {
			if len(chi.ServerName) > maxName {
				return nil, stop
			}
			h.protocol = tlsHello
			h.host = registry.Canonical(chi.ServerName)
			h.spelled = chi.ServerName
			h.http1 = len(chi.SupportedProtos) == 0 || slices.Contains(chi.SupportedProtos, "http/1.1")
			return nil, stop
		},
	}).HandshakeContext(context.Background())
	return h
}

func peekHTTP(rec *recorder) hello {
	// One byte at a time would be slow and many could be the next request's,
	// so the buffer is small; all that is read is recorded anyway.
	br := bufio.NewReader(rec)
	req, err := http.ReadRequest(br)
	if err != nil {
		return hello{}
	}
	if req.Method == http.MethodConnect {
		h := hello{protocol: plainHTTP}
		// What follows is said to who is at the other end of the tunnel. It is too early.
		if len(req.URL.Host) <= maxAuthority && req.ContentLength == 0 && br.Buffered() == 0 {
			h.connect, h.asked = registry.Canonical(req.URL.Host), req.Header
			h.spelled = req.URL.Hostname()
		}
		return h
	}
	host := req.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	h := hello{protocol: plainHTTP, host: registry.Canonical(host)}
	if h.host != "" && len(req.Host) <= maxAuthority && req.ProtoAtLeast(1, 1) && req.Header.Get("Upgrade") == "" &&
		(req.URL.Path == "/v2" || strings.HasPrefix(req.URL.Path, "/v2/")) && !req.URL.IsAbs() {
		h.registry = registry.Canonical(req.Host)
	}
	return h
}

// recorder is a connection whose reads are remembered and whose writes go
// nowhere.
type recorder struct {
	r      io.Reader
	bytes  []byte
	replay int // of bytes: how many at the end are to be read again
}

var errTooLong = errors.New("the client's first message is too long")

func (c *recorder) Read(p []byte) (int, error) {
	if c.replay > 0 {
		n := copy(p, c.bytes[len(c.bytes)-c.replay:])
		c.replay -= n
		return n, nil
	}
	room := maxHello - len(c.bytes)
	if room <= 0 {
		return 0, errTooLong
	}
	n, err := c.r.Read(p[:min(len(p), room)])
	c.bytes = append(c.bytes, p[:n]...)
	return n, err
}

func (c *recorder) Write(p []byte) (int, error)      { return len(p), nil }
func (c *recorder) Close() error                     { return nil }
func (c *recorder) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c *recorder) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (c *recorder) SetDeadline(time.Time) error      { return nil }
func (c *recorder) SetReadDeadline(time.Time) error  { return nil }
func (c *recorder) SetWriteDeadline(time.Time) error { return nil }

// replayConn gives the bytes that were peeked before those of the connection.
type replayConn struct {
	*net.TCPConn
	head []byte
}

func (c *replayConn) Read(p []byte) (int, error) {
	if len(c.head) == 0 {
		return c.TCPConn.Read(p)
	}
	n := copy(p, c.head)
	if c.head = c.head[n:]; len(c.head) == 0 {
		c.head = nil // the connection may live long
	}
	return n, nil
}
