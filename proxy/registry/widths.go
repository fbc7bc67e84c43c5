// SPDX-License-Identifier: Apache-2.0

package registry

import (
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
	// another than was asked for, is asked for blobs over one connection.
	aloneTime = 10 * time.Minute
	// paceTime is for how long it is measured how fast a registry is, and maxPaceTime the
	// same where less than a part comes meanwhile. After connections were added as much time
	// passes before what they bring is measured.
	paceTime    = 100 * time.Millisecond
	maxPaceTime = 3 * paceTime
	// growth is the share that added connections have to bring of what they would bring if each
	// brought as much as those before, or they are given up. To bring less than leastGrowth more
	// than before may be chance.
	growth      = 0.3
	leastGrowth = 0.1
	// stallTime is how long a part may stand still before it is asked for again.
	stallTime = 5 * time.Second
	// learnedTime is for how long blobs have as many connections as those before them have
	// grown to, be it one. Most layers have come before it is measured what more would bring.
	learnedTime = time.Minute
	// slowPart is how many times slower than the blob's first connection, when that was
	// alone, another one stands still. Eight have each a quarter of it, where each
	// doubling has brought no more than growth.
	slowPart = 16
)

// widths are over how many connections the large blobs of each registry are fetched.
type widths struct {
	most  int                 // connections for a blob, at most
	from  int64               // bytes of a large blob, at least
	part  int64               // bytes of a part
	parts chan struct{}       // has one for each part in memory, of all blobs
	pace  func(*width) sample // measures a registry
	stall time.Duration       // stallTime, but in tests
	free  sync.Pool           // *[]byte, of parts that were read

	mu sync.Mutex
	of map[string]*width
}

// width is over how many connections each large blob of one registry is fetched. That is
// found out by doubling: where twice as many for all blobs that are on their way bring more, these
// keep them, and those that begin soon afterwards have as many from their beginning.
type width struct {
	received atomic.Int64 // bytes of large blobs
	refused  atomic.Int64 // a part; until then blobs have one connection (in Unix nanoseconds)
	several  atomic.Int64 // ranges in one request were refused; until then weir asks for one

	mu      sync.Mutex
	blobs   map[*parallel]struct{} // that are on their way
	each    int                    // connections for each
	least   int64                  // bytes that each connection has to bring in widths.stall
	settled bool                   // more connections would bring no more
	until   time.Time              // when each and settled hold no more
	growing bool                   // grow is running
}

// sample is how much a registry gives.
type sample struct {
	rate  float64 // bytes per second
	conns float64 // over how many connections
}

// grown says whether added connections bring what they have to, see growth.
func (after sample) grown(before sample) bool {
	return after.rate >= before.rate*(1+max(leastGrowth, growth*(after.conns/before.conns-1)))
}

// alike says whether there are hardly more connections than before, so that the rates say
// nothing of them.
func (after sample) alike(before sample) bool { return after.conns < (1+leastGrowth)*before.conns }

func newWidths(most int) *widths {
	return &widths{
		most: most, from: largeBlob, part: partSize, parts: make(chan struct{}, maxParts), of: make(map[string]*width), stall: stallTime, pace: measure,
	}
}

// measure measures how much a registry gives.
func measure(w *width) sample {
	start, before, conns := time.Now(), w.received.Load(), w.conns()
	for {
		time.Sleep(paceTime)
		took, came := time.Since(start), w.received.Load()-before
		if came >= partSize || took >= maxPaceTime {
			return sample{float64(came) / took.Seconds(), float64(conns+w.conns()) / 2}
		}
	}
}

// conns is how many connections there are to the registry for large blobs.
func (w *width) conns() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for p := range w.blobs {
		p.mu.Lock()
		n += p.conns()
		p.mu.Unlock()
	}
	return n
}

