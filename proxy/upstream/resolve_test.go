// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"weir/proxy/internal/proxytest"
)

func resolvConf(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// While the own name servers don't answer, the node's are asked.
func TestNodeNames(t *testing.T) {
	var asked atomic.Int64
	n := newNames(resolvConf(t, "nameserver 198.51.100.1\n"), resolvConf(t, "# the node's\nsearch lan\nnameserver "+proxytest.NameServer(t, &asked, "192.0.2.1")+"\noptions edns0\n"))
	n.ownDown.Store(time.Now().Add(time.Hour).UnixNano())
	ips, err := n.lookup(t.Context(), "registry.example.com")
	if err != nil || len(ips) != 1 || ips[0].Unmap().String() != "192.0.2.1" || asked.Load() == 0 {
		t.Errorf("%v, %v, %d questions", ips, err, asked.Load())
	}
	// Names that this process knows itself go on being known when the node
	// has none of them.
	n.node = n.own
	if ips, err := n.lookup(t.Context(), "localhost"); err != nil || len(ips) == 0 {
		t.Errorf("%v, %v", ips, err)
	}
	if n.ofNode() != nil {
		t.Error("the same name servers are asked twice")
	}
}

// silent is a resolver whose name server takes questions and says nothing. It is
// told when it gets one.
func silent(t *testing.T, asked func()) *net.Resolver {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		for b := make([]byte, 1500); ; asked() {
			if _, _, err := c.ReadFrom(b); err != nil {
				return
			}
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", c.LocalAddr().String())
	}}
}

// While the own name servers are silent, the node's are asked beside them, whatever
// the search list, and first the next time.
func TestSilentNameServers(t *testing.T) {
	var asked, inVain atomic.Int64
	n := newNames(resolvConf(t, "nameserver 198.51.100.1\n"), resolvConf(t, "nameserver "+proxytest.NameServer(t, &asked, "192.0.2.1")+"\n"))
	n.resolver = silent(t, func() { inVain.Add(1) })
	for range 2 {
		ips, err := n.lookup(t.Context(), "cdn.example.com")
		if err != nil || len(ips) != 1 || ips[0].Unmap().String() != "192.0.2.1" {
			t.Errorf("%v, %v", ips, err)
		}
	}
	if n := inVain.Load(); n > 2 { // the addresses of both families
		t.Errorf("the silent ones were asked again, %d questions", n)
	}
}

// While no name server answers, a host is where it was, and the questions go on. A
// host that no name server ever knew has none, and one that is gone is gone.
func TestNamesAreKept(t *testing.T) {
	var asked atomic.Int64
	addr := proxytest.NameServer(t, &asked, "192.0.2.1")
	questions := make(chan struct{}, 100)
	mute := silent(t, func() { questions <- struct{}{} })
	type dial func(ctx context.Context, network, address string) (net.Conn, error)
	var server atomic.Value
	conf := resolvConf(t, "nameserver 198.51.100.1\n")
	n := newNames(conf, conf)
	n.resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		return server.Load().(dial)(ctx, network, address)
	}}
	lookup := func(host string) (string, error) {
		ips, err := n.lookup(t.Context(), host)
		return fmt.Sprint(ips), err
	}
	server.Store(dial(func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", addr)
	}))
	if got, err := lookup("cdn.example.com"); err != nil || got != "[192.0.2.1]" {
		t.Fatal(got, err)
	}
	server.Store(dial(func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("refused") }))
	if got, err := lookup("cdn.example.com"); err != nil || got != "[192.0.2.1]" {
		t.Error("name servers that refuse:", got, err)
	}
	if got, err := lookup("other.example.com"); err == nil {
		t.Error("a host that was never known:", got)
	}
	n.known.Add("old.example.com", addresses{[]netip.Addr{netip.MustParseAddr("192.0.2.2")}, time.Now().Add(-knownTTL)})
	if got, err := lookup("old.example.com"); err == nil {
		t.Error("addresses of long ago:", got)
	}
	server.Store(dial(mute.Dial))
	for range 3 {
		if got, err := lookup("cdn.example.com"); err != nil || got != "[192.0.2.1]" {
			t.Error("silent name servers:", got, err)
		}
	}
	<-questions
	if n.silent.Load() == 0 {
		t.Error("the silent ones are waited for again")
	}
}

func TestNameservers(t *testing.T) {
	got := nameservers(resolvConf(t, "nameserver 192.0.2.53\nnameserver 2001:db8::53\nnameserver\noptions ndots:1\n"))
	if len(got) != 2 || got[0] != "192.0.2.53:53" || got[1] != "[2001:db8::53]:53" {
		t.Errorf("%q", got)
	}
	if got := nameservers("/nowhere"); got != nil {
		t.Errorf("%q", got)
	}
}

func FuzzNameservers(f *testing.F) {
	f.Add([]byte("nameserver 10.96.0.10\nsearch svc.cluster.local\noptions ndots:5\n"))
	f.Add([]byte("nameserver fe80::1%eth0\nnameserver [::1]:5353\n"))
	file := filepath.Join(f.TempDir(), "resolv.conf")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, addr := range nameservers(file) {
			if _, err := netip.ParseAddrPort(addr); err != nil {
				t.Errorf("%q: %v", addr, err)
			}
		}
	})
}
