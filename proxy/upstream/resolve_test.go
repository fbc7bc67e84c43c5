// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

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
	n := &names{own: resolvConf(t, "nameserver 198.51.100.1\n"), node: resolvConf(t, "# the node's\nsearch lan\nnameserver "+nameServer(t, &asked, "192.0.2.1")+"\noptions edns0\n")}
	n.down.Store(time.Now().Add(time.Hour).UnixNano())
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

// While the own name servers are silent, the node's are asked before a runtime
// loses its patience, whatever the search list.
func TestSilentNameServers(t *testing.T) {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	own := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", silent.LocalAddr().String())
	}}
	var asked atomic.Int64
	n := &names{resolver: own, own: resolvConf(t, "nameserver 198.51.100.1\n"), node: resolvConf(t, "nameserver "+nameServer(t, &asked, "192.0.2.1")+"\n")}
	ctx, cancel := context.WithTimeout(t.Context(), 2*ownServersTime)
	defer cancel()
	ips, err := n.lookup(ctx, "cdn.example.com")
	if err != nil || len(ips) != 1 || ips[0].Unmap().String() != "192.0.2.1" {
		t.Errorf("%v, %v", ips, err)
	}
	if n.down.Load() == 0 {
		t.Error("the silent ones are asked first again")
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
