// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"weir/proxy/store"
)

// wanted is which ranges of a blob are asked for, in order: {0, -1} if it is all. It is nil if that isn't understood.
func (q request) wanted() []store.Span {
	switch fields := q.r.Header["Range"]; {
	case len(fields) > 1:
		return nil
	case len(fields) == 0 || fields[0] == "":
		return []store.Span{{To: -1}}
	default:
		return parseRanges(fields[0])
	}
}

// wholly says whether all of a blob is wanted.
func wholly(wanted []store.Span) bool { return len(wanted) == 1 && wanted[0] == store.Span{To: -1} }

// unwanted is how many bytes of a blob come before the last one of the ranges that are wanted, and aren't wanted.
func unwanted(wanted []store.Span) int64 {
	if len(wanted) == 0 {
		return 1 << 62 // who knows
	}
	n := wanted[len(wanted)-1].From
	for _, e := range wanted[:len(wanted)-1] {
		n -= e.To - e.From
	}
	return n
}

// sentRange says which range of a blob an answer is, and how large that is.
func sentRange(resp *reply) (at store.Span, size int64, ok bool) {
	if resp.StatusCode != http.StatusPartialContent || encoded(resp) || foreign(resp.Response) ||
		strings.HasPrefix(resp.Header.Get("Content-Type"), severalRanges) {
		return store.Span{}, 0, false
	}
	return parseContentRange(resp.Header.Get("Content-Range"))
}

// opened is an answer with a blob, and what its request was made with: see [exchange.detachable].
type opened struct {
	resp   *reply
	detach func() bool
	cancel context.CancelFunc
}

// ranges answers GET of ranges of a blob that isn't stored: with what is there of it, or on its way
// to others, and what the registry sends of the rest, which is put with what is there. So the
// ranges that clients ask for become one transfer. It returns false, and has not answered, when
// the ranges are to be had in another way; and an answer with all of the blob, when the registry gives
// that to who asks for several ranges.
//
// Nothing of it is verified, as nothing is that passes through: it is what this repository's
// registry has sent, and the client is one that the registry gives content to, or this range.
func (x *exchange) ranges(wanted []store.Span) (answered bool, all *opened) {
	if len(wanted) == 0 || conditionalRange(x.r) {
		return false, nil
	}
	waiting, stop := context.WithTimeout(x.r.Context(), x.h.lagTime)
	r := x.h.store.Ranges(waiting, x.target.digest, x.origin())
	stop()
	if r == nil {
		return false, nil
	}
	defer r.Close()
	var at time.Time // the registry has last sent some of it
	r.With(x.r.Context(), func(ctx context.Context, missing []store.Span) (io.ReadCloser, int, error) {
		when, body, n, err := x.openGaps(ctx, missing, r.Size(), x.counted)
		if err != nil {
			return nil, 0, err
		}
		at = when
		return body, n, nil
	})
	entitled := x.h.rights.Granted(x.who)
	missing := r.Missing(wanted...)
	size, last := r.Size(), wanted[len(wanted)-1]
	switch {
	case x.r.Context().Err() != nil:
		return true, nil
	case size >= 0 && last.From >= size:
		return false, nil // there is no such range, which the registry says
	case len(missing) > 0:
	case entitled && size >= 0:
		x.stats.hits.Add(1)
		x.serve(r, size, provenance{source: SourceTransfer}, true)
		x.complete(r, size, at)
		return true, nil
	default:
		x.miss()
		return true, nil
	}
	if end := &missing[len(missing)-1]; end.To == math.MaxInt64 {
		// Nobody knows how large it is, and others that come at the same time want what
		// follows.
		end.To = end.From + store.PieceSize
	}
	x.stats.misses.Add(1)
	ctx, detach, cancel := x.detachable()
	resp, err := x.fetchRanges(ctx, nil, missing...)
	if err != nil {
		cancel()
		r.Decline()
		x.refused(nil, err)
		return true, nil
	}
	less, several := !slices.Equal(missing, wanted), len(missing) > 1
	body, given, size, ok := pick(resp, missing, x.counted)
	switch {
	case ok && r.Fill(&cancelBody{body, cancel}, given, size):
	case several && resp.StatusCode == http.StatusOK && !encoded(resp) && !foreign(resp.Response):
		return false, &opened{resp: resp, detach: detach, cancel: cancel}
	default:
		defer cancel()
		r.Decline()
		if less && ofTheRange(resp.StatusCode) || several && resp.StatusCode == http.StatusPartialContent {
			resp.Body.Close()
			x.forward()
		} else {
			x.refused(resp, nil)
		}
		return true, nil
	}
	at = resp.at
	x.grant(at)
	if last.To < 0 || last.To > size {
		last.To = size
	}
	if n := given[0].To - given[0].From; len(wanted) == 1 && given[0].To == last.To {
		err = x.relayRange(resp, r, n)
	} else {
		x.serve(r, size, provenance{}, true)
	}
	x.complete(r, size, at)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return true, nil
}

