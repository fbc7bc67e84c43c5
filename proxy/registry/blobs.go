// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"weir/proxy/store"
)

// farAhead is how far beyond a running transfer's end a range may begin and
// still wait for it; what is farther is had faster from the upstream.
const farAhead = 8 << 20

// origin is where what the exchange brings to the store comes from. Only clients of
// the same repository follow a transfer, and of the same network where the registry,
// or one that it redirects to, may authorize by that: they are given what this
// repository's registry sends, to them or to another of them, which is no more than
// it would send each.
func (x *exchange) origin() store.Origin {
	return store.Origin{Name: x.who.Registry + "/" + x.who.Name + " from " + x.vantage.From, Owner: x.up.owner(), Free: !x.up.authenticated()}
}

// headBlob answers HEAD of a blob with what the registry says, if it says anything:
// a client that pushes asks so what the registry has, and doesn't send that.
func (x *exchange) headBlob() {
	b, err := x.h.store.Get(x.target.digest)
	if err != nil {
		x.forward()
		return
	}
	defer b.Close()
	resp, err := x.ask(x.head(false, x.stale(x.target.digest)))
	switch {
	case errors.Is(err, errOutage):
		x.serveKept(b, true)
	case err != nil && x.inOwnName():
		x.forward()
	case err != nil:
		x.unreachable(err)
	default:
		x.relay(resp)
	}
}

// blob answers GET of a blob: from the store, from a transfer that another client
// leads, or by leading one. retry is whether the client looks for the blob once more
// when another's transfer comes to nothing: it may be given what that one wasn't.
func (x *exchange) blob(retry bool) {
	if b, err := x.h.store.Get(x.target.digest); err == nil {
		defer b.Close()
		x.kept(b)
		return
	}
	wanted := x.wanted()
	var all *opened
	if !wholly(wanted) {
		var answered bool
		if answered, all = x.ranges(wanted); answered {
			return
		}
	}
	t, leader := x.h.store.Claim(x.target.digest, x.origin())
	if all != nil && !leader {
		all.resp.Body.Close()
		all.cancel()
	}
	switch {
	case leader && all == nil && !wholly(wanted):
		t.Abandon(errNotLed)
		if retry && x.h.store.Has(x.target.digest) { // since just now
			x.blob(false)
			return
		}
		x.miss()
	case leader:
		x.lead(t, all)
	case x.follow(t, wanted):
	case retry:
		x.blob(false)
	default:
		x.miss()
	}
}

// miss answers with what the registry gives to the client's own request.
func (x *exchange) miss() {
	x.stats.misses.Add(1)
	x.forward()
}

// kept answers GET of a blob that is kept: with it, if the client may have it.
func (x *exchange) kept(b *store.Blob) {
	stale := false
	if d := x.target.digest; !x.allows(d) {
		shown, resp, err := x.requestProof(b.Size())
		switch {
		case errors.Is(err, errOutage):
			stale = true
		case shown != nil && shown.compare(b.Reader()) == nil:
			x.grant(shown.at)
			x.prove(shown.by, d, shown.at)
		default:
			x.notShown(shown, resp, err)
			return
		}
	}
	x.serveKept(b, stale)
}

// notShown answers with what the upstream gives, which has not shown by a range
// that it has what is kept.
func (x *exchange) notShown(shown *proof, resp *reply, err error) {
	x.stats.misses.Add(1)
	switch {
	case err != nil && x.r.Context().Err() != nil:
		panic(http.ErrAbortHandler) // the client has gone
	case shown != nil, errors.Is(err, errNothingToShow), err == nil && resp.StatusCode == http.StatusOK && x.toWeir(resp.Response):
		// Other bytes, or none, or not to the client's own request.
		if resp != nil {
			resp.Body.Close()
		}
		if wholly(x.wanted()) {
			x.askForAll()
		} else {
			x.forward() // it may be given the range, and not the whole
		}
	case err != nil:
		x.forward()
	case resp.StatusCode == http.StatusOK:
		x.sent(resp)
	case x.own(resp.Response) && !x.toWeir(resp.Response) && refusesAnyway(resp.StatusCode):
		x.relay(resp)
	default:
		resp.Body.Close()
		x.forward()
	}
}

// refusesAnyway says whether an answer to a range would be the same without.
func refusesAnyway(status int) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusTooManyRequests:
		return true
	}
	return false
}

// follow answers from a transfer that another client of the repository leads. It
// returns false, and has not answered, when that came to nothing.
func (x *exchange) follow(t *store.Transfer, wanted []store.Span) bool {
	waiting, stop := context.WithTimeout(x.r.Context(), x.h.lagTime)
	r, err := t.Wait(waiting)
	stop()
	switch {
	case x.r.Context().Err() != nil:
		return true
	case errors.Is(err, context.DeadlineExceeded):
		// The leader still asks. It may be its way that gives no answer.
		x.miss()
		return true
	case err != nil:
		return false
	}
	defer r.Close()
	// What the registry sends to the leader is in the repository, and the leader
	// may have it. What a peer sends is shown to be there by the registry.
	leader, fromRegistry := x.h.leaders.Load(t)
	proven := fromRegistry || x.contains(x.target.digest)
	var shown *proof
	if leader != x.who.Client && (!proven || !x.h.rights.Granted(x.who)) {
		var resp *reply
		shown, resp, err = x.requestProof(r.Size())
		switch {
		case errors.Is(err, errOutage):
		case shown == nil:
			x.notShown(shown, resp, err)
			return true
		case proven:
			x.grant(shown.at)
			shown = nil
		}
	}
	r.AddSource(x.source)
	if x.r.Header.Get("Range") == "" {
		r.Whole()
	}
	if r.WaitReadable(x.r.Context()) == nil && unwanted(wanted) > r.Arrived()+farAhead {
		x.forward()
		return true
	}
	x.stats.hits.Add(1)
	x.serveTransfer(r, shown, provenance{source: SourceTransfer})
	return true
}

