// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"weir/proxy/internal/proxytest"
)

// Connections that were kept are forgotten on the way: nothing comes through any
// more, and no side is told. Requests are answered over new ones all the same, and
// once it is known none is tried in vain again.
func TestForgottenConnections(t *testing.T) {
	for name, tt := range map[string]struct {
		packets bool // they are dropped; else they are taken, and not passed on
		relay   time.Duration
	}{"dropped": {true, time.Hour}, "taken and not passed on": {false, time.Second}} {
		for _, method := range []string{"GET", "HEAD"} {
			t.Run(name+" "+method, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				w.egress.times.guess = 500 * time.Millisecond // new ones must be quicker
				w.egress.times.idle, w.egress.times.relay = 0, tt.relay
				var forgotten atomic.Pointer[map[net.Conn]bool]
				end := make(chan struct{})
				s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, r *http.Request) {
					if f := forgotten.Load(); f != nil && (*f)[r.Context().Value(connKey{}).(net.Conn)] {
						<-end
					}
					fmt.Fprint(rw, "here")
				})
				defer close(end)
				url := s.target().url()
				const kept = 3
				ask := func() error {
					got, err := send(t, w.egress.Transport(s.target()), method, url, nil)
					if err == nil && got != map[string]string{"GET": "here", "HEAD": ""}[method] {
						err = fmt.Errorf("got %q", got)
					}
					return err
				}
				w.several(kept, s.target())
				s.idle()
				if tt.packets {
					s.drop()
				} else {
					f := make(map[net.Conn]bool)
					s.mu.Lock()
					for c := range s.open {
						f[c] = true
					}
					s.mu.Unlock()
					forgotten.Store(&f)
				}
				for range 5 {
					if err := ask(); err != nil {
						t.Fatal(err)
					}
				}
				if n := w.dialled(s.addr); n != kept+1 {
					t.Errorf("%d new connections, want 1: others were tried in vain", n-kept)
				}
			})
		}
	}
}

// Where one connection was forgotten, those to other hosts are not tried either: a pull
// that needs a registry, its token server and where blobs are waits once.
func TestForgottenTogether(t *testing.T) {
	w := newWorld(t)
	w.egress.times.guess = 50 * time.Millisecond
	here := func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, "here") }
	s, other := w.serve("127.0.0.1", 0, w.ca, here), w.serve("127.0.0.1", 0, w.ca, here)
	for _, target := range []Target{s.target(), other.target()} {
		if got, err := send(t, w.egress.Transport(target), "GET", target.url(), nil); err != nil || got != "here" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	s.idle()
	other.idle()
	s.drop()
	if got, err := send(t, w.egress.Transport(s.target()), "GET", s.target().url(), nil); err != nil || got != "here" {
		t.Fatalf("%q, %v", got, err)
	}
	eventually(t, "the other's is closed", func() bool { return other.conns() == 0 })
	if got, err := send(t, w.egress.Transport(s.target()), "GET", s.target().url(), nil); err != nil || got != "here" || w.dialled(s.addr) != 2 {
		t.Errorf("%q, %v, %d connections, want 2: the new one is used again", got, err, w.dialled(s.addr))
	}
}

// Connections that were made to look at a registry, and have waited for their first
// request, are forgotten as well.
func TestForgottenReady(t *testing.T) {
	w := newWorld(t)
	s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, "here") })
	target := s.target()
	p := w.egress.pool(target.key())
	for range 2 {
		c, err := w.egress.connect(t.Context(), target.key(), target, true)
		if err != nil {
			t.Fatal(err)
		}
		p.keep(c)
	}
	s.drop()
	if got, err := send(t, w.egress.Transport(target), "GET", target.url(), nil); err != nil || got != "here" {
		t.Errorf("%q, %v", got, err)
	}
}

// several has some connections to a target kept.
func (w *world) several(n int, target Target) {
	w.t.Helper()
	tr := w.egress.Transport(target)
	var bodies []io.Closer
	for range n {
		req, _ := http.NewRequestWithContext(w.t.Context(), "GET", target.url(), nil)
		resp, err := tr.RoundTrip(req)
		if err != nil {
			w.t.Fatal(err)
		}
		bodies = append(bodies, resp.Body) // not read, so that the next one needs another
		defer func() { _, _ = io.Copy(io.Discard, resp.Body); resp.Body.Close() }()
	}
	if len(bodies) != n || w.dialled(target.Addr) != n {
		w.t.Fatalf("%d connections", w.dialled(target.Addr))
	}
}