// relayRange sends the client the upstream's answer with n bytes that r reads.
func (x *exchange) relayRange(resp *reply, r io.Reader, n int64) error {
	copyHeader(x.w.Header(), resp.Header)
	x.w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	x.w.WriteHeader(resp.StatusCode)
	_, err := io.CopyN(flushing{x.w}, r, n)
	return err
}

// flushing sends what is written at once.
type flushing struct{ http.ResponseWriter }

// Write implements io.Writer.
func (w flushing) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	if err == nil {
		err = http.NewResponseController(w.ResponseWriter).Flush()
	}
	return n, err
}

// gap opens ranges that are missing of the blob, which has size bytes, for a transfer.
func (x *exchange) gap(size int64) store.Opener {
	return func(ctx context.Context, missing []store.Span) (io.ReadCloser, int, error) {
		_, body, n, err := x.openGaps(ctx, missing, size, x.arriving)
		return body, n, err
	}
}

// openGaps opens the first n of ranges that are missing, which are read by way of through, and says when the registry
// has answered. The error is [store.ErrCorrupt] when it says now that the blob has another size: what has come of it is
// wrong, or what comes.
func (x *exchange) openGaps(ctx context.Context, missing []store.Span, size int64, through func(io.ReadCloser) io.ReadCloser) (at time.Time, body io.ReadCloser, n int, err error) {
	w := x.h.widths.registry(x.up.ID())
	if w.refusesSeveral() {
		missing = missing[:1]
	}
	resp, err := x.fetchRanges(ctx, nil, missing...)
	if err != nil {
		return time.Time{}, nil, 0, err
	}
	body, given, total, ok := pick(resp, missing, through)
	switch {
	case ok && total == size:
		return resp.at, body, len(given), nil
	case ok:
		body.Close()
		return time.Time{}, nil, 0, fmt.Errorf("%s says that a blob has %d bytes, and said %d before: %w", x.up.Host, total, size, store.ErrCorrupt)
	}
	resp.Body.Close()
	if len(missing) > 1 {
		if resp.StatusCode < http.StatusInternalServerError && !refusesAnyway(resp.StatusCode) {
			w.refuseSeveral()
		}
		return x.openGaps(ctx, missing[:1], size, through)
	}
	if body, err = x.open(ctx, missing[0].From); err != nil {
		return time.Time{}, nil, 0, err
	}
	return resp.at, through(body), 1, nil
}

// complete has a blob verified and stored of which all was sent in ranges, or more than half: the
// rest is fetched then. The last of these ranges was sent to this client at a time, which is zero if it was
// given only what was there.
func (x *exchange) complete(r *store.Ranges, size int64, at time.Time) {
	if n, idle := r.There(); !idle || n <= size/2 || at.IsZero() {
		return
	}
	t, leader := x.h.store.Claim(x.target.digest, x.origin())
	if !leader {
		return
	}
	t.OnEnd(func(kept bool) { x.ended(t, kept, at) })
	first, to, size, ok := t.Missing()
	if !ok {
		t.Abandon(errNotLed)
		return
	}
	x.h.leaders.Store(t, x.who.Client)
	rest := store.Rest{Size: size, First: first, To: to, Pieces: true, Gap: x.gap(size), More: x.source}
	whole, err := t.Resume(rest)
	if err != nil {
		x.notKept(err)
		return
	}
	go func() { // until it may end as any that nobody reads
		defer whole.Close()
		ctx, cancel := context.WithTimeout(x.h.ctx, x.h.lagTime+time.Duration(size/2/slowPace)*time.Second)
		defer cancel()
		_ = whole.Ended(ctx)
	}()
}

