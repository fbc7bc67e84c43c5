// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
)

// Stats are a registry's figures since the start.
type Stats struct {
	Registry          string `json:"registry"`
	Requests          int64  `json:"requests"`
	Hits              int64  `json:"hits"`          // blobs and manifests that were kept, or arriving
	Misses            int64  `json:"misses"`        // blobs and manifests that a peer or the upstream had to give
	Errors            int64  `json:"errors"`        // requests without an answer of the upstream
	RateLimited       int64  `json:"rate_limited"`  // answers 429 of the upstream
	ServerErrors      int64  `json:"server_errors"` // answers 5xx of the upstream
	Stale             int64  `json:"stale"`         // answers from before the upstream failed
	Pushed            int64  `json:"pushed"`        // blobs and manifests kept from pushes
	BytesFromStore    int64  `json:"bytes_from_store"`
	BytesFromPeers    int64  `json:"bytes_from_peers"`
	BytesFromUpstream int64  `json:"bytes_from_upstream"`
}

// counts are all of the figures.
func (s *Stats) counts() []*int64 {
	return []*int64{&s.Requests, &s.Hits, &s.Misses, &s.Errors, &s.RateLimited, &s.ServerErrors, &s.Stale, &s.Pushed,
		&s.BytesFromStore, &s.BytesFromPeers, &s.BytesFromUpstream}
}

// Add adds another registry's figures, or another node's of this one.
func (s *Stats) Add(o Stats) {
	for i, n := range o.counts() {
		*s.counts()[i] += *n
	}
}

type counters struct {
	requests, hits, misses, errors, rateLimited, serverErrors, stale, pushed, fromStore, fromPeers, fromUpstream atomic.Int64
	arrivals                                                                                                     arrivals
}

// countedAnswers counts an upstream's answers to requests of weir and of its clients.
type countedAnswers struct {
	http.RoundTripper
	stats *counters
}

// RoundTrip implements http.RoundTripper.
func (c countedAnswers) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := c.RoundTripper.RoundTrip(req)
	switch {
	case err != nil:
	case resp.StatusCode == http.StatusTooManyRequests:
		c.stats.rateLimited.Add(1)
	case resp.StatusCode >= 500:
		c.stats.serverErrors.Add(1)
	}
	return resp, err
}

// maxStats bounds the registries that are counted each for itself: clients can
// make up as many names as they like.
const maxStats = 500

// Other stands for the registries above such a bound.
const Other = "other"

type statsTable struct {
	m sync.Map // registry → *counters
	n atomic.Int64
}

func (t *statsTable) of(registry string) *counters {
	if c, ok := t.m.Load(registry); ok {
		return c.(*counters)
	}
	if t.n.Add(1) > maxStats {
		t.n.Add(-1)
		registry = Other
	}
	c, _ := t.m.LoadOrStore(registry, &counters{})
	return c.(*counters)
}

// Stats returns the figures of each registry that was asked for something.
func (h *Handler) Stats() []Stats {
	var all []Stats
	h.stats.m.Range(func(k, v any) bool {
		c := v.(*counters)
		all = append(all, Stats{k.(string), c.requests.Load(), c.hits.Load(), c.misses.Load(), c.errors.Load(), c.rateLimited.Load(), c.serverErrors.Load(), c.stale.Load(), c.pushed.Load(), c.fromStore.Load(), c.fromPeers.Load(), c.fromUpstream.Load()})
		return true
	})
	slices.SortFunc(all, func(a, b Stats) int { return cmp.Compare(a.Registry, b.Registry) })
	return all
}
