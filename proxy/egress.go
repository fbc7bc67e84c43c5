// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sys/unix"
	"weir/proxy/registry"
)

// Dialer opens a TCP connection to an IP address and port.
type Dialer func(ctx context.Context, addr netip.AddrPort) (*net.TCPConn, error)

const (
	// dialTimeout bounds one attempt to reach an address; runtimes give up
	// after 30 seconds.
	dialTimeout = 15 * time.Second
	// onlyDialTimeout bounds it where there is no other address: the runtime would
	// have made this one attempt.
	onlyDialTimeout = 30 * time.Second
	// fallbackDelay is when other addresses of a host are tried beside the
	// one that the client dialled: what Go's own dialer waits before it tries
	// the other address family (RFC 8305), which the client itself can't do
	// any more since its connection was accepted here.
	fallbackDelay = 300 * time.Millisecond
	// verifiedTTL is how long a host whose certificate was verified at an address
	// is intercepted, for clients that dial that, without looking again.
	verifiedTTL = 10 * time.Minute
	// refusedTTL is how long a host that could not be verified is passed
	// through without looking again.
	refusedTTL = time.Minute
	// downTTL is how long a host that is down is taken to be down.
	downTTL = 30 * time.Second
	// hurry bounds the look at a host that there is something to serve of
	// without it. Clients wait 10 seconds for a TLS handshake.
	hurry = 3 * time.Second
	// maxSettings bounds the ways out that differ in what verifies a registry.
	maxSettings = 64
)

// Settings are what a client's runtime has for one registry beside the system's
// roots. The zero value is nothing.
type Settings struct {
	// Roots verify the registry. Nil means the usual ones.
	Roots *x509.CertPool
	// Certificates are what the client can show to the registry.
	Certificates []tls.Certificate
	// Key tells different settings apart.
	Key string
}

// withoutRoots are the same settings where the registry is one that the node
// trusts.
func (s Settings) withoutRoots() Settings {
	if len(s.Certificates) == 0 {
		return Settings{}
	}
	if s.Roots != nil {
		s.Roots, s.Key = nil, s.Key+", without its roots"
	}
	return s
}

// Egress is the way out for the clients of one network namespace: connections
// are made in their namespace, so that they have their routes, policies and
// source address, and those to a registry are kept open for the next request.
type Egress struct {
	dial      Dialer
	ups       Upstreams
	settings  Settings
	transport *http.Transport
	verdicts  *lru.Cache[string, verdict] // by HOST:PORT, or at; no expirable one, whose goroutine outlives it

	mu    sync.Mutex
	addrs map[string]netip.AddrPort // HOST:PORT → where a client has dialled it and it was verified
	ready map[string][]net.Conn     // connections nobody has used yet; nil once it is closed
	with  map[string]*Egress        // the same way out with other settings, by their key
}

// verdict is why a host can't be intercepted, or nil.
type verdict struct {
	err   error
	until time.Time
}

// Upstreams is what is common to all ways out.
type Upstreams struct {
	// Roots returns what a registry's certificate is verified with; nil, as
	// function or result, means the system's roots.
	Roots func(host string) *x509.CertPool
	// Remembers says whether there may be something to serve of a registry
	// that can't be reached. Nil means never.
	Remembers func(host string) bool
	// Reaches says whether the node itself gets an answer of a registry. One that
	// a client can't reach is not down then, but out of the client's bounds. Nil
	// means that it doesn't.
	Reaches func(ctx context.Context, host string) bool
}

// NewEgress returns a way out that dials with dial. Close it when its
// namespace has no more clients.
func (u Upstreams) NewEgress(dial Dialer) *Egress {
	verdicts, _ := lru.New[string, verdict](1024)
	e := &Egress{
		dial:     dial,
		ups:      u,
		verdicts: verdicts,
		addrs:    make(map[string]netip.AddrPort),
		ready:    make(map[string][]net.Conn),
		with:     make(map[string]*Egress),
	}
	e.transport = &http.Transport{
		DialContext:    e.dialHost,
		DialTLSContext: e.dialTLS,
		// What the client sent and what the upstream sends stays as it is.
		DisableCompression:    true,
		TLSNextProto:          map[string]func(string, *tls.Conn) http.RoundTripper{},
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       30 * time.Second,
		ExpectContinueTimeout: time.Second,
		WriteBufferSize:       64 << 10,
		ReadBufferSize:        64 << 10,
	}
	return e
}

