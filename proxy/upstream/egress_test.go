// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"weir/proxy/internal/proxytest"
)

// world is a way out to servers on loopback.
type world struct {
	t      testing.TB
	ca     *proxytest.Authority
	egress *Egress

	mu    sync.Mutex
	dials map[netip.AddrPort]int
	hold  map[netip.AddrPort]bool // don't answer
	seen  func(context.Context, netip.AddrPort)
	ip    netip.Addr // of every name; invalid when there is no name server
	asked int        // how often for one
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, ca: proxytest.NewAuthority(t, "world"), dials: make(map[netip.AddrPort]int), hold: make(map[netip.AddrPort]bool)}
	w.egress = Config{Roots: func(string) *x509.CertPool { return w.ca.Pool }}.NewEgress(w.dial)
	w.egress.lookup = w.lookup
	t.Cleanup(w.egress.Close)
	return w
}

// name has every name stand for an address.
func (w *world) name(ip string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ip = netip.MustParseAddr(ip)
}

func (w *world) lookup(context.Context, string) ([]netip.Addr, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asked++; !w.ip.IsValid() {
		return nil, errors.New("no name server")
	}
	return []netip.Addr{w.ip}, nil
}

func (w *world) questions() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.asked
}

// watch has f called at each dial.
func (w *world) watch(f func(context.Context, netip.AddrPort)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = f
}

func (w *world) dial(ctx context.Context, addr netip.AddrPort) (*net.TCPConn, error) {
	w.mu.Lock()
	w.dials[addr]++
	silent, seen := w.hold[addr], w.seen
	w.mu.Unlock()
	if seen != nil {
		seen(ctx, addr)
	}
	if silent {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (w *world) dialled(addr netip.AddrPort) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dials[addr]
}

// silence has an address answer no more, or again.
func (w *world) silence(addr netip.AddrPort, silent bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hold[addr] = silent
}

// server is a registry.
type server struct {
	w        *world
	addr     netip.AddrPort
	listener net.Listener
	mu       sync.Mutex
	open     map[net.Conn]http.ConnState
}

type connKey struct{}

// serve serves any name by a CA.
func (w *world) serve(ip string, port uint16, by *proxytest.Authority, h http.HandlerFunc) *server {
	w.t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr(ip), port).String())
	if err != nil {
		w.t.Fatal(err)
	}
	s := &server{w: w, listener: l, addr: netip.MustParseAddrPort(l.Addr().String()), open: make(map[net.Conn]http.ConnState)}
	srv := &http.Server{
		Handler:     h,
		TLSConfig:   &tls.Config{GetCertificate: func(c *tls.ClientHelloInfo) (*tls.Certificate, error) { return by.Leaf(c.ServerName) }},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		ConnState: func(c net.Conn, st http.ConnState) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.open[c] = st; st == http.StateClosed {
				delete(s.open, c)
			}
		},
		ErrorLog: log.New(io.Discard, "", 0),
	}
	go func() { _ = srv.ServeTLS(l, "", "") }()
	w.t.Cleanup(func() { srv.Close() })
	return s
}

// drop has the connections that there are receive nothing any more, which no side
// is told of. New ones are as before.
func (s *server) drop() {
	s.w.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		err := control(c, func(fd int) error {
			return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
				&unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}})
		})
		if err != nil {
			s.w.t.Fatal(err)
		}
	}
}

func (s *server) conns() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

// idle waits until the server has nothing to do on any connection.
func (s *server) idle() {
	eventually(s.w.t, "the server is idle", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, st := range s.open {
			if st != http.StateIdle {
				return false
			}
		}
		return true
	})
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not so: ", what)
		}
	}
}

// target is the registry as a client has dialled it.
func (s *server) target() Target {
	return Target{Host: ParseHost(fmt.Sprintf("registry.test:%d", s.addr.Port())), Addr: s.addr}
}

// send sends a request as a client connection does, and returns the answer.
func send(t *testing.T, rt http.RoundTripper, method, url string, body io.Reader) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.Request != req {
		t.Error("the answer is to another request")
	}
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func (t Target) url() string { return "https://" + t.Host.String() + "/v2/" }

