// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"
)

// race opens a connection to one of a host's addresses: each is tried when the
// one before has failed, or is silent, and goes on beside it. So a silent one costs
// a moment where there are others, and has all the time where there are none.
type race struct {
	egress *Egress
	// open makes one attempt, and says when the address has accepted, if there is
	// more to wait for.
	open func(ctx context.Context, addr netip.AddrPort, accepted func()) (net.Conn, error)
	// names is the HOST:PORT that has other addresses. Empty means none.
	names string
	// strict has the first address's refusal be the answer.
	strict bool
}

// maxAddrs bounds the addresses that are tried.
const maxAddrs = 8

// run returns the first connection. first, if it is valid, is tried before the
// name is resolved; if it answers, no name server is asked.
func (r race) run(ctx context.Context, first netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type resolved struct {
		addrs []netip.AddrPort
		err   error
	}
	results := make(chan attempt, maxAddrs)
	accepted := make(chan struct{}, maxAddrs)
	found := make(chan resolved, 1)
	var addrs []netip.AddrPort
	var cause error
	running, asking, asked := 0, false, r.names == ""
	next := time.NewTimer(0)
	defer next.Stop()
	if first.IsValid() {
		addrs = append(addrs, first)
	}
	for {
		if running == 0 && !asking && len(addrs) == 0 && asked {
			if cause == nil {
				cause = errors.New("no address to connect to")
			}
			return nil, cause
		}
		select {
		case <-next.C:
			switch {
			case len(addrs) > 0:
				addr := addrs[0]
				addrs = addrs[1:]
				running++
				go func() {
					c, err := r.open(ctx, addr, func() { accepted <- struct{}{} })
					results <- attempt{c, err, addr}
				}()
				next.Reset(r.egress.times.fallback)
			case !asked:
				asked, asking = true, true
				go func() {
					a, err := r.egress.resolve(ctx, r.names)
					found <- resolved{a, err}
				}()
			}
		case <-accepted:
			next.Reset(r.egress.times.handshake)
		case f := <-found:
			asking = false
			if cause == nil {
				cause = f.err
			}
			for _, a := range f.addrs {
				if a != first && len(addrs) < maxAddrs-1 {
					addrs = append(addrs, a)
				}
			}
			next.Reset(0)
		case w := <-results:
			running--
			if w.err == nil || r.strict && w.addr == first && Refused(w.err) {
				go closeLate(results, running)
				return w.c, w.err
			}
			if cause == nil {
				cause = w.err
			}
			next.Reset(0)
		case <-ctx.Done():
			go closeLate(results, running)
			return nil, ctx.Err()
		}
	}
}

// attempt is how one has ended.
type attempt struct {
	c    net.Conn
	err  error
	addr netip.AddrPort
}

// closeLate takes care of the attempts that are not needed any more.
func closeLate(results <-chan attempt, running int) {
	for range running {
		if a := <-results; a.err == nil {
			a.c.Close()
		}
	}
}

func (e *Egress) resolve(ctx context.Context, hostport string) ([]netip.AddrPort, error) {
	if addr, err := netip.ParseAddrPort(hostport); err == nil {
		return []netip.AddrPort{addr}, nil
	}
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	p, err := net.DefaultResolver.LookupPort(ctx, "tcp", port)
	if err != nil {
		return nil, err
	}
	ips, err := e.lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.AddrPort, 0, len(ips))
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), uint16(p)))
	}
	return addrs, nil
}