// NewOwnEgress returns the way out for requests that come to this process by
// themselves: from its own namespace, and through the proxy that HTTPS_PROXY and
// NO_PROXY in its environment name.
func (u Upstreams) NewOwnEgress() *Egress {
	e := u.NewEgress(func(ctx context.Context, addr netip.AddrPort) (*net.TCPConn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr.String())
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil
	})
	e.transport.Proxy = http.ProxyFromEnvironment
	// For registries behind the proxy. crypto/tls can't choose the roots by
	// the host, so they are verified here, as it would.
	e.transport.TLSClientConfig = &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			o := x509.VerifyOptions{DNSName: cs.ServerName, Intermediates: x509.NewCertPool()}
			if u.Roots != nil {
				o.Roots = u.Roots(registry.Canonical(cs.ServerName))
			}
			for _, c := range cs.PeerCertificates[1:] {
				o.Intermediates.AddCert(c)
			}
			_, err := cs.PeerCertificates[0].Verify(o)
			return err
		},
	}
	return e
}

// under returns the same way out with a client's settings.
func (e *Egress) under(s Settings) *Egress {
	if s.Key == "" {
		return e
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if child, ok := e.with[s.Key]; ok {
		return child
	}
	child := e.ups.NewEgress(e.dial)
	child.settings = s
	if e.ready == nil { // closed
		child.Close()
		return child
	}
	if len(e.with) >= maxSettings { // they were changed many times
		for key, old := range e.with {
			old.Close()
			delete(e.with, key)
		}
	}
	e.with[s.Key] = child
	return child
}

// Close closes idle connections. Those in use live on until they are done.
func (e *Egress) Close() {
	e.transport.CloseIdleConnections()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, conns := range e.ready {
		for _, c := range conns {
			c.Close()
		}
	}
	e.ready = nil
	for _, child := range e.with {
		child.Close()
	}
}

// errClientCert says that a registry asks its clients for certificates, which
// weir doesn't have.
var errClientCert = errors.New("the registry asks for a client certificate")

// verify finds out whether a host that a client dialled at addr can be spoken
// to in the client's place: it is there, and its certificate is good. It makes
// the connection that the client's first request will use.
//
// The name is the client's word. Who gives a registry's name to an address of
// his own learns that this address isn't the registry's, and no other client of
// the network namespace is sent there, or loses the registry for it.
func (e *Egress) verify(ctx context.Context, host string, addr netip.AddrPort) error {
	hostport := withPort(host)
	for _, key := range []string{hostport, at(hostport, addr)} {
		if v, ok := e.verdicts.Get(key); ok && time.Now().Before(v.until) {
			return v.err
		}
	}
	hctx := ctx
	remembered := e.remembers(host)
	if remembered {
		var cancel context.CancelFunc
		hctx, cancel = context.WithTimeout(ctx, hurry)
		defer cancel()
	}
	c, err := e.handshakeAt(hctx, hostport, addr)
	var ne net.Error
	timedOut := errors.As(err, &ne) && ne.Timeout()
	switch {
	case err == nil:
		e.verified(hostport, c)
		e.verdicts.Add(at(hostport, addr), verdict{nil, time.Now().Add(verifiedTTL)})
		e.keep(hostport, c)
		return nil
	case ctx.Err() != nil:
		return err
	case remembered && !badCertificate(err) && e.ups.Reaches != nil && e.ups.Reaches(ctx, host):
		// A network policy, say. What others were given by it is not for this
		// client, who could not have asked.
		e.verdicts.Add(at(hostport, addr), verdict{err, time.Now().Add(refusedTTL)})
		return err
	case remembered && !badCertificate(err):
		// It was verified before, and is down now. Requests try it again.
		e.verdicts.Add(hostport, verdict{nil, time.Now().Add(downTTL)})
		return nil
	case !timedOut:
		e.verdicts.Add(at(hostport, addr), verdict{err, time.Now().Add(refusedTTL)})
	}
	return err
}

// at is the key of the verdict on a host at one address.
func at(hostport string, addr netip.AddrPort) string { return hostport + " at " + addr.String() }

// verified takes in where a host was found to be itself.
func (e *Egress) verified(hostport string, c net.Conn) {
	addr, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.addrs) >= 4096 {
		clear(e.addrs)
	}
	e.addrs[hostport] = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
}