func TestParseHost(t *testing.T) {
	for in, want := range map[string][2]string{
		"Registry.Test.":      {"registry.test", "registry.test:443"},
		"registry.test:443":   {"registry.test", "registry.test:443"},
		"registry.test.:5000": {"registry.test:5000", "registry.test:5000"},
		"::1":                 {"::1", "[::1]:443"},
		"[::1]":               {"::1", "[::1]:443"},
		"[::1]:443":           {"::1", "[::1]:443"},
		"[::1]:5000":          {"[::1]:5000", "[::1]:5000"},
		"a:":                  {"a:", "a:"},
		"":                    {"", ":443"},
	} {
		h := ParseHost(in)
		if got := [2]string{h.String(), h.HostPort()}; got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
		if ParseHost(h.String()) != h {
			t.Errorf("%q: %v is not %v", in, ParseHost(h.String()), h)
		}
	}
}

// A registry has moved, and the old server still answers; or one of its addresses
// takes connections and says nothing. Each client gets what it has dialled, at
// once, and only who dialled the silent one is given the other.
func TestDialledAddress(t *testing.T) {
	w := newWorld(t)
	w.egress.times.handshake = 50 * time.Millisecond
	w.name("127.0.0.1")
	say := func(what string) http.HandlerFunc {
		return func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, what) }
	}
	old := w.serve("127.0.0.1", 0, w.ca, say("old"))
	moved := w.serve("127.0.0.2", old.addr.Port(), w.ca, say("new"))
	l, err := net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), old.addr.Port()).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hangs := netip.MustParseAddrPort(l.Addr().String())
	for _, tt := range []struct {
		addr netip.AddrPort
		want string
	}{{old.addr, "old"}, {moved.addr, "new"}, {hangs, "old"}, {old.addr, "old"}, {moved.addr, "new"}} {
		target := old.target()
		target.Addr = tt.addr
		if err := w.egress.Verify(t.Context(), target); err != nil {
			t.Errorf("at %s: %v", tt.addr, err)
		}
		if got, err := send(t, w.egress.Transport(target), "GET", target.url(), nil); err != nil || got != tt.want {
			t.Errorf("at %s: %q, %v; want %q", tt.addr, got, err, tt.want)
		}
	}
	if w.dialled(hangs) != 1 {
		t.Errorf("the silent address was dialled %d times", w.dialled(hangs))
	}
}

// What is found out at an address is remembered, and says nothing of another.
func TestVerdicts(t *testing.T) {
	w := newWorld(t)
	none := func(http.ResponseWriter, *http.Request) {}
	good := w.serve("127.0.0.1", 0, w.ca, none)
	evil := w.serve("127.0.0.2", good.addr.Port(), proxytest.NewAuthority(t, "evil"), none)
	w.name("127.0.0.1")
	closed := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), good.addr.Port())
	target := good.target()
	for range 2 {
		target.Addr = evil.addr
		if err := w.egress.Verify(t.Context(), target); !Refused(err) {
			t.Errorf("with another's certificate: %v", err)
		}
		target.Addr = good.addr
		if err := w.egress.Verify(t.Context(), target); err != nil {
			t.Error(err)
		}
		target.Addr = closed
		if err := w.egress.Verify(t.Context(), target); err != nil {
			t.Errorf("at another of its addresses: %v", err)
		}
	}
	for addr, want := range map[netip.AddrPort]int{evil.addr: 1, good.addr: 2, closed: 1} {
		if w.dialled(addr) != want {
			t.Errorf("%s was dialled %d times, want %d", addr, w.dialled(addr), want)
		}
	}
	// Who has no address asks by name.
	target.Addr = netip.AddrPort{}
	if err := w.egress.Verify(t.Context(), target); err != nil || !w.egress.Reaches(t.Context(), target.Host) {
		t.Errorf("by name: %v", err)
	}
	if other := ParseHost(fmt.Sprintf("other.test:%d", evil.addr.Port()+1)); w.egress.Reaches(t.Context(), other) {
		t.Error("where nothing listens, a registry answers")
	}
}

