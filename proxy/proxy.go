// SPDX-License-Identifier: Apache-2.0

// Package proxy carries redirected connections. It looks at what a client says
// first, and then either speaks TLS with it in the registry's place and
// answers its requests (package registry), or passes every byte through to
// where the client wanted to go.
//
// Passing through is the rule, and intercepting the exception that needs a
// reason: the client names a host that is known to be a registry, its runtime
// is known to trust weir for that host, and the registry itself can be
// verified. Everything is decided before the client gets its first byte, so
// that passing through is always still possible.
package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/golang-lru/v2/expirable"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// Flow is a redirected connection's meaning: what the agent knows of it.
type Flow struct {
	// Dst is where the client wanted to go.
	Dst netip.AddrPort
	// NetworkID tells the network that Dst is an address in from all others that
	// there ever were. Empty means the node's.
	NetworkID string
	// Egress is the way out of the client's network namespace.
	Egress *upstream.Egress
	// tunnelled is where the client goes through the proxy at Dst, and through is how.
	tunnelled upstream.Host
	through   upstream.Tunnel
	// Client names the client in logs.
	Client string
	// Direct says that the connection is passed through unseen.
	Direct bool
	// Closed is called once, when the client's connection is closed. It may be
	// nil.
	Closed func()
	// Trusts says whether the client's runtime trusts weir's CA for a
	// registry, and sees to it that it can. The name is canonical, but for
	// upper-case letters that the client has written. Nil means never.
	Trusts func(host registry.Known, name string) bool
	// Settings returns what the client's runtime verifies a registry with, and
	// shows to it, beside the usual. The error says why that can't be had.
	// Nil means nothing.
	Settings func(host registry.Known, name string) (upstream.Settings, error)
	// Learn is told of a host that the client has connected to, and that is a
	// registry, though not a known one. ownRoots says that only the client's runtime
	// verifies it so. The error says why it isn't learned. Nil means that none is.
	Learn func(host string, ownRoots bool) error
	// Unsure is told of a host that the client has connected to, and of which it isn't
	// known whether it is a registry, or that is one which isn't known; and when it is
	// known to be none. It may be nil.
	Unsure func(host string, unsure bool)
	// Leave has further connections to Dst from the client's network not come here for
	// that long: no registry is there. Want has them come, whatever its port: one is
	// there, without TLS. They may be nil.
	Leave func(long time.Duration)
	Want  func()
	// Accepted is told when the client has trusted weir's certificate. It may be
	// nil.
	Accepted func()
	// Rejected is told when the client did not trust weir's certificate all
	// the same. It may be nil.
	Rejected func(host string, err error)
}

// Leaves issues the certificates that the proxy shows to clients.
type Leaves interface {
	Leaf(host string) (*tls.Certificate, error)
	Permits(host string) bool
}

// Options of a proxy. All but Node and Log are required.
type Options struct {
	Hosts    *registry.Hosts
	Leaves   Leaves
	Registry *registry.Handler
	// Node says whether the node itself gets an answer of a registry. One that
	// a client can't reach is not down then, but out of the client's bounds. Nil
	// means that it doesn't.
	Node interface {
		Reaches(ctx context.Context, host upstream.Host) bool
	}
	Log *slog.Logger // nil means slog.Default()
}

// Proxy serves flows.
type Proxy struct {
	opts   Options
	log    *slog.Logger
	server *http.Server
	ready  handed // intercepted connections on their way to server

	intercepted, passed, failed, unverified atomic.Int64

	mu         sync.Mutex
	splices    map[*splice]struct{}
	idle       time.Duration // see idleTime
	opening    int           // connections of which it isn't known yet what becomes of them
	changed    sync.Cond     // when there are fewer
	unknown    unknowns
	companions companions
	// unverifiable are registries of which the log has it.
	unverifiable *expirable.LRU[string, struct{}]
	serving      *lru.Cache[place, struct{}] // where registries were seen
	active       sync.WaitGroup
}

// Stats are a proxy's figures since the start.
type Stats struct {
	Intercepted   int64 `json:"intercepted"`    // connections
	PassedThrough int64 `json:"passed_through"` // connections
	Failed        int64 `json:"failed"`         // connections whose destination could not be reached
	// Unverified are those of PassedThrough whose registry could not be verified.
	Unverified int64 `json:"unverified"`
}

