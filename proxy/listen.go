// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"weir/proxy/upstream"
)

const (
	// silence is how long a client may say nothing before the destination is
	// dialled, for protocols in which the server speaks first.
	silence = 100 * time.Millisecond
	// helloTime is how much longer it is listened to when the destination isn't there.
	helloTime = 2 * time.Second
)

// opening is how a connection begins.
type opening struct {
	hello
	// server is the connection to the destination, when there is one already.
	server *net.TCPConn
	// greeting is what the destination said before the client did.
	greeting []byte
	// opened is called when it is known what becomes of the connection.
	opened func()
}

// listen hears who speaks first and what the client says. The destination is
// dialled only when the client says nothing for a moment: in most protocols it
// has the first word. The error says that one of the two has left.
func (p *Proxy) listen(ctx context.Context, conn *net.TCPConn, f Flow) (o opening, err error) {
	first := make([]byte, 1)
	_ = conn.SetReadDeadline(time.Now().Add(silence))
	n, err := conn.Read(first)
	if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		n, o.server, err = p.dialAside(ctx, conn, f, first)
		if n == 0 && o.server != nil {
			n, o.greeting, err = whoIsFirst(ctx, conn, o.server, first)
		}
	}
	if n == 0 && len(o.greeting) == 0 {
		if o.server != nil {
			o.server.Close()
		}
		return o, err
	}
	if n > 0 {
		_ = conn.SetReadDeadline(time.Now().Add(peekTimeout))
		o.hello = peek(io.MultiReader(bytes.NewReader(first), conn))
	}
	_ = conn.SetReadDeadline(time.Time{})
	return o, nil
}

// dialAside dials the destination until the client says something, and returns
// the client's first byte in first, or the connection, or both. The error says
// that there is neither. A client that spoke is heard, whatever becomes of the
// dial: there may be another address, or something to serve without.
func (p *Proxy) dialAside(ctx context.Context, client *net.TCPConn, f Flow, first []byte) (n int, server *net.TCPConn, err error) {
	dctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_ = client.SetReadDeadline(time.Time{})
	var derr error
	var wg sync.WaitGroup
	wg.Go(func() {
		until := time.Unix(1, 0)
		if server, derr = f.Egress.Dial(dctx, f.Dst, upstream.Host{}); derr != nil && ctx.Err() == nil {
			until = time.Now().Add(helloTime)
		}
		_ = client.SetReadDeadline(until)
	})
	n, err = client.Read(first)
	cancel()
	wg.Wait()
	switch {
	case n > 0:
		return n, server, nil
	case errors.Is(err, os.ErrDeadlineExceeded): // the dial has ended
		if derr != nil {
			p.failed.Add(1)
		}
		return 0, server, derr
	case server != nil: // the client has left
		server.Close()
	}
	return 0, nil, err
}

// whoIsFirst waits until the client or the server says something, and returns
// the client's first byte in first, the server's first bytes, or the error when
// one of them left without a word.
func whoIsFirst(ctx context.Context, client, server *net.TCPConn, first []byte) (n int, greeting []byte, err error) {
	long := time.Unix(1, 0)
	stop := context.AfterFunc(ctx, func() { _ = client.SetReadDeadline(long); _ = server.SetReadDeadline(long) })
	defer stop()
	_ = client.SetReadDeadline(time.Time{})
	buf := make([]byte, 4096)
	var k int
	var serr error
	var wg sync.WaitGroup
	wg.Go(func() {
		k, serr = server.Read(buf)
		_ = client.SetReadDeadline(long)
	})
	n, err = client.Read(first)
	_ = server.SetReadDeadline(long)
	wg.Wait()
	_ = server.SetReadDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) && serr != nil {
		err = serr
	}
	return n, buf[:k], err
}
