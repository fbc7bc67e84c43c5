// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"slices"
	"testing"
	"time"
)

func TestHistory(t *testing.T) {
	var h history
	if steps := h.list(); steps != nil {
		t.Errorf("an empty history has %v", steps)
	}
	now := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	h.add(now, traffic{10, 0, 5})
	h.add(now.Add(time.Minute), traffic{30, 0, 5})
	h.add(now.Add(historyStep), traffic{30, 100, 5})
	want := []Step{{now, traffic{30, 0, 5}}, {now.Add(historyStep), traffic{0, 100, 0}}}
	if steps := h.list(); !slices.Equal(steps, want) {
		t.Errorf("%v, want %v", steps, want)
	}
	drawn, highest := bars(h.list(), now.Add(historyStep))
	if highest != 100 || len(drawn) != 3 || drawn[2].X != 10*(historySteps-1)+1 || drawn[0].X != drawn[2].X-10 {
		t.Errorf("%v, %d", drawn, highest)
	}
	// After a long pause nothing of before is left, and a clock that goes
	// backwards loses nothing.
	h.add(now.Add(30*time.Hour), traffic{31, 100, 5})
	h.add(now, traffic{33, 100, 5})
	if steps := h.list(); len(steps) != 1 || steps[0].All() != 3 {
		t.Errorf("%v, want one of 3 bytes", steps)
	}
}