// place is an address in a network.
type place struct {
	network string
	addr    netip.AddrPort
}

// maxServing bounds the addresses of registries that are remembered.
const maxServing = 4096

// leaveTime is how long an address is left alone where there was no registry: another
// host may have the same one.
const leaveTime = 10 * time.Minute

// leave has connections to a destination not come here, unless there is a registry too.
func (p *Proxy) leave(f Flow) {
	if f.Leave != nil && !p.serving.Contains(place{f.NetworkID, f.Dst}) {
		f.Leave(leaveTime)
	}
}

const (
	// peekTimeout is how long a client that has begun to speak may take to
	// say what it wants.
	peekTimeout = 10 * time.Second
	// openTime is how long connections that are being opened are waited for at
	// the end.
	openTime = 5 * time.Second
	// idleTime is for how long a connection that is passed through has to be idle to
	// be closed at the end, and idleLook how often that is looked at.
	idleTime = 5 * time.Second
	idleLook = 100 * time.Millisecond
	// silence is how long a client may say nothing before the destination is
	// dialled, for protocols in which the server speaks first.
	silence = 100 * time.Millisecond
	// helloTime is how much longer it is listened to when the destination isn't there.
	helloTime = 2 * time.Second
	// maxRequestHead bounds a request's head, which is held for as long as the
	// answer takes. A token has some 20 KB, and large registries take no more than
	// 64 to 128 KB.
	maxRequestHead = 128 << 10
	// staleDialTimeout bounds the look at a registry that there is something to
	// serve of without it. Clients wait 10 seconds for a TLS handshake.
	staleDialTimeout = time.Second
	// nodeDialTime is when the node itself looks as well, where the client's
	// network is silent.
	nodeDialTime = 300 * time.Millisecond
)

// New returns a proxy. Close it.
func New(o Options) *Proxy {
	p := &Proxy{opts: o, log: o.Log, splices: make(map[*splice]struct{}), idle: idleTime, unknown: newUnknowns(), unverifiable: expirable.NewLRU[string, struct{}](maxUnknown, nil, askAgain)}
	p.changed.L = &p.mu
	p.serving, _ = lru.New[place, struct{}](maxServing)
	if p.log == nil {
		p.log = slog.Default()
	}
	p.ready = handed{conns: make(chan net.Conn), closed: make(chan struct{})}
	p.server = &http.Server{
		Handler:           http.HandlerFunc(p.serveHTTP),
		ReadHeaderTimeout: 30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxRequestHead,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if t, ok := c.(*tlsConn); ok {
				c = t.raw.Conn
			}
			return context.WithValue(ctx, upstreamKey{}, c.(*intercepted))
		},
		ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	p.active.Go(func() { _ = p.server.Serve(&p.ready) })
	return p
}

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
	c := &intercepted{replayConn{conn, bytes.NewReader(o.bytes)}, up, out, p.open(), func() {}}
	if f.Closed != nil {
		c.closed = sync.OnceFunc(f.Closed)
	}
	return c
}

// open counts a connection of which it isn't known yet what becomes of it, until
// what it returns is called.
func (p *Proxy) open() (opened func()) {
	p.mu.Lock()
	p.opening++
	p.mu.Unlock()
	return sync.OnceFunc(func() {
		p.mu.Lock()
		p.opening--
		p.changed.Broadcast()
		p.mu.Unlock()
	})
}

// Close implements net.Conn.
func (c *intercepted) Close() error {
	c.opened()
	defer c.closed()
	c.out.Close()
	return c.replayConn.Close()
}

// Stats returns the proxy's figures.
func (p *Proxy) Stats() Stats {
	return Stats{p.intercepted.Load(), p.passed.Load(), p.failed.Load(), p.unverified.Load()}
}

// Serve carries one connection. It returns when the connection was passed
// through to its end, or handed over to be answered; it always takes care of
// conn.
func (p *Proxy) Serve(ctx context.Context, conn *net.TCPConn, f Flow) {
	p.active.Add(1)
	defer p.active.Done()
	if !p.carry(ctx, conn, f) && f.Closed != nil {
		f.Closed()
	}
}

