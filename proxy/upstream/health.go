// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

// Health is the one memory of which hosts answer, and how fast. Its methods may be
// called concurrently. Hosts have the names that the caller gives them.
type Health struct {
	mu  sync.Mutex
	lru *lru.Cache[string, health]
}

type health struct {
	answered, failed, tried time.Time // the last times
	last, slowest           time.Duration
}

const (
	// failingTTL is how long a host that has failed isn't waited for.
	failingTTL = 30 * time.Second
	// tryTime is how long others don't try a silent host that is being tried.
	tryTime = 500 * time.Millisecond
	// freshTTL is how long a host that has answered is known to answer, for those that
	// come at the same time.
	freshTTL = 100 * time.Millisecond
	// slack is how many times as long as its slowest answers a host may take.
	slack = 3
)

// NewHealth returns a memory without anything in it.
func NewHealth() *Health {
	h := &Health{}
	h.lru, _ = lru.New[string, health](maxPools)
	return h
}

func (h *Health) with(host string, f func(*health)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	x, _ := h.lru.Get(host)
	f(&x)
	h.lru.Add(host, x)
}

// Answered records that a host has answered, and how long that took. One answer that
// took long says nothing: it may have come because an outage has ended.
func (h *Health) Answered(host string, took time.Duration) {
	h.with(host, func(x *health) {
		x.answered, x.failed = time.Now(), time.Time{}
		x.slowest, x.last = max(min(took, x.last), x.slowest/2), took
	})
}

// Back records that a host has answered what it was asked while it failed: how long
// that took says nothing.
func (h *Health) Back(host string) {
	h.with(host, func(x *health) { x.answered, x.failed = time.Now(), time.Time{} })
}

// Failed records that a host has failed to answer.
func (h *Health) Failed(host string) {
	h.with(host, func(x *health) { x.failed, x.tried = time.Now(), time.Time{} })
}

// Silent records that a host has not answered in time, and is still being tried.
func (h *Health) Silent(host string) {
	h.with(host, func(x *health) { x.failed, x.tried = time.Now(), time.Now() })
}

// Fresh says whether a host has answered just now.
func (h *Health) Fresh(host string) (is bool) {
	h.with(host, func(x *health) { is = x.failed.IsZero() && time.Since(x.answered) < freshTTL })
	return is
}

// Failing says whether a host has failed lately, and not answered since.
func (h *Health) Failing(host string) (is bool) {
	h.with(host, func(x *health) { is = time.Since(x.failed) < failingTTL })
	return is
}

// Try says whether a host that fails may be tried now: no other caller does, or one
// has for long already.
func (h *Health) Try(host string) (may bool) {
	h.with(host, func(x *health) {
		if may = time.Since(x.tried) >= tryTime; may {
			x.tried = time.Now()
		}
	})
	return may
}

// Timeout is how long a host is waited for where there is another answer: at least
// as long as given, and longer if it is known to take its time, up to ten times
// that.
func (h *Health) Timeout(host string, least time.Duration) (d time.Duration) {
	h.with(host, func(x *health) { d = min(max(least, slack*x.slowest), 10*least) })
	return d
}
