// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// AnswerProbe serves a connection to a probe address: it shows the runtime a
// certificate, and learns from its reaction whether it trusts the CA.
func (rs *Runtimes) AnswerProbe(conn *net.TCPConn, pid int, addr netip.Addr) {
	defer conn.Close()
	p, err := rs.probeOf(pid, addr)
	if err != nil {
		rs.o.Log.Error("no certificate for a probe address", "addr", addr, "err", err)
		return
	}
	ctx, cancel := context.WithTimeout(rs.ctx, 10*time.Second)
	defer cancel()
	c := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{*p.leaf}, NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS12})
	if err := c.HandshakeContext(ctx); err != nil {
		op, ok := errors.AsType[*net.OpError](err)
		switch {
		case ok && op.Op == "remote error": // a TLS alert
			p.is(errDistrusts)
		default: // plain HTTP, which some try before or after; says nothing
			rs.o.Log.Debug("a probe's connection ended early", "pid", pid, "err", err)
		}
		return
	}
	p.is(nil)
	// The image isn't there, and the runtime should get that answer at once.
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
	stop := context.AfterFunc(rs.ctx, func() { conn.Close() })
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

// Probe addresses: what runtimes are asked to pull from, to see whether they
// trust the CA. They are in the range for benchmarks (RFC 2544), which is not
// routed, and only the kernel side makes them lead somewhere: to the listener.
// Nothing is installed for the first one but the system's roots; the second has
// a directory in each certs.d.
var (
	probeSystem = netip.MustParseAddr("198.18.116.1")
	probeCertsD = netip.MustParseAddr("198.18.116.2")
)

// Probes are the probe addresses.
var Probes = []netip.Addr{probeSystem, probeCertsD}

var (
	errDistrusts = errors.New("it does not trust the CA")
	errNoProbe   = errors.New("it did not come to the probe address")
)

// probe is a pull from a probe address that a runtime was asked for.
type probe struct {
	leaf    *tls.Certificate
	verdict chan error
}

// probeOf returns the probe that a process comes to an address for: what it is shown there
// is that one's, and so is what it makes of it. There may be another one by then.
func (rs *Runtimes) probeOf(pid int, addr netip.Addr) (*probe, error) {
	if rt := rs.Find(pid); rt != nil {
		rt.mu.Lock()
		defer rt.mu.Unlock()
		if p, ok := rt.probes[addr]; ok {
			return p, nil
		}
	}
	leaf, err := rs.o.CA.Leaf(addr.String())
	return &probe{leaf: leaf}, err // whose verdict isn't waited for
}

// is records what became of a connection to a probe address.
func (p *probe) is(verdict error) {
	select {
	case p.verdict <- verdict:
	default:
	}
}

// probe makes a runtime pull from a probe address. It returns nil when the
// runtime trusted the certificate that it was shown there, which is for the names
// that the CA has from after to upTo, see [trust.CA.ProbeLeaf]; [errDistrusts] when
// it did not, and another error when it could not be found out.
func (rs *Runtimes) probe(rt *Runtime, addr netip.Addr, after, upTo uint64) error {
	leaf, err := rs.o.CA.ProbeLeaf(addr, after, upTo)
	if err != nil {
		return err
	}
	p := &probe{leaf, make(chan error, 1)}
	rt.mu.Lock()
	rt.probes[addr] = p
	rt.mu.Unlock()
	defer func() {
		rt.mu.Lock()
		if rt.probes[addr] == p { // and not the next one's
			delete(rt.probes, addr)
		}
		rt.mu.Unlock()
	}()
	image := addr.String() + "/weir/probe:" + strings.ToLower(rand.Text()[:12])
	// A runtime that is just starting doesn't answer at once.
	ctx, cancel := context.WithTimeout(rt.ctx, 30*time.Second)
	defer cancel()
	for delay := 50 * time.Millisecond; ; delay = min(2*delay, 2*time.Second) {
		asked := make(chan error, 1)
		go func() { asked <- rt.kind.ask(ctx, rt, image) }()
		select {
		case err := <-p.verdict:
			return err
		case err := <-asked:
			select {
			case err := <-p.verdict: // the answer's cause
				return err
			case <-time.After(200 * time.Millisecond):
			}
			select {
			case err := <-p.verdict:
				return err
			case <-ctx.Done():
				if err == nil {
					err = errNoProbe
				}
				return fmt.Errorf("%w: %w", errNoProbe, err)
			case <-time.After(delay):
			}
		case <-ctx.Done():
			return errNoProbe
		}
	}
}