// A registry that takes its time is not asked twice, as what is sent arrives. Where
// what acknowledges may be a relay, it is, and not given up.
func TestSlowRegistry(t *testing.T) {
	w := newWorld(t)
	w.egress.times.guess, w.egress.times.idle, w.egress.times.relay = 50*time.Millisecond, 0, 100*time.Millisecond
	var n atomic.Int64
	second, end := make(chan struct{}), make(chan struct{})
	s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, r *http.Request) {
		switch n.Add(1) {
		case 2:
			<-second // the same again has come
		case 3:
			close(second)
			select {
			case <-r.Context().Done(): // it is broken off
			case <-end:
			}
		}
		fmt.Fprint(rw, n.Load())
	})
	defer close(end)
	target := s.target()
	for _, want := range []string{"1", "3"} {
		if got, err := send(t, w.egress.Transport(target), "GET", target.url(), nil); err != nil || got != want {
			t.Fatalf("%q, %v; want %q", got, err, want)
		}
	}
	c, err := net.Dial("tcp", s.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("arrives")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what was sent has arrived", func() bool { return delivered(c, 0) == arrived })
	for _, waited := range []bool{false, true} {
		g := &guess{times: defaultTimes, since: time.Now(), waited: waited}
		g.suspect(c)
		if again := g.timer != nil && g.timer.Stop(); g.done != nil || again != waited {
			t.Errorf("its connection has waited: %v; asked twice at once: %v, later: %v", waited, g.done != nil, again)
		}
	}
}

// What the kernel has not sent again yet may be on its way still, for twice as long.
func TestUnderway(t *testing.T) {
	w := newWorld(t)
	s := w.serve("127.0.0.1", 0, w.ca, func(http.ResponseWriter, *http.Request) {})
	c, err := net.Dial("tcp", s.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	eventually(t, "the server has it", func() bool { return s.conns() == 1 })
	s.drop()
	if _, err := c.Write([]byte("doesn't arrive")); err != nil {
		t.Fatal(err)
	}
	var again atomic.Bool
	req, _ := http.NewRequestWithContext(t.Context(), "GET", s.target().url(), nil)
	for !again.Load() {
		g := &guess{pool: &pool{}, times: defaultTimes, req: req, since: time.Now(), giveUp: func() {}, forgotten: func() {}, fresh: func() *http.Transport {
			again.Store(true)
			return w.egress.newHTTP(Target{Addr: s.addr}, 0)
		}}
		g.suspect(c)
		if again.Load() != (g.timer == nil) || again.Load() && delivered(c, 0) != repeated {
			t.Fatalf("asked twice: %v, and it is %d", again.Load(), delivered(c, 0))
		}
		if g.timer != nil {
			g.timer.Stop()
		}
	}
}

// A connection was forgotten on the way, and there is no other: the request fails
// as it would for a client without weir, and doesn't wait for the kernel to find
// out.
func TestForgottenAndDown(t *testing.T) {
	w := newWorld(t)
	w.egress.times.guess = 50 * time.Millisecond
	s := w.serve("127.0.0.1", 0, w.ca, func(http.ResponseWriter, *http.Request) {})
	target := s.target()
	w.several(1, target)
	s.idle()
	s.drop()
	s.listener.Close()
	if _, err := send(t, w.egress.Transport(target), "GET", target.url(), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Error(err)
	}
}

// nonsense gives no answer, for which net/http doesn't ask again, and waits until
// the client has closed the connection.
func nonsense(rw http.ResponseWriter) {
	c, _, err := http.NewResponseController(rw).Hijack()
	if err == nil {
		_, _ = io.WriteString(c, "nonsense\r\n\r\n")
		_, _ = c.Read(make([]byte, 1))
		c.Close()
	}
}

// When the first attempt fails while the second one is under way, that one's
// answer counts; and when both fail, the request does.
func TestBothAttempts(t *testing.T) {
	for _, answered := range []bool{true, false} {
		t.Run(fmt.Sprint("the second is answered: ", answered), func(t *testing.T) {
			w := newWorld(t)
			w.egress.times.guess, w.egress.times.idle, w.egress.times.relay = 50*time.Millisecond, 0, 50*time.Millisecond
			var n atomic.Int64
			second, failed := make(chan struct{}), make(chan struct{})
			s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, r *http.Request) {
				switch n.Add(1) {
				case 2:
					<-second
					defer close(failed)
					nonsense(rw)
					return
				case 3:
					close(second)
					<-failed
				}
				if n.Load() >= 3 && !answered {
					nonsense(rw)
					return
				}
				fmt.Fprint(rw, "here")
			})
			target := s.target()
			w.several(1, target)
			s.idle()
			got, err := send(t, w.egress.Transport(target), "GET", target.url(), nil)
			if answered != (err == nil && got == "here") {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// What may not be sent twice never goes over a connection that others have used:
// one that was forgotten on the way, or that the registry closes just now. One
// connection is made for it, and kept as long as the client's.
func TestUploadsHaveTheirOwnConnection(t *testing.T) {
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
		t.Run("forgotten, "+method, func(t *testing.T) {
			w := newWorld(t)
			s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, r *http.Request) {
				b, _ := io.ReadAll(r.Body)
				fmt.Fprintf(rw, "%s %s", r.Method, b)
			})
			target := s.target()
			w.several(2, target)
			s.idle()
			s.drop()
			tr := w.egress.Transport(target)
			for range 3 {
				if got, err := send(t, tr, method, target.url(), strings.NewReader("body")); err != nil || got != method+" body" {
					t.Fatalf("%q, %v", got, err)
				}
			}
			if n := w.dialled(s.addr); n != 3 {
				t.Errorf("%d connections for three requests of one client connection, want 1", n-2)
			}
			tr.Close()
			eventually(t, "the connection is closed with the client's", func() bool { return s.conns() == 2 })
		})
	}
	t.Run("closed just now", func(t *testing.T) {
		w := newWorld(t)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() { // gives one answer on each connection, and closes it when more comes
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					r := bufio.NewReader(c)
					req, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, req.Body)
					fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(req.Method), req.Method)
					_, _ = r.ReadByte()
				}()
			}
		}()
		target := Target{Addr: netip.MustParseAddrPort(l.Addr().String())}
		for _, method := range []string{"GET", "POST", "POST"} {
			tr := w.egress.Transport(target)
			if got, err := send(t, tr, method, "http://"+target.Addr.String()+"/v2/", nil); err != nil || got != method {
				t.Errorf("%s: %q, %v", method, got, err)
			}
			tr.Close()
		}
	})
}

