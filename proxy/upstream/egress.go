// SPDX-License-Identifier: Apache-2.0

// Package upstream is how weir reaches registries: which host is which, how it is
// dialled in a client's network namespace, what verifies it, what is known of its
// health, and the connections that are kept to it.
//
// A client that weir answers for has dialled an address, and gets what is there,
// as it would without weir. So all that is known or kept belongs to a host at an
// address, with the settings of the client's runtime (see [Target]), and never to
// the host alone. Only when that address fails are the host's others tried, which
// is better than failing.
//
// Bounds in time are for choosing between two ways. The only way has as long as
// the client gives it.
package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sys/unix"
)

// Dialer opens a TCP connection to an IP address and port.
type Dialer func(ctx context.Context, addr netip.AddrPort) (*net.TCPConn, error)

// Config is what is common to all egresses.
type Config struct {
	// Roots returns what a registry's certificate is verified with; nil, as
	// function or result, means the system's roots.
	Roots func(host string) *x509.CertPool
}

// Egress is the way out for the clients of one network namespace: connections
// are made in their namespace, so that they have their routes, policies and
// source address, and those to a registry are kept open for the next request.
type Egress struct {
	dial   Dialer
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	conf   Config
	proxy  func(*http.Request) (*url.URL, error) // nil for none
	times  times
	pools  *lru.Cache[key, *pool] // no expirable one, whose goroutine outlives it
}

// maxHead bounds the head of an answer, which is held for as long as its client
// takes to read. curl, for one, has 300 KB.
const maxHead = 128 << 10

// maxPools bounds the targets that something is known of, and is kept for.
const maxPools = 1024

// times are how long things may take; see the defaults.
type times struct {
	connect, fallback, handshake, guess, idle, relay, retry, least time.Duration
}

var defaultTimes = times{
	// One attempt to reach an address, and then the TLS handshake: what the
	// clients' own dialers have (containerd, dockerd, go-containerregistry).
	connect: 30 * time.Second,
	// When other addresses of a host are tried beside the one that doesn't accept:
	// what Go's own dialer waits before it tries the other address family (RFC
	// 8305), which the client itself can't do any more since its connection was
	// accepted here.
	fallback: 300 * time.Millisecond,
	// When they are tried beside one that accepts, and then says nothing.
	handshake: time.Second,
	// How long a request may go without an acknowledgement, and twice that if the
	// kernel has not sent it again by then: all that forgotten connections cost is to be
	// less than a second. Linux sends it again after 200 ms and two round trips.
	guess: 400 * time.Millisecond,
	// How long a connection may wait for its next request and be taken to lead to
	// the registry still, if what is sent is acknowledged.
	idle: 5 * time.Second,
	// What acknowledges may be a relay on this side (slirp4netns, a virtual
	// machine's NAT) that has lost the registry meanwhile. After so long without an
	// answer the request is sent again, once, if the connection has waited as long
	// as idle before. A registry that takes its time is not asked twice otherwise:
	// what it counts or fetches it would count and fetch twice.
	relay: 15 * time.Second,
	// How often a host that could not be reached is tried again, which none waits
	// for.
	retry: 500 * time.Millisecond,
	// A host that may be reached has at least so long, when a forgotten connection has
	// taken the rest.
	least: 200 * time.Millisecond,
}

// NewEgress returns a way out that dials with dial. Close it when its namespace
// has no more clients.
func (c Config) NewEgress(dial Dialer) *Egress {
	pools, _ := lru.NewWithEvict(maxPools, func(_ key, p *pool) { p.close() })
	return &Egress{dial: dial, lookup: upstreamNames.lookup, conf: c, times: defaultTimes, pools: pools}
}

// NewNodeEgress returns the way out for requests that come to this process by
// themselves: from its own namespace, and through the proxy that HTTPS_PROXY and
// NO_PROXY in its environment name.
func (c Config) NewNodeEgress() *Egress {
	e := c.NewEgress(func(ctx context.Context, addr netip.AddrPort) (*net.TCPConn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr.String())
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil
	})
	e.proxy = http.ProxyFromEnvironment
	return e
}

// Close closes idle connections. Those in use live on until they are done.
func (e *Egress) Close() { e.closeOthers(nil) }

