// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"weir/bpf"
	"weir/p2p"
	"weir/proxy"
	"weir/proxy/registry"
	"weir/proxy/store"
)

// Status is what /api/status shows.
type Status struct {
	Version    string           `json:"version"`
	PID        int              `json:"pid"`
	Started    time.Time        `json:"started"`
	Cgroup     string           `json:"cgroup"`
	DataDir    string           `json:"data_dir"`
	Runtimes   []RuntimeStatus  `json:"runtimes"`
	Doors      []DoorStatus     `json:"doors"`
	Registries []registry.Stats `json:"registries"`
	// Waiting are registries that are passed through until the agent is
	// restarted.
	Waiting []string `json:"waiting,omitempty"`
	// UnknownHosts were passed through because they aren't known to be
	// registries; --registry makes one known.
	UnknownHosts []proxy.Unknown `json:"unknown_hosts"`
	Connections  proxy.Stats     `json:"connections"`
	Store        store.Stats     `json:"store"`
	// Peers is nil without a swarm key.
	Peers  *p2p.Status `json:"peers,omitempty"`
	Kernel bpf.Stats   `json:"kernel"`
}

// Status returns the agent's present state.
func (a *Agent) Status() Status {
	kernel, err := a.kernel.Stats()
	if err != nil {
		a.log.Warn("reading the kernel side's figures", "err", err)
	}
	s := Status{
		Version: a.conf.Version, PID: os.Getpid(), Started: a.started, Cgroup: a.conf.Cgroup, DataDir: a.conf.DataDir,
		Runtimes: a.runtimes.status(), Doors: a.doors.status(),
		Registries: a.registry.Stats(), Waiting: a.regs.waiting(), UnknownHosts: a.proxy.Unknowns(), Connections: a.proxy.Stats(),
		Store: a.store.Stats(), Kernel: kernel,
	}
	if a.peers != nil {
		p := a.peers.Status()
		s.Peers = &p
	}
	return s
}

func (a *Agent) adminHandler() http.Handler {
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collector{a})
	mux := http.NewServeMux()
	// A compressor takes a MiB for each scrape of some KiB.
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{DisableCompression: true}))
	ok := func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) }
	mux.HandleFunc("GET /healthz", ok)
	// It listens once it serves, and stops serving when it stops listening.
	mux.HandleFunc("GET /readyz", ok)
	for path, get := range map[string]func() any{
		"status":  func() any { return a.Status() },
		"pulls":   func() any { return append([]registry.Pull{}, a.registry.Pulls()...) },
		"cluster": func() any { return a.Cluster() },
	} {
		mux.HandleFunc("GET /api/"+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(get())
		})
	}
	mux.HandleFunc("GET /{$}", a.page)
	for _, name := range []string{"page.css", "page.js"} {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) { http.ServeFileFS(w, r, pageFiles, "page/"+name) })
	}
	return guarded(mux)
}

// collector turns the status into metrics, so that there is one count of
// everything.
type collector struct{ a *Agent }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("weir_"+name, help, labels, nil)
}

