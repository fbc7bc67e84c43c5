// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"testing"
	"time"
)

// A host that has failed is tried by one at a time, until it answers. One that
// takes its time has more of it.
func TestHealth(t *testing.T) {
	h := NewHealth()
	if h.Failing("a") || h.Fresh("a") {
		t.Error("a host that nothing is known of")
	}
	h.Failed("a")
	if !h.Failing("a") || !h.Try("a") || h.Try("a") {
		t.Error("it is to be tried by one at a time")
	}
	h.Failed("a")
	if !h.Failing("a") || !h.Try("a") {
		t.Error("it isn't tried after that")
	}
	h.Silent("a")
	if !h.Failing("a") || h.Try("a") {
		t.Error("it is tried beside one that waits")
	}
	if h.Failing("b") {
		t.Error("another has failed")
	}
	h.Answered("a", 2*time.Second)
	if h.Failing("a") || !h.Fresh("a") {
		t.Error("it has answered, and fails")
	}
	if got := h.Timeout("a", time.Second); got != time.Second {
		t.Errorf("after one slow answer it has %v", got)
	}
	h.Failed("a")
	if h.Back("a"); h.Failing("a") || h.Timeout("a", time.Second) != time.Second {
		t.Errorf("it is back, and has %v", h.Timeout("a", time.Second))
	}
	h.Answered("a", 3*time.Second)
	for _, want := range []time.Duration{6, 3, 1, 1} {
		if got := h.Timeout("a", time.Second).Truncate(time.Second); got != want*time.Second {
			t.Errorf("it has %v, want %v s", got, want)
		}
		h.Answered("a", time.Millisecond)
	}
	h.Answered("a", time.Hour)
	h.Answered("a", time.Hour)
	if got := h.Timeout("a", time.Second); got != 10*time.Second {
		t.Errorf("it has %v", got)
	}
	h.with("a", func(x *health) { x.failed = time.Now().Add(-failingTTL) })
	if h.Failing("a") {
		t.Error("a failure of long ago")
	}
}
