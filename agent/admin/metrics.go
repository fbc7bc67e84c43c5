// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"github.com/prometheus/client_golang/prometheus"
	"weir/bpf"
	"weir/proxy/registry"
)

// collector turns the status into metrics, so that there is one count of
// everything.
type collector struct{ server *Server }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("weir_"+name, help, labels, nil)
}

var (
	descInfo                = desc("build_info", "A constant 1 with weir's version.", "version")
	descRuntimes            = desc("runtimes", "Running container runtimes by how they are treated.", "kind", "reach")
	descListeners           = desc("redirect_listeners", "Network namespaces with a redirect listener.")
	descConnections         = desc("connections_total", "Redirected connections by how they were served.", "action")
	descUnverified          = desc("unverified_connections_total", "Connections to known registries passed through because the registry could not be verified.")
	descRequests            = desc("registry_requests_total", "Requests to intercepted registries.", "registry")
	descLookups             = desc("registry_lookups_total", "Requests for blobs and manifests by digest or known tag, by whether the store had them.", "registry", "result")
	descErrors              = desc("registry_upstream_errors_total", "Requests that the upstream didn't answer (no_answer), or answered with 429 (rate_limited) or 5xx (server_error).", "registry", "kind")
	descStale               = desc("registry_stale_answers_total", "Stale answers sent while the upstream failed (stale-if-error).", "registry")
	descPushed              = desc("registry_pushed_total", "Pushed blobs and manifests that were stored.", "registry")
	descBytes               = desc("registry_bytes_total", "Bytes sent to clients, by where they came from.", "registry", "source")
	descPeers               = desc("peers", "Peers that this node is connected to.")
	descPeerSent            = desc("peer_sent_bytes_total", "Bytes of blobs sent to peers.")
	descPeerRefused         = desc("peer_refused_requests_total", "Requests of peers for blobs that were refused because too many were being served.")
	descPeerUnauthenticated = desc("peer_unauthenticated_connections_total", "Connections to the peers' port without the swarm key.")
	descStoreBytes          = desc("store_bytes", "Bytes of stored blobs and of running transfers.")
	descStoreDuplicate      = desc("store_duplicate_bytes", "Bytes of stored blobs that the node's containerd has as well. They are the first to make room.")
	descStorePartial        = desc("store_partial_bytes", "Bytes of blobs of which only a part has come, among weir_store_bytes.")
	descStoreMax            = desc("store_max_bytes", "The bound of weir_store_bytes.")
	descStoreBlobs          = desc("store_blobs", "Stored blobs.")
	descStoreEvicted        = desc("store_evicted_total", "Blobs evicted to make room for others.")
	descStoreCorrupt        = desc("store_corrupt_total", "Blobs found damaged and removed.")
	descStoreNotKept        = desc("store_not_kept_total", "Blobs not stored for want of room.")
	descStoreHangs          = desc("store_disk_hangs", "1 while the store's disk does not answer, and nothing is stored; otherwise 0.")
	descKernel              = desc("kernel_connections_total", "Decisions of the kernel side about connections of tracked processes.", "decision")
	descEventsLost          = desc("kernel_events_lost_total", "Events of processes that were lost because the agent didn't read them in time.")
)

func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

func (c collector) Collect(ch chan<- prometheus.Metric) {
	s := c.server.Status()
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
	gauge(descListeners, float64(len(s.Listeners)))
	count(descConnections, float64(s.Connections.Intercepted), "intercepted")
	count(descConnections, float64(s.Connections.PassedThrough), "passed_through")
	count(descConnections, float64(s.Connections.Failed), "failed")
	count(descUnverified, float64(s.Connections.Unverified))
	for _, r := range s.Registries {
		count(descRequests, float64(r.Requests), r.Registry)
		count(descLookups, float64(r.Hits), r.Registry, "hit")
		count(descLookups, float64(r.Misses), r.Registry, "miss")
		count(descErrors, float64(r.Errors), r.Registry, "no_answer")
		count(descErrors, float64(r.RateLimited), r.Registry, "rate_limited")
		count(descErrors, float64(r.ServerErrors), r.Registry, "server_error")
		count(descStale, float64(r.Stale), r.Registry)
		count(descPushed, float64(r.Pushed), r.Registry)
		count(descBytes, float64(r.BytesFromStore), r.Registry, registry.SourceStore.String())
		count(descBytes, float64(r.BytesFromPeers), r.Registry, registry.SourcePeer.String())
		count(descBytes, float64(r.BytesFromUpstream), r.Registry, registry.SourceUpstream.String())
	}
	if s.Peers != nil {
		gauge(descPeers, float64(len(s.Peers.Peers)))
		count(descPeerSent, float64(s.Peers.Sent))
		count(descPeerRefused, float64(s.Peers.Refused))
		count(descPeerUnauthenticated, float64(s.Peers.Unauthenticated))
	}
	gauge(descStoreBytes, float64(s.Store.Bytes))
	gauge(descStoreDuplicate, float64(s.Store.Duplicate))
	gauge(descStorePartial, float64(s.Store.Partial))
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
		"redirected": s.Redirected, "no_listener": s.NoListener, "stale_heartbeat": s.StaleHeartbeat, "unfit": s.Unfit, "early": s.Early, "no_origin": s.NoOrigin, "refused": s.Refused,
	} {
		count(descKernel, float64(n), decision)
	}
	count(descEventsLost, float64(s.EventsLost))
}