// A registry closes each connection after its answer, and doesn't say so; sometimes
// late, when the next request is on its way. Once it has done so, each request that
// may not be sent twice has a connection of its own.
func TestClosedUnannounced(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(c)
			if req, err := http.ReadRequest(r); err == nil {
				_, _ = io.Copy(io.Discard, req.Body)
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere")
			}
			if n == 0 {
				c.Close()
				continue
			}
			go func() { _, _ = r.ReadByte(); c.Close() }()
		}
	}()
	w := newWorld(t)
	target := Target{Addr: netip.MustParseAddrPort(l.Addr().String())}
	tr := w.egress.Transport(target)
	defer tr.Close()
	for i := range 4 {
		if got, err := send(t, tr, "POST", "http://"+target.Addr.String()+"/v2/", strings.NewReader("body")); err != nil || got != "here" {
			t.Errorf("request %d: %q, %v", i, got, err)
		}
		if i == 0 {
			eventually(t, "the first connection is closed", func() bool { return !alive(tr.last[target.key()].conn) })
		}
	}
	// To who doesn't know, it is as if the client had met the end of its connection.
	w.egress.pool(target.key()).closing = time.Time{}
	if _, err := send(t, tr, "POST", "http://"+target.Addr.String()+"/v2/", strings.NewReader("body")); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// The kernel notices when a kept connection is dead. An upload to a registry that
// takes nothing for a while goes on, as it would without weir.
func TestSocketOptions(t *testing.T) {
	w := newWorld(t)
	s := w.serve("127.0.0.1", 0, w.ca, func(http.ResponseWriter, *http.Request) {})
	target := s.target()
	if err := w.egress.Verify(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	tr := w.egress.Transport(target)
	for method, want := range map[string]time.Duration{"POST": 0, "GET": userTimeout} {
		var got, alive int
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
			if err := control(i.Conn, func(fd int) (err error) {
				if alive, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE); err != nil {
					return err
				}
				got, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
				return err
			}); err != nil {
				t.Error(err)
			}
		}})
		req, _ := http.NewRequestWithContext(ctx, method, target.url(), nil)
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got != int(want.Milliseconds()) || alive != 1 {
			t.Errorf("%s: TCP_USER_TIMEOUT %d ms, keep-alive %d", method, got, alive)
		}
	}
}