var errNotLed = errors.New("not to be had from the upstream through this client")

// detachable returns a context that ends with the client's request until detach is
// called, which says whether the client was still there. After that, what is asked
// for belongs to a transfer, and ends with cancel.
func (x *exchange) detachable() (ctx context.Context, detach func() bool, cancel context.CancelFunc) {
	ctx, cancel = context.WithCancel(context.WithoutCancel(x.r.Context()))
	return ctx, context.AfterFunc(x.r.Context(), cancel), cancel
}

// lead gets a blob for all clients that want it: from a peer, or from the
// upstream, which may have answered with all of it already.
func (x *exchange) lead(t *store.Transfer, all *opened) {
	var share Share
	if all == nil {
		x.stats.misses.Add(1)
		share = x.share()
	}
	var at time.Time       // the registry answered with the blob
	var body io.ReadCloser // what the transfer reads
	t.OnEnd(func(kept bool) {
		if share != nil {
			share.Close(kept)
		}
		p, ok := body.(*parallel)
		if fromRegistry := x.ended(t, kept, at); ok && fromRegistry && !kept && p.inParts() {
			p.w.refuse() // it may be the parts that were wrong
		}
	})
	if share != nil && x.fromPeer(t, share) {
		return
	}
	var rest *store.Rest // nil if the answer is all of the blob
	var err error
	if all == nil {
		all = new(opened)
		var ctx context.Context
		ctx, all.detach, all.cancel = x.detachable()
		all.resp, rest, err = x.missing(ctx, t)
	} else {
		t.Missing() // which comes again
	}
	resp, cancel := all.resp, all.cancel
	switch {
	case err != nil || resp.StatusCode != http.StatusOK && rest == nil:
		t.Abandon(errNotLed)
		defer cancel()
		x.refused(resp, err)
		return
	case encoded(resp), foreign(resp.Response):
		// A login page, say: the registry may give the blob to those who follow.
		t.Abandon(errNotLed)
		defer cancel()
		x.sent(resp)
		return
	case !all.detach():
		t.Abandon(errNotLed)
		resp.Body.Close()
		cancel()
		return
	}
	at = resp.at
	x.h.leaders.Store(t, x.who.Client)
	switch {
	case rest == nil:
		body = x.parallel(resp, 0, resp.ContentLength)
	case rest.Firm:
		body = x.parallel(resp, rest.First, rest.Size)
	default:
		body = x.arriving(resp.Body)
	}
	resp.Body = &cancelBody{body, cancel}
	var r *store.Reader
	if rest == nil {
		r, err = t.Begin(resp.ContentLength, resp.Body, x.source)
	} else {
		x.grant(at) // 206; its other ranges come before the end
		rest.Body = resp.Body
		r, err = t.Resume(*rest)
	}
	switch {
	case err != nil && rest != nil:
		resp.Body.Close()
		x.notKept(err)
		x.forward()
		return
	case err != nil:
		defer context.AfterFunc(x.r.Context(), cancel)() // it is the client's again
		x.notKept(err)
		x.sent(resp)
		return
	}
	defer r.Close()
	x.serveTransfer(r, nil, provenance{stored: true, ranged: resp.firstPart > 0})
}

// ended records that a transfer has ended, to which the registry had answered at a time, and says
// whether all of it came from the registry.
func (x *exchange) ended(t *store.Transfer, kept bool, at time.Time) (fromRegistry bool) {
	_, fromRegistry = x.h.leaders.LoadAndDelete(t)
	if kept && fromRegistry {
		x.grant(at)
		x.prove(x.vantage, x.target.digest, at) // it may have been redirected on the way
	}
	return fromRegistry
}

func (x *exchange) notKept(err error) {
	x.logger(x.target.digest).Info("a blob is served without being kept", "err", err)
}

// refused answers for a blob that the upstream did not give.
func (x *exchange) refused(resp *reply, err error) {
	var at *url.Error
	switch {
	case err == nil && x.own(resp.Response):
		x.relay(resp)
		return
	case err == nil:
		resp.Body.Close()
	case errors.As(err, &at) && strings.HasPrefix(at.URL, x.up.base().String()+"/"):
		x.unreachable(err)
		return
	case x.r.Context().Err() == nil:
		x.logger(x.target.digest).Warn("a blob can't be fetched; left to the client", "err", scrub(err))
	}
	// Where the registry redirected to refuses: to the client it may not, or
	// the client can tell why.
	x.forward()
}