var (
	descInfo         = desc("build_info", "A constant 1 with weir's version.", "version")
	descRuntimes     = desc("runtimes", "Running container runtimes by how they are treated.", "kind", "reach")
	descDoors        = desc("doors", "Network namespaces with a door.")
	descConnections  = desc("connections_total", "Redirected connections by what was done with them.", "action")
	descRequests     = desc("registry_requests_total", "Requests to intercepted registries.", "registry")
	descLookups      = desc("registry_lookups_total", "Blobs and manifests asked for by digest or known tag, by whether the store had them.", "registry", "result")
	descErrors       = desc("registry_upstream_errors_total", "Requests that the upstream gave no answer to.", "registry")
	descStale        = desc("registry_stale_answers_total", "Answers given from before the upstream failed (stale-if-error).", "registry")
	descPushed       = desc("registry_pushed_total", "Pushed blobs and manifests that were kept.", "registry")
	descBytes        = desc("registry_bytes_total", "Bytes of answers by where they came from.", "registry", "source")
	descPeers        = desc("peers", "Peers that this node is connected to.")
	descPeerSent     = desc("peer_sent_bytes_total", "Bytes of blobs sent to peers.")
	descPeerRefused  = desc("peer_refused_total", "Requests of peers for blobs above what is served at a time.")
	descStrangers    = desc("peer_strangers_total", "Connections to the peers' port without the swarm key.")
	descStoreBytes   = desc("store_bytes", "Bytes of kept blobs and of running transfers.")
	descStoreMax     = desc("store_max_bytes", "The bound of weir_store_bytes.")
	descStoreBlobs   = desc("store_blobs", "Kept blobs.")
	descStoreEvicted = desc("store_evicted_total", "Blobs that made room for others.")
	descStoreCorrupt = desc("store_corrupt_total", "Blobs that were found damaged and dropped.")
	descStoreNotKept = desc("store_not_kept_total", "Blobs there was no room for.")
	descStoreHangs   = desc("store_disk_hangs", "Whether the store's disk does not answer: nothing is kept until it does.")
	descKernel       = desc("kernel_connections_total", "Decisions of the kernel side about connections of tracked processes.", "decision")
	descEventsLost   = desc("kernel_events_lost_total", "Reports of processes that the agent was too slow for.")
)

func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

func (c collector) Collect(ch chan<- prometheus.Metric) {
	s := c.a.Status()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	gauge(descInfo, 1, s.Version)
	type key struct{ kind, reach string }
	reach := make(map[key]int)
	for _, r := range s.Runtimes {
		reach[key{r.Kind, r.Reach}]++
	}
	for k, n := range reach {
		gauge(descRuntimes, float64(n), k.kind, k.reach)
	}
	gauge(descDoors, float64(len(s.Doors)))
	count(descConnections, float64(s.Connections.Intercepted), "intercepted")
	count(descConnections, float64(s.Connections.PassedOn), "passed")
	count(descConnections, float64(s.Connections.Failed), "failed")
	for _, r := range s.Registries {
		count(descRequests, float64(r.Requests), r.Registry)
		count(descLookups, float64(r.Hits), r.Registry, "hit")
		count(descLookups, float64(r.Misses), r.Registry, "miss")
		count(descErrors, float64(r.Errors), r.Registry)
		count(descStale, float64(r.Stale), r.Registry)
		count(descPushed, float64(r.Pushed), r.Registry)
		count(descBytes, float64(r.BytesFromStore), r.Registry, "store")
		count(descBytes, float64(r.BytesFromPeers), r.Registry, "peers")
		count(descBytes, float64(r.BytesFromUpstream), r.Registry, "upstream")
	}
	if s.Peers != nil {
		gauge(descPeers, float64(len(s.Peers.Peers)))
		count(descPeerSent, float64(s.Peers.Sent))
		count(descPeerRefused, float64(s.Peers.Refused))
		count(descStrangers, float64(s.Peers.Strangers))
	}
	gauge(descStoreBytes, float64(s.Store.Bytes))
	gauge(descStoreMax, float64(s.Store.MaxBytes))
	gauge(descStoreBlobs, float64(s.Store.Blobs))
	count(descStoreEvicted, float64(s.Store.Evicted))
	count(descStoreCorrupt, float64(s.Store.Corrupt))
	count(descStoreNotKept, float64(s.Store.NotKept))
	hangs := 0.0
	if !s.Store.Hangs.IsZero() {
		hangs = 1
	}
	gauge(descStoreHangs, hangs)
	collectKernel(s.Kernel, count)
}

func collectKernel(s bpf.Stats, count func(*prometheus.Desc, float64, ...string)) {
	for decision, n := range map[string]uint64{
		"redirected": s.Redirected, "no_door": s.NoDoor, "stale_heartbeat": s.StaleBeat, "unfit": s.Unfit, "early": s.Early, "no_origin": s.NoOrigin, "knocked": s.Knocked,
	} {
		count(descKernel, float64(n), decision)
	}
	count(descEventsLost, float64(s.EventsLost))
}
