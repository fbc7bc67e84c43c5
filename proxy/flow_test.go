// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// A connection counts until it is closed, whatever became of it.
func TestClosed(t *testing.T) {
	answers := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "{}") })
	ask := func(c net.Conn) error {
		fmt.Fprint(c, "GET /v2/ HTTP/1.1\r\nHost: registry.test\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
		}
		return err
	}
	secure := func(c net.Conn) error {
		tc := tls.Client(c, &tls.Config{ServerName: "registry.test", InsecureSkipVerify: true})
		if err := tc.Handshake(); err != nil {
			return err
		}
		return ask(tc)
	}
	for name, tt := range map[string]struct {
		tls         bool
		direct      bool
		use         func(net.Conn) error // leaves it open
		intercepted int64
	}{
		"intercepted":        {true, false, secure, 1},
		"intercepted, plain": {false, false, ask, 1},
		"direct":             {true, true, secure, 0},
		"direct, plain":      {false, true, ask, 0},
		"passed through": {false, false, func(c net.Conn) error {
			_, err := io.WriteString(c, "BREW / HTCPCP/1.0\r\n\r\n")
			if err == nil {
				_, err = c.Read(make([]byte, 1)) // that it isn't HTTP
			}
			return err
		}, 0},
		"half a hello": {false, false, func(c net.Conn) error { _, err := c.Write([]byte{22, 3, 1}); return err }, 0},
		"no word":      {false, false, func(net.Conn) error { return nil }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			if tt.tls {
				leaf, _ := s.world.Leaf("registry.test")
				s.serveTLS(l, &tls.Config{Certificates: []tls.Certificate{*leaf}}, answers)
			} else {
				srv := &http.Server{Handler: answers}
				go func() { _ = srv.Serve(l) }()
				t.Cleanup(func() { srv.Close() })
			}
			closed := make(chan struct{}, 2)
			s.change(func(f *Flow) { f.Direct, f.Closed = tt.direct, func() { closed <- struct{}{} } })
			c := s.dial()
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			if err := tt.use(c); err != nil {
				t.Fatal(err)
			}
			if name != "passed through" { // whose destination has closed it
				select {
				case <-closed:
					t.Error("counted as closed while it is open")
				default:
				}
			}
			if n := s.proxy.Stats().Intercepted; n != tt.intercepted {
				t.Errorf("%d connections intercepted", n)
			}
			c.Close()
			select {
			case <-closed:
			case <-time.After(20 * time.Second):
				t.Fatal("it counts for ever")
			}
			select {
			case <-closed:
				t.Error("counted as closed twice")
			default:
			}
		})
	}
}

// So it does where nothing answers, and when the client takes no certificate.
func TestClosedWithoutAnswer(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	leaf, _ := s.world.Leaf("registry.test")
	s.serveTLS(l, &tls.Config{Certificates: []tls.Certificate{*leaf}}, http.NotFoundHandler())
	closed := make(chan struct{}, 10)
	s.change(func(f *Flow) { f.Closed = func() { closed <- struct{}{} } })
	wait := func(what string) {
		t.Helper()
		select {
		case <-closed:
		case <-time.After(20 * time.Second):
			t.Fatal(what, " counts for ever")
		}
	}
	c := s.dial()
	if err := tls.Client(c, &tls.Config{ServerName: "registry.test", RootCAs: s.world.Pool}).Handshake(); err == nil {
		t.Fatal("the client took weir's certificate")
	}
	c.Close()
	wait("a connection that the client gave up")
	l.Close()
	c = s.dial()
	fmt.Fprint(c, "GET /v2/ HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n")
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.ReadAll(c)
	c.Close()
	wait("a connection to where nothing is")
	if len(closed) > 0 {
		t.Error("counted as closed twice")
	}
}
