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
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	"weir/proxy/internal/proxytest"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// A registry that is down is intercepted when there is something to serve of it
// without it, and one that shows a wrong certificate isn't.
func TestDownButRemembered(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(giveManifest))
	s.keepStale()
	// What was found out before isn't known to these.
	anew := func(network string) {
		e := s.newEgress(s.world.Pool)
		s.change(func(f *Flow) { f.Egress, f.NetworkID = e, network })
	}
	l.Close()
	for range 2 {
		anew("")
		if got := s.issuer("registry.test"); got != "weir" {
			t.Errorf("certificate of %q", got)
		}
	}
	// Down for this client alone: its network policy, and not an outage.
	s.node.Store(true)
	anew("a pod")
	if got := s.issuer("registry.test"); got == "weir" {
		t.Error("intercepted for a client that is kept from the registry")
	}
	// And when it is down for the node too.
	s.node.Store(false)
	anew("a pod")
	if got := s.issuer("registry.test"); got != "weir" {
		t.Errorf("in an outage: certificate of %q", got)
	}
	l2 := listen(t)
	fresh := newStage(t, l2)
	l2.Close()
	if got := fresh.issuer("registry.test"); got == "weir" {
		t.Error("intercepted with nothing to serve")
	}
	l3 := listen(t)
	evil := newStage(t, l3)
	evil.serveTLS(l3, &tls.Config{}, http.HandlerFunc(giveManifest))
	evil.keepStale()
	e := evil.newEgress(s.world.Pool)
	evil.change(func(f *Flow) { f.Egress = e })
	if got := evil.issuer("registry.test"); got != "world" {
		t.Errorf("with a wrong certificate: certificate of %q", got)
	}
}

// What a runtime has for a registry of its own is what it is verified with.
func TestSettings(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{ClientAuth: tls.RequireAnyClientCert}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.TLS.PeerCertificates[0].DNSNames)
	}))
	e := s.newEgress(nil) // the system's don't do
	leaf, err := s.world.Leaf("client.test")
	if err != nil {
		t.Fatal(err)
	}
	settings := upstream.Settings{Roots: s.world.Pool, Certificates: []tls.Certificate{*leaf}, Key: "1"}
	s.change(func(f *Flow) {
		f.Egress, f.Settings = e, func(registry.Known, string) (upstream.Settings, error) { return settings, nil }
	})
	c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", RootCAs: s.weir.Pool})
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: registry.test\r\nConnection: close\r\n\r\n")
	if b, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(b), "[client.test]") {
		t.Errorf("%q, %v", b, err)
	}
	s.change(func(f *Flow) {
		f.Settings = func(registry.Known, string) (upstream.Settings, error) {
			return upstream.Settings{}, fmt.Errorf("a key is missing")
		}
	})
	if got := s.issuer("registry.test"); got != "world" && !strings.Contains(got, "certificate required") {
		t.Errorf("certificate of %q", got)
	}
}

// What a registry gives to one client's certificate is not for another's.
func TestCertificatesTellClientsApart(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	secret := []byte("for alice")
	path := "/v2/a/blobs/" + digest.FromBytes(secret).String()
	s.serveTLS(l, &tls.Config{ClientAuth: tls.RequireAnyClientCert}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS.PeerCertificates[0].DNSNames[0] != "alice.test" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = w.Write(secret)
	}))
	for _, who := range []string{"alice.test", "mallory.test", "alice.test"} {
		leaf, err := s.world.Leaf(who)
		if err != nil {
			t.Fatal(err)
		}
		s.change(func(f *Flow) {
			f.Settings = func(registry.Known, string) (upstream.Settings, error) {
				return upstream.Settings{Certificates: []tls.Certificate{*leaf}, Key: who}, nil
			}
		})
		c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", RootCAs: s.weir.Pool})
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: registry.test:%d\r\nConnection: close\r\n\r\n", path, s.dst.Port())
		if b, err := io.ReadAll(c); err != nil || bytes.HasSuffix(b, secret) != (who == "alice.test") {
			t.Errorf("%s: %q, %v", who, b, err)
		}
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
	evil := proxytest.NewAuthority(t, "evil")
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

// A client that gives a registry's name to an address of its own has no effect on
// another one in the same network namespace, before it or after.
func TestForgedName(t *testing.T) {
	for _, first := range []string{"the registry", "the forger"} {
		t.Run(first+" first", func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			path := "/v2/a/tags/list" // which is always the registry's to answer
			s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
			forger := proxytest.NewAuthority(t, "forger")
			fake := listen(t)
			srv := &http.Server{TLSConfig: &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) { return forger.Leaf(chi.ServerName) }}}
			go func() { _ = srv.ServeTLS(fake, "", "") }()
			defer srv.Close()
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.weir.Pool}, MaxIdleConns: 1,
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
	mallory := proxytest.NewAuthority(t, "mallory")
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
		c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", RootCAs: s.weir.Pool, NextProtos: []string{"http/1.1"}})
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
		e := upstream.Config{Roots: func(string) *x509.CertPool { return s.world.Pool }}.NewEgress(func(context.Context, netip.AddrPort) (*net.TCPConn, error) {
			c, err := net.Dial(to.Network(), to.String())
			if err != nil {
				return nil, err
			}
			return c.(*net.TCPConn), nil
		})
		t.Cleanup(e.Close)
		return e
	}
	pool := s.world.Pool.Clone()
	pool.AddCert(mallory.Cert)
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
