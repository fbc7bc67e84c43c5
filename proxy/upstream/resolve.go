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
	"slices"
	"strings"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"
)

// names resolves the names of upstreams: as this process does, and while its
// name servers don't answer, as the node does. In a Kubernetes pod the former
// are the cluster's own, which may be waiting for an image themselves. While none
// answers, a host's addresses are what they were (RFC 8767): whoever is there by
// now has to show the host's certificate.
type names struct {
	own, node string        // resolv.conf(5) of this process and of the node
	resolver  *net.Resolver // of the own ones; nil for net.DefaultResolver
	ownDown   atomic.Int64  // until when the own ones aren't asked first, in Unix nanoseconds
	silent    atomic.Int64  // until when none is waited for where the addresses were known
	asking    singleflight.Group
	known     *lru.Cache[string, addresses]
}

// addresses are what a host's addresses were.
type addresses struct {
	ips  []netip.Addr
	when time.Time
}

const (
	// silentTime is for how long name servers that gave no answer are left out.
	silentTime = 30 * time.Second
	// ownServersTime is how long the own ones have before the node's are asked as
	// well. A search list would have them waited for eight times as long.
	ownServersTime = 300 * time.Millisecond
	// answerTime is how long all have where a host's addresses were known.
	answerTime = 600 * time.Millisecond
	// lookupTime bounds a lookup without any answer.
	lookupTime = 30 * time.Second
	// knownTTL is for how long addresses are good while no name server answers: the
	// least of what RFC 8767, section 5, suggests.
	knownTTL = 24 * time.Hour
)

var upstreamNames = newNames("/etc/resolv.conf", "/proc/1/root/etc/resolv.conf")

func newNames(own, node string) *names {
	n := &names{own: own, node: node}
	n.known, _ = lru.New[string, addresses](maxPools)
	return n
}

// lookup returns the addresses of a host.
func (n *names) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	found := n.asking.DoChan(host, func() (any, error) {
		ips, err := n.ask(host)
		if err == nil {
			n.known.Add(host, addresses{ips, time.Now()})
			n.silent.Store(0)
		}
		return ips, err
	})
	was, known := n.known.Get(host)
	known = known && time.Since(was.when) < knownTTL
	var enough <-chan time.Time
	if known {
		wait := answerTime
		if time.Now().UnixNano() < n.silent.Load() {
			wait = 0
		}
		timer := time.NewTimer(wait)
		defer timer.Stop()
		enough = timer.C
	}
	select {
	case a := <-found:
		if a.Err == nil {
			return a.Val.([]netip.Addr), nil
		}
		if !known || notFound(a.Err) {
			return nil, a.Err
		}
		return was.ips, nil
	case <-enough:
		n.silent.Store(time.Now().Add(silentTime).UnixNano())
		return was.ips, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func notFound(err error) bool {
	var dns *net.DNSError
	return errors.As(err, &dns) && dns.IsNotFound
}

// ask asks the name servers: the second ones when the first have failed, or are
// silent, and then both.
func (n *names) ask(host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTime)
	defer cancel()
	own := cmp.Or(n.resolver, net.DefaultResolver)
	order := []*net.Resolver{own}
	if r := n.ofNode(); r != nil {
		order = append(order, r)
		if time.Now().UnixNano() < n.ownDown.Load() {
			slices.Reverse(order)
		}
	}
	type answer struct {
		ips  []netip.Addr
		err  error
		from *net.Resolver
	}
	answers := make(chan answer, len(order))
	next := time.NewTimer(0)
	defer next.Stop()
	var cause error
	for asked, answered := 0, 0; ; {
		select {
		case <-next.C:
			if asked < len(order) {
				r := order[asked]
				asked++
				go func() {
					ips, err := r.LookupNetIP(ctx, "ip", host)
					answers <- answer{ips, err, r}
				}()
				next.Reset(ownServersTime)
			}
		case a := <-answers:
			switch answered++; {
			case a.err == nil && a.from != own:
				n.ownDown.Store(time.Now().Add(silentTime).UnixNano())
				return a.ips, nil
			case a.err == nil, a.from == own && notFound(a.err):
				n.ownDown.Store(0)
				return a.ips, a.err
			case a.from == own || cause == nil:
				cause = a.err
			}
			if answered == len(order) {
				return nil, cause
			}
			next.Reset(0)
		}
	}
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
