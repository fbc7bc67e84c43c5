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
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

func TestParseMirror(t *testing.T) {
	for in, want := range map[string]mirrored{
		"/v2/":                                   {registry: "docker.io", path: "/v2/"},
		"/v2":                                    {registry: "docker.io", path: "/v2/"},
		"/v2/flyway/flyway/manifests/10.11.0":    {registry: "docker.io", path: "/v2/flyway/flyway/manifests/10.11.0"},
		"/v2/alpine/manifests/3.20":              {registry: "docker.io", path: "/v2/library/alpine/manifests/3.20"},
		"/v2/alpine/manifests/3.20?ns=docker.io": {registry: "docker.io", path: "/v2/library/alpine/manifests/3.20", ns: "docker.io"},
		"/v2/library/alpine/blobs/x":             {registry: "docker.io", path: "/v2/library/alpine/blobs/x"},
		"/v2/alpine/tags/list?n=2":               {registry: "docker.io", path: "/v2/library/alpine/tags/list", query: "n=2"},
		"/v2/a/manifests/1?ns=ghcr.io&x=y":       {registry: "ghcr.io", path: "/v2/a/manifests/1", query: "x=y", ns: "ghcr.io"},
		"/v2/ghcr.io/a/b/manifests/1":            {registry: "ghcr.io", path: "/v2/a/b/manifests/1", prefix: "ghcr.io"},
		"/v2/reg.lan:5000/a/manifests/1":         {registry: "reg.lan:5000", path: "/v2/a/manifests/1", prefix: "reg.lan:5000"},
		"/v2/localhost/a/manifests/1":            {registry: "localhost", path: "/v2/a/manifests/1", prefix: "localhost"},
		"/v2/docker.io/alpine/manifests/1":       {registry: "docker.io", path: "/v2/library/alpine/manifests/1", prefix: "docker.io"},
		"/v2/ghcr.io/a/manifests/1?ns=quay.io":   {registry: "quay.io", path: "/v2/ghcr.io/a/manifests/1", ns: "quay.io"},
		"/v2/manifests/manifests/1":              {registry: "docker.io", path: "/v2/library/manifests/manifests/1"},
	} {
		u, err := url.Parse(in)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseMirror(u, "docker.io"); err != nil || got != want {
			t.Errorf("%s:\n %+v, want\n %+v (%v)", in, got, want, err)
		}
	}
	for _, in := range []string{"/", "/v1/", "/v2/a/../b", "/v2/%2e%2e/x", "/v2//a", "/v2/a?%zz"} {
		u, err := url.Parse("http://mirror" + in)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseMirror(u, "docker.io"); err == nil {
			t.Errorf("%s is %+v", in, got)
		}
	}
}

func FuzzMirrorURL(f *testing.F) {
	f.Add("/v2/alpine/manifests/3.20", "ns=docker.io")
	f.Add("/v2/ghcr.io/a/b/manifests/1", "")
	f.Add("/v2/../x", "ns=%zz")
	f.Fuzz(func(t *testing.T, path, query string) {
		m, err := parseMirror(&url.URL{Path: path, RawQuery: query}, "docker.io")
		if err == nil && (m.registry == "" || !strings.HasPrefix(m.path, "/v2/") || strings.Contains(m.query, "ns=") && !strings.Contains(query, "ns")) {
			t.Errorf("%q %q: %+v", path, query, m)
		}
	})
}

