// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/elazarl/goproxy"
	lru "github.com/hashicorp/golang-lru/v2/expirable"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// distrust is for how long a client that did not trust our certificate is
// tunnelled.
const distrust = 10 * time.Minute

// Forward returns an HTTP forward proxy, for clients that name weir in
// HTTPS_PROXY and trust its CA: it answers for known registries, and tunnels
// everything else. What is answered is for the host of the CONNECT request,
// whatever is asked inside. ctx ends the tunnels to registries.
func (p *Proxy) Forward(ctx context.Context, e *upstream.Egress) http.Handler {
	distrusts := lru.NewLRU[string, struct{}](1024, nil, distrust)
	g := goproxy.NewProxyHttpServer()
	g.Logger = slog.NewLogLogger(p.log.Handler(), slog.LevelDebug)
	// Its own transport doesn't verify, and its own CA is known to all.
	g.Tr = e.HTTPTransport()
	g.CertStore = nil
	g.KeepAcceptEncoding = true
	g.ConnectDialWithReq = func(r *http.Request, network, addr string) (net.Conn, error) {
		via, err := http.ProxyFromEnvironment(&http.Request{URL: &url.URL{Scheme: "https", Host: addr}})
		if err != nil {
			return nil, err
		}
		if via != nil {
			return g.NewConnectDialToProxy(via.String())(network, addr)
		}
		return e.DialName(r.Context(), addr)
	}
	g.OnRequest().HandleConnectFunc(func(authority string, c *goproxy.ProxyCtx) (*goproxy.ConnectAction, string) {
		tunnel := &goproxy.ConnectAction{Action: goproxy.ConnectAccept}
		name, _, err := net.SplitHostPort(authority)
		host := registry.Canonical(authority)
		client, _, _ := net.SplitHostPort(c.Req.RemoteAddr)
		key := client + " " + host
		if k, known := p.opts.Hosts.Find(host); err != nil || !known || k.Learned || !p.opts.Leaves.Permits(name) || distrusts.Contains(key) {
			return tunnel, authority
		}
		target := upstream.Target{Host: upstream.ParseHost(host)}
		if err := p.verify(c.Req.Context(), Flow{Egress: e}, target); err != nil {
			p.cantVerify(host, err)
			return tunnel, authority
		}
		return &goproxy.ConnectAction{Action: goproxy.ConnectHijack, Hijack: func(_ *http.Request, conn net.Conn, _ *goproxy.ProxyCtx) {
			tcp, ok := conn.(*net.TCPConn)
			if _, err := io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil || !ok {
				conn.Close()
				return
			}
			f := Flow{Egress: e, Client: client, Rejected: func(string, error) {
				p.log.Warn("a client of the forward proxy does not trust weir's CA; tunnelled from now on", "client", client, "registry", host)
				distrusts.Add(key, struct{}{})
			}}
			p.active.Go(func() {
				o := opening{hello: hello{protocol: tlsHello, host: registry.Canonical(name)}}
				p.intercept(ctx, tcp, f, o, registry.Upstream{Host: host, Client: client}, target)
			})
		}}, authority
	})
	return g
}