// carry is Serve, and says whether the connection was handed over.
func (p *Proxy) carry(ctx context.Context, conn *net.TCPConn, f Flow) (handed bool) {
	opened := p.open()
	defer opened()
	if f.Direct {
		p.pass(ctx, conn, f, opening{opened: opened})
		return false
	}

	o, err := p.listen(ctx, conn, f)
	o.opened = opened
	if err != nil {
		p.log.Debug("nothing to carry", "client", f.Client, "dst", f.Dst, "err", err)
		abort(conn)
		return false
	}
	if len(o.greeting) > 0 {
		p.leave(f)
		p.pass(ctx, conn, f, o)
		return false
	}
	if o.registry != "" {
		return p.interceptPlain(ctx, conn, f, o)
	}
	if o.connect != "" {
		return p.carryTunnel(ctx, conn, f, o)
	}
	if o.protocol != tlsHello {
		p.leave(f)
		p.pass(ctx, conn, f, o)
		return false
	}
	up, target, why := p.decide(ctx, f, o.hello)
	if why != "" {
		p.log.Debug("passed through", "client", f.Client, "host", o.host, "dst", f.Dst, "why", why)
		p.pass(ctx, conn, f, o)
		return false
	}
	return p.intercept(ctx, conn, f, o, up, target)
}

// decide returns the registry, and where it is, when the connection is to be
// intercepted, and otherwise why not.
func (p *Proxy) decide(ctx context.Context, f Flow, h hello) (up registry.Upstream, t upstream.Target, why string) {
	name := h.host
	if name == "" { // clients name no IP addresses, RFC 6066 section 3
		name = f.Dst.Addr().String()
	}
	t = f.target(name)
	host := t.Host.String()
	known, ok := p.opts.Hosts.Find(host)
	spelled := host
	if h.spelled != strings.ToLower(h.spelled) {
		spelled = net.JoinHostPort(h.spelled, f.port())
	}
	if ok {
		p.serving.Add(place{f.NetworkID, f.Dst}, struct{}{})
	}
	switch {
	case !ok && !h.http1:
		p.leave(f)
		return up, t, "not a known registry, and the client doesn't speak HTTP/1.1"
	case !ok:
		p.see(ctx, host, f)
		return up, t, "not a known registry"
	case !h.http1:
		return up, t, "the client doesn't speak HTTP/1.1"
	case !p.opts.Leaves.Permits(name):
		return up, t, "the CA may not speak for this host, or not at this time"
	case f.Trusts == nil || !f.Trusts(known, spelled):
		if host != known.Host { // by its domain alone
			p.see(ctx, host, f)
		}
		return up, t, "the runtime isn't known to trust the CA"
	}
	var s upstream.Settings
	if f.Settings != nil {
		var err error
		if s, err = f.Settings(known, host); err != nil {
			p.log.Warn("a runtime's settings for a registry can't be used; passed through", "client", f.Client, "registry", host, "err", err)
			return up, t, "the runtime's settings for the registry can't be used"
		}
	}
	up = registry.Upstream{Host: host, NetworkID: f.NetworkID, AnyNetwork: known.AnyNetwork, Client: f.Client}
	if len(s.Certificates) > 0 {
		up.ClientIdentity = s.Key
	}
	// Who is trusted by this node is the registry of that name for all clients;
	// who is trusted by the runtime alone, only for those with the same settings.
	t.Settings = s.WithoutRoots()
	err := p.verify(ctx, f, t)
	if err != nil && s.Roots != nil && upstream.Refused(err) {
		up.TrustRootsID, t.Settings = s.Key, s
		err = p.verify(ctx, f, t)
	}
	if err != nil {
		p.cantVerify(host, err)
		return up, t, "the registry can't be verified"
	}
	return up, t, ""
}

// verify finds out whether a registry can be spoken to in a client's place. One
// that is down can when there may be something to serve without it.
func (p *Proxy) verify(ctx context.Context, f Flow, t upstream.Target) error {
	if !p.opts.Registry.HasStale(registry.Upstream{Host: t.Host.String()}) {
		return f.Egress.Verify(ctx, t)
	}
	vctx, cancel := context.WithTimeout(ctx, staleDialTimeout)
	defer cancel()
	reaches := make(chan bool, 1)
	node := sync.OnceFunc(func() { reaches <- p.opts.Node.Reaches(vctx, t.Host) })
	aside := f.NetworkID != "" && p.opts.Node != nil
	if aside {
		defer time.AfterFunc(nodeDialTime, node).Stop()
	}
	err := f.Egress.Verify(vctx, t)
	if err == nil || upstream.Refused(err) || ctx.Err() != nil {
		return err
	}
	if aside {
		go node()
		if <-reaches {
			// A network policy, say. What others were given by it is not for this
			// client, who could not have asked.
			return err
		}
	}
	p.opts.Registry.Unreachable(registry.Upstream{Host: t.Host.String(), NetworkID: f.NetworkID})
	return nil // requests try it again
}

