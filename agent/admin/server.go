// SPDX-License-Identifier: Apache-2.0

// Package admin serves what an agent does to its operators: status and
// pulls as JSON, metrics, and a page; and the sums over the cluster.
package admin

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"weir/agent/redirect"
	"weir/agent/registries"
	"weir/agent/runtimes"
	"weir/bpf"
	"weir/p2p"
	"weir/proxy"
	"weir/proxy/registry"
	"weir/proxy/store"
)

// Options are the parts whose state is shown.
type Options struct {
	Version string
	Cgroup  string
	DataDir string
	Kernel  interface {
		Stats() (bpf.Stats, error)
	}
	Runtimes interface {
		Status() []runtimes.Status
	}
	// Restarts is nil where no runtime is to be restarted.
	Restarts interface {
		All() []runtimes.Restart
	}
	Others interface {
		All() []runtimes.Other
	}
	Listeners interface {
		Status() []redirect.Status
	}
	Registry interface {
		Stats() []registry.Stats
		Pulls() []registry.Pull
	}
	Registries interface {
		All() []registries.Registry
	}
	Proxy interface {
		Stats() proxy.Stats
		Unknowns() []proxy.Unknown
	}
	Store interface {
		Stats() store.Stats
	}
	// Peers is nil without a swarm key.
	Peers interface {
		ID() string
		Status() p2p.Status
		Figures(ctx context.Context) map[string][]byte
	}
	// Metrics has what parts collect by themselves.
	Metrics *prometheus.Registry
	Log     *slog.Logger
	// Level is the log's level, to be changed at run time; nil if it can't be.
	Level *slog.LevelVar
}

// Server shows the state of an agent's parts.
type Server struct {
	o         Options
	ctx       context.Context // peers are asked until then
	started   time.Time
	history   history
	peerStats peerStats // from peers
}

// New makes a server that asks peers until ctx is done.
func New(ctx context.Context, o Options) *Server {
	return &Server{o: o, ctx: ctx, started: time.Now()}
}

// Sample adds what was sent to runtimes since the last time to the history.
func (s *Server) Sample() { s.history.add(time.Now(), trafficOf(s.o.Registry.Stats())) }

// Handler serves all of it.
func (s *Server) Handler() http.Handler {
	metrics := s.o.Metrics
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collector{s})
	mux := http.NewServeMux()
	// A compressor takes a MiB for each scrape of some KiB.
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{DisableCompression: true}))
	ok := func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) }
	mux.HandleFunc("GET /healthz", ok)
	// It listens once it serves, and stops serving when it stops listening.
	mux.HandleFunc("GET /readyz", ok)
	for path, get := range map[string]func() any{
		"status":     func() any { return s.Status() },
		"pulls":      func() any { return append([]registry.Pull{}, s.o.Registry.Pulls()...) },
		"cluster":    func() any { return s.Cluster() },
		"registries": func() any { return s.Registries() },
	} {
		mux.HandleFunc("GET /api/"+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(get())
		})
	}
	mux.Handle("/debug/", debug(s.o.Level, s.o.Log))
	mux.HandleFunc("GET /{$}", s.page)
	for _, name := range []string{"page.css", "page.js"} {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) { http.ServeFileFS(w, r, pageFiles, "page/"+name) })
	}
	return guarded(mux)
}

// guarded refuses what browsers should not do here for other sites. A page of
// another site may give its own name this node's address (DNS rebinding), and
// would then read what is here: on loopback only requests for loopback are
// answered.
func guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if local, ok := loopback(r); ok && !loopbackHost(r.Host) {
			http.Error(w, "this address answers for itself only: use http://"+local, http.StatusMisdirectedRequest)
			return
		}
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		next.ServeHTTP(w, r)
	})
}

// loopback says whether a request came by the loopback interface, and where.
func loopback(r *http.Request) (local string, ok bool) {
	addr, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if addr == nil || !addr.IP.IsLoopback() {
		return "", false
	}
	return addr.String(), true
}

// URL is where a program on the node asks the agent whose --admin is addr: one that
// listens on all addresses is asked on loopback, which is what it answers for there.
func URL(addr, path string) string {
	host, port, err := net.SplitHostPort(addr)
	switch ip, _ := netip.ParseAddr(host); {
	case err != nil:
	case ip == netip.IPv6Unspecified():
		addr = net.JoinHostPort("::1", port)
	case host == "" || ip.IsValid() && ip.IsUnspecified():
		addr = net.JoinHostPort("127.0.0.1", port)
	}
	return "http://" + addr + path
}

func loopbackHost(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}