// missing asks the upstream for the blob: for what is missing of it, if some is there. What was sent
// to others is the client's too once the registry gives it a part. A registry that gives none, or that
// of a blob of another size, is asked for all of it. Of a client that begins with a range without
// an end others are to be expected, and it may leave in the middle of this one.
//
// An ETag isn't compared: what is there is of the same digest or wrong, which is found out,
// and two hosts of one registry's content needn't have the same.
func (x *exchange) missing(ctx context.Context, t *store.Transfer) (*reply, *store.Rest, error) {
	first, to, size, ok := t.Missing()
	pieces := x.r.Header.Get("Range") != ""
	switch {
	case ok && first == size:
		first = size - 1 // whether the client may have it is the registry's to say
	case !ok && pieces:
		to, size = store.PieceSize, -1
	case !ok && x.h.widths.wide(x.up.ID()):
		resp, err := x.fetchFirstPart(ctx)
		return resp, nil, err
	case !ok:
		resp, err := x.fetch(ctx, 0)
		return resp, nil, err
	}
	resp, err := x.fetchRanges(ctx, nil, store.Span{From: first, To: to})
	if err != nil {
		return nil, nil, err
	}
	at, total, is := sentRange(resp)
	switch {
	case is && at.From == first && (size < 0 || at.To == to && total == size):
		rest := &store.Rest{Size: total, First: first, To: at.To, Pieces: pieces, Gap: x.gap(total), More: x.source, Refetch: x.anew}
		rest.Firm = at.To == total && !pieces
		return resp, rest, nil
	case ofTheRange(resp.StatusCode):
		resp.Body.Close()
		resp, err = x.fetch(ctx, 0)
	}
	return resp, nil, err
}

// ofTheRange says whether an answer to a range that the client hasn't asked for may be another one
// than that to its own request: a registry, or what is on the way there, may refuse ranges, or so many
// requests (429, and 503 of Amazon S3), by any status.
func ofTheRange(status int) bool {
	switch status {
	case http.StatusPartialContent:
		return true // of another range
	case http.StatusUnauthorized, http.StatusNotFound:
		return false
	}
	return status >= 400
}

// fetchFirstPart asks the upstream for a blob by its first part. What it gives is as the answer to a
// request for all of it, with the body of the first part, or of all.
func (x *exchange) fetchFirstPart(ctx context.Context) (*reply, error) {
	resp, err := x.fetchRanges(ctx, nil, store.Span{To: x.h.widths.part})
	if err != nil {
		return nil, err
	}
	at, size, ok := sentRange(resp)
	switch {
	case ok && at.From == 0 && (at.To == size || at.To == x.h.widths.part):
		resp.StatusCode, resp.Status, resp.ContentLength, resp.firstPart = http.StatusOK, "200 OK", size, at.To
		resp.Header.Del("Content-Range")
		return resp, nil
	case !refusesAnyway(resp.StatusCode) || resp.StatusCode == http.StatusTooManyRequests:
		x.h.widths.registry(x.up.ID()).refuse() // it gives no parts any more
	}
	if ofTheRange(resp.StatusCode) {
		resp.Body.Close()
		return x.fetch(ctx, 0)
	}
	return resp, nil
}

// errNotAnew says that the registry doesn't give a blob, of which something wrong has come.
var errNotAnew = errors.New("the registry doesn't give it")

// anew fetches all of a blob, as what has come of it is wrong. The error is [errNotAnew].
func (x *exchange) anew(ctx context.Context) (io.ReadCloser, int64, error) {
	resp, err := x.fetch(ctx, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", errNotAnew, err)
	}
	if resp.StatusCode != http.StatusOK || encoded(resp) {
		return nil, 0, fmt.Errorf("%w: %w", errNotAnew, x.notGiven(resp))
	}
	return x.arriving(resp.Body), resp.ContentLength, nil
}