// closeOthers closes idle connections to all targets but that of p, of which one was
// forgotten on the way: the others probably were as well, and each costs time.
func (e *Egress) closeOthers(p *pool) {
	for _, other := range e.pools.Values() {
		if other != p {
			other.close()
		}
	}
}

// HTTPTransport returns a transport for requests to what is no registry.
func (e *Egress) HTTPTransport() *http.Transport { return e.newHTTP(Target{}, 0) }

// newHTTP returns a transport for requests to a target, and to other hosts by
// name. What is sent goes at most for unacked without an acknowledgement, if that
// isn't 0.
func (e *Egress) newHTTP(t Target, unacked time.Duration) *http.Transport {
	open := func(ctx context.Context, scheme, hostport string) (net.Conn, error) {
		c, err := e.open(ctx, t, t.keyFor(&url.URL{Scheme: scheme, Host: hostport}))
		if err == nil && unacked > 0 {
			_ = control(c, func(fd int) error {
				return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unacked.Milliseconds()))
			})
		}
		return c, err
	}
	return &http.Transport{
		Proxy: e.proxy,
		DialContext: func(ctx context.Context, _, hostport string) (net.Conn, error) {
			return open(ctx, "http", hostport)
		},
		DialTLSContext: func(ctx context.Context, _, hostport string) (net.Conn, error) {
			return open(ctx, "https", hostport)
		},
		TLSClientConfig: e.proxiedTLS(),
		// What the client sent and what the upstream sends stays as it is.
		DisableCompression:    true,
		TLSNextProto:          map[string]func(string, *tls.Conn) http.RoundTripper{},
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       30 * time.Second,
		ExpectContinueTimeout: time.Second,
		// Bodies are read in larger pieces, which go past these.
		WriteBufferSize:        16 << 10,
		ReadBufferSize:         16 << 10,
		MaxResponseHeaderBytes: maxHead,
	}
}

// proxiedTLS verifies registries behind a proxy, with which net/http speaks TLS
// itself. crypto/tls can't choose the roots by the host.
func (e *Egress) proxiedTLS() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			o := x509.VerifyOptions{DNSName: cs.ServerName, Intermediates: x509.NewCertPool()}
			if e.conf.Roots != nil {
				o.Roots = e.conf.Roots(ParseHost(cs.ServerName).String())
			}
			for _, c := range cs.PeerCertificates[1:] {
				o.Intermediates.AddCert(c)
			}
			if _, err := cs.PeerCertificates[0].Verify(o); err != nil {
				return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
			}
			return nil
		},
	}
}

// Dial connects to an address, or else to another address of a host, which may
// be zero for none.
func (e *Egress) Dial(ctx context.Context, addr netip.AddrPort, or Host) (*net.TCPConn, error) {
	r := race{egress: e, open: func(ctx context.Context, addr netip.AddrPort, _ func()) (net.Conn, error) { return e.tcp(ctx, addr) }}
	if or != (Host{}) {
		r.names = or.HostPort()
	}
	c, err := r.run(ctx, addr)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// DialName connects to HOST:PORT.
func (e *Egress) DialName(ctx context.Context, hostport string) (*net.TCPConn, error) {
	return e.Dial(ctx, netip.AddrPort{}, ParseHost(hostport))
}

// Connect connects to a registry without TLS, and keeps the connection for the
// first request there.
func (e *Egress) Connect(ctx context.Context, addr netip.AddrPort) error {
	p := e.pool(Target{Addr: addr}.key())
	if p.waiting() {
		return nil
	}
	c, err := e.Dial(ctx, addr, Host{})
	if err == nil {
		p.keep(c)
	}
	return err
}

// Keep keeps a connection to a registry without TLS for the first request there.
func (e *Egress) Keep(addr netip.AddrPort, c *net.TCPConn) {
	e.pool(Target{Addr: addr}.key()).keep(c)
}

// tcp makes one attempt.
func (e *Egress) tcp(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, e.times.connect)
	defer cancel()
	c, err := e.dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	_ = c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: keepAlive, Interval: keepAlive})
	return c, nil
}