// A mirror gives those without credentials what is public, from the
// registry that they mean, once.
func TestMirror(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	blob := bytes.Repeat([]byte("blob"), 1000)
	path := "/v2/team/app/blobs/" + digest.FromBytes(blob).String()
	var log atomic.Pointer[[]string]
	log.Store(&[]string{})
	base := fmt.Sprintf("https://registry.test:%d", s.dst.Port())
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		was := append(*log.Load(), r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("Authorization"))
		log.Store(&was)
		switch {
		case r.URL.Path == "/token":
			fmt.Fprint(w, `{"token":"anonymous"}`)
		case r.Header.Get("Authorization") != "Bearer anonymous":
			w.Header().Set("Www-Authenticate", `Bearer realm="`+base+`/token",service="test",scope="repository:team/app:pull"`)
			w.WriteHeader(http.StatusUnauthorized)
		case r.URL.Path == path:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
		case strings.HasSuffix(r.URL.Path, "/tags/list"):
			w.Header().Set("Link", `</v2/team/app/tags/list?last=b&n=2>; rel="next"`)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	resolveBy(t, nameServer(t, &atomic.Int64{}, "127.0.0.1"))
	name := strings.TrimPrefix(base, "https://")
	mirror := httptest.NewServer(s.proxy.Mirror(s.egress, name))
	defer mirror.Close()
	do := func(method, path string) (*http.Response, string) {
		t.Helper()
		req, _ := http.NewRequest(method, mirror.URL+path, nil)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(b)
	}
	if resp, _ := do("GET", "/v2/"); resp.StatusCode != 200 || len(*log.Load()) != 0 {
		t.Error(resp.Status, *log.Load())
	}
	for _, p := range []string{path, path + "?ns=" + name, "/v2/" + name + strings.TrimPrefix(path, "/v2")} {
		if resp, b := do("GET", p); resp.StatusCode != 200 || b != string(blob) {
			t.Errorf("%s: %s, %d bytes", p, resp.Status, len(b))
		}
	}
	want := []string{"GET " + path + " ", "GET /token?scope=repository%3Ateam%2Fapp%3Apull&service=test ", "GET " + path + " Bearer anonymous"}
	if fmt.Sprint(*log.Load()) != fmt.Sprint(want) {
		t.Errorf("the registry was asked %q", *log.Load())
	}
	for p, link := range map[string]string{
		"/v2/team/app/tags/list?n=2":            `</v2/team/app/tags/list?last=b&n=2>; rel="next"`,
		"/v2/" + name + "/team/app/tags/list":   `</v2/` + name + `/team/app/tags/list?last=b&n=2>; rel="next"`,
		"/v2/team/app/tags/list?n=2&ns=" + name: `</v2/team/app/tags/list?last=b&n=2&ns=` + url.QueryEscape(name) + `>; rel="next"`,
	} {
		if resp, _ := do("GET", p); resp.Header.Get("Link") != link {
			t.Errorf("%s: %q", p, resp.Header.Get("Link"))
		}
	}
	for p, code := range map[string]int{"/v2/x/manifests/1?ns=evil.test": 404, "/v2/evil.test/x/manifests/1": 404, "/elsewhere": 404, "/v2/x/manifests/none": 404} {
		if resp, b := do("GET", p); resp.StatusCode != code || p != "/v2/x/manifests/none" && !strings.Contains(b, "NAME_UNKNOWN") {
			t.Errorf("%s: %s %s", p, resp.Status, b)
		}
	}
	if resp, _ := do("PUT", "/v2/team/app/manifests/1"); resp.StatusCode != http.StatusMethodNotAllowed {
		t.Error(resp.Status)
	}
}

// The forward proxy answers for the registry of the CONNECT request, and
// tunnels what it is not trusted for and all else.
func TestForward(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "this is ", r.Host) }))
	e := upstream.Config{Roots: func(string) *x509.CertPool { return s.world.pool }}.NewNodeEgress()
	defer e.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	proxy := httptest.NewServer(s.proxy.Forward(ctx, e))
	defer proxy.Close()
	resolveBy(t, nameServer(t, &atomic.Int64{}, "127.0.0.1"))
	connect := func(name string, roots *x509.CertPool) (*tls.Conn, error) {
		t.Helper()
		c, err := net.Dial("tcp", proxy.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(c, "CONNECT %s:%d HTTP/1.1\r\nHost: %s\r\n\r\n", name, s.dst.Port(), name)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		tc := tls.Client(c, &tls.Config{ServerName: name, RootCAs: roots})
		return tc, tc.Handshake()
	}
	ask := func(c *tls.Conn, host string) string {
		t.Helper()
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host)
		b, err := io.ReadAll(c)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	c, err := connect("registry.test", s.weir.pool)
	if err != nil {
		t.Fatal(err)
	}
	if b := ask(c, "evil.test"); !strings.HasSuffix(b, "this is evil.test") { // the registry was asked, whatever it makes of it
		t.Errorf("%q", b)
	}
	if c, err = connect("other.test", s.world.pool); err != nil {
		t.Fatal(err)
	}
	if b := ask(c, "other.test"); !strings.HasSuffix(b, "this is other.test") {
		t.Errorf("%q", b)
	}
	if _, err = connect("registry.test", s.world.pool); err == nil {
		t.Error("weir's certificate was trusted")
	}
	if err := eventually(func() error { _, err := connect("registry.test", s.world.pool); return err }); err != nil {
		t.Errorf("a client that does not trust: %v", err)
	}
	if got := s.proxy.Stats().Intercepted; got < 2 {
		t.Errorf("%d intercepted", got)
	}
}

