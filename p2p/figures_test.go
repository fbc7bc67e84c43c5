// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"bytes"
	"testing"
	"time"
)

// Figures are asked of each peer that is connected. One that says nothing, or too
// much, keeps none from the others'.
func TestFigures(t *testing.T) {
	all := swarm(t, 4)
	size := MaxFigures
	all[1].says = func() []byte { return []byte(`{"a":1}`) }
	all[2].says = func() []byte { return bytes.Repeat([]byte{'x'}, size) }
	var got map[string][]byte
	until(t, "two say something", func() bool { got = all[0].Node.Figures(t.Context()); return len(got) == 2 })
	if string(got[all[1].ID()]) != `{"a":1}` || len(got[all[2].ID()]) != size {
		t.Errorf("%d say something", len(got))
	}
	size++
	until(t, "only one does without saying too much", func() bool { return len(all[0].Node.Figures(t.Context())) == 1 })
	// One that takes forever has its time.
	forever := make(chan struct{})
	defer close(forever)
	all[3].says = func() []byte { <-forever; return nil }
	start := time.Now()
	if got := all[0].Node.Figures(t.Context()); len(got) != 1 || time.Since(start) > figuresTime+waitTime/2 {
		t.Errorf("after %v, %d say something", time.Since(start), len(got))
	}
}
