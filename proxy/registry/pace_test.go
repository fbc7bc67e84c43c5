// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"weir/proxy/store"
)

// A client whose own way is slow, or who makes it so, doesn't hold up those who
// want the same blob.
func TestLaggingIsLeft(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Bearer slow", "Bearer fast")
	want := bytesOf(8, 300_000)
	d := u.put("a", want)
	begun, done := u.holdsBack("Bearer slow", want)
	s := newSide(t, u, store.Options{})
	s.h.lagTime = 10 * time.Millisecond
	path := "/v2/a/blobs/" + d.String()
	led := make(chan answer)
	go func() { led <- s.do("GET", path, "Bearer slow") }()
	<-begun
	for _, rng := range []string{"", "bytes=100000-"} {
		a := s.do("GET", path, "Bearer fast", "Range", rng)
		if a.err != nil || !bytes.Equal(a.body, want[300_000-len(a.body):]) || len(a.body) < 200_000 || !strings.Contains(a.Header.Get("Cache-Status"), "following") {
			t.Errorf("range %q: %d bytes, %v", rng, len(a.body), a.err)
		}
	}
	several := []store.Span{{From: 100, To: 200}, {From: 250_000, To: 300_000}} // of which one has not come
	if got, err := s.do("GET", path, "Bearer fast", "Range", formatRanges(several)).pieces(); err != nil || len(got) != 2 || !bytes.Equal(got[0], want[100:200]) || !bytes.Equal(got[1], want[250_000:]) {
		t.Errorf("several ranges: %d, %v", len(got), err)
	}
	close(done)
	if a := <-led; a.err != nil || !bytes.Equal(a.body, want) {
		t.Errorf("the slow one got %d bytes, %v", len(a.body), a.err)
	}
	s.want(s.do("GET", path, "Bearer fast"), 200, want, "GET "+path, "GET "+path, "GET "+path, "GET "+path, "GET "+path)
}

// A transfer lags when the registry gives more, and the node gets less.
func TestLags(t *testing.T) {
	const mib = 1 << 20
	many := func(n int, each int64) []int64 { return slices.Repeat([]int64{each}, n) }
	for _, c := range []struct {
		got  int64
		each []int64
		pace int64
		lags bool
	}{
		{0, many(1, 0), 0, true}, {100 << 10, many(1, 100<<10), 0, true}, {mib, many(1, mib), 0, false}, // it isn't known what it gives
		{10 * mib, many(1, 10*mib), 10 * mib, true}, {13 * mib, many(1, 13*mib), 10 * mib, false},
		{mib, many(30, mib), 10 * mib, false},                             // one of many
		{0, many(30, mib), 10 * mib, true},                                // that gets nothing, unlike the others
		{mib, append(many(1, 60*mib), many(99, 1000)...), 10 * mib, true}, // one is fast, and many stand still on purpose
		{mib, many(20, mib), 10 * mib, true},                              // less than it gives to one, in all
	} {
		if got := lags(c.got, c.each, c.pace, 5*time.Second); got != c.lags {
			t.Errorf("%d of %v: %v", c.got, c.each, got)
		}
	}
}

// A client can't lower a registry's pace by slow transfers.
func TestPace(t *testing.T) {
	var as arrivals
	var count atomic.Int64
	transfer := func(n int, took time.Duration) {
		body := as.measure(io.NopCloser(bytes.NewReader(make([]byte, n))), &count)
		_, _ = io.Copy(io.Discard, body)
		body.(*arrival).since = time.Now().Add(-took)
		body.Close()
		body.Close()
	}
	transfer(10<<20, 100*time.Millisecond)
	fast := as.pace()
	for range 20 {
		transfer(1<<20, time.Minute)
	}
	if got := as.pace(); got < fast*9/10 || fast < 50<<20 {
		t.Errorf("%d, and %d before", got, fast)
	}
	as.when = as.when.Add(-4 * paceHalfLife)
	if got := as.pace(); got > fast/15 {
		t.Errorf("%d long after", got)
	}
	if len(as.sample()) > 0 || count.Load() != 30<<20 {
		t.Errorf("%d run, %d bytes", len(as.sample()), count.Load())
	}
}
