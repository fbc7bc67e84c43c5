// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"slices"
	"sync"
	"time"
)

// nextTime is after how long of silence the next peer is asked beside one, and half
// of it beside two.
const nextTime = 400 * time.Millisecond

// answers is how long peers take to answer. When many nodes want much at the same
// time, all take longer, which is no silence.
type answers struct {
	mu      sync.Mutex
	slowest time.Duration // of the last ones
	when    time.Time
}

const (
	// silentTime is how long peers may say nothing, all together, before what they are
	// asked for is had elsewhere, where they don't take their time.
	silentTime = time.Second
	// answersTTL is how long an answer says how long others take.
	answersTTL = 30 * time.Second
	// answersSlack is how many times as long as the slowest answer another may take,
	// and maxAnswers how many times as long as silentTime at most.
	answersSlack, maxAnswers = 3, 3
)

// took records an answer.
func (a *answers) took(long time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.slowest, a.when = max(long, a.slowest*7/8), time.Now()
}

// enough is how long peers are waited for.
func (a *answers) enough() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.when) > answersTTL {
		return silentTime
	}
	return min(max(silentTime, answersSlack*a.slowest), maxAnswers*silentTime)
}

// firstOf asks one after another, and returns the first answer and whose it is. The
// next one is asked when one has failed, and beside those that are silent for next,
// then for half of that. Those that are asked have a bound in time of their own: what
// comes after the first answer is given to late, which may be nil.
//
// An answer that isn't enough, which may be nil for any, counts when those asked
// before have failed, or when ctx is done, and no others are asked meanwhile. The
// error is the last one, or ctx's.
func firstOf[P, A any](ctx context.Context, all []P, next time.Duration, ask func(P) (A, error), enough func(A) bool, late func(A, error)) (by P, a A, err error) {
	type answer struct {
		at  int
		a   A
		err error
	}
	answers := make(chan answer, len(all))
	timer := time.NewTimer(0)
	defer timer.Stop()
	asked, answered := 0, 0
	defer func() {
		rest := asked - answered
		if late == nil || rest == 0 {
			return
		}
		go func() {
			for range rest {
				r := <-answers
				late(r.a, r.err)
			}
		}()
	}()
	pending := make([]bool, len(all))
	best := answer{at: len(all)} // of those that aren't enough, the one asked first
	err = ErrNoPeer
	for answered < len(all) {
		if best.at < len(all) && !slices.Contains(pending[:best.at], true) {
			return all[best.at], best.a, nil
		}
		select {
		case <-timer.C:
			if asked == len(all) || best.at < len(all) {
				continue
			}
			at, who := asked, all[asked]
			asked++
			pending[at] = true
			go func() {
				a, err := ask(who)
				answers <- answer{at, a, err}
			}()
			timer.Reset(next)
			next = max(next/2, nextTime/2)
		case r := <-answers:
			answered++
			pending[r.at] = false
			switch {
			case r.err != nil:
				err = r.err
				timer.Reset(0)
			case enough == nil || enough(r.a):
				return all[r.at], r.a, nil
			case r.at < best.at:
				best = r
			}
		case <-ctx.Done():
			if best.at < len(all) {
				return all[best.at], best.a, nil
			}
			return by, a, ctx.Err()
		}
	}
	if best.at < len(all) {
		return all[best.at], best.a, nil
	}
	return by, a, err
}
