// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"

	"weir/p2p/tlsconn"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

type upstreamKey struct{}

func (p *Proxy) serveHTTP(w http.ResponseWriter, r *http.Request) {
	c := r.Context().Value(upstreamKey{}).(*intercepted)
	c.opened()
	p.opts.Registry.Serve(w, r, c.up)
}

// intercepted is a connection whose client believes to speak to up.
type intercepted struct {
	replayConn
	up  registry.Upstream
	out *upstream.Transport // up's
	// opened is called when it has had a request, or none comes.
	opened func()
	closed func()
}

func (p *Proxy) newIntercepted(conn *net.TCPConn, f Flow, o opening, up registry.Upstream, out *upstream.Transport) *intercepted {
	up.Transport = out
	if up.Plain == "" && up.TrustRootsID == "" {
		up.Transport = seeing{out, up.Host, &p.companions}
	}
	c := &intercepted{replayConn{conn, o.bytes}, up, out, p.open(), func() {}}
	if f.Closed != nil {
		c.closed = sync.OnceFunc(f.Closed)
	}
	return c
}

// Close implements net.Conn.
func (c *intercepted) Close() error {
	c.opened()
	defer c.closed()
	c.out.Close()
	return c.replayConn.Close()
}

// interceptPlain answers requests to a registry without TLS, whoever it is: the
// client trusts whatever is there. It has to be there, though. It returns false when
// it isn't, and the connection is closed.
func (p *Proxy) interceptPlain(ctx context.Context, conn *net.TCPConn, f Flow, o opening) bool {
	p.serving.Add(place{f.NetworkID, f.Dst}, struct{}{})
	up := registry.Upstream{Host: o.registry, Plain: f.Dst.String(), NetworkID: f.NetworkID, Client: f.Client}
	if o.server != nil {
		f.Egress.Keep(f.Dst, o.server)
	} else if err := f.Egress.Connect(ctx, f.Dst); err != nil && !p.opts.Registry.HasStale(up) {
		p.failed.Add(1)
		p.log.Debug("the destination can't be reached", "client", f.Client, "dst", f.Dst, "err", err)
		abort(conn)
		return false
	}
	p.intercepted.Add(1)
	if c := p.newIntercepted(conn, f, o, up, f.Egress.Transport(upstream.Target{Addr: f.Dst})); !p.ready.hand(c) {
		c.Close()
	}
	return true
}

// intercept answers requests to a registry with TLS. It returns false when the
// connection was passed through instead, to its end.
func (p *Proxy) intercept(ctx context.Context, conn *net.TCPConn, f Flow, o opening, up registry.Upstream, t upstream.Target) bool {
	host := up.Host
	name := o.host
	if name == "" {
		name = f.Dst.Addr().String()
	}
	leaf, err := p.opts.Leaves.Leaf(name)
	if err != nil {
		p.log.Error("no certificate for a registry; passed through", "registry", host, "err", err)
		p.pass(ctx, conn, f, o)
		return false
	}
	if o.server != nil {
		o.server.Close()
	}
	p.intercepted.Add(1)
	raw := p.newIntercepted(conn, f, o, up, f.Egress.Transport(t))
	c := tlsconn.Server(raw, &tls.Config{
		Certificates: []tls.Certificate{*leaf},
		NextProtos:   []string{"http/1.1"},
		MinVersion:   tls.VersionTLS12,
		// The client is on this node, where small records speed nothing up, and
		// this configuration is for one connection, to which none can return.
		DynamicRecordSizingDisabled: true,
		SessionTicketsDisabled:      true,
	})
	hctx, cancel := context.WithTimeout(ctx, peekTimeout)
	defer cancel()
	if err := c.HandshakeContext(hctx); err != nil {
		// An alert is the client's word that it doesn't trust us; a
		// connection that just ends is not.
		if alert, ok := errors.AsType[*net.OpError](err); ok && alert.Op == "remote error" && f.Rejected != nil {
			f.Rejected(host, err)
		}
		p.log.Debug("TLS with a client failed", "client", f.Client, "registry", host, "err", err)
		raw.Close()
		return true
	}
	if f.Accepted != nil {
		f.Accepted()
	}
	if !p.ready.hand(c) {
		c.Close()
	}
	return true
}

// handed is the listener of connections whose TLS handshake is done.
type handed struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *handed) hand(c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.closed:
		return false
	}
}

func (l *handed) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *handed) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *handed) Addr() net.Addr { return &net.TCPAddr{} }
