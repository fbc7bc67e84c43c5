// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"io"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// arrivals are the transfers that come from one registry, and how fast it was
// lately. Only what a transfer reads is measured, which only the network and
// the registry hold up: an answer that passes through comes as fast as its
// client reads.
type arrivals struct {
	mu      sync.Mutex
	running map[*arrival]struct{}
	best    float64 // bytes per second
	when    time.Time
}

// arrival is the body of a transfer.
type arrival struct {
	io.ReadCloser
	of    *arrivals
	count *atomic.Int64
	since time.Time
	n     atomic.Int64 // it may be closed while it is being read
}

const (
	// measurable is how many bytes say something about the pace.
	measurable = 1 << 20
	// paceHalfLife is how long a pace takes to count for half. That, and not
	// what is measured, is what lowers it: a client can make its own transfers
	// slow, and not those of others fast.
	paceHalfLife = 10 * time.Minute
)

// measure measures a body that a transfer will read.
func (as *arrivals) measure(body io.ReadCloser, count *atomic.Int64) io.ReadCloser {
	a := &arrival{ReadCloser: body, of: as, count: count, since: time.Now()}
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.running == nil {
		as.running = make(map[*arrival]struct{})
	}
	as.running[a] = struct{}{}
	return a
}

// Read implements io.Reader.
func (a *arrival) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	a.count.Add(int64(n))
	a.n.Add(int64(n))
	return n, err
}

// Close implements io.Closer.
func (a *arrival) Close() error {
	a.of.mu.Lock()
	if _, running := a.of.running[a]; running {
		delete(a.of.running, a)
		now := time.Now()
		if n := a.n.Load(); n >= measurable {
			if rate := float64(n) / now.Sub(a.since).Seconds(); rate > a.of.at(now) {
				a.of.best, a.of.when = rate, now
			}
		}
	}
	a.of.mu.Unlock()
	return a.ReadCloser.Close()
}

// at is the pace at a time. The caller holds as.mu.
func (as *arrivals) at(now time.Time) float64 {
	return as.best * math.Exp2(-now.Sub(as.when).Seconds()/paceHalfLife.Seconds())
}

// pace is what the registry gives to one transfer, in bytes per second, or 0 if
// that isn't known.
func (as *arrivals) pace() int64 {
	as.mu.Lock()
	defer as.mu.Unlock()
	return int64(as.at(time.Now()))
}

// sample returns how many bytes have come by each running transfer.
func (as *arrivals) sample() map[*arrival]int64 {
	as.mu.Lock()
	defer as.mu.Unlock()
	m := make(map[*arrival]int64, len(as.running))
	for a := range as.running {
		m[a] = a.n.Load()
	}
	return m
}

// progress is what came by each transfer between two samples.
func progress(before, now map[*arrival]int64) (came []int64) {
	for a, n := range now {
		came = append(came, n-before[a])
	}
	return came
}

// lags says whether a transfer of which so many bytes came in a time, while so
// many came by each of the registry's, is much slower than a registry that gives
// pace to each, or 0 if that isn't known. It isn't where the registry's transfers
// together get what it gives, and this one gets its share: that of the transfer
// by which the average byte came, so that transfers which stand still count for
// nothing.
func lags(got int64, each []int64, pace int64, in time.Duration) bool {
	if pace == 0 {
		pace = slowPace
	}
	given := float64(pace) * in.Seconds()
	if float64(got) >= given/4 {
		return false
	}
	var all, squares float64
	for _, n := range each {
		all += float64(n)
		squares += float64(n) * float64(n)
	}
	return all < given/2 || float64(got) < squares/all/4
}
