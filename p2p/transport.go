// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"cmp"
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"weir/p2p/tlsconn"
)

// Peers have one port. What comes there is either libp2p, which in a private
// network begins with a random nonce of 24 bytes, or TLS, whose ClientHello
// begins as below; a nonce does that once in 2^33 connections, and is dialled
// again then.

// isClientHello says whether a connection that begins with b (6 bytes) is TLS:
// a handshake record of legacy version 3.1 (RFC 8446, 5.1), not longer than a
// record may be, with a ClientHello in it.
func isClientHello(b []byte) bool {
	return b[0] == 0x16 && b[1] == 3 && b[2] == 1 && b[3] < 0x40 && b[5] == 1
}

const (
	// peekTime is how long a connection may take to show what it is, and then
	// to prove that it is a peer's.
	peekTime = 5 * time.Second
	// maxUnknown bounds the connections that have not shown it yet.
	maxUnknown = 256
)

// tcpTransport is libp2p's TCP transport, sharing its port with the transfers.
type tcpTransport struct {
	*tcp.TcpTransport
	node     *Node
	upgrader transport.Upgrader
}

func newTransport(n *Node, u transport.Upgrader, rm network.ResourceManager) (*tcpTransport, error) {
	t, err := tcp.NewTCPTransport(u, rm, nil, tcp.DisableReuseport(), tcp.WithConnectionTimeout(peekTime),
		tcp.WithDialerForAddr(func(ma.Multiaddr) (tcp.ContextDialer, error) { return n, nil }))
	return &tcpTransport{t, n, u}, err
}

// DialContext opens a connection to a peer's address.
func (n *Node) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: peekTime}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, network, addr)
	if err == nil && n.opts.Wrap != nil {
		c = n.opts.Wrap(c)
	}
	return c, err
}

// Listen implements transport.Transport.
func (t *tcpTransport) Listen(addr ma.Multiaddr) (transport.Listener, error) {
	l, err := manet.Listen(addr)
	if err != nil {
		return nil, err
	}
	// The host closes it; until then it isn't a failure.
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.node.ctx))
	s := &splitter{Listener: l, node: t.node, libp2p: newQueue(ctx), cancel: cancel}
	t.node.wg.Go(s.run)
	return t.upgrader.UpgradeGatedMaListener(t, t.upgrader.GateMaListener(s)), nil
}

// splitter tells the connections to the peers' port apart.
type splitter struct {
	manet.Listener
	node   *Node
	libp2p *queue
	cancel context.CancelFunc
}

func (s *splitter) run() {
	unknown := make(chan struct{}, maxUnknown)
	l := manet.NetListener(s.Listener)
	for {
		c, err := l.Accept()
		if err != nil {
			if _, ok := errors.AsType[net.Error](err); ok && s.libp2p.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) { // out of descriptors
				time.Sleep(50 * time.Millisecond)
				continue
			}
			s.cancel()
			return
		}
		if s.node.opts.Wrap != nil {
			c = s.node.opts.Wrap(c)
		}
		select {
		case unknown <- struct{}{}:
			s.node.wg.Go(func() { s.sort(c); <-unknown })
		default:
			c.Close()
		}
	}
}

func (s *splitter) sort(c net.Conn) {
	stop := context.AfterFunc(s.libp2p.ctx, func() { c.Close() })
	defer stop()
	_ = c.SetDeadline(time.Now().Add(peekTime))
	var head [6]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		c.Close()
		return
	}
	pc := &prefixed{Conn: c, prefix: head[:]}
	if !isClientHello(head[:]) {
		_ = c.SetDeadline(time.Time{})
		s.libp2p.put(pc)
		return
	}
	tc, id, err := s.node.secureServer(s.libp2p.ctx, pc)
	if err != nil {
		s.node.serving.unauthenticated.Add(1)
		s.node.log.Debug("a connection to the peers' port without the swarm key", "addr", c.RemoteAddr(), "err", err)
		c.Close()
		return
	}
	_ = c.SetDeadline(time.Time{})
	s.node.incoming.put(&peerConn{tc, id})
}

// Accept implements manet.Listener.
func (s *splitter) Accept() (manet.Conn, error) {
	c, err := s.libp2p.Accept()
	if err != nil {
		return nil, err
	}
	return manet.WrapNetConn(c)
}

// Close implements manet.Listener.
func (s *splitter) Close() error {
	s.cancel()
	return s.Listener.Close()
}

// prefixed is a connection of which some has been read already.
type prefixed struct {
	net.Conn
	prefix []byte
}