// A connection that was made to look at a registry is the one that the client's
// first request uses, and none that others left behind.
func TestReadyConnection(t *testing.T) {
	w := newWorld(t)
	s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, "here") })
	target := s.target()
	if err := w.egress.Verify(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	if _, err := send(t, w.egress.Transport(target), "POST", target.url(), nil); err != nil || w.dialled(s.addr) != 1 {
		t.Errorf("%v, %d connections", err, w.dialled(s.addr))
	}
	plain := netip.MustParseAddrPort(s.addr.String())
	for range 2 {
		if err := w.egress.Connect(t.Context(), plain); err != nil || w.dialled(s.addr) != 2 {
			t.Errorf("%v, %d connections", err, w.dialled(s.addr))
		}
	}
	p := w.egress.pool(Target{Addr: plain}.key())
	if c := p.take(); c == nil || !alive(c) {
		t.Error("no connection is ready")
	} else {
		p.keep(c)
	}
	w.egress.Close()
	if p.waiting() {
		t.Error("it outlives the way out")
	}
}

// A host that a registry redirects to, and that can't be reached from here, costs
// those who can do without a moment, once. Those who can't try it all the same.
func TestDialBudget(t *testing.T) {
	w := newWorld(t)
	w.egress.times.retry = time.Hour
	w.egress.times.fallback = time.Millisecond
	w.name("127.0.0.2")
	here := func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, "here") }
	s := w.serve("127.0.0.1", 0, w.ca, here)
	cdn := w.serve("127.0.0.2", 0, w.ca, here)
	w.silence(cdn.addr, true)
	tr := w.egress.Transport(s.target())
	const budget = 10 * time.Millisecond
	blob := fmt.Sprintf("https://cdn.test:%d/blob", cdn.addr.Port())
	get := func(ctx context.Context, url string) error {
		req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
		resp, err := tr.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	for i := range 3 {
		if err := get(WithDialBudget(t.Context(), budget), blob); !errors.Is(err, ErrUnreachable) {
			t.Errorf("request %d: %v", i, err)
		}
	}
	if n := w.dialled(cdn.addr); n != 1 {
		t.Errorf("it was dialled %d times", n)
	}
	// The registry itself has as long as it likes, and so has who has no budget.
	w.watch(func(_ context.Context, addr netip.AddrPort) {
		if addr == s.addr {
			time.Sleep(budget)
		}
	})
	if err := get(WithDialBudget(t.Context(), budget), s.target().url()); err != nil {
		t.Error(err)
	}
	w.silence(cdn.addr, false)
	if err := get(t.Context(), blob); err != nil {
		t.Error(err)
	}
	w.egress.Close()
	if err := get(WithDialBudget(t.Context(), defaultTimes.connect), blob); err != nil {
		t.Errorf("after it could be reached again: %v", err)
	}
}

// What it takes until a kept connection is known to be forgotten is of the same time.
func TestDialBudgetAfterForgotten(t *testing.T) {
	w := newWorld(t)
	w.egress.times.guess = 100 * time.Millisecond
	w.name("127.0.0.2")
	cdn := w.serve("127.0.0.2", 0, w.ca, func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, "here") })
	target := Target{Host: ParseHost("registry.test")}
	url := fmt.Sprintf("https://cdn.test:%d/blob", cdn.addr.Port())
	const budget = time.Minute
	get := func() (string, error) {
		req, _ := http.NewRequestWithContext(WithDialBudget(t.Context(), budget), "GET", url, nil)
		resp, err := w.egress.Transport(target).RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	}
	if _, err := get(); err != nil {
		t.Fatal(err)
	}
	cdn.idle()
	cdn.drop()
	var left time.Duration
	w.watch(func(ctx context.Context, _ netip.AddrPort) { left = time.Until(ctx.Value(untilKey{}).(time.Time)) })
	if got, err := get(); err != nil || got != "here" || left > budget-w.egress.times.guess {
		t.Errorf("%q, %v, and %v were left to connect", got, err, left)
	}
}

// A host that could not be reached is tried again beside those who don't wait for it,
// so that it is known when it is back.
func TestUnreachableIsBack(t *testing.T) {
	w := newWorld(t)
	w.egress.times.retry = 100 * time.Millisecond
	w.name("127.0.0.1")
	cdn := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, "here") })
	w.silence(cdn.addr, true)
	tr := w.egress.Transport(Target{Host: ParseHost("registry.test")})
	get := func() error {
		req, _ := http.NewRequestWithContext(WithDialBudget(t.Context(), 10*time.Millisecond), "GET", fmt.Sprintf("https://cdn.test:%d/blob", cdn.addr.Port()), nil)
		resp, err := tr.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	eventually(t, "it is tried again", func() bool {
		if err := get(); !errors.Is(err, ErrUnreachable) {
			t.Fatal(err)
		}
		return w.dialled(cdn.addr) > 1
	})
	w.silence(cdn.addr, false)
	eventually(t, "it is reached", func() bool { return get() == nil })
}

