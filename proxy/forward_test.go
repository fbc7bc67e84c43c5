// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"weir/proxy/internal/proxytest"
	"weir/proxy/upstream"
)

// The forward proxy answers for the registry of the CONNECT request, and
// tunnels what it is not trusted for and all else.
func TestForward(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "this is ", r.Host) }))
	e := upstream.Config{Roots: func(string) *x509.CertPool { return s.world.Pool }}.NewNodeEgress()
	defer e.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	proxy := httptest.NewServer(s.proxy.Forward(ctx, e))
	defer proxy.Close()
	resolveBy(t, proxytest.NameServer(t, &atomic.Int64{}, "127.0.0.1"))
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
	c, err := connect("registry.test", s.weir.Pool)
	if err != nil {
		t.Fatal(err)
	}
	if b := ask(c, "evil.test"); !strings.HasSuffix(b, "this is evil.test") { // the registry was asked, whatever it makes of it
		t.Errorf("%q", b)
	}
	if c, err = connect("other.test", s.world.Pool); err != nil {
		t.Fatal(err)
	}
	if b := ask(c, "other.test"); !strings.HasSuffix(b, "this is other.test") {
		t.Errorf("%q", b)
	}
	if _, err = connect("registry.test", s.world.Pool); err == nil {
		t.Error("weir's certificate was trusted")
	}
	if err := eventually(func() error { _, err := connect("registry.test", s.world.Pool); return err }); err != nil {
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
