// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/internal/proxytest"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// company is a proxy that wants a name and a password, and leads to hosts by their
// names.
type company struct {
	mu      sync.Mutex
	asked   []string // by CONNECT and in plain, with what it was sent for a password
	refuses string   // a host
	hosts   map[string]string
}

const password = "Basic Y2k6c2VjcmV0" // ci:secret

func (c *company) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	c.asked = append(c.asked, r.Method+" "+r.Host+" "+r.Header.Get("Proxy-Authorization"))
	to, ok := c.hosts[r.Host]
	refused := r.Host == c.refuses
	c.mu.Unlock()
	switch {
	case r.Header.Get("Proxy-Authorization") != password:
		w.Header().Set("Proxy-Authenticate", `Basic realm="company"`)
		http.Error(w, "who are you?", http.StatusProxyAuthRequired)
	case r.Method != http.MethodConnect:
		fmt.Fprintf(w, "%s of %s", r.URL, r.Header.Get("X-Asked"))
	case refused || !ok:
		http.Error(w, "not from here", http.StatusForbidden)
	default:
		tunnel(w, to)
	}
}

// tunnel answers CONNECT with a connection to an address.
func tunnel(w http.ResponseWriter, to string) {
	server, err := net.Dial("tcp", to)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	w.WriteHeader(http.StatusOK)
	client, said, err := http.NewResponseController(w).Hijack()
	if err != nil {
		server.Close()
		return
	}
	go func() { _, _ = io.Copy(server, said); server.Close() }()
	_, _ = io.Copy(client, server)
	client.Close()
}

// requests empties what was asked, and returns it.
func (c *company) requests() (all []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all, c.asked = c.asked, nil
	return all
}

// A client behind a company's proxy: a registry is intercepted, and reached through the
// same proxy with the same password. All else the proxy gets as it was said.
func TestTunnel(t *testing.T) {
	at, l, otherL := listen(t), listen(t), listen(t)
	s := newStage(t, at)
	host, other := fmt.Sprintf("registry.test:%d", s.dst.Port()), fmt.Sprintf("other.test:%d", s.dst.Port())
	blob := bytes.Repeat([]byte("blob"), 50_000)
	path := "/v2/a/blobs/" + digest.FromBytes(blob).String()
	var mu sync.Mutex
	gets := 0
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == path {
			mu.Lock()
			gets++
			mu.Unlock()
			_, _ = w.Write(blob)
		}
	}))
	s.serveTLS(otherL, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
		fmt.Fprint(w, "other")
	}))
	c := &company{hosts: map[string]string{host: l.Addr().String(), other: otherL.Addr().String()}}
	srv := &http.Server{Handler: c}
	go func() { _ = srv.Serve(at) }()
	t.Cleanup(func() { srv.Close() })
	get := func(user *url.Userinfo, roots *x509.CertPool, url string) (string, error) {
		return through(t, s, user, roots, url)
	}
	ci := url.UserPassword("ci", "secret")

	for range 3 {
		if got, err := get(ci, s.weir.Pool, "https://"+host+path); err != nil || got != string(blob) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	if gets != 1 {
		t.Errorf("the registry was asked %d times", gets)
	}
	// Each of weir's own ways to the registry was asked for with the client's password.
	if all := c.requests(); len(all) == 0 || strings.Count(strings.Join(all, "\n"), "CONNECT "+host+" "+password) != len(all) {
		t.Errorf("the proxy was asked %q", all)
	}

	// Who has no password, or a wrong one, gets the proxy's answer, and nothing that is
	// kept.
	for _, user := range []*url.Userinfo{nil, url.UserPassword("ci", "wrong")} {
		if _, err := get(user, s.weir.Pool, "https://"+host+path); err == nil || !strings.Contains(err.Error(), "Proxy Authentication Required") {
			t.Errorf("%v: %v", user, err)
		}
	}
	// So does who is not let there.
	c.mu.Lock()
	c.refuses, c.asked = host, nil
	c.mu.Unlock()
	s.change(func(f *Flow) { f.Egress = s.newEgress(s.world.Pool) })
	if _, err := get(ci, s.weir.Pool, "https://"+host+path); err == nil || !strings.Contains(err.Error(), "Forbidden") {
		t.Error(err)
	}
	c.mu.Lock()
	c.refuses = ""
	c.mu.Unlock()

	// A runtime that doesn't trust weir, another host, and a request without TLS.
	s.change(func(f *Flow) {
		f.Egress = s.newEgress(s.world.Pool)
		f.Trusts = func(registry.Known, string) bool { return false }
	})
	if got, err := get(ci, s.world.Pool, "https://"+host+path); err != nil || got != string(blob) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	s.change(func(*Flow) {})
	if got, err := get(ci, s.world.Pool, "https://"+other+"/"); err != nil || got != "other" {
		t.Errorf("%q, %v", got, err)
	}
	// That other host is asked the same way whether it is a registry, and learned.
	learned := make(chan string, 1)
	c.requests()
	s.change(func(f *Flow) {
		f.Egress, f.NetworkID = s.newEgress(s.world.Pool), "a pod's"
		f.Learn = func(host string, _ bool) error { learned <- host; return nil }
	})
	if got, err := get(ci, s.world.Pool, "https://"+other+"/"); err != nil || got != "other" {
		t.Errorf("%q, %v", got, err)
	}
	if got := <-learned; got != other {
		t.Errorf("%q was learned", got)
	}
	if all := c.requests(); len(all) < 2 || slices.ContainsFunc(all, func(a string) bool { return a != "CONNECT "+other+" "+password }) {
		t.Errorf("the proxy was asked %q", all)
	}
	s.change(func(*Flow) {})
	if got, err := get(ci, nil, "http://plain.test/x"); err != nil || got != "http://plain.test/x of weir's test" {
		t.Errorf("%q, %v", got, err)
	}
}