// A host that takes longer than there was time for is reached all the same, and is
// there for the next request.
func TestDialOverBudget(t *testing.T) {
	w := newWorld(t)
	w.name("127.0.0.1")
	cdn := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, "here") })
	slow := make(chan struct{})
	w.watch(func(context.Context, netip.AddrPort) { <-slow })
	tr := w.egress.Transport(Target{Host: ParseHost("registry.test")})
	url := fmt.Sprintf("https://cdn.test:%d/blob", cdn.addr.Port())
	get := func(budget time.Duration) error {
		req, _ := http.NewRequestWithContext(WithDialBudget(t.Context(), budget), "GET", url, nil)
		resp, err := tr.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	if err := get(time.Millisecond); !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
	close(slow)
	eventually(t, "the connection is ready", w.egress.pool(tr.target.keyFor(mustParse(t, url))).waiting)
	if err := get(time.Minute); err != nil {
		t.Error(err)
	}
}

func mustParse(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// What the runtime has for a registry tells its connections apart.
func TestSettingsTellConnectionsApart(t *testing.T) {
	w := newWorld(t)
	w.name("127.0.0.1")
	s := w.serve("127.0.0.1", 0, w.ca, func(http.ResponseWriter, *http.Request) {})
	evil := proxytest.NewAuthority(t, "evil")
	target := s.target()
	for i, tt := range []struct {
		settings Settings
		ok       bool
	}{{Settings{}, true}, {Settings{Roots: evil.Pool, Key: "evil"}, false}, {Settings{Roots: w.ca.Pool, Key: "own"}, true}, {Settings{}, true}} {
		target.Settings = tt.settings
		for _, url := range []string{target.url(), fmt.Sprintf("https://cdn.test:%d/", s.addr.Port())} {
			if _, err := send(t, w.egress.Transport(target), "GET", url, nil); (err == nil) != tt.ok {
				t.Errorf("%d: %s: %v", i, url, err)
			}
		}
	}
	if n := w.dialled(s.addr); n < 6 {
		t.Errorf("%d connections", n)
	}
}

// What a registry sends before an answer's body is held until the client has read
// it: it has a bound.
func TestAnswerHeadIsBounded(t *testing.T) {
	w := newWorld(t)
	var size int
	s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("X", strings.Repeat("x", size))
	})
	for _, method := range []string{"GET", "POST"} {
		for n, ok := range map[int]bool{100_000: true, 200_000: false, 5 << 20: false} {
			size = n
			tr := w.egress.Transport(s.target())
			if _, err := send(t, tr, method, s.target().url(), nil); (err == nil) != ok {
				t.Errorf("%s: a field of %d bytes: %v", method, n, err)
			}
			tr.Close()
		}
	}
}

// A kept connection is closed while an answer without a body comes: net/http takes
// it for idle already, and gives an error in place of the answer.
func TestClosedUnderAnAnswer(t *testing.T) {
	w := newWorld(t)
	s := w.serve("127.0.0.1", 0, w.ca, func(http.ResponseWriter, *http.Request) {})
	target := s.target()
	if err := w.egress.Verify(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	tr := w.egress.Transport(target)
	for i := range 3 {
		ctx := t.Context()
		if i > 0 {
			var once sync.Once
			ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{PutIdleConn: func(error) {
				once.Do(func() { w.egress.Close(); time.Sleep(10 * time.Millisecond) }) // as if there were no processor for it
			}})
		}
		req, _ := http.NewRequestWithContext(ctx, http.MethodHead, target.url(), nil)
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(i, err)
		}
		resp.Body.Close()
	}
}

// What is left on a kept connection of an answer before, here a body where there must be none,
// is taken for the beginning of the next one. A client without weir may have a connection of its own.
func TestLeftOnTheConnection(t *testing.T) {
	w := newWorld(t)
	var conns atomic.Int64
	s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodHead || conns.Add(1) > 1 {
			return
		}
		c, buf, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 40\r\n\r\n")
		if _, err := http.ReadRequest(buf.Reader); err != nil {
			t.Error("the connection isn't used again: ", err)
		}
		_, _ = io.WriteString(c, `{"message":"authentication is required"}`+"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	target := s.target()
	if err := w.egress.Verify(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	tr := w.egress.Transport(target)
	for _, want := range []struct {
		method string
		status int
	}{{http.MethodHead, 401}, {http.MethodGet, 200}} {
		req, _ := http.NewRequestWithContext(t.Context(), want.method, target.url(), nil)
		resp, err := tr.RoundTrip(req)
		if err != nil || resp.StatusCode != want.status {
			t.Fatal(want.method, resp, err)
		}
		resp.Body.Close()
	}
}
