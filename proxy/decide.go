// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"weir/proxy/registry"
	"weir/proxy/upstream"
)

const (
	// maxServing bounds the addresses of registries that are remembered.
	maxServing = 4096
	// leaveTime is how long an address is left alone where there was no registry:
	// another host may have the same one.
	leaveTime = 10 * time.Minute
	// staleDialTimeout bounds the look at a registry that there is something to
	// serve of without it. Clients wait 10 seconds for a TLS handshake.
	staleDialTimeout = time.Second
	// nodeDialTime is when the node itself looks as well, where the client's
	// network is silent.
	nodeDialTime = 300 * time.Millisecond
)

// place is an address in a network.
type place struct {
	network string
	addr    netip.AddrPort
}

// leave has connections to a destination not come here, unless there is a registry too.
func (p *Proxy) leave(f Flow) {
	if f.Leave != nil && !p.serving.Contains(place{f.NetworkID, f.Dst}) {
		f.Leave(leaveTime)
	}
}

// decide returns the registry, and where it is, when the connection is to be
// intercepted, and otherwise why not.
func (p *Proxy) decide(ctx context.Context, f Flow, h hello) (up registry.Upstream, t upstream.Target, why string) {
	name := h.host
	if name == "" { // clients name no IP addresses, RFC 6066 section 3
		name = f.Dst.Addr().String()
	}
	t = f.target(upstream.ParseHost(net.JoinHostPort(name, f.port())))
	host := t.Host.String()
	known, ok := p.opts.Hosts.Find(host)
	spelled := host
	if h.spelled != strings.ToLower(h.spelled) {
		spelled = net.JoinHostPort(h.spelled, f.port())
	}
	if ok {
		p.serving.Add(place{f.NetworkID, f.Dst}, struct{}{})
	}
	switch {
	case !ok && !h.http1:
		p.leave(f)
		return up, t, "not a known registry, and the client doesn't speak HTTP/1.1"
	case !ok:
		p.see(ctx, host, f)
		return up, t, "not a known registry"
	case !h.http1:
		return up, t, "the client doesn't speak HTTP/1.1"
	case !p.opts.Leaves.Permits(name):
		return up, t, "the CA may not speak for this host, or not at this time"
	case f.Trusts == nil || !f.Trusts(known, spelled):
		if host != known.Host { // by its domain alone
			p.see(ctx, host, f)
		}
		return up, t, "the runtime isn't known to trust the CA"
	}
	var s upstream.Settings
	if f.Settings != nil {
		var err error
		if s, err = f.Settings(known, host); err != nil {
			p.log.Warn("a runtime's settings for a registry can't be used; passed through", "client", f.Client, "registry", host, "err", err)
			return up, t, "the runtime's settings for the registry can't be used"
		}
	}
	up = registry.Upstream{Host: host, NetworkID: f.NetworkID, Client: f.Client}
	up.Worldwide = known.Worldwide && f.through.ID() == "" // a proxy may answer in its stead
	if len(s.Certificates) > 0 {
		up.ClientIdentity = s.Key
	}
	// Who is trusted by this node is the registry of that name for all clients;
	// who is trusted by the runtime alone, only for those with the same settings.
	t.Settings = s.WithoutRoots()
	err := p.verify(ctx, f, t)
	if err != nil && s.Roots != nil && upstream.Refused(err) {
		up.TrustRootsID, t.Settings = s.Key, s
		err = p.verify(ctx, f, t)
	}
	if err != nil {
		p.cantVerify(host, err)
		return up, t, "the registry can't be verified"
	}
	return up, t, ""
}

// verify finds out whether a registry can be spoken to in a client's place. One
// that is down can when there may be something to serve without it.
func (p *Proxy) verify(ctx context.Context, f Flow, t upstream.Target) error {
	if !p.opts.Registry.HasStale(registry.Upstream{Host: t.Host.String()}) {
		return f.Egress.Verify(ctx, t)
	}
	vctx, cancel := context.WithTimeout(ctx, staleDialTimeout)
	defer cancel()
	reaches := make(chan bool, 1)
	node := sync.OnceFunc(func() { reaches <- p.opts.Node.Reaches(vctx, t.Host) })
	aside := f.NetworkID != "" && p.opts.Node != nil
	if aside {
		defer time.AfterFunc(nodeDialTime, node).Stop()
	}
	err := f.Egress.Verify(vctx, t)
	if err == nil || upstream.Refused(err) || ctx.Err() != nil {
		return err
	}
	if aside {
		go node()
		if <-reaches {
			// A network policy, say. What others were given by it is not for this
			// client, who could not have asked.
			return err
		}
	}
	p.opts.Registry.Unreachable(registry.Upstream{Host: t.Host.String(), NetworkID: f.NetworkID})
	return nil // requests try it again
}

// cantVerify counts a connection to a registry that can't be verified, which the log
// has once in a while.
func (p *Proxy) cantVerify(host string, err error) {
	p.unverified.Add(1)
	level := slog.LevelDebug
	if !p.unverifiable.Contains(host) {
		p.unverifiable.Add(host, struct{}{})
		level = slog.LevelInfo
	}
	p.log.Log(context.Background(), level, "a registry can't be verified: connections to it are passed through, and counted", "registry", host, "err", err)
}

func portOf(a netip.AddrPort) string {
	_, port, _ := net.SplitHostPort(a.String())
	return port
}
