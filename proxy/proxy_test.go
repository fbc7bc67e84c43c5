// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/registry"
	"weir/proxy/store"
	"weir/proxy/upstream"
)

// authority is a CA for tests; as Leaves it is weir's.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t testing.TB, name string) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key, pool: x509.NewCertPool()}
	a.cert, _ = x509.ParseCertificate(der)
	a.pool.AddCert(a.cert)
	return a
}

func (a *authority) Permits(host string) bool { return host != "forbidden.test" }

func (a *authority) Leaf(host string) (*tls.Certificate, error) {
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{host}}
	if ip := net.ParseIP(host); ip != nil {
		tmpl.DNSNames, tmpl.IPAddresses = nil, []net.IP{ip}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, a.key.Public(), a.key)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.key}, err
}

// stage is a proxy between clients and one destination on loopback.
type stage struct {
	t        testing.TB
	proxy    *Proxy
	weir     *authority // what clients may trust
	world    *authority // what the destination's certificate is of
	egress   *upstream.Egress
	listener net.Listener
	dst      netip.AddrPort
	flow     atomic.Pointer[func(*Flow)]
	dials    atomic.Int64
	dialed   atomic.Pointer[func(netip.AddrPort) netip.AddrPort] // where an address is
	node     atomic.Bool                                         // whether the node reaches registries
}

func newStage(t testing.TB, dst net.Listener) *stage {
	s := &stage{t: t, weir: newAuthority(t, "weir"), world: newAuthority(t, "world")}
	s.dst = netip.MustParseAddrPort(dst.Addr().String())
	st, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	s.proxy = New(Options{
		Hosts: registry.NewHosts(fmt.Sprintf("registry.test:%d", s.dst.Port()), fmt.Sprintf("forbidden.test:%d", s.dst.Port())), Leaves: s.weir,
		Registry: registry.New(registry.Options{Store: st, StaleIfError: registry.DefaultStaleIfError}), Node: s,
	})
	s.egress = s.newEgress(s.world.pool)
	if s.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := s.listener.Accept()
			if err != nil {
				return
			}
			f := Flow{Dst: s.dst, Egress: s.egress, Client: "test", Trusts: func(registry.Known, string) bool { return true }}
			if change := s.flow.Load(); change != nil {
				(*change)(&f)
			}
			wg.Go(func() { s.proxy.Serve(context.Background(), c.(*net.TCPConn), f) })
		}
	})
	t.Cleanup(func() {
		s.listener.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = s.proxy.Shutdown(ctx)
		s.egress.Close()
		wg.Wait()
	})
	return s
}

// newEgress returns a way out that knows nothing yet.
func (s *stage) newEgress(roots *x509.CertPool) *upstream.Egress {
	e := upstream.Config{Roots: func(string) *x509.CertPool { return roots }}.NewEgress(func(ctx context.Context, addr netip.AddrPort) (*net.TCPConn, error) {
		s.dials.Add(1)
		if at := s.dialed.Load(); at != nil {
			addr = (*at)(addr)
		}
		if addr == silent {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr.String())
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil
	})
	s.t.Cleanup(e.Close)
	return e
}

// silent is an address that doesn't answer.
var silent = netip.MustParseAddrPort("198.51.100.9:1")

// place puts addresses elsewhere.
func (s *stage) place(at func(netip.AddrPort) netip.AddrPort) { s.dialed.Store(&at) }

// Reaches implements Options.Node.
func (s *stage) Reaches(context.Context, upstream.Host) bool { return s.node.Load() }

// remember has something to serve of the registry without it.
func (s *stage) remember() {
	s.t.Helper()
	resp, err := s.client().Get(fmt.Sprintf("https://registry.test:%d/v2/a/manifests/1", s.dst.Port()))
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
		s.t.Fatal(resp.Status, err)
	}
}

