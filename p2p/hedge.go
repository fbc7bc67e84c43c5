// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"time"
)

// nextTime is after how long of silence the next peer is asked beside one, and half
// of it beside two.
const nextTime = 400 * time.Millisecond

// firstOf asks one after another, and returns the first answer and whose it is. The
// next one is asked when one has failed, and beside those that are silent for next,
// then for half of that. Those that are asked have a bound in time of their own: what
// comes after the first answer is given to late, which may be nil, so that it is
// known of each whether it answers. The error is the last one, or ctx's.
func firstOf[P, A any](ctx context.Context, all []P, next time.Duration, ask func(P) (A, error), late func(A, error)) (by P, a A, err error) {
	type answer struct {
		by  P
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
	err = ErrNoPeer
	for answered < len(all) {
		select {
		case <-timer.C:
			if asked == len(all) {
				continue
			}
			p := all[asked]
			asked++
			go func() {
				a, err := ask(p)
				answers <- answer{p, a, err}
			}()
			timer.Reset(next)
			next = max(next/2, nextTime/2)
		case r := <-answers:
			answered++
			if r.err == nil {
				return r.by, r.a, nil
			}
			err = r.err
			timer.Reset(0)
		case <-ctx.Done():
			return by, a, ctx.Err()
		}
	}
	return by, a, err
}
