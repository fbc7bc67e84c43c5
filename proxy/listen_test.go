// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"weir/proxy/internal/proxytest"
)

// A client that is slow to speak, in a protocol in which it speaks first, is
// intercepted all the same.
func TestSlowClientIsIntercepted(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
	raw := s.dial()
	for s.dials.Load() == 0 { // the proxy has dialled by now
		runtime.Gosched()
	}
	var who string
	c := tls.Client(raw, &tls.Config{ServerName: "registry.test", InsecureSkipVerify: true, VerifyConnection: func(cs tls.ConnectionState) error {
		who = cs.PeerCertificates[0].Issuer.CommonName
		return nil
	}})
	if err := c.Handshake(); err != nil || who != "weir" {
		t.Errorf("certificate of %q, err %v", who, err)
	}
}

// Whoever opens many connections, and says half of what belongs to a beginning,
// keeps no other client from being served, and takes little memory for it.
func TestHalfHellos(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.NotFoundHandler())
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const many = 1000
	for range many {
		c := s.dial()
		defer c.Close()
		if _, err := c.Write([]byte("\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03")); err != nil {
			t.Fatal(err)
		}
	}
	c := tls.Client(s.dial(), &tls.Config{ServerName: "registry.test", InsecureSkipVerify: true})
	if err := c.Handshake(); err != nil || c.ConnectionState().PeerCertificates[0].Issuer.CommonName != "weir" {
		t.Errorf("the next client isn't served: %v", err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)) / many; each > 64<<10 {
		t.Errorf("each takes %d bytes", each)
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
			resolveBy(t, proxytest.NameServer(t, &atomic.Int64{}, "127.0.0.1"))
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
			if err := tls.Client(raw, &tls.Config{ServerName: "registry.test", RootCAs: s.weir.Pool}).HandshakeContext(ctx); err != nil {
				t.Error(err)
			}
		})
		t.Run(fmt.Sprint("down, after ", late), func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			s.serveTLS(l, &tls.Config{}, http.HandlerFunc(giveManifest))
			s.keepStale()
			l.Close()
			e := s.newEgress(s.world.Pool)
			s.change(func(f *Flow) { f.Egress = e })
			raw := s.dial()
			time.Sleep(late) // the silence is what it is about
			if err := tls.Client(raw, &tls.Config{ServerName: "registry.test", RootCAs: s.weir.Pool}).Handshake(); err != nil {
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