func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.prefix) > 0 {
		n := copy(b, p.prefix)
		p.prefix = p.prefix[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// queue is a listener of connections that are put into it.
type queue struct {
	ctx   context.Context
	conns chan net.Conn
}

func newQueue(ctx context.Context) *queue { return &queue{ctx, make(chan net.Conn)} }

func (q *queue) put(c net.Conn) {
	select {
	case q.conns <- c:
	case <-q.ctx.Done():
		c.Close()
	}
}

// Accept implements net.Listener.
func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener; the queue ends with its context.
func (q *queue) Close() error { return nil }

// Addr implements net.Listener.
func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }

// transferSecret derives what proves membership on transfer connections.
func transferSecret(swarmKey []byte) ([]byte, error) {
	if len(swarmKey) != 32 {
		return nil, fmt.Errorf("a swarm key has 32 bytes, not %d", len(swarmKey))
	}
	return hkdf.Key(sha256.New, swarmKey, nil, "weir peer transfer", 32)
}

// peerConn is a transfer connection from a peer.
type peerConn struct {
	*tlsconn.Conn
	id peer.ID
}

// config is for TLS with both sides' libp2p certificates (libp2p's TLS specification).
// want is who must be on the other side; empty is any peer. Its key is sent when that
// has shown it.
func (n *Node) config(want peer.ID) (*tls.Config, <-chan crypto.PubKey) {
	conf, key := n.identity.ConfigForPeer(want)
	conf.NextProtos = []string{"http/1.1"}
	conf.DynamicRecordSizingDisabled = true // the link is fast
	return conf, key
}

func (n *Node) secureServer(ctx context.Context, c net.Conn) (*tlsconn.Conn, peer.ID, error) {
	conf, key := n.config("")
	tc := tlsconn.Server(c, conf)
	id, err := n.secure(ctx, tc.Conn, key, true)
	return tc, id, err
}

func (n *Node) secureClient(ctx context.Context, c net.Conn, want peer.ID) (*tls.Conn, peer.ID, error) {
	conf, key := n.config(want)
	tc := tls.Client(c, conf)
	id, err := n.secure(ctx, tc, key, false)
	return tc, id, err
}

// secure makes a connection one between peers: TLS, then each side's proof that it has
// the swarm key, bound to this very connection (RFC 9266). It returns who is on the other
// side.
func (n *Node) secure(ctx context.Context, tc *tls.Conn, key <-chan crypto.PubKey, server bool) (peer.ID, error) {
	sides := []string{"client", "server"}
	if server {
		slices.Reverse(sides)
	}
	if err := tc.HandshakeContext(ctx); err != nil {
		return "", err
	}
	state := tc.ConnectionState()
	binding, err := state.ExportKeyingMaterial("EXPORTER-Channel-Binding", nil, 32)
	if err != nil {
		return "", err
	}
	proof := func(side string) []byte {
		m := hmac.New(sha256.New, n.secret)
		m.Write([]byte(side))
		m.Write(binding)
		return m.Sum(nil)
	}
	theirs := make([]byte, sha256.Size)
	// The server speaks only to one who has shown the key.
	if !server {
		if _, err := tc.Write(proof(sides[0])); err != nil {
			return "", err
		}
	}
	if _, err := io.ReadFull(tc, theirs); err != nil {
		return "", err
	}
	if !hmac.Equal(theirs, proof(sides[1])) {
		return "", errors.New("the other side doesn't have the swarm key")
	}
	if server {
		if _, err := tc.Write(proof(sides[0])); err != nil {
			return "", err
		}
	}
	return peer.IDFromPublicKey(<-key)
}

// dialPeer opens a transfer connection to one of several addresses.
func (n *Node) dialPeer(ctx context.Context, want peer.ID, addrs []string) (*tls.Conn, peer.ID, error) {
	ctx, cancel := context.WithTimeout(ctx, peekTime)
	defer cancel()
	type conn struct {
		*tls.Conn
		peer.ID
	}
	_, c, err := firstOf(ctx, addrs, n.opts.next, func(addr string) (conn, error) {
		c, err := n.DialContext(ctx, "tcp", addr)
		if err != nil {
			return conn{}, err
		}
		stop := context.AfterFunc(ctx, func() { c.Close() })
		tc, id, err := n.secureClient(ctx, c, want)
		if !stop() || err != nil {
			c.Close()
			return conn{}, cmp.Or(err, ctx.Err())
		}
		return conn{tc, id}, nil
	}, nil, func(c conn, err error) {
		if err == nil {
			c.Close()
		}
	})
	if err != nil {
		return nil, "", fmt.Errorf("no connection to peer %s at %v: %w", want, addrs, err)
	}
	return c.Conn, c.ID, nil
}

// hostPort is the HOST:PORT of a multiaddr that is just that, or empty.
func hostPort(a ma.Multiaddr) string {
	network, addr, err := manet.DialArgs(a)
	if err != nil || !strings.HasPrefix(network, "tcp") {
		return ""
	}
	return addr
}
