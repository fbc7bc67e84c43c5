// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"weir/proxy/upstream"
)

const (
	// askTimeout is how long an upstream has to answer when there is an answer
	// without it, if it isn't known to take longer. A runtime would wait longer by
	// itself, but it would not have an answer at the end.
	askTimeout = time.Second
	// askTimeoutAgain is the same for one that has just failed. It is only for
	// being the first to see that it is back.
	askTimeoutAgain = 50 * time.Millisecond
	// lateTime is how long an answer is waited for that has come too late for its
	// client, to know that the upstream answers.
	lateTime = 10 * time.Second
)

// outages are the hosts that don't answer.
type outages struct {
	*upstream.Health
	first, again time.Duration // timeouts
}

// Unreachable records that an upstream could not be reached, so that requests don't
// wait for it once more.
func (h *Handler) Unreachable(up Upstream) {
	h.outages.Failed(up.way())
	h.outages.Failed(up.way() + anonymously)
}

// anonymously is added to the name of an upstream for what is asked in weir's own
// name, which its token server can keep from an answer.
const anonymously = " anonymously"

// errOutage says that the upstream gives no answer, and that there is another.
var errOutage = errors.New("the upstream gives no answer")

// attempt sends a request to a host, which has as long as the client gives it. Once
// its timeout is over, and otherwise says that there is another answer, the error is
// [errOutage], and the request goes on by itself, so that it is known whether the
// host answers. A silent host is tried by one client at a time.
func (h *Handler) attempt(ctx context.Context, host string, otherwise func() bool, send func(context.Context) (*http.Response, error)) (*http.Response, error) {
	failing := h.outages.Failing(host)
	if failing && !h.outages.Try(host) && otherwise() {
		return nil, fmt.Errorf("%w: it is silent", errOutage)
	}
	rctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	type result struct {
		resp *http.Response
		err  error
	}
	done := make(chan result, 1)
	start := time.Now()
	go func() {
		resp, err := send(rctx) //nolint:bodyclose // the caller closes it
		done <- result{resp, err}
	}()
	end := func(r result) (*http.Response, error) {
		if r.err != nil {
			cancel()
			if !errors.Is(r.err, errElsewhere) && !errors.Is(r.err, upstream.ErrTunnel) {
				h.outages.Failed(host)
			}
			return nil, r.err
		}
		h.outages.Answered(host, time.Since(start))
		stop := context.AfterFunc(ctx, cancel)
		r.resp.Body = &cancelBody{r.resp.Body, func() { stop(); cancel() }}
		return r.resp, nil
	}
	wait := h.outages.Timeout(host, h.outages.first)
	if failing {
		wait = h.outages.again
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case r := <-done:
			return end(r)
		case <-timer.C:
			if !otherwise() {
				continue
			}
			select {
			case r := <-done: // meanwhile
				return end(r)
			default:
			}
			h.outages.Silent(host)
			h.wg.Go(func() {
				defer cancel()
				timer := time.NewTimer(lateTime)
				defer timer.Stop()
				select {
				case r := <-done:
					if r.err != nil {
						return
					}
					r.resp.Body.Close()
					if failing {
						h.outages.Back(host)
					} else {
						h.outages.Answered(host, time.Since(start))
					}
				case <-timer.C:
				case <-h.ctx.Done():
				}
			})
			return nil, fmt.Errorf("%w: none in %s", errOutage, wait)
		case <-ctx.Done():
			cancel()
			if r := <-done; r.err == nil {
				r.resp.Body.Close()
			}
			return nil, ctx.Err()
		}
	}
}
