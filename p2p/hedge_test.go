// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// The first of several: an answer that isn't enough waits for those that were asked
// before.
func TestFirstOf(t *testing.T) {
	gone := errors.New("gone")
	for _, tt := range []struct {
		name string
		// after is when each answers, what is what, empty for a failure.
		after []time.Duration
		what  []string
		by    string // who counts
		want  string
		err   error
		took  time.Duration
	}{
		{"the first", []time.Duration{1, 1}, []string{"it", "it"}, "a", "it", nil, 1},
		{"the second, beside a silent one", []time.Duration{500, 1}, []string{"it", "it"}, "b", "it", nil, 11},
		{"the second knows nothing, and the first does", []time.Duration{50, 1}, []string{"it", "nothing"}, "a", "it", nil, 50},
		{"neither knows anything", []time.Duration{50, 1}, []string{"nothing", "nothing"}, "a", "nothing", nil, 50},
		{"the second knows nothing, and the first fails", []time.Duration{50, 1}, []string{"", "nothing"}, "b", "nothing", nil, 50},
		{"the second knows nothing, and the first is silent", []time.Duration{500, 1}, []string{"it", "nothing"}, "b", "nothing", nil, 100},
		{"the first fails at once", []time.Duration{1, 1}, []string{"", "it"}, "b", "it", nil, 2},
		{"both fail", []time.Duration{1, 1}, []string{"", ""}, "", "", gone, 2},
		{"both are silent", []time.Duration{500, 500}, []string{"it", "it"}, "", "", context.DeadlineExceeded, 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				begun := time.Now()
				by, got, err := firstOf(ctx, []string{"a", "b"}, 10*time.Millisecond, func(who string) (string, error) {
					i := int(who[0] - 'a')
					time.Sleep(tt.after[i] * time.Millisecond)
					if tt.what[i] == "" {
						return "", gone
					}
					return tt.what[i], nil
				}, func(what string) bool { return what == "it" }, nil)
				took := time.Since(begun)
				if by != tt.by || got != tt.want || !errors.Is(err, tt.err) || took != tt.took*time.Millisecond {
					t.Errorf("%q by %q after %v, %v", got, by, took, err)
				}
				time.Sleep(time.Second) // the others end
			})
		})
	}
}

// Peers that take their time have more of it, within bounds, for a while.
func TestAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a answers
		want := func(d time.Duration) {
			t.Helper()
			if got := a.enough(); got != d {
				t.Errorf("they have %v, want %v", got, d)
			}
		}
		want(silentTime)
		a.took(10 * time.Millisecond)
		want(silentTime)
		a.took(800 * time.Millisecond)
		want(2400 * time.Millisecond)
		a.took(10 * time.Millisecond)
		want(2100 * time.Millisecond)
		a.took(time.Minute)
		want(maxAnswers * silentTime)
		time.Sleep(answersTTL + 1)
		want(silentTime)
	})
}
