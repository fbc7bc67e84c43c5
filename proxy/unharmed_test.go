// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
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
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// client makes requests through the stage, each on a connection of its own.
func (s *stage) client() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.weir.pool}, DisableKeepAlives: true,
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

// nameServer is one that knows everything, at ip.
func nameServer(t *testing.T, asked *atomic.Int64, ip string) (addr string) {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			asked.Add(1)
			var m dnsmessage.Message
			if m.Unpack(b[:n]) != nil {
				continue
			}
			m.Response, m.Additionals = true, nil
			if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}, Body: &dnsmessage.AResource{A: netip.MustParseAddr(ip).As4()}}}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = c.WriteTo(out, from)
			}
		}
	}()
	return c.LocalAddr().String()
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
			tr := docker.DefaultHTTPTransport(&tls.Config{RootCAs: s.weir.pool})
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
			other := newAuthority(t, "other")
			srv := &http.Server{TLSConfig: &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return other.Leaf("tenant.test") }}}
			go func() { _ = srv.ServeTLS(again, "", "") }()
			t.Cleanup(func() { srv.Close() })
			dst := netip.MustParseAddrPort(moved.Addr().String())
			resolveBy(t, nameServer(t, &atomic.Int64{}, "127.0.0.2"))
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

// A client that takes a moment to say hello, on a busy node, has what others
// have: the host's other addresses, and what there is to serve while it is down.
func TestLateHello(t *testing.T) {
	for _, late := range []time.Duration{0, silence + silence/2} {
		t.Run(fmt.Sprint("another address, after ", late), func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
			resolveBy(t, nameServer(t, &atomic.Int64{}, "127.0.0.1"))
			dialled := netip.AddrPortFrom(silent.Addr(), s.dst.Port())
			s.place(func(a netip.AddrPort) netip.AddrPort {
				if a == dialled {
					return silent
				}
				return a
			})
			s.change(func(f *Flow) { f.Dst = dialled })
			raw := s.dial()
			time.Sleep(late)                                                // the silence is what it is about
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // as runtimes have it
			defer cancel()
			if err := tls.Client(raw, &tls.Config{ServerName: "registry.test", RootCAs: s.weir.pool}).HandshakeContext(ctx); err != nil {
				t.Error(err)
			}
		})
		t.Run(fmt.Sprint("down, after ", late), func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			s.serveTLS(l, &tls.Config{}, http.HandlerFunc(giveManifest))
			s.remember()
			l.Close()
			e := s.newEgress(s.world.pool)
			s.change(func(f *Flow) { f.Egress = e })
			raw := s.dial()
			time.Sleep(late) // the silence is what it is about
			if err := tls.Client(raw, &tls.Config{ServerName: "registry.test", RootCAs: s.weir.pool}).Handshake(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A client that says nothing has its connection broken off when the destination isn't there.
func TestSilentToNobody(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	l.Close()
	if n, err := s.dial().Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("%d bytes, %v", n, err)
	}
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
