// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// durations are how long clients waited, in seconds, by the source of what they got.
type durations struct {
	pull, resolve, firstByte *prometheus.HistogramVec
}

// newDurations makes histograms that r, which may be nil, collects.
func newDurations(r prometheus.Registerer) durations {
	histogram := func(name, help string, buckets ...float64) *prometheus.HistogramVec {
		return promauto.With(r).NewHistogramVec(prometheus.HistogramOpts{Namespace: "weir", Name: name, Help: help, Buckets: buckets}, []string{"source"})
	}
	return durations{
		pull: histogram("pull_duration_seconds", "Pulls of an image with at least one blob, from the first request to the end of the last answer, by the farthest source: upstream, else peer, else store.",
			.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
		resolve: histogram("resolve_duration_seconds", "Requests for a tag, to the end of the answer, by the source of the answer's content.",
			.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30),
		firstByte: histogram("blob_first_byte_seconds", "Requests for a blob, to the first byte of content that the client is sent, by its source.",
			.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30),
	}
}

// ended records a pull that is over.
func (d durations) ended(p *Pull) {
	if p.Blobs == 0 {
		return
	}
	source := SourceStore
	switch {
	case p.BytesFromUpstream > 0:
		source = SourceUpstream
	case p.BytesFromPeers > 0:
		source = SourcePeer
	}
	observe(d.pull, source, p.Ended.Sub(p.Started))
}

func observe(h *prometheus.HistogramVec, s Source, d time.Duration) {
	h.WithLabelValues(s.String()).Observe(d.Seconds())
}