// open opens a connection for requests, or takes one that is ready.
func (e *Egress) open(ctx context.Context, t Target, k key) (net.Conn, error) {
	p := e.pool(k)
	if c := p.take(); c != nil {
		return c, nil
	}
	until, _ := ctx.Value(untilKey{}).(time.Time)
	if until.IsZero() {
		c, err := e.connect(ctx, k, t, false)
		if err == nil {
			p.found(nil)
		}
		return c, err
	}
	type result struct {
		c   net.Conn
		err error
	}
	results := make(chan result)
	late := make(chan struct{})
	attempt := func(long time.Duration) {
		actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), long)
		defer cancel()
		c, err := e.connect(actx, k, t, false)
		if err != nil {
			err = fmt.Errorf("%s: %w: %w", k.hostport, ErrUnreachable, err)
		}
		select {
		case results <- result{c, err}:
		case <-late:
			if p.found(err); err == nil {
				p.keep(c)
			}
		}
	}
	if err := p.unreachable(); err != nil {
		if p.tryAgain(e.times.retry) {
			close(late)
			go attempt(4 * e.times.retry)
		}
		return nil, err
	}
	go attempt(e.times.connect)
	budget := max(time.Until(until), e.times.least)
	timer := time.NewTimer(budget)
	defer timer.Stop()
	select {
	case r := <-results:
		p.found(r.err)
		return r.c, r.err
	case <-timer.C:
		// It goes on, and the next request may find that it could be reached.
		defer close(late)
		err := fmt.Errorf("%s: %w: no connection in %s", k.hostport, ErrUnreachable, budget)
		p.found(err)
		return nil, err
	case <-ctx.Done():
		close(late)
		return nil, ctx.Err()
	}
}

// connect opens a connection: to the address that was dialled, or else to another
// of the host's; or through the client's proxy. With strict, a certificate that is shown there and can't be
// verified is the answer.
func (e *Egress) connect(ctx context.Context, k key, t Target, strict bool) (net.Conn, error) {
	if k.tunnel != "" {
		c, err := e.Tunnel(ctx, t.Tunnel, k.hostport)
		if errors.Is(err, ErrTunnel) && k == t.key() && ctx.Err() == nil {
			e.pool(k).judge(err) // it may have let the client there before
		}
		if err != nil || k.scheme != "https" {
			return c, err
		}
		return e.secure(ctx, k.hostport, t.Settings, c)
	}
	r := race{egress: e, names: k.hostport, strict: strict}
	r.open = func(ctx context.Context, addr netip.AddrPort, accepted func()) (net.Conn, error) {
		c, err := e.tcp(ctx, addr)
		if err != nil {
			return nil, err
		}
		if k.scheme != "https" {
			return c, nil
		}
		accepted()
		return e.secure(ctx, k.hostport, t.Settings, c)
	}
	return r.run(ctx, k.addr)
}

// errClientCert says that a registry asks its clients for certificates, which
// weir doesn't have.
var errClientCert = errors.New("the registry asks for a client certificate")

// Refused says whether an error of [Egress.Verify] means that there is somebody
// to speak to, who isn't who it should be or wants to know who weir is. A client
// may know better. So does a proxy's refusal.
func Refused(err error) bool {
	var verification *tls.CertificateVerificationError
	return errors.As(err, &verification) || errors.Is(err, errClientCert) || errors.Is(err, ErrTunnel)
}

// secure speaks TLS with a host on a connection, which it takes over.
func (e *Egress) secure(ctx context.Context, hostport string, s Settings, raw net.Conn) (net.Conn, error) {
	host := ParseHost(hostport)
	asked := false
	conf := &tls.Config{
		ServerName: host.name,
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetClientCertificate: func(cri *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			for _, c := range s.Certificates {
				if cri.SupportsCertificate(&c) == nil {
					return &c, nil
				}
			}
			asked = true
			return &tls.Certificate{}, nil
		},
		RootCAs: s.Roots,
	}
	if conf.RootCAs == nil && e.conf.Roots != nil {
		conf.RootCAs = e.conf.Roots(host.String())
	}
	c := tls.Client(raw, conf)
	hctx, cancel := context.WithTimeout(ctx, e.times.connect)
	defer cancel()
	if err := c.HandshakeContext(hctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("TLS with %s at %s: %w", hostport, raw.RemoteAddr(), err)
	}
	if asked {
		c.Close()
		return nil, errClientCert
	}
	return c, nil
}