// giveManifest answers every request with a manifest.
func giveManifest(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	_, _ = io.WriteString(w, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[]}`)
}

// change changes what the agent knows of later connections.
func (s *stage) change(f func(*Flow)) { s.flow.Store(&f) }

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (s *stage) dial() *net.TCPConn {
	s.t.Helper()
	c, err := net.Dial("tcp", s.listener.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// issuer says who has signed the certificate that a TLS client is shown.
func (s *stage) issuer(name string, protos ...string) string {
	s.t.Helper()
	var who string
	c := tls.Client(s.dial(), &tls.Config{ServerName: name, NextProtos: protos, InsecureSkipVerify: true, VerifyConnection: func(cs tls.ConnectionState) error {
		who = cs.PeerCertificates[0].Issuer.CommonName
		return nil
	}})
	if err := c.Handshake(); err != nil {
		return err.Error()
	}
	return who
}

// serveTLS answers TLS for any name with the world's certificates.
func (s *stage) serveTLS(l net.Listener, conf *tls.Config, h http.Handler) {
	conf.GetCertificate = func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) {
		name := chi.ServerName
		if name == "" {
			name = "127.0.0.1"
		}
		return s.world.Leaf(name)
	}
	srv := &http.Server{Handler: h, TLSConfig: conf, ErrorLog: nil}
	go func() { _ = srv.ServeTLS(l, "", "") }()
	s.t.Cleanup(func() { srv.Close() })
}

func TestIntercept(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	var asked atomic.Int64
	blob := bytes.Repeat([]byte("blob"), 50_000)
	path := "/v2/a/blobs/" + digest.FromBytes(blob).String()
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.URL.Path == path {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
			return
		}
		fmt.Fprintf(w, "%s %s", r.Host, r.URL.Path)
	}))
	c := http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("tcp", s.listener.Addr().String())
		},
		TLSClientConfig: &tls.Config{RootCAs: s.weir.pool},
	}}
	base := fmt.Sprintf("https://registry.test:%d", s.dst.Port())
	for range 3 {
		resp, err := c.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(got, blob) || resp.ProtoMajor != 1 || resp.ContentLength != int64(len(blob)) {
			t.Fatalf("%d bytes, %s, %v", len(got), resp.Proto, err)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the registry was asked %d times", n)
	}
	resp, err := c.Get(base + "/elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(resp.Body); string(got) != strings.TrimPrefix(base, "https://")+" /elsewhere" {
		t.Errorf("%q", got)
	}
	if n := s.dials.Load(); n != 1 {
		t.Errorf("%d connections to the registry, want the verified one used for all", n)
	}
}

// Only a registry that can be verified, for a client that trusts, is intercepted.
func TestDecide(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
	if got := s.issuer("registry.test"); got != "weir" {
		t.Errorf("a registry: certificate of %q", got)
	}
	if got := s.issuer("registry.test", "h2", "http/1.1"); got != "weir" {
		t.Errorf("with h2 and http/1.1: certificate of %q", got)
	}
	for name, got := range map[string]string{
		"other host":    s.issuer("other.test"),
		"forbidden":     s.issuer("forbidden.test"),
		"h2 only":       s.issuer("registry.test", "h2"),
		"no SNI":        s.issuer(""),
		"below a host":  s.issuer("x.registry.test"),
		"case and dots": s.issuer("registry.test.evil"),
	} {
		if got != "world" {
			t.Errorf("%s: certificate of %q", name, got)
		}
	}
	s.change(func(f *Flow) { f.Trusts = func(registry.Known, string) bool { return false } })
	if got := s.issuer("registry.test"); got != "world" {
		t.Errorf("no trust: certificate of %q", got)
	}
	s.change(func(f *Flow) { f.Trusts = nil })
	if got := s.issuer("registry.test"); got != "world" {
		t.Errorf("unknown process: certificate of %q", got)
	}
	if u := s.proxy.Unknowns(); len(u) < 2 {
		t.Errorf("hosts seen: %v", u)
	}
}

func TestUnverifiableUpstreamIsPassedThrough(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	var log bytes.Buffer
	s.proxy.log = slog.New(slog.NewTextHandler(&log, nil))
	evil := newAuthority(t, "evil")
	srv := &http.Server{TLSConfig: &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) { return evil.Leaf(chi.ServerName) }}}
	go func() { _ = srv.ServeTLS(l, "", "") }()
	defer srv.Close()
	for range 2 {
		if got := s.issuer("registry.test"); got != "evil" {
			t.Errorf("certificate of %q, want the client to see for itself", got)
		}
	}
	if n := s.proxy.Stats().Unverified; n != 2 || strings.Count(log.String(), "can't be verified") != 1 {
		t.Errorf("%d connections are counted, and the log has\n%s", n, log.String())
	}
}

// Who gives a registry's name to an address of his own has no effect on another
// client in the same network namespace, before him or after.
func TestForgedName(t *testing.T) {
	for _, first := range []string{"the registry", "the forger"} {
		t.Run(first+" first", func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			path := "/v2/a/tags/list" // which is always the registry's to answer
			s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
			forger := newAuthority(t, "forger")
			fake := listen(t)
			srv := &http.Server{TLSConfig: &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) { return forger.Leaf(chi.ServerName) }}}
			go func() { _ = srv.ServeTLS(fake, "", "") }()
			defer srv.Close()
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.weir.pool}, MaxIdleConns: 1,
				DialContext: func(context.Context, string, string) (net.Conn, error) { return s.dial(), nil }}}
			ask := func() {
				t.Helper()
				resp, err := client.Get(fmt.Sprintf("https://registry.test:%d%s", s.dst.Port(), path))
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				if b, _ := io.ReadAll(resp.Body); string(b) != path {
					t.Errorf("%s %q", resp.Status, b)
				}
			}
			forge := func() {
				t.Helper()
				// The port is part of a registry's name: another address with it.
				other := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), s.dst.Port())
				s.change(func(f *Flow) { f.Dst = other })
				s.issuer("registry.test")
				s.change(func(*Flow) {})
			}
			s.place(func(addr netip.AddrPort) netip.AddrPort {
				if addr.Addr() != s.dst.Addr() {
					return netip.MustParseAddrPort(fake.Addr().String())
				}
				return addr
			})
			if first == "the registry" {
				ask()
			}
			forge()
			ask()
			s.egress.Close()
			ask() // on the same connection to weir, and a new one to the registry
		})
	}
}

func TestClientCertificateIsPassedThrough(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{ClientAuth: tls.RequestClientCert}, http.NotFoundHandler())
	if got := s.issuer("registry.test"); got != "world" {
		t.Errorf("certificate of %q", got)
	}
}

func TestRejected(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
	rejected := make(chan string, 2)
	s.change(func(f *Flow) { f.Rejected = func(host string, err error) { rejected <- host } })
	c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", RootCAs: s.world.pool})
	if err := c.Handshake(); err == nil {
		t.Fatal("weir's certificate was trusted")
	}
	select {
	case host := <-rejected:
		if !strings.HasPrefix(host, "registry.test") {
			t.Error(host)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it wasn't called")
	}
	// A client that just goes away is not one that rejects.
	raw := s.dial()
	c = tls.Client(&oneWay{raw}, &tls.Config{ServerName: "registry.test", InsecureSkipVerify: true})
	_ = c.Handshake()
	raw.Close()
	select {
	case <-rejected:
		t.Error("a broken connection was taken for a rejection")
	case <-time.After(300 * time.Millisecond):
	}
}

// The agent is told that weir's certificate was accepted, and asked with the name
// in the client's own case, by which that looks for a registry's settings.
func TestAccepted(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
	accepted, asked := make(chan struct{}, 2), make(chan string, 2)
	s.change(func(f *Flow) {
		f.Accepted = func() { accepted <- struct{}{} }
		f.Trusts = func(_ registry.Known, name string) bool { asked <- name; return name == strings.ToLower(name) }
	})
	if got := s.issuer("registry.test"); got == "world" {
		t.Error("it was passed through")
	}
	select {
	case <-accepted:
	case <-time.After(10 * time.Second):
		t.Fatal("it wasn't called")
	}
	if name := <-asked; registry.Canonical(name) != name {
		t.Errorf("asked for %q", name)
	}
	if got := s.issuer("Registry.TEST"); got != "world" {
		t.Errorf("certificate of %q", got)
	}
	if name := <-asked; !strings.HasPrefix(name, "Registry.TEST") {
		t.Errorf("asked for %q", name)
	}
	if len(accepted) > 0 {
		t.Error("what passed through was taken for accepted")
	}
}

// oneWay is a connection that breaks before the answer.
type oneWay struct{ net.Conn }

func (*oneWay) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// Whatever isn't a registry comes through byte by byte, in both directions,
// with both ways of ending.
func TestPassThrough(t *testing.T) {
	for name, tt := range map[string]struct {
		server func(c net.Conn)
		client func(c *net.TCPConn) error
	}{
		"garbage echo": {
			func(c net.Conn) { _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error { return echo(c, []byte("\x00\x01garbage\xff")) },
		},
		"looks like TLS": {
			func(c net.Conn) { _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error { return echo(c, []byte("\x16\x03\x01\x00\x05hello and more")) },
		},
		"TLS record too long": {
			func(c net.Conn) { _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error {
				return echo(c, append([]byte("\x16\x03\x01\xff\xff"), bytes.Repeat([]byte("x"), 100_000)...))
			},
		},
		"HTTP": {
			func(c net.Conn) {
				r, _ := http.ReadRequest(bufio.NewReader(c))
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Host: %s\r\n\r\n", r.Host)
			},
			func(c *net.TCPConn) error {
				fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: plain.test\r\n\r\n")
				resp, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err == nil && resp.Header.Get("X-Host") != "plain.test" {
					err = errors.New("another host")
				}
				return err
			},
		},
		"HTTP head too long": {
			func(c net.Conn) { _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error {
				return echo(c, []byte("GET / HTTP/1.1\r\nX: "+strings.Repeat("x", 200_000)))
			},
		},
		"server speaks first": {
			func(c net.Conn) { fmt.Fprint(c, "220 ready\r\n"); _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error {
				line := make([]byte, 11)
				if _, err := io.ReadFull(c, line); err != nil || string(line) != "220 ready\r\n" {
					return fmt.Errorf("greeting %q: %w", line, err)
				}
				return echo(c, []byte("HELO"))
			},
		},
		"client half-closes": {
			func(c net.Conn) { b, _ := io.ReadAll(c); _, _ = c.Write(bytes.ToUpper(b)) },
			func(c *net.TCPConn) error {
				fmt.Fprint(c, "question")
				_ = c.CloseWrite()
				b, err := io.ReadAll(c)
				if string(b) != "QUESTION" {
					return fmt.Errorf("%q: %w", b, err)
				}
				return err
			},
		},
		"server resets": {
			func(c net.Conn) { _, _ = c.Read(make([]byte, 1)); _ = c.(*net.TCPConn).SetLinger(0) },
			func(c *net.TCPConn) error {
				fmt.Fprint(c, "x")
				if _, err := io.ReadAll(c); err == nil {
					return errors.New("the reset became an orderly end")
				}
				return nil
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() { defer c.Close(); tt.server(c) }()
				}
			}()
			if err := tt.client(s.dial()); err != nil {
				t.Error(err)
			}
		})
	}
}

func echo(c *net.TCPConn, b []byte) error {
	go func() { _, _ = c.Write(b) }()
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return errors.New("other bytes came back")
	}
	return nil
}

// A client that is slow to speak, in a protocol in which it speaks first, is
// intercepted all the same.
func TestSlowClientIsIntercepted(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
	raw := s.dial()
	for s.dials.Load() == 0 { // the proxy has dialled by now
		runtime.Gosched()
	}
	var who string
	c := tls.Client(raw, &tls.Config{ServerName: "registry.test", InsecureSkipVerify: true, VerifyConnection: func(cs tls.ConnectionState) error {
		who = cs.PeerCertificates[0].Issuer.CommonName
		return nil
	}})
	if err := c.Handshake(); err != nil || who != "weir" {
		t.Errorf("certificate of %q, err %v", who, err)
	}
}

// Whoever opens many connections, and says half of what belongs to a beginning,
// keeps no other client from being served, and takes little memory for it.
func TestHalfHellos(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const many = 1000
	for range many {
		c := s.dial()
		defer c.Close()
		if _, err := c.Write([]byte("\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03")); err != nil {
			t.Fatal(err)
		}
	}
	c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", InsecureSkipVerify: true})
	if err := c.Handshake(); err != nil || c.ConnectionState().PeerCertificates[0].Issuer.CommonName != "weir" {
		t.Errorf("the next client isn't served: %v", err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)) / many; each > 64<<10 {
		t.Errorf("each takes %d bytes", each)
	}
}

func TestUnreachableIsReset(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	l.Close()
	c := s.dial()
	fmt.Fprint(c, "hello")
	if _, err := io.ReadAll(c); err == nil {
		t.Error("an orderly end from a destination that isn't there")
	}
}

func TestMany(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	before := runtime.NumGoroutine()
	var wg sync.WaitGroup
	for range 200 {
		c := s.dial()
		wg.Go(func() {
			defer c.Close()
			if err := echo(c, bytes.Repeat([]byte("z"), 100_000)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before+4; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
	}
}

// clientHello returns the first bytes of a real client.
func clientHello(t testing.TB, conf *tls.Config) []byte {
	rec := &recorder{r: iotest.ErrReader(io.EOF)}
	var out bytes.Buffer
	_ = tls.Client(&tee{rec, &out}, conf).Handshake()
	return out.Bytes()
}

type tee struct {
	*recorder
	out *bytes.Buffer
}

func (t *tee) Write(p []byte) (int, error) { return t.out.Write(p) }

// split cuts a ClientHello into TLS records of n bytes.
func split(hello []byte, n int) (out []byte) {
	for body := hello[5:]; len(body) > 0; {
		k := min(n, len(body))
		out = append(out, hello[0], hello[1], hello[2], byte(k>>8), byte(k))
		out = append(out, body[:k]...)
		body = body[k:]
	}
	return out
}

func TestPeek(t *testing.T) {
	conf := &tls.Config{ServerName: "Registry.Test"}
	h := clientHello(t, conf)
	h2 := clientHello(t, &tls.Config{ServerName: "a.test", NextProtos: []string{"h2"}})
	for name, tt := range map[string]struct {
		in   []byte
		want hello
	}{
		"TLS":            {h, hello{protocol: tlsHello, host: "registry.test", http1: true}},
		"TLS in records": {split(h, 7), hello{protocol: tlsHello, host: "registry.test", http1: true}},
		"h2":             {h2, hello{protocol: tlsHello, host: "a.test"}},
		"half":           {h[:len(h)/2], hello{}},
		"nothing":        {nil, hello{}},
		"HTTP":           {[]byte("GET /v2/ HTTP/1.1\r\nHost: Reg.test:5000\r\n\r\nbody"), hello{protocol: plainHTTP, host: "reg.test"}},
		"HTTP no host":   {[]byte("GET /v2/ HTTP/1.0\r\n\r\n"), hello{protocol: plainHTTP}},
		"HTTP half":      {[]byte("GET /v2/ HTTP/1.1\r\nHo"), hello{}},
		"CONNECT":        {[]byte("CONNECT Reg.test:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic eA==\r\n\r\n"), hello{protocol: plainHTTP, connect: "reg.test", spelled: "Reg.test"}},
		"CONNECT, body":  {[]byte("CONNECT reg.test:443 HTTP/1.1\r\nContent-Length: 4\r\n\r\n"), hello{protocol: plainHTTP}},
		"CONNECT, half":  {[]byte("CONNECT reg.test:443 HTTP/1.1\r\nHost:"), hello{}},
		"h2 preface":     {[]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), hello{protocol: plainHTTP}},
		"other":          {[]byte("SSH-2.0-x\r\n"), hello{}},
		"long name":      {clientHello(t, &tls.Config{ServerName: strings.Repeat("a.", maxName/2) + "gcr.io"}), hello{}},
	} {
		for how, r := range map[string]io.Reader{"at once": bytes.NewReader(tt.in), "by bytes": iotest.OneByteReader(bytes.NewReader(tt.in))} {
			got := peek(r)
			if got.protocol != tt.want.protocol || got.host != tt.want.host || got.http1 != tt.want.http1 || got.connect != tt.want.connect {
				t.Errorf("%s %s: %d %q %v %q", name, how, got.protocol, got.host, got.http1, got.connect)
			}
			if !bytes.HasPrefix(tt.in, got.bytes) {
				t.Errorf("%s %s: what is replayed is not what was said", name, how)
			}
		}
	}
}

// Who says more than its CONNECT before it is answered has the proxy hear it.
func TestPeekEarly(t *testing.T) {
	if got := peek(strings.NewReader("CONNECT reg.test:443 HTTP/1.1\r\n\r\nmore")); got.protocol != plainHTTP || got.connect != "" {
		t.Errorf("%+v", got)
	}
}

// Who never comes to the end of a beginning is listened to for 64 KiB.
func TestPeekIsBounded(t *testing.T) {
	for name, begin := range map[string]string{
		"a header":             "GET /v2/ HTTP/1.1\r\nX: ",
		"headers":              "GET /v2/ HTTP/1.1\r\nHost: a.test\r\n",
		"a method":             "G",
		"a TLS handshake":      "\x16\x03\x01\x40\x00\x01\x00\xff\xff\x03\x03",
		"a longer one than is": "\x16\x03\x01\x40\x00\x01\xff\xff\xff\x03\x03",
	} {
		again := strings.Repeat("a: b\r\n", 1<<16)
		in := &io.LimitedReader{R: io.MultiReader(strings.NewReader(begin), strings.NewReader(again)), N: 1 << 20}
		got := peek(in)
		if read := 1<<20 - in.N; got.protocol != opaque || read > 64<<10 || read != int64(len(got.bytes)) {
			t.Errorf("%s: taken for %v after %d bytes, of which %d are passed on", name, got.protocol, read, len(got.bytes))
		}
	}
}

func FuzzPeek(f *testing.F) {
	h := clientHello(f, &tls.Config{ServerName: "registry.test"})
	f.Add(h)
	f.Add(split(h, 1))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	f.Add([]byte("\x16\x03\x01\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got := peek(bytes.NewReader(b))
		if !bytes.HasPrefix(b, got.bytes) {
			t.Error("what is replayed is not what was said")
		}
		if got.protocol != opaque && len(got.bytes) == 0 {
			t.Error("understood out of nothing")
		}
	})
}

// A pod has a CA of its own in its runtime's settings, and a server that answers
// as a registry that this node knows, with a certificate of that CA. It is
// another registry: what it says gives nothing of what the real one's clients
// have got, and counts for no other client's.
func TestOwnRootsAreAnotherRegistry(t *testing.T) {
	genuine, fake := listen(t), listen(t)
	s := newStage(t, genuine)
	secret := []byte("only for those whom the registry lets read it")
	d := digest.FromBytes(secret)
	blob := "/v2/acme/secret/blobs/" + d.String()
	s.serveTLS(genuine, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer right" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = w.Write(secret)
	}))
	mallory := newAuthority(t, "mallory")
	var lied atomic.Int64
	lies := &http.Server{
		TLSConfig: &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) { return mallory.Leaf(chi.ServerName) }},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			lied.Add(1)
			w.Header().Set("Docker-Content-Digest", d.String())
			w.Header().Set("Content-Length", fmt.Sprint(len(secret)))
			_, _ = w.Write(make([]byte, len(secret)))
		}),
	}
	go func() { _ = lies.ServeTLS(fake, "", "") }()
	defer lies.Close()
	get := func(auth string) (int, string) {
		t.Helper()
		c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", RootCAs: s.weir.pool, NextProtos: []string{"http/1.1"}})
		defer c.Close()
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: registry.test:%d\r\nAuthorization: %s\r\nConnection: close\r\n\r\n", blob, s.dst.Port(), auth)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return 0, "" // it broke off
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	if code, body := get("Bearer right"); code != 200 || body != string(secret) {
		t.Fatalf("%d %q", code, body)
	}
	// The port is part of a registry's name, so it has to be at the real one's.
	pod := func(to net.Addr) *upstream.Egress {
		e := upstream.Config{Roots: func(string) *x509.CertPool { return s.world.pool }}.NewEgress(func(context.Context, netip.AddrPort) (*net.TCPConn, error) {
			c, err := net.Dial(to.Network(), to.String())
			if err != nil {
				return nil, err
			}
			return c.(*net.TCPConn), nil
		})
		t.Cleanup(e.Close)
		return e
	}
	pool := s.world.pool.Clone()
	pool.AddCert(mallory.cert)
	own := func(e *upstream.Egress) {
		s.change(func(f *Flow) {
			f.Egress = e
			f.Settings = func(registry.Known, string) (upstream.Settings, error) {
				return upstream.Settings{Roots: pool, Key: "mallory"}, nil
			}
		})
	}
	own(pod(fake.Addr()))
	for _, auth := range []string{"Bearer right", "Bearer none"} {
		if _, body := get(auth); strings.Contains(body, "only for") {
			t.Errorf("the pod got the secret, with %q", auth)
		}
	}
	if lied.Load() == 0 {
		t.Error("mallory was not asked")
	}
	// The real one again, for a client without a right.
	s.change(func(*Flow) {})
	if code, body := get("Bearer none"); code != http.StatusUnauthorized {
		t.Errorf("%d %q, because of what another registry said", code, body)
	}
	// With the same settings, at the real one: it is that one for all.
	own(pod(genuine.Addr()))
	asked := s.proxy.opts.Registry.Stats()
	if code, body := get("Bearer right"); code != 200 || body != string(secret) || len(s.proxy.opts.Registry.Stats()) != len(asked) {
		t.Errorf("%d %q, %+v", code, body, s.proxy.opts.Registry.Stats())
	}
}
