// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"sync"
	"time"

	"weir/proxy/registry"
)

const (
	historyStep  = 15 * time.Minute
	historySteps = 96
)

// traffic is what runtimes have got, by where it came from.
type traffic struct {
	BytesFromStore    int64 `json:"bytes_from_store"`
	BytesFromPeers    int64 `json:"bytes_from_peers"`
	BytesFromUpstream int64 `json:"bytes_from_upstream"`
}

func (t *traffic) add(o traffic) {
	t.BytesFromStore += o.BytesFromStore
	t.BytesFromPeers += o.BytesFromPeers
	t.BytesFromUpstream += o.BytesFromUpstream
}

func trafficOf(all []registry.Stats) (t traffic) {
	for _, r := range all {
		t.add(traffic{r.BytesFromStore, r.BytesFromPeers, r.BytesFromUpstream})
	}
	return t
}

// Step is what runtimes got in a quarter of an hour.
type Step struct {
	At time.Time `json:"at"` // its beginning
	traffic
}

// stepOf is the number of a time's step since the Unix epoch.
func stepOf(t time.Time) int64 { return t.Unix() / int64(historyStep/time.Second) }

func stepStart(n int64) time.Time { return time.Unix(n*int64(historyStep/time.Second), 0).UTC() }

// history is the traffic of the last day.
type history struct {
	mu    sync.Mutex
	steps [historySteps]traffic
	last  int64 // number of the latest step since the Unix epoch
	seen  traffic
}

// add records how much it has been by now.
func (h *history) add(now time.Time, total traffic) {
	h.mu.Lock()
	defer h.mu.Unlock()
	step := stepOf(now)
	for n := max(h.last+1, step-historySteps+1); n <= step; n++ {
		h.steps[n%historySteps] = traffic{}
	}
	h.last = max(h.last, step)
	h.steps[h.last%historySteps].add(total.minus(h.seen))
	h.seen = total
}