// through gets a URL through the stage, as a client does that has the proxy there in
// its environment.
func through(t *testing.T, s *stage, user *url.Userinfo, roots *x509.CertPool, of string) (string, error) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots},
		Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: s.listener.Addr().String(), User: user})}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, of, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Asked", "weir's test")
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// A proxy that breaks TLS open has certificates of a company's CA: who trusts that, and
// weir, is intercepted, and who hasn't told weir so goes on as without it.
func TestTunnelIsBrokenOpen(t *testing.T) {
	at, l := listen(t), listen(t)
	s := newStage(t, at)
	host := fmt.Sprintf("registry.test:%d", s.dst.Port())
	inspecting := proxytest.NewAuthority(t, "company")
	srv := &http.Server{TLSConfig: &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) { return inspecting.Leaf(chi.ServerName) }},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "seen by the company") })}
	go func() { _ = srv.ServeTLS(l, "", "") }()
	proxy := &http.Server{Handler: &company{hosts: map[string]string{host: l.Addr().String()}}}
	go func() { _ = proxy.Serve(at) }()
	t.Cleanup(func() { srv.Close(); proxy.Close() })
	ci := url.UserPassword("ci", "secret")
	if got, err := through(t, s, ci, inspecting.Pool, "https://"+host+"/v2/"); err != nil || got != "seen by the company" {
		t.Errorf("passed through: %q, %v", got, err)
	}
	s.change(func(f *Flow) {
		f.Settings = func(registry.Known, string) (upstream.Settings, error) {
			return upstream.Settings{Roots: inspecting.Pool, Key: "company"}, nil
		}
	})
	if got, err := through(t, s, ci, s.weir.Pool, "https://"+host+"/v2/"); err != nil || got != "seen by the company" {
		t.Errorf("intercepted: %q, %v", got, err)
	}
}

// What a client has authenticated one connection with isn't used for another.
func TestTunnelIsNotRepeated(t *testing.T) {
	for auth, want := range map[string]bool{"": true, "Basic eA==": true, "bearer x": true, "Negotiate YII=": false, "NTLM TlRM": false, `Digest username="x"`: false} {
		asked := http.Header{}
		if auth != "" {
			asked.Set("Proxy-Authorization", auth)
		}
		if got := repeatable(asked); got != want {
			t.Errorf("%s: %v", auth, got)
		}
	}
	at := listen(t)
	s := newStage(t, at)
	said := make(chan string, 2)
	go func() {
		for {
			c, err := at.Accept()
			if err != nil {
				return
			}
			b := make([]byte, 4096)
			n, _ := c.Read(b)
			said <- string(b[:n])
			c.Close()
		}
	}()
	c := s.dial()
	defer c.Close()
	head := fmt.Sprintf("CONNECT registry.test:%d HTTP/1.1\r\nHost: x\r\nX: y\r\nProxy-Authorization: Negotiate YII=\r\n\r\n", s.dst.Port())
	fmt.Fprint(c, head)
	if got := <-said; got != head {
		t.Errorf("the proxy got %q", got)
	}
}