func eventually(f func() error) (err error) {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err = f(); err == nil {
			return nil
		}
	}
	return err
}

// A registry without TLS is answered for, under its address.
func TestPlainRegistry(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	blob := bytes.Repeat([]byte("blob"), 1000)
	path := "/v2/a/blobs/" + digest.FromBytes(blob).String()
	var asked atomic.Int64
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.URL.Path != path || r.Host != "registry.lan" {
			fmt.Fprintf(w, "%s at %s", r.URL.Path, r.Host)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	c := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("tcp", s.listener.Addr().String())
	}}}
	get := func(url string) string {
		t.Helper()
		resp, err := c.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for range 3 {
		if got := get("http://registry.lan" + path); got != string(blob) {
			t.Errorf("%d bytes", len(got))
		}
	}
	if asked.Load() != 1 || s.dials.Load() != 1 {
		t.Errorf("asked %d times, %d connections", asked.Load(), s.dials.Load())
	}
	if got := get("http://registry.lan/elsewhere"); got != "/elsewhere at registry.lan" { // on the same connection
		t.Error(got)
	}
	c.CloseIdleConnections()
	before := s.proxy.Stats()
	if got := get("http://registry.lan/index.html"); got != "/index.html at registry.lan" {
		t.Error(got)
	}
	if got := s.proxy.Stats(); got.PassedThrough != before.PassedThrough+1 || got.Intercepted != before.Intercepted {
		t.Errorf("what isn't a registry: %+v, before %+v", got, before)
	}
	if st := s.proxy.opts.Registry.Stats(); len(st) != 1 || st[0].Registry != "http://registry.lan@"+s.dst.String() {
		t.Errorf("%+v", st)
	}
}

// A registry that is down is intercepted when there is something to serve of it
// without it, and one that shows a wrong certificate isn't.
func TestDownButRemembered(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(giveManifest))
	s.remember()
	// What was found out before isn't known to these.
	anew := func(network string) {
		e := s.newEgress(s.world.pool)
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
	evil.remember()
	e := evil.newEgress(s.world.pool)
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
	settings := upstream.Settings{Roots: s.world.pool, Certificates: []tls.Certificate{*leaf}, Key: "1"}
	s.change(func(f *Flow) {
		f.Egress, f.Settings = e, func(registry.Known, string) (upstream.Settings, error) { return settings, nil }
	})
	c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", RootCAs: s.weir.pool})
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
		c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", RootCAs: s.weir.pool})
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: registry.test:%d\r\nConnection: close\r\n\r\n", path, s.dst.Port())
		if b, err := io.ReadAll(c); err != nil || bytes.HasSuffix(b, secret) != (who == "alice.test") {
			t.Errorf("%s: %q, %v", who, b, err)
		}
	}
}

// A host that speaks the distribution API is recognised as a registry.
func TestRecognised(t *testing.T) {
	for name, tt := range map[string]struct {
		h  http.HandlerFunc
		is bool
	}{
		"a registry": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
		}, true},
		"with a login": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Www-Authenticate", `Bearer realm="https://x/token",service="x"`)
			w.WriteHeader(401)
		}, true},
		"another login": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
		}, false},
		"something else":  {func(w http.ResponseWriter, r *http.Request) {}, false},
		"something empty": {func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			asked := make(chan struct{}, 1)
			s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/v2/" && r.UserAgent() == "weir" {
					tt.h(w, r)
					asked <- struct{}{}
				}
			}))
			s.issuer("new.test")
			s.issuer("new.test")
			if err := eventually(func() error {
				if u := s.proxy.Unknowns(); len(u) != 1 || u[0].Connections != 2 || u[0].Registry != tt.is || !tt.is && name == "something empty" && u[0].Problem == "" {
					return fmt.Errorf("%+v", u)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
}
