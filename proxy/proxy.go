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
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/golang-lru/v2/expirable"
	"weir/p2p/tlsconn"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

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
	// maxRequestHead bounds a request's head, which is held for as long as the
	// answer takes. A token has some 20 KB, and large registries take no more than
	// 64 to 128 KB.
	maxRequestHead = 128 << 10
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
			if t, ok := c.(*tlsconn.Conn); ok {
				c = t.Raw()
			}
			return context.WithValue(ctx, upstreamKey{}, c.(*intercepted))
		},
		ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	p.active.Go(func() { _ = p.server.Serve(&p.ready) })
	return p
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
