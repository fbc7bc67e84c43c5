// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// port is that of the host that the client means.
func (f Flow) port() string {
	if f.through.ID() != "" {
		_, port, _ := net.SplitHostPort(f.tunnelled.HostPort())
		return port
	}
	return portOf(f.Dst)
}

// target is a host that the client means, the way that it takes there.
func (f Flow) target(host upstream.Host) upstream.Target {
	t := upstream.Target{Host: host, Addr: f.Dst}
	if f.through.ID() != "" {
		t.Addr, t.Tunnel = netip.AddrPort{}, f.through
	}
	return t
}

// into is the flow in the tunnel that a client has asked the proxy at Dst for. A
// registry sees the proxy's address, and not the client's: it is another network.
func (f Flow) into(h hello) Flow {
	f.tunnelled, f.through = upstream.ParseHost(h.connect), upstream.NewTunnel(f.Dst, h.asked)
	f.NetworkID = strings.TrimSpace(f.NetworkID + " via " + f.through.ID())
	if learn, want := f.Learn, f.Want; learn != nil && want != nil {
		f.Learn = func(host string, ownRoots bool) error {
			defer want() // it has the destination looked at anew
			return learn(host, ownRoots)
		}
	}
	f.Leave, f.Want = nil, nil // other hosts are behind the same proxy
	return f
}

// repeatable says whether a proxy can be asked with the same header again, for another
// connection and another host. With Negotiate, NTLM and Digest it can't.
func repeatable(asked http.Header) bool {
	return !slices.ContainsFunc(asked.Values("Proxy-Authorization"), func(v string) bool {
		scheme, _, _ := strings.Cut(v, " ")
		return !strings.EqualFold(scheme, "Basic") && !strings.EqualFold(scheme, "Bearer")
	})
}

// carryTunnel carries a connection to a proxy that is asked for one to a host. If the
// host is a registry that is intercepted, the client gets its answer from here, and the
// registry is reached through the same proxy, asked in the same way. Otherwise
// the proxy gets what the client has said, and all that follows.
func (p *Proxy) carryTunnel(ctx context.Context, conn *net.TCPConn, f Flow, o opening) (handed bool) {
	// Whatever else is asked of the proxy, connections to it come here.
	p.serving.Add(place{f.NetworkID, f.Dst}, struct{}{})
	if f.Want != nil {
		f.Want()
	}
	in := f.into(o.hello)
	name, _, err := net.SplitHostPort(in.tunnelled.HostPort())
	if err != nil || name == "" || !repeatable(o.asked) {
		p.pass(ctx, conn, f, o)
		return false
	}
	// The client's first words in the tunnel would say the same, if it is TLS: until
	// they are heard, nothing is decided that could not be taken back.
	up, t, why := p.decide(ctx, in, hello{protocol: tlsHello, host: name, spelled: o.spelled, http1: true})
	if why == "" {
		if _, err = p.opts.Leaves.Leaf(name); err != nil {
			why = "no certificate for it"
		}
	}
	if why != "" {
		p.log.Debug("passed through to a proxy", "client", f.Client, "host", o.connect, "proxy", f.Dst, "why", why)
		p.pass(ctx, conn, f, o)
		return false
	}
	if o.server != nil {
		o.server.Close()
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		abort(conn)
		return false
	}
	_ = conn.SetReadDeadline(time.Now().Add(peekTimeout))
	said := peek(conn)
	_ = conn.SetReadDeadline(time.Time{})
	if said.protocol == tlsHello && said.http1 && (said.host == registry.Canonical(name) || said.host == "") {
		said.host = registry.Canonical(name)
		return p.intercept(ctx, conn, in, opening{hello: said, opened: o.opened}, up, t)
	}
	p.enter(ctx, conn, in, opening{hello: said, opened: o.opened})
	return false
}

// enter passes a connection through that was told that it has its tunnel.
func (p *Proxy) enter(ctx context.Context, conn *net.TCPConn, f Flow, o opening) {
	var err error
	if o.server, err = f.Egress.Tunnel(ctx, f.through, f.tunnelled.HostPort()); err != nil {
		p.failed.Add(1)
		p.log.Debug("no tunnel", "client", f.Client, "host", f.tunnelled.HostPort(), "err", err)
		abort(conn)
		return
	}
	p.pass(ctx, conn, f, o)
}