// join has a blob have as many connections as others have, and finds out whether more
// would bring more.
func (ws *widths) join(w *width, p *parallel) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if time.Now().After(w.until) || w.refuses() {
		w.each, w.least, w.settled = 1, 1, false
	}
	w.blobs[p] = struct{}{}
	p.use(w.each, w.least)
	if !w.growing && !w.settled {
		w.growing = true
		go ws.grow(w)
	}
}

// wide says whether blobs have more than one connection from their beginning. Then the
// first one is best asked for the first part alone: had it been asked for all of the blob, what is on its way when it
// comes to the next part would be sent for nothing.
func (ws *widths) wide(registry string) bool {
	w := ws.registry(registry)
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.each > 1 && time.Now().Before(w.until) && !w.refuses()
}

func (w *width) leave(p *parallel) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.blobs, p)
}

// use has all blobs have n connections each.
func (w *width) use(n int, settled bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.each, w.settled, w.until = n, settled, time.Now().Add(learnedTime)
	for p := range w.blobs {
		p.use(n, w.least)
	}
}

// try doubles the connections of blobs that have one each by giving all that are added to the longest of them, which has
// most at most. It returns false, and has done nothing, if there is but one. A first connection that comes to rest has sent
// for nothing what is on its way: if more connections bring no more, that is so at one blob only.
func (w *width) try(most int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	var longest *parallel
	for p := range w.blobs {
		if longest == nil || p.left() > longest.left() {
			longest = p
		}
	}
	if longest == nil || len(w.blobs) == 1 {
		return false
	}
	longest.use(min(1+len(w.blobs), most), w.least)
	return true
}

// more says whether there is a blob for which more connections could be of use.
func (w *width) more() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for p := range w.blobs {
		if !p.ending() {
			return !w.refuses()
		}
	}
	return false
}

// grow adds connections for as long as that makes the registry faster, and there are
// blobs.
func (ws *widths) grow(w *width) {
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.growing = false
	}()
	w.mu.Lock()
	n := w.each
	w.mu.Unlock()
	for n < ws.most {
		before := ws.pace(w)
		switch {
		case !w.more():
			return
		case before.rate == 0 || before.conns == 0:
			continue
		case n == 1:
			w.expect(before, ws)
		}
		twice := min(2*n, ws.most)
		if n > 1 || !w.try(ws.most) {
			w.use(twice, false)
		}
		ws.pace(w) // until they are under way
		after := ws.pace(w)
		switch {
		case w.refuses():
			return
		case after.alike(before): // blobs have come to their ends
			w.use(n, false)
		case after.grown(before):
			n = twice
			w.use(n, n == ws.most)
		default:
			w.use(n, true)
			return
		}
	}
}

// expect records how much a connection has to bring, by what one alone has brought.
func (w *width) expect(s sample, ws *widths) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.least = int64(max(1, min(s.rate/s.conns*ws.stall.Seconds()/slowPart, float64(ws.part))))
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
		w = &width{blobs: make(map[*parallel]struct{})}
		ws.of[name] = w
	}
	return w
}

// alone says whether a blob is fetched over one connection, and it isn't tried whether more bring more.
func (w *width) alone() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refuses() || w.settled && w.each == 1 && time.Now().Before(w.until)
}

func (w *width) refuses() bool { return time.Now().UnixNano() < w.refused.Load() }

func (w *width) refuse() { w.refused.Store(time.Now().Add(aloneTime).UnixNano()) }

// refusesSeveral says whether it doesn't give several ranges of a blob to one request.
func (w *width) refusesSeveral() bool { return time.Now().UnixNano() < w.several.Load() }

func (w *width) refuseSeveral() { w.several.Store(time.Now().Add(aloneTime).UnixNano()) }

// take takes memory for a part, if there is some, and give gives it back.
func (ws *widths) take() (taken bool) {
	select {
	case ws.parts <- struct{}{}:
		return true
	default:
		return false
	}
}

func (ws *widths) give() { <-ws.parts }
