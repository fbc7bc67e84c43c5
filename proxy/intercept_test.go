// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"weir/proxy/internal/proxytest"
	"weir/proxy/registry"
)

// What a client sends before its request's body is held until the answer has been
// read: it has a bound, and what registries take has room in it.
func TestRequestHeadIsBounded(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, len(r.Header.Get("X")))
	}), MaxHeaderBytes: 2 << 20}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	for _, tt := range []struct{ size, status int }{
		{100_000, http.StatusOK},
		{200_000, http.StatusRequestHeaderFieldsTooLarge},
	} {
		c := s.dial()
		r := bufio.NewReader(c)
		for i, size := range []int{1, tt.size} { // the first has another bound
			go func() {
				_, _ = io.WriteString(c, fmt.Sprintf("GET /v2/ HTTP/1.1\r\nHost: a.test\r\nX: %s\r\n\r\n", strings.Repeat("x", size)))
			}()
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := []int{http.StatusOK, tt.status}[i]
			b, err := io.ReadAll(resp.Body)
			if resp.StatusCode != want || want == http.StatusOK && (err != nil || string(b) != fmt.Sprint(size)) {
				t.Errorf("a field of %d bytes: %s, %q, %v", size, resp.Status, b, err)
			}
		}
	}
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
		TLSClientConfig: &tls.Config{RootCAs: s.weir.Pool},
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

func TestRejected(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
	rejected := make(chan string, 2)
	s.change(func(f *Flow) { f.Rejected = func(host string, err error) { rejected <- host } })
	c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", RootCAs: s.world.Pool})
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

// containerd tries again when a connection to a registry ends without an answer.
// It does so through weir as well.
func TestDropped(t *testing.T) {
	manifest := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[]}`
	for drops := range int64(4) {
		t.Run(fmt.Sprint(drops), func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			var n atomic.Int64
			s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if n.Add(1) <= drops {
					panic(http.ErrAbortHandler)
				}
				w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
				w.Header().Set("Content-Length", fmt.Sprint(len(manifest)))
				w.Header().Set("Docker-Content-Digest", digest.FromString(manifest).String())
				if r.Method == http.MethodGet {
					_, _ = io.WriteString(w, manifest)
				}
			}))
			tr := docker.DefaultHTTPTransport(&tls.Config{RootCAs: s.weir.Pool})
			tr.DialContext = func(context.Context, string, string) (net.Conn, error) {
				return net.Dial("tcp", s.listener.Addr().String())
			}
			r := docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithClient(&http.Client{Transport: tr}))})
			if _, _, err := r.Resolve(t.Context(), fmt.Sprintf("registry.test:%d/a/b:v1", s.dst.Port())); err != nil {
				t.Errorf("after %d requests: %v", n.Load(), err)
			}
			if n.Load() <= drops {
				t.Errorf("only %d requests came", n.Load())
			}
		})
	}
}

// Where a client dials a registry is where it is now, whatever it was before and
// whoever is there by now. A client that stays connected dials no more: for it,
// another address of the registry is better than none.
func TestMoved(t *testing.T) {
	for _, stays := range []bool{false, true} {
		t.Run(fmt.Sprint("the client stays connected: ", stays), func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "right") })
			moved, err := net.Listen("tcp", fmt.Sprintf("127.0.0.2:%d", s.dst.Port()))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { moved.Close() })
			s.serveTLS(moved, &tls.Config{}, h)
			old := &http.Server{Handler: h, TLSConfig: &tls.Config{GetCertificate: func(c *tls.ClientHelloInfo) (*tls.Certificate, error) { return s.world.Leaf(c.ServerName) }}}
			go func() { _ = old.ServeTLS(l, "", "") }()
			client := s.client()
			client.Transport.(*http.Transport).DisableKeepAlives = !stays
			get := func() string {
				resp, err := client.Get(fmt.Sprintf("https://registry.test:%d/v2/a/tags/list", s.dst.Port()))
				if err != nil {
					return err.Error()
				}
				defer resp.Body.Close()
				b, _ := io.ReadAll(resp.Body)
				return resp.Status + " " + string(b)
			}
			if got := get(); got != "200 OK right" {
				t.Fatal(got)
			}
			// Another server is at the old address.
			old.Close()
			s.egress.Close()
			again, err := net.Listen("tcp", s.dst.String())
			if err != nil {
				t.Fatal(err)
			}
			other := proxytest.NewAuthority(t, "other")
			srv := &http.Server{TLSConfig: &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return other.Leaf("tenant.test") }}}
			go func() { _ = srv.ServeTLS(again, "", "") }()
			t.Cleanup(func() { srv.Close() })
			dst := netip.MustParseAddrPort(moved.Addr().String())
			resolveBy(t, proxytest.NameServer(t, &atomic.Int64{}, "127.0.0.2"))
			s.change(func(f *Flow) { f.Dst = dst })
			for range 3 {
				if got := get(); got != "200 OK right" {
					t.Errorf("the client dialled the right address, and got %s", got)
				}
				s.egress.Close()
			}
		})
	}
}

// A registry moves to a new server, and the old one still answers: who dials the
// new one gets the new one, and who dials the old one the old one.
func TestOldServerStillAnswers(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "old") }))
	moved, err := net.Listen("tcp", fmt.Sprintf("127.0.0.2:%d", s.dst.Port()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { moved.Close() })
	s.serveTLS(moved, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "new") }))
	for _, want := range []string{"old", "new", "new", "old", "new"} {
		dst := s.dst
		if want == "new" {
			dst = netip.MustParseAddrPort(moved.Addr().String())
		}
		s.change(func(f *Flow) { f.Dst = dst })
		resp, err := s.client().Get(fmt.Sprintf("https://registry.test:%d/v2/a/tags/list", s.dst.Port()))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != want {
			t.Errorf("who dialled the %s server got the %s one (%v)", want, b, err)
		}
	}
}

// recorded is a listener that knows what it has accepted.
type recorded struct {
	net.Listener
	mu    sync.Mutex
	conns []*net.TCPConn
}

func (l *recorded) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.mu.Lock()
		l.conns = append(l.conns, c.(*net.TCPConn))
		l.mu.Unlock()
	}
	return c, err
}

// drop has the connections that there are receive nothing any more, without their
// being closed.
func (l *recorded) drop(t *testing.T) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		err = raw.Control(func(fd uintptr) {
			err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
				&unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}})
		})
		if err != nil && !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
	}
}

// weir's connections to a registry are forgotten on the way, as those are that were
// there before a node's firewall was restarted. The clients, which come with new
// ones, pull and push all the same.
func TestForgottenFlows(t *testing.T) {
	l := &recorded{Listener: listen(t)}
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.Method, b)
	}))
	ask := func(method, path string) {
		t.Helper()
		req, err := http.NewRequest(method, fmt.Sprintf("https://registry.test:%d%s", s.dst.Port(), path), strings.NewReader(strings.Repeat("x", map[string]int{"PUT": 5}[method])))
		if err != nil {
			t.Fatal(err)
		}
		c := s.client()
		c.Timeout = 20 * time.Second
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != method+" "+map[string]string{"PUT": "xxxxx"}[method] {
			t.Errorf("%s: %q, %v", method, b, err)
		}
	}
	for range 2 {
		ask("GET", "/v2/a/tags/list")
		l.drop(t)
		ask("PUT", "/v2/a/manifests/1")
		ask("GET", "/v2/a/tags/list")
	}
}
