// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// DefaultUpstreamConnections is how many connections a large blob has at most.
	DefaultUpstreamConnections = 8
	// partSize is of how many bytes a part is that one request asks for. Parts are
	// in memory until those before them were read.
	partSize = 4 << 20
	// maxParts bounds the parts that are in memory, or on their way there, of all
	// blobs together, and with it the connections to a registry.
	maxParts = 16
	// aloneTime is for how long a registry that has refused a range, or has given
	// another than was asked for, is asked for blobs over one connection, and
	// enoughTime for how long one of which more connections got no more.
	aloneTime  = 10 * time.Minute
	enoughTime = time.Minute
	// paceTime is over what time it is measured how fast a registry is. After a
	// connection was added it takes as long until that counts.
	paceTime = 200 * time.Millisecond
	// growth is how many times as fast twice the connections have to be.
	growth    = 1.3
	stallTime = 5 * time.Second
	// slowPart is how many times slower than the blob's first connection, when that was
	// alone, another one stands still. Eight have each a quarter of it, where each
	// doubling has brought no more than growth.
	slowPart = 16
)

// widths are the registries, of which more than one connection may bring a large
// blob sooner.
type widths struct {
	most  int                                 // connections for a blob
	from  int64                               // of how many bytes it is, at least
	part  int64                               // bytes of a part
	parts chan struct{}                       // that there may be more
	pace  func(context.Context, *width) int64 // bytes per paceTime, 0 when ctx is done
	grown func(before, after int64) bool
	stall time.Duration // how long a part may stand still, before it is asked for again
	free  sync.Pool     // *[]byte, of parts that were read

	mu sync.Mutex
	of map[string]*width
}

// width is what is known of one registry.
type width struct {
	received atomic.Int64 // bytes of large blobs
	growing  sync.Mutex   // by one blob at a time, or each would take the other's for its own
	// Until then blobs have one connection (in Unix nanoseconds): since it has refused
	// a part, or since more connections have brought no more.
	refused, enough atomic.Int64
}

func newWidths(most int) *widths {
	return &widths{
		most: most, from: largeBlob, part: partSize, parts: make(chan struct{}, maxParts), of: make(map[string]*width), stall: stallTime,
		pace: func(ctx context.Context, w *width) int64 {
			before := w.received.Load()
			select {
			case <-time.After(paceTime):
				return w.received.Load() - before
			case <-ctx.Done():
				return 0
			}
		},
		grown: func(before, after int64) bool { return float64(after) >= growth*float64(before) },
	}
}

// maxWidths bounds the registries that are remembered.
const maxWidths = 256

func (ws *widths) registry(name string) *width {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.of[name]
	if w == nil {
		if len(ws.of) >= maxWidths {
			clear(ws.of) // those that are in use go on
		}
		w = &width{}
		ws.of[name] = w
	}
	return w
}

// alone says whether a blob has one connection, and refuses that more are asked for.
func (w *width) alone() bool { return w.refuses() || time.Now().UnixNano() < w.enough.Load() }

func (w *width) refuses() bool { return time.Now().UnixNano() < w.refused.Load() }

func (w *width) rest() { w.enough.Store(time.Now().Add(enoughTime).UnixNano()) }

func (w *width) refuse() { w.refused.Store(time.Now().Add(aloneTime).UnixNano()) }

func (ws *widths) take() (taken bool) {
	select {
	case ws.parts <- struct{}{}:
		return true
	default:
		return false
	}
}
func (ws *widths) give() { <-ws.parts }
