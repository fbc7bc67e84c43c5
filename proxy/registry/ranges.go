// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"weir/proxy/store"
)

// oneRange reads a Range field that names one range, from its first byte up to, and without, end,
// which is -1 if it has none (RFC 9110, section 14.2). A suffix isn't one.
func oneRange(header string) (first, end int64, ok bool) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	from, to, dash := strings.Cut(spec, "-")
	if !ok || !dash {
		return 0, 0, false
	}
	first, err := strconv.ParseInt(from, 10, 63)
	if err != nil || from[0] == '+' || from[0] == '-' {
		return 0, 0, false
	}
	if to == "" {
		return first, -1, true
	}
	last, err := strconv.ParseInt(to, 10, 63)
	if err != nil || to[0] == '+' || to[0] == '-' || last < first || last == math.MaxInt64 {
		return 0, 0, false
	}
	return first, last + 1, true
}

// sentRange says which range of a blob an answer is, and how large that is: to is without it.
func sentRange(resp *reply) (first, to, size int64, ok bool) {
	spec, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes ")
	where, total, slash := strings.Cut(spec, "/")
	if !ok || !slash || resp.StatusCode != http.StatusPartialContent || encoded(resp) || foreign(resp.Response) {
		return 0, 0, 0, false
	}
	first, to, ok = oneRange("bytes=" + where)
	size, err := strconv.ParseInt(total, 10, 64)
	if !ok || err != nil || to < 0 || to > size {
		return 0, 0, 0, false
	}
	return first, to, size, true
}

// fetchUpTo asks the upstream for a range of the blob, or for all from first on if to, which is
// without it, isn't known.
func (x *exchange) fetchUpTo(ctx context.Context, first, to int64) (*reply, error) {
	if to == math.MaxInt64 || to < 0 {
		return x.send(x.up.Transport, x.outgoing(ctx, http.MethodGet, http.Header{"Accept-Encoding": {"identity"}, "Range": {fmt.Sprintf("bytes=%d-", first)}}), true)
	}
	return x.fetchRange(ctx, nil, first, to-1)
}

// part answers GET of a range of a blob that isn't stored: with what is there of it, or on its way
// to others, and what the registry sends of the rest, which is put with what is there. So the
// ranges that clients ask for become one transfer. It returns false, and has not answered, when
// the range is to be had in another way.
//
// Nothing of it is verified, as nothing is that passes through: it is what this repository's
// registry has sent, and the client is one that the registry gives content to, or this range.
func (x *exchange) part() bool {
	first, end, ok := oneRange(x.r.Header.Get("Range"))
	if !ok || first == 0 && end < 0 || len(x.r.Header["Range"]) != 1 || conditionalRange(x.r) {
		return false
	}
	waiting, stop := context.WithTimeout(x.r.Context(), x.h.lagTime)
	r := x.h.store.Ranges(waiting, x.target.digest, x.origin())
	stop()
	if r == nil {
		return false
	}
	defer r.Close()
	var at time.Time // the registry has last sent some of it
	r.With(x.r.Context(), func(ctx context.Context, first, to int64) (io.ReadCloser, error) {
		answered, body, err := x.openGap(ctx, first, to, r.Size())
		if err != nil {
			return nil, err
		}
		at = answered
		return x.counted(body), nil
	})
	entitled := x.h.rights.Granted(x.who)
	to, missing := r.Missing(first, end)
	size := r.Size()
	switch {
	case x.r.Context().Err() != nil:
		return true
	case size >= 0 && first >= size:
		return false // there is no such range, which the registry says
	case !missing && entitled && size >= 0:
		x.stats.hits.Add(1)
		x.serve(r, size, provenance{source: SourceTransfer}, true)
		x.complete(r, size, at)
		return true
	case !missing:
		to = end
	}
	if to == math.MaxInt64 {
		// Nobody knows how large it is, and others that come at the same time want what
		// follows.
		to = first + store.PieceSize
	}
	x.stats.misses.Add(1)
	less := to != end && to < math.MaxInt64 // than the client wants
	resp, err := x.fetchUpTo(x.r.Context(), first, to)
	if err != nil {
		r.Decline()
		x.refused(nil, err)
		return true
	}
	from, until, size, ok := sentRange(resp)
	switch {
	case !ok || from != first, !missing, !r.Fill(x.counted(resp.Body), first, until, size):
		r.Decline()
		if less && ofTheRange(resp.StatusCode) {
			resp.Body.Close()
			x.forward()
		} else {
			x.refused(resp, nil)
		}
		return true
	}
	at = resp.at
	x.grant(at)
	if end < 0 || end > size {
		end = size
	}
	if until == end {
		err = x.relayRange(resp, r, until-first)
	} else {
		x.serve(r, size, provenance{}, true)
	}
	x.complete(r, size, at)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return true
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

// conditionalRange says whether a range is asked for under a condition.
func conditionalRange(r *http.Request) bool {
	for _, h := range []string{"If-None-Match", "If-Modified-Since", "If-Match", "If-Unmodified-Since", "If-Range"} {
		if r.Header.Get(h) != "" {
			return true
		}
	}
	return false
}

// gap opens ranges that are missing of the blob, which has size bytes, or more of it, for a transfer.
func (x *exchange) gap(size int64) func(ctx context.Context, first, to int64) (io.ReadCloser, error) {
	return func(ctx context.Context, first, to int64) (io.ReadCloser, error) {
		_, body, err := x.openGap(ctx, first, to, size)
		if err != nil {
			return nil, err
		}
		return x.arriving(body), nil
	}
}

// openGap opens a range, and says when the registry has answered. The error is [store.ErrCorrupt] when it
// says now that the blob has another size: what has come of it is wrong, or what comes.
func (x *exchange) openGap(ctx context.Context, first, to, size int64) (at time.Time, body io.ReadCloser, err error) {
	resp, err := x.fetchUpTo(ctx, first, to)
	if err != nil {
		return time.Time{}, nil, err
	}
	from, _, total, ok := sentRange(resp)
	switch {
	case ok && from == first && total == size:
		return resp.at, resp.Body, nil
	case ok && from == first:
		err = fmt.Errorf("%s says that a blob has %d bytes, and said %d before: %w", x.up.Host, total, size, store.ErrCorrupt)
	default:
		at = resp.at
	}
	resp.Body.Close()
	if err == nil {
		body, err = x.open(ctx, first)
	}
	return at, body, err
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
	resp, err := x.fetchRange(ctx, nil, first, to-1)
	if err != nil {
		return nil, nil, err
	}
	from, until, total, is := sentRange(resp)
	switch {
	case is && from == first && (size < 0 || until == to && total == size):
		rest := &store.Rest{Size: total, First: first, To: until, Pieces: pieces, Gap: x.gap(total), More: x.source, Refetch: x.anew}
		rest.Firm = until == total && !pieces
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
	resp, err := x.fetchRange(ctx, nil, 0, x.h.widths.part-1)
	if err != nil {
		return nil, err
	}
	from, to, size, ok := sentRange(resp)
	switch {
	case ok && from == 0 && (to == size || to == x.h.widths.part):
		resp.StatusCode, resp.Status, resp.ContentLength, resp.ranged = http.StatusOK, "200 OK", size, true
		resp.Header.Del("Content-Range")
		if to < size {
			resp.Body = &firstPart{resp.Body, to}
		}
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
		x.decline(resp)
		return nil, 0, fmt.Errorf("%w: %s answers with %s", errNotAnew, x.up.Host, resp.Status)
	}
	return x.arriving(resp.Body), resp.ContentLength, nil
}
