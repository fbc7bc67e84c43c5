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
	if is, due := h.Failing("a"); is || due || h.Fresh("a") {
		t.Error("a host that nothing is known of")
	}
	h.Failed("a")
	if is, due := h.Failing("a"); !is || !due {
		t.Errorf("it isn't tried: %v %v", is, due)
	}
	if is, due := h.Failing("a"); !is || due {
		t.Errorf("it is tried twice at once: %v %v", is, due)
	}
	h.Failed("a")
	if is, due := h.Failing("a"); !is || !due {
		t.Errorf("it isn't tried after that: %v %v", is, due)
	}
	h.Silent("a")
	if is, due := h.Failing("a"); !is || due {
		t.Errorf("it is tried beside one that waits: %v %v", is, due)
	}
	if is, _ := h.Failing("b"); is {
		t.Error("another has failed")
	}
	h.Answered("a", 2*time.Second)
	if is, _ := h.Failing("a"); is || !h.Fresh("a") {
		t.Error("it has answered, and fails")
	}
	for _, want := range []time.Duration{6, 3, 1, 1} {
		if got := h.Timeout("a", time.Second).Truncate(time.Second); got != want*time.Second {
			t.Errorf("it has %v, want %v s", got, want)
		}
		h.Answered("a", time.Millisecond)
	}
	h.Answered("a", time.Hour)
	if got := h.Timeout("a", time.Second); got != 10*time.Second {
		t.Errorf("it has %v", got)
	}
	h.with("a", func(x *health) { x.failed = time.Now().Add(-failingTTL) })
	if is, _ := h.Failing("a"); is {
		t.Error("a failure of long ago")
	}
}