// cantVerify counts a connection to a registry that can't be verified, which the log
// has once in a while.
func (p *Proxy) cantVerify(host string, err error) {
	p.unverified.Add(1)
	level := slog.LevelDebug
	if !p.unverifiable.Contains(host) {
		p.unverifiable.Add(host, struct{}{})
		level = slog.LevelInfo
	}
	p.log.Log(context.Background(), level, "a registry can't be verified: connections to it are passed through, and counted", "registry", host, "err", err)
}

func portOf(a netip.AddrPort) string {
	_, port, _ := net.SplitHostPort(a.String())
	return port
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
	c := newTLSConn(raw, &tls.Config{
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
		var alert *net.OpError
		if errors.As(err, &alert) && alert.Op == "remote error" && f.Rejected != nil {
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

// pass passes a connection through, with what was said already.
func (p *Proxy) pass(ctx context.Context, conn *net.TCPConn, f Flow, o opening) {
	if o.server == nil {
		// Where the client dialled; for a host whose certificate the client
		// is going to verify, another of its addresses will do if need be.
		var alternative upstream.Host
		if o.protocol == tlsHello && o.host != "" {
			alternative = upstream.ParseHost(net.JoinHostPort(o.host, portOf(f.Dst)))
		}
		var err error
		if o.server, err = f.Egress.Dial(ctx, f.Dst, alternative); err != nil {
			p.failed.Add(1)
			p.log.Debug("the destination can't be reached", "client", f.Client, "dst", f.Dst, "err", err)
			if o.connect != "" && f.Leave != nil {
				f.Leave(leaveTime) // the client may know more of the proxy's addresses
			}
			abort(conn)
			return
		}
	}
	p.passed.Add(1)
	o.opened()
	s := &splice{client: conn, server: o.server}
	p.mu.Lock()
	p.splices[s] = struct{}{}
	p.mu.Unlock()
	s.run(o.bytes, o.greeting)
	p.mu.Lock()
	delete(p.splices, s)
	p.mu.Unlock()
}

// Shutdown waits until the connections have ended: those to registries after
// their running request, those passed through when one side closes, or when they
// are idle. When ctx is done it cuts the rest, and returns ctx's error. There must be no more calls
// of Serve by then.
func (p *Proxy) Shutdown(ctx context.Context) error {
	// The server reads no more requests then, and some connections may still be on
	// their way to their first.
	octx, cancel := context.WithTimeout(ctx, openTime)
	defer cancel()
	stop := context.AfterFunc(octx, func() {
		p.mu.Lock()
		p.changed.Broadcast()
		p.mu.Unlock()
	})
	defer stop()
	p.mu.Lock()
	for p.opening > 0 && octx.Err() == nil {
		p.changed.Wait()
	}
	p.mu.Unlock()
	err := p.server.Shutdown(ctx)
	if err != nil {
		p.server.Close()
	}
	p.ready.Close()
	done := make(chan struct{})
	go func() { p.active.Wait(); close(done) }()
	look := time.NewTicker(idleLook)
	defer look.Stop()
	for ctx.Err() == nil {
		p.closeIdle()
		select {
		case <-done:
			return err
		case <-look.C:
		case <-ctx.Done():
		}
	}
	p.mu.Lock()
	for s := range p.splices {
		abort(s.client)
		abort(s.server)
	}
	p.mu.Unlock()
	<-done
	return ctx.Err()
}

// closeIdle closes the connections that are passed through and idle: clients may
// keep them for minutes after their last request.
func (p *Proxy) closeIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.splices {
		if s.idleFor(p.idle) {
			s.close()
		}
	}
}

// abort closes a connection with a reset, as its peer would see it from a
// destination that is not there.
func abort(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
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
