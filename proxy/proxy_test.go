// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"weir/proxy/internal/proxytest"
	"weir/proxy/registry"
	"weir/proxy/store"
	"weir/proxy/upstream"
)

// leaves are of an authority that is weir's.
type leaves struct{ *proxytest.Authority }

func (leaves) Permits(host string) bool { return host != "forbidden.test" }

// stage is a proxy between clients and one destination on loopback.
type stage struct {
	t        testing.TB
	proxy    *Proxy
	weir     *proxytest.Authority // what clients may trust
	world    *proxytest.Authority // what the destination's certificate is of
	egress   *upstream.Egress
	listener net.Listener
	dst      netip.AddrPort
	flow     atomic.Pointer[func(*Flow)]
	dials    atomic.Int64
	dialed   atomic.Pointer[func(netip.AddrPort) netip.AddrPort] // where an address is
	node     atomic.Bool                                         // whether the node reaches registries
}

func newStage(t testing.TB, dst net.Listener) *stage {
	s := &stage{t: t, weir: proxytest.NewAuthority(t, "weir"), world: proxytest.NewAuthority(t, "world")}
	s.dst = netip.MustParseAddrPort(dst.Addr().String())
	st, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	s.proxy = New(Options{
		Hosts: registry.NewHosts(fmt.Sprintf("registry.test:%d", s.dst.Port()), fmt.Sprintf("forbidden.test:%d", s.dst.Port())), Leaves: leaves{s.weir},
		Registry: registry.New(registry.Options{Store: st, StaleIfError: registry.DefaultStaleIfError}), Node: s,
	})
	s.egress = s.newEgress(s.world.Pool)
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

// keepStale has something to serve of the registry without it.
func (s *stage) keepStale() {
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

// client makes requests through the stage, each on a connection of its own.
func (s *stage) client() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.weir.Pool}, DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("tcp", s.listener.Addr().String())
		}}}
}

// resolveBy has this process ask a name server, until the test ends.
func resolveBy(t *testing.T, addr string) {
	was := net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = was })
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", addr)
	}}
}

// A connection that has come before the end is carried to its end, also when it
// was still being found out what to do with it.
func TestShutdownWhileOpening(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	verifying, verified := make(chan struct{}, 8), make(chan struct{})
	s.serveTLS(l, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		verifying <- struct{}{}
		<-verified // a registry on another continent
		return nil, nil
	}}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "here") }))
	got := make(chan error, 1)
	go func() {
		resp, err := s.client().Get(fmt.Sprintf("https://registry.test:%d/v2/", s.dst.Port()))
		if err == nil {
			resp.Body.Close()
		}
		got <- err
	}()
	<-verifying
	down := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
	defer cancel()
	go func() { down <- s.proxy.Shutdown(ctx) }()
	// It has begun when it would take no more connections, if it did so at once.
	time.AfterFunc(50*time.Millisecond, func() { close(verified) })
	if err := <-got; err != nil {
		t.Errorf("the pull: %v", err)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
}

// At the end, connections that are passed through and that their clients keep for a
// next request are closed in order, at once. One whose server is still to answer has
// its answer.
func TestShutdownWhileIdle(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.proxy.idle = 100 * time.Millisecond
	s.flow.Store(new(func(f *Flow) { f.Direct = true }))
	answer := make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/late" {
			<-answer
		}
		_, _ = io.WriteString(w, "here")
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	ask := func(path string) (net.Conn, *bufio.Reader) {
		c, err := net.Dial("tcp", s.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
		return c, bufio.NewReader(c)
	}
	_, idle := ask("/")
	if resp, err := http.ReadResponse(idle, nil); err != nil {
		t.Fatal(err)
	} else if b, err := io.ReadAll(resp.Body); string(b) != "here" {
		t.Fatal(string(b), err)
	}
	_, late := ask("/late")
	down := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() { down <- s.proxy.Shutdown(ctx) }()
	if _, err := idle.ReadByte(); err != io.EOF {
		t.Errorf("the idle one: %v", err)
	}
	close(answer)
	if resp, err := http.ReadResponse(late, nil); err != nil {
		t.Errorf("the one that waits: %v", err)
	} else if b, err := io.ReadAll(resp.Body); string(b) != "here" || err != nil {
		t.Errorf("the one that waits: %q %v", b, err)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
}