// Reaches says whether a registry answers by this way out. It is for
// [Upstreams].
func (e *Egress) Reaches(ctx context.Context, host string) bool {
	key := "answers " + host
	if v, ok := e.verdicts.Get(key); ok && time.Now().Before(v.until) {
		return v.err == nil
	}
	ctx, cancel := context.WithTimeout(ctx, hurry/2)
	defer cancel()
	_, err := e.base(ctx, host)
	e.verdicts.Add(key, verdict{err, time.Now().Add(hurry)})
	return err == nil
}

func (e *Egress) remembers(host string) bool {
	return e.ups.Remembers != nil && e.ups.Remembers(host)
}

// badCertificate says whether a host could be spoken to, and isn't who it says
// or wants to know who we are. A client may know better.
func badCertificate(err error) bool {
	var verification *tls.CertificateVerificationError
	return errors.As(err, &verification) || errors.Is(err, errClientCert)
}

// reach connects to an address, and keeps the connection for the first request
// there.
func (e *Egress) reach(ctx context.Context, addr netip.AddrPort) error {
	e.mu.Lock()
	waiting := len(e.ready[plain(addr)])
	e.mu.Unlock()
	if waiting > 0 {
		return nil
	}
	c, err := e.dialOr(ctx, addr, "")
	if err == nil {
		e.keep(plain(addr), c)
	}
	return err
}

// plain is the key of ready connections to an address without TLS.
func plain(addr netip.AddrPort) string { return "plain " + addr.String() }

// keep keeps a connection for whoever dials next.
func (e *Egress) keep(hostport string, c net.Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ready == nil || len(e.ready[hostport]) >= 4 {
		c.Close()
		return
	}
	e.ready[hostport] = append(e.ready[hostport], c)
	// It is idle like any other until then.
	time.AfterFunc(e.transport.IdleConnTimeout, func() {
		if e.take(hostport, c) != nil {
			c.Close()
		}
	})
}

// take takes a ready connection to a host: the given one, or any.
func (e *Egress) take(hostport string, which net.Conn) net.Conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, c := range e.ready[hostport] {
		if which == nil && !alive(c) {
			continue // closed when its time is over
		}
		if which == nil || c == which {
			e.ready[hostport] = append(e.ready[hostport][:i:i], e.ready[hostport][i+1:]...)
			return c
		}
	}
	return nil
}

// alive says whether the other side hasn't closed a connection. A request that
// is sent on one that it has fails, which net/http repairs only for connections
// that were used before.
func alive(c net.Conn) bool {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return false
	}
	established := false
	err = raw.Control(func(fd uintptr) {
		info, ierr := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		established = ierr == nil && info.State == unix.BPF_TCP_ESTABLISHED
	})
	return err == nil && established
}

func (e *Egress) dialTLS(ctx context.Context, _, hostport string) (net.Conn, error) {
	if c := e.take(hostport, nil); c != nil {
		return c, nil
	}
	return e.handshake(ctx, hostport)
}

func (e *Egress) handshake(ctx context.Context, hostport string) (*tls.Conn, error) {
	raw, err := e.dialHost(ctx, "tcp", hostport)
	if err != nil {
		return nil, err
	}
	c, err := e.secure(ctx, hostport, raw)
	if err != nil && ctx.Err() == nil && e.forget(hostport, raw.RemoteAddr()) {
		// It was there, and somebody else is now.
		if raw, err = e.dialHost(ctx, "tcp", hostport); err == nil {
			c, err = e.secure(ctx, hostport, raw)
		}
	}
	return c, err
}

// forget forgets that a host was verified at an address, and says whether it was.
func (e *Egress) forget(hostport string, at net.Addr) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.addrs[hostport].String() != at.String() {
		return false
	}
	delete(e.addrs, hostport)
	return true
}

// handshakeAt is handshake with a host where a client has dialled it.
func (e *Egress) handshakeAt(ctx context.Context, hostport string, addr netip.AddrPort) (*tls.Conn, error) {
	raw, err := e.dialOr(ctx, addr, hostport)
	if err != nil {
		return nil, err
	}
	return e.secure(ctx, hostport, raw)
}

// secure speaks TLS with a host on a connection, which it takes over.
func (e *Egress) secure(ctx context.Context, hostport string, raw net.Conn) (*tls.Conn, error) {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		raw.Close()
		return nil, err
	}
	asked := false
	conf := &tls.Config{
		ServerName: host,
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetClientCertificate: func(cri *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			for _, c := range e.settings.Certificates {
				if cri.SupportsCertificate(&c) == nil {
					return &c, nil
				}
			}
			asked = true
			return &tls.Certificate{}, nil
		},
		RootCAs: e.settings.Roots,
	}
	if conf.RootCAs == nil && e.ups.Roots != nil {
		conf.RootCAs = e.ups.Roots(stripDefaultPort(hostport))
	}
	c := tls.Client(raw, conf)
	hctx, cancel := context.WithTimeout(ctx, dialTimeout)
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

