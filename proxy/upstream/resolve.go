// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// names resolves the names of upstreams: as this process does, and while its
// name servers don't answer, as the node does. In a Kubernetes pod the former
// are the cluster's own, which may be waiting for an image themselves.
type names struct {
	own, node string        // resolv.conf(5) of this process and of the node
	resolver  *net.Resolver // of the own ones; nil for net.DefaultResolver
	down      atomic.Int64  // until when the own ones aren't asked first, in Unix nanoseconds
}

// ownServersDown is for how long name servers that gave no answer are left out.
const ownServersDown = 30 * time.Second

// ownServersTime is how long they have where there are others to ask. A search
// list would have them asked, and waited for, eight times as long.
const ownServersTime = time.Second

var upstreamNames = &names{own: "/etc/resolv.conf", node: "/proc/1/root/etc/resolv.conf"}

// lookup returns the addresses of a host.
func (n *names) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	r, own := n.ofNode(), ctx
	if r != nil {
		if time.Now().UnixNano() < n.down.Load() {
			if ips, err := r.LookupNetIP(ctx, "ip", host); err == nil {
				return ips, nil
			}
		}
		var cancel context.CancelFunc
		own, cancel = context.WithTimeout(ctx, ownServersTime)
		defer cancel()
	}
	resolver := cmp.Or(n.resolver, net.DefaultResolver)
	ips, err := resolver.LookupNetIP(own, "ip", host)
	var dns *net.DNSError
	if err == nil || ctx.Err() != nil || errors.As(err, &dns) && dns.IsNotFound {
		return ips, err
	}
	if r == nil {
		return nil, err
	}
	n.down.Store(time.Now().Add(ownServersDown).UnixNano())
	if ips, nerr := r.LookupNetIP(ctx, "ip", host); nerr == nil {
		return ips, nil
	}
	return nil, err
}

// ofNode asks the node's name servers, if they are others.
func (n *names) ofNode() *net.Resolver {
	own, servers := nameservers(n.own), nameservers(n.node)
	if len(servers) == 0 || strings.Join(own, " ") == strings.Join(servers, " ") {
		return nil
	}
	var next atomic.Int64
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, servers[int(next.Add(1)-1)%len(servers)])
	}}
}

// nameservers returns the addresses, with port, that a resolv.conf(5) names.
func nameservers(path string) (addrs []string) {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) > 1 && fields[0] == "nameserver" {
			// Others than addresses don't count, as for libc.
			if ip, err := netip.ParseAddr(fields[1]); err == nil {
				addrs = append(addrs, netip.AddrPortFrom(ip, 53).String())
			} else if addr, err := netip.ParseAddrPort(fields[1]); err == nil {
				addrs = append(addrs, addr.String())
			}
		}
	}
	return addrs
}