// A look that a client's timeout has ended is remembered as one that has failed,
// and one that was broken off says nothing.
func TestVerdictOfBrokenLook(t *testing.T) {
	w := newWorld(t)
	s := w.serve("127.0.0.1", 0, w.ca, func(http.ResponseWriter, *http.Request) {})
	w.silence(s.addr, true)
	w.name(s.addr.Addr().String())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.egress.Verify(ctx, s.target()); err == nil {
		t.Error("verified")
	}
	ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := w.egress.Verify(ctx, s.target()); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	w.silence(s.addr, false)
	if err := w.egress.Verify(t.Context(), s.target()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("looked again: %v", err)
	}
}

// Another address of a host is looked for when the one that the client has
// dialled fails, and not beside one that answers: that would be a question to a
// name server for nothing.
func TestOtherAddress(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	there := netip.MustParseAddrPort(l.Addr().String())
	slow := false
	w := newWorld(t)
	dial := func(addr netip.AddrPort) error {
		start := time.Now()
		c, err := w.egress.Dial(t.Context(), addr, ParseHost(fmt.Sprintf("registry.test:%d", there.Port())))
		if err == nil {
			c.Close()
		}
		if time.Since(start) >= defaultTimes.fallback {
			slow = true // it is right to ask then
		}
		return err
	}
	for range 300 {
		if err := dial(there); err != nil {
			t.Fatal(err)
		}
	}
	before := w.questions()
	if before > 0 && !slow {
		t.Errorf("for 300 connections name servers were asked %d times", before)
	}
	// Where nothing listens.
	if err := dial(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.9"), there.Port())); err == nil || w.questions() == before {
		t.Errorf("no other address was looked for: %v", err)
	}
}

// Where there is another address, a silent one costs a moment; where there is
// none, it has all the time.
func TestSilentAddress(t *testing.T) {
	w := newWorld(t)
	w.egress.times.fallback = 5 * time.Millisecond
	s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, "here") })
	w.name("127.0.0.1")
	target := s.target()
	target.Addr = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), s.addr.Port())
	w.silence(target.Addr, true)
	if got, err := send(t, w.egress.Transport(target), "GET", target.url(), nil); err != nil || got != "here" {
		t.Errorf("%q, %v", got, err)
	}
	// The only one answers after the name has been resolved to no other.
	late := make(chan struct{})
	w.watch(func(_ context.Context, addr netip.AddrPort) {
		if addr == s.addr {
			<-late
		}
	})
	before := w.questions()
	go func() {
		for w.questions() == before {
			time.Sleep(time.Millisecond)
		}
		close(late)
	}()
	c, err := w.egress.Dial(t.Context(), s.addr, s.target().Host)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// Behind a proxy of the node's own, registries are verified as everywhere.
func TestNodeEgressVerifies(t *testing.T) {
	world, evil := proxytest.NewAuthority(t, "world"), proxytest.NewAuthority(t, "evil")
	e := Config{Roots: func(host string) *x509.CertPool {
		if host == "registry.test" {
			return world.Pool
		}
		return evil.Pool
	}}.NewNodeEgress()
	defer e.Close()
	for _, c := range []struct {
		by   *proxytest.Authority
		name string // in the certificate
		ok   bool
	}{{world, "registry.test", true}, {evil, "registry.test", false}, {world, "other.test", false}} {
		leaf, err := c.by.Leaf(c.name)
		if err != nil {
			t.Fatal(err)
		}
		here, there := net.Pipe()
		go func() {
			_ = tls.Server(there, &tls.Config{Certificates: []tls.Certificate{*leaf}}).Handshake()
			there.Close()
		}()
		conf := e.HTTPTransport().TLSClientConfig
		conf.ServerName = "registry.test"
		if err := tls.Client(here, conf).Handshake(); (err == nil) != c.ok || err != nil && !Refused(err) {
			t.Errorf("%s by %s: %v", c.name, c.by.Cert.Subject.CommonName, err)
		}
		here.Close()
	}
}