// dialHost connects to a host: where it was verified, else to what its name
// resolves to.
func (e *Egress) dialHost(ctx context.Context, _, hostport string) (net.Conn, error) {
	if addr, err := netip.ParseAddrPort(hostport); err == nil && e.transport.Proxy == nil {
		if c := e.take(plain(addr), nil); c != nil {
			return c, nil
		}
		return e.dialOr(ctx, addr, "")
	}
	e.mu.Lock()
	addr, dialled := e.addrs[hostport]
	e.mu.Unlock()
	if dialled {
		return e.dialOr(ctx, addr, hostport)
	}
	addrs, err := resolve(ctx, hostport)
	if err != nil {
		return nil, err
	}
	return e.race(ctx, addrs)
}

// dialOr connects to addr, or else to another address of hostport, which may
// be empty for none.
func (e *Egress) dialOr(ctx context.Context, addr netip.AddrPort, hostport string) (*net.TCPConn, error) {
	if hostport == "" {
		ctx, cancel := context.WithTimeout(ctx, onlyDialTimeout)
		defer cancel()
		return e.dial(ctx, addr)
	}
	failed := make(chan struct{})
	type result struct {
		c   *net.TCPConn
		err error
	}
	results := make(chan result, 2)
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	go func() {
		c, err := e.dial(ctx, addr)
		results <- result{c, err}
		if err != nil {
			close(failed)
		}
	}()
	go func() {
		select {
		case <-failed:
		case <-time.After(fallbackDelay):
		case <-ctx.Done():
			results <- result{nil, ctx.Err()}
			return
		}
		others, err := resolve(ctx, hostport)
		if err == nil && ctx.Err() == nil {
			var c *net.TCPConn
			c, err = e.race(ctx, without(others, addr))
			results <- result{c, err}
			return
		}
		results <- result{nil, err}
	}()
	var firstErr error
	for i := range 2 {
		r := <-results
		if r.err == nil && r.c != nil {
			if i == 0 { // the other one is not needed
				cancel()
				go func() {
					if r := <-results; r.c != nil {
						r.c.Close()
					}
				}()
			}
			return r.c, nil
		}
		if firstErr == nil {
			firstErr = r.err
		}
	}
	return nil, firstErr
}

// race dials addresses, each a moment after the one before, and returns the
// first connection.
func (e *Egress) race(ctx context.Context, addrs []netip.AddrPort) (*net.TCPConn, error) {
	if len(addrs) == 0 {
		return nil, errors.New("no address to connect to")
	}
	if len(addrs) > 8 {
		addrs = addrs[:8]
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	type result struct {
		c   *net.TCPConn
		err error
	}
	results := make(chan result)
	var started, finished int
	next := time.NewTimer(0)
	defer next.Stop()
	var first error
	for {
		select {
		case <-next.C:
			if started < len(addrs) {
				addr := addrs[started]
				started++
				go func() {
					c, err := e.dial(ctx, addr)
					select {
					case results <- result{c, err}:
					case <-ctx.Done():
						if err == nil {
							c.Close()
						}
					}
				}()
				next.Reset(fallbackDelay)
			}
		case r := <-results:
			if r.err == nil {
				return r.c, nil
			}
			if first == nil {
				first = r.err
			}
			if finished++; finished == len(addrs) {
				return nil, first
			}
			next.Reset(0)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func resolve(ctx context.Context, hostport string) ([]netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	p, err := net.DefaultResolver.LookupPort(ctx, "tcp", port)
	if err != nil {
		return nil, err
	}
	ips, err := upstreamNames.lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.AddrPort, 0, len(ips))
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), uint16(p)))
	}
	return addrs, nil
}

func without(addrs []netip.AddrPort, not netip.AddrPort) (rest []netip.AddrPort) {
	for _, a := range addrs {
		if a != not {
			rest = append(rest, a)
		}
	}
	return rest
}

func withPort(host string) string {
	if _, _, err := net.SplitHostPort(host); err == nil {
		return host
	}
	return net.JoinHostPort(host, "443")
}

func stripDefaultPort(hostport string) string {
	if h, p, err := net.SplitHostPort(hostport); err == nil && p == "443" {
		return h
	}
	return hostport
}