// What isn't TLS, or is for another host, after a tunnel to a registry was given, goes
// where it would have.
func TestTunnelToElsewhere(t *testing.T) {
	at, l := listen(t), listen(t)
	s := newStage(t, at)
	host := fmt.Sprintf("registry.test:%d", s.dst.Port())
	// It speaks TLS, as the registry, and takes down what else is said.
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.TLS.ServerName) }))
	c := &company{hosts: map[string]string{host: l.Addr().String()}}
	srv := &http.Server{Handler: c}
	go func() { _ = srv.Serve(at) }()
	t.Cleanup(func() { srv.Close() })
	open := func() *net.TCPConn {
		t.Helper()
		conn := s.dial()
		fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\nProxy-Authorization: %s\r\n\r\n", host, host, password)
		const want = "HTTP/1.1 200 Connection established\r\n\r\n"
		got := make([]byte, len(want))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
			t.Fatalf("%q, %v", got, err)
		}
		return conn
	}
	tc := tls.Client(open(), &tls.Config{ServerName: "another.test", RootCAs: s.world.Pool})
	defer tc.Close()
	if err := tc.HandshakeContext(context.Background()); err != nil {
		t.Errorf("TLS with another host in the tunnel: %v", err)
	}
}

// A proxy that can't be reached is left alone, so that the client finds another of its
// addresses.
func TestTunnelProxyIsDown(t *testing.T) {
	at := listen(t)
	s := newStage(t, at)
	at.Close()
	left := make(chan struct{}, 8)
	s.change(func(f *Flow) { f.Leave = func(_ time.Duration) { left <- struct{}{} } })
	if _, err := through(t, s, nil, s.weir.Pool, fmt.Sprintf("https://registry.test:%d/v2/", s.dst.Port())); err == nil {
		t.Error("there is an answer")
	}
	<-left
}

// A proxy that no longer lets a client through is no outage of the registry: the client
// gets nothing of what is kept, and hears it from the proxy.
func TestTunnelIsRefusedLater(t *testing.T) {
	at, l := listen(t), listen(t)
	s := newStage(t, at)
	host := fmt.Sprintf("registry.test:%d", s.dst.Port())
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close") // each request has a tunnel of its own
		giveManifest(w, r)
	}))
	c := &company{hosts: map[string]string{host: l.Addr().String()}}
	srv := &http.Server{Handler: c}
	go func() { _ = srv.Serve(at) }()
	t.Cleanup(func() { srv.Close() })
	ci := url.UserPassword("ci", "secret")
	tag := "https://" + host + "/v2/a/manifests/1"
	first, err := through(t, s, ci, s.weir.Pool, tag)
	if err != nil || first == "" {
		t.Fatalf("%q, %v", first, err)
	}
	// One that can't reach the registry is: the proxy answers with 502.
	c.mu.Lock()
	c.hosts[host] = "127.0.0.1:1"
	c.mu.Unlock()
	for range 2 {
		if got, err := through(t, s, ci, s.weir.Pool, tag); err != nil || got != first {
			t.Errorf("while the registry is away: %q, %v", got, err)
		}
		s.change(func(f *Flow) { f.Egress = s.newEgress(s.world.Pool) })
	}
	s.change(func(*Flow) {})
	c.mu.Lock()
	c.refuses = host
	c.mu.Unlock()
	if got, err := through(t, s, ci, s.weir.Pool, tag); err == nil || got != "" {
		t.Errorf("%q was given", got)
	}
	if _, err := through(t, s, ci, s.weir.Pool, tag); err == nil || !strings.Contains(err.Error(), "Forbidden") {
		t.Errorf("the next request: %v", err)
	}
}

