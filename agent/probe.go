// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// answerProbe serves a connection to a probe address: it shows the runtime a
// certificate, and tells from its reaction whether it trusts the CA.
func (a *Agent) answerProbe(conn *net.TCPConn, pid int, addr netip.Addr) {
	defer conn.Close()
	leaf, err := a.ca.Leaf(addr.String())
	if err != nil {
		a.log.Error("no certificate for a probe address", "addr", addr, "err", err)
		return
	}
	ctx, cancel := context.WithTimeout(a.ctx, 10*time.Second)
	defer cancel()
	c := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{*leaf}, NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS12})
	if err := c.HandshakeContext(ctx); err != nil {
		var op *net.OpError
		switch {
		case errors.As(err, &op) && op.Op == "remote error": // a TLS alert
			a.runtimes.probed(pid, addr, errDistrusts)
		default: // plain HTTP, which some try before or after; says nothing
			a.log.Debug("a probe's connection ended early", "pid", pid, "err", err)
		}
		return
	}
	a.runtimes.probed(pid, addr, nil)
	// The image isn't there, and the runtime should hear that at once.
	l := &oneConn{c: c, done: make(chan struct{})}
	s := http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
			if r.URL.Path == "/v2/" {
				_, _ = w.Write([]byte("{}"))
				return
			}
			w.WriteHeader(http.StatusNotFound)
			_, _ = w.Write([]byte(`{"errors":[{"code":"MANIFEST_UNKNOWN","message":"weir asked for this image to see whether its certificate is trusted; there is no such image"}]}`))
		}),
		ConnState: func(_ net.Conn, st http.ConnState) {
			if st == http.StateClosed || st == http.StateHijacked {
				l.Close()
			}
		},
		ReadTimeout: 10 * time.Second,
		IdleTimeout: 10 * time.Second,
	}
	stop := context.AfterFunc(a.ctx, func() { conn.Close() })
	defer stop()
	_ = s.Serve(l)
}

// oneConn is a listener with a single connection.
type oneConn struct {
	c    net.Conn
	done chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.c; c != nil {
		l.c = nil
		return c, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error {
	select {
	case <-l.done:
	default:
		close(l.done)
	}
	return nil
}

func (l *oneConn) Addr() net.Addr { return &net.TCPAddr{} }