// What a client sends together with its CONNECT is not lost, whatever it is.
func TestTunnelIsSpokenIntoEarly(t *testing.T) {
	at, l := listen(t), listen(t)
	s := newStage(t, at)
	host := fmt.Sprintf("registry.test:%d", s.dst.Port())
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(giveManifest))
	srv := &http.Server{Handler: &company{hosts: map[string]string{host: l.Addr().String()}}}
	go func() { _ = srv.Serve(at) }()
	t.Cleanup(func() { srv.Close() })
	conn := s.dial()
	// Go's server answers a request without TLS with 400.
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\nProxy-Authorization: %s\r\n\r\nGET / HTTP/1.1\r\nHost: %s\r\n\r\n", host, host, password, host)
	_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	got, _ := io.ReadAll(conn)
	if !strings.Contains(string(got), "400 Bad Request") {
		t.Errorf("%q", got)
	}
}

// leadingBy is a proxy that leads to another registry for each user, as one that breaks
// TLS open does which doesn't let all users have the same.
type leadingBy map[string]string

func (l leadingBy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	tunnel(w, l[r.Header.Get("Proxy-Authorization")])
}

// What is public at a registry is so for those who reach it without a proxy, or through
// the same proxy. Another may answer in its stead.
func TestPublicThroughAProxy(t *testing.T) {
	at, open, closed := listen(t), listen(t), listen(t)
	s := newStage(t, at)
	const host = "quay.io" // which answers alike in each network
	blob := bytes.Repeat([]byte("blob"), 1000)
	path := "/v2/a/blobs/" + digest.FromBytes(blob).String()
	checked := make(chan struct{}, 100)
	s.serveTLS(open, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
		if r.URL.Path == path {
			_, _ = w.Write(blob)
			return
		}
		giveManifest(w, r)
		if r.UserAgent() == "weir" {
			checked <- struct{}{}
		}
	}))
	s.serveTLS(closed, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, "<p>not from here</p>")
	}))
	srv := &http.Server{Handler: leadingBy{"Basic YTph": open.Addr().String(), "Basic Yjpi": closed.Addr().String()}}
	go func() { _ = srv.Serve(at) }()
	t.Cleanup(func() { srv.Close() })
	a, b := url.UserPassword("a", "a"), url.UserPassword("b", "b")
	s.change(func(f *Flow) { f.Trusts = func(registry.Known, string) bool { return true } })
	if _, err := through(t, s, a, s.weir.Pool, "https://"+host+"/v2/a/manifests/1"); err != nil {
		t.Fatal(err)
	}
	if got, err := through(t, s, a, s.weir.Pool, "https://"+host+path); err != nil || got != string(blob) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	<-checked
	for range 20 { // it may be recorded only now
		if got, err := through(t, s, b, s.weir.Pool, "https://"+host+path); err != nil || !strings.Contains(got, "not from here") {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
}

// Of a proxy that was there, and is down, the client is told as without weir: it may know
// another of its addresses.
func TestTunnelProxyGoesDown(t *testing.T) {
	at, l := listen(t), listen(t)
	s := newStage(t, at)
	host := fmt.Sprintf("registry.test:%d", s.dst.Port())
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		giveManifest(w, r)
	}))
	srv := &http.Server{Handler: &company{hosts: map[string]string{host: l.Addr().String()}}}
	go func() { _ = srv.Serve(at) }()
	t.Cleanup(func() { srv.Close() })
	left := make(chan struct{}, 8)
	s.change(func(f *Flow) { f.Leave = func(_ time.Duration) { left <- struct{}{} } })
	ci := url.UserPassword("ci", "secret")
	if got, err := through(t, s, ci, s.weir.Pool, "https://"+host+"/v2/a/manifests/1"); err != nil || got == "" {
		t.Fatalf("%q, %v", got, err)
	}
	srv.Close()
	for range 2 { // the first may be in a tunnel that weir believed to have
		if got, err := through(t, s, ci, s.weir.Pool, "https://"+host+"/v2/a/manifests/2"); err == nil {
			t.Errorf("%q is the answer", got)
		}
	}
	select {
	case <-left:
	case <-time.After(10 * time.Second):
		t.Error("the proxy's address is not left alone")
	}
}
