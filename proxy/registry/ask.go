// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"weir/proxy/store"
	"weir/proxy/upstream"
)

// reply is an upstream's answer, and when it was given.
type reply struct {
	*http.Response
	at time.Time
	// firstPart is how many bytes its body has where the first part of a blob was asked for, and
	// the client asked for all: to that the registry may answer otherwise.
	firstPart int64
}

// question is a request that weir makes to find out what the client may have: the
// client's own request, without its body.
type question struct {
	method string
	extra  http.Header // over the client's
	// follow says that redirects are followed, as the client would.
	follow bool
	// base says that /v2/ is asked for, whatever the client wants.
	base bool
	// stale says that there is another answer while the upstream gives none: what it
	// said before.
	stale func() bool
}

// head is the question for what the client asked for, without its content.
func (x *exchange) head(follow bool, stale func() bool) question {
	return question{method: http.MethodHead, follow: follow, stale: stale}
}

// ask asks the upstream. The error is [errOutage] when it has failed, and what it
// said before may be taken instead. The answer to a HEAD has no body.
func (x *exchange) ask(q question) (*reply, error) {
	way := x.up.way()
	if x.inOwnName() {
		way += anonymously
	}
	send := func(ctx context.Context) (*http.Response, error) {
		resp, err := x.send(x.via, x.question(ctx, q), q.follow)
		if err != nil {
			return nil, err
		}
		return resp.Response, nil
	}
	resp, err := x.h.attempt(x.r.Context(), way, q.stale, func(ctx context.Context) (*http.Response, error) {
		if q.method == http.MethodHead && x.inOwnName() { // for all clients that want to know the same
			key := fmt.Sprintf("%s from %s %s %q %v", x.vantage.Registry, x.vantage.From, x.r.URL.RequestURI(), x.r.Header["Accept"], q.follow)
			return x.h.together(ctx, key, send)
		}
		return send(ctx)
	})
	switch {
	case errors.Is(err, errOutage), x.r.Context().Err() != nil, errors.Is(err, upstream.ErrTunnel):
		return nil, err
	case err != nil && q.stale():
		return nil, fmt.Errorf("%w: %w", errOutage, scrub(err))
	case err != nil:
		return nil, err
	}
	if x.inOwnName() && resp.StatusCode == http.StatusTooManyRequests {
		x.h.asking.pause(x.up.ID(), resp)
	}
	if x.toWeir(resp) && resp.StatusCode/100 != 2 && !x.failed(resp) {
		resp.Body.Close()
		return nil, fmt.Errorf("%w: %s", errNotTheClients, resp.Status)
	}
	outage := x.failed(resp) && q.stale()
	if q.method == http.MethodHead || outage {
		resp.Body.Close()
	}
	switch {
	case outage && x.own(resp) && foreign(resp):
		return nil, fmt.Errorf("%w: %w: %s", errOutage, errForeign, resp.Status)
	case outage:
		return nil, fmt.Errorf("%w: it answers with %s", errOutage, resp.Status)
	}
	return &reply{Response: resp, at: x.h.rights.Now()}, nil
}

// errForeign says that an answer is hardly the registry's.
var errForeign = errors.New("the answer isn't a registry's")

// question is what is asked.
func (x *exchange) question(ctx context.Context, q question) *http.Request {
	if !q.base {
		return x.outgoing(ctx, q.method, q.extra)
	}
	u := x.up.base()
	u.Path = "/v2/" // which JoinPath has without its first slash
	return (&http.Request{Method: q.method, URL: u, Host: x.r.Host, Header: http.Header{"User-Agent": {"weir"}}}).WithContext(ctx)
}

// inOwnName says whether questions are asked in weir's own name, and not in the
// client's.
func (x *exchange) inOwnName() bool {
	_, is := x.via.(*anonymous)
	return is
}

// toWeir says whether an answer was to a request that had a token which the client's
// own has not.
func (x *exchange) toWeir(resp *http.Response) bool { return x.stead && hadToken(resp) }

// hadToken says whether the request that was answered, maybe where it was redirected
// to, had a token.
func hadToken(resp *http.Response) bool {
	req := resp.Request
	for req.Response != nil && req.Response.Request != nil {
		req = req.Response.Request
	}
	return req.Header.Get("Authorization") != ""
}

// errNotTheClients says that weir was refused what it asked for in its own name, which
// says nothing of the client.
var errNotTheClients = errors.New("what weir asked for in its own name was refused")

// togetherTime is how long after a request others join it.
const togetherTime = 200 * time.Millisecond

// together sends one request for all that want the same at the same time, and returns
// its answer without the body.
func (h *Handler) together(ctx context.Context, key string, send func(context.Context) (*http.Response, error)) (*http.Response, error) {
	answer := h.asked.DoChan(key, func() (any, error) {
		ctx, cancel := context.WithTimeout(h.ctx, tokenTimeout)
		defer cancel()
		// Who comes later than that asks again: the host may be back by then.
		defer time.AfterFunc(togetherTime, func() { h.asked.Forget(key) }).Stop()
		resp, err := send(ctx)
		if err != nil {
			return nil, err
		}
		return resp, resp.Body.Close()
	})
	select {
	case a := <-answer:
		if a.Err != nil {
			return nil, a.Err
		}
		resp := *a.Val.(*http.Response)
		resp.Header, resp.Body = resp.Header.Clone(), http.NoBody
		return &resp, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// way is what is remembered of whether the upstream answers: to this client's
// network.
func (u Upstream) way() string { return u.ID() + " from " + u.NetworkID }

// send sends a request to the upstream. What follows redirects goes on to https
// only, or stays at a registry without TLS.
func (x *exchange) send(by http.RoundTripper, req *http.Request, follow bool) (*reply, error) {
	rt := transport(func(req *http.Request) (*http.Response, error) {
		resp, err := by.RoundTrip(req)
		if err == nil && resp.StatusCode == http.StatusSwitchingProtocols {
			resp.Body.Close()
			return nil, errUpgrade
		}
		return resp, err
	})
	do := rt.RoundTrip
	if follow {
		// Where a redirect leads may be out of weir's reach, and not of the client's,
		// which may go there by a proxy: it is left to the client then.
		req = req.WithContext(upstream.WithDialBudget(req.Context(), redirectTime))
		do = x.up.follow(rt).Do
	}
	resp, err := do(req) //nolint:bodyclose // the caller closes the reply's
	var at *url.Error
	if errors.As(err, &at) && !strings.HasPrefix(at.URL, x.up.base().String()+"/") {
		err = fmt.Errorf("%w: %w", errElsewhere, err)
	}
	if err != nil {
		return nil, err
	}
	return &reply{Response: resp, at: x.h.rights.Now()}, nil
}

// errElsewhere says that the host that the upstream redirects to, or that gives its
// tokens, has failed.
var errElsewhere = errors.New("another host than the registry")

// errUpgrade says that a registry changes the protocol of a connection on its own.
// What it sends then has no end, and doesn't end with the request.
var errUpgrade = errors.New("the registry changes the protocol, which it wasn't asked for")

// transport is a function as an http.RoundTripper.
type transport func(*http.Request) (*http.Response, error)

// RoundTrip implements http.RoundTripper.
func (t transport) RoundTrip(req *http.Request) (*http.Response, error) { return t(req) }

// redirectTime is how long it may take to connect to where a registry redirects:
// with what comes after, it is less than a second.
const redirectTime = 700 * time.Millisecond

// outgoing is the client's request, as it goes to the upstream, with another method
// and without its body. extra headers go over the client's.
func (x *exchange) outgoing(ctx context.Context, method string, extra http.Header) *http.Request {
	req := x.r.Clone(ctx)
	req.Method = method
	base := x.up.base()
	req.URL.Scheme, req.URL.Host = base.Scheme, base.Host
	req.RequestURI = ""
	req.Body, req.ContentLength = http.NoBody, 0
	for _, h := range []string{"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Range", "If-Range"} {
		req.Header.Del(h)
	}
	if _, ok := req.Header["User-Agent"]; !ok {
		req.Header["User-Agent"] = nil // not Go's
	}
	for k, v := range extra {
		req.Header[k] = v
	}
	return req
}

// dropCredentials takes from a request what isn't for another host than the registry, as
// clients do that follow a redirect (net/http). All else is the client's still.
func dropCredentials(req *http.Request) {
	for _, field := range []string{"Authorization", "Cookie", "Proxy-Authorization"} {
		req.Header.Del(field)
	}
}

// fetch opens the blob at the upstream, from an offset on, following redirects
// to where the registry keeps its blobs.
func (x *exchange) fetch(ctx context.Context, offset int64) (*reply, error) {
	if offset > 0 {
		return x.fetchRanges(ctx, nil, store.Span{From: offset, To: -1})
	}
	return x.send(x.up.Transport, x.outgoing(ctx, http.MethodGet, http.Header{"Accept-Encoding": {"identity"}}), true)
}

// open opens the blob at the upstream for a reader that has what is before offset.
func (x *exchange) open(ctx context.Context, offset int64) (io.ReadCloser, error) {
	resp, err := x.fetch(ctx, offset)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusPartialContent && strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", offset)):
		return resp.Body, nil
	case resp.StatusCode == http.StatusOK:
		return skipTo(resp.Body, offset)
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && resp.Header.Get("Content-Range") == fmt.Sprintf("bytes */%d", offset):
		// RFC 9110, 15.5.17. A client that knows the size takes it.
		resp.Body.Close()
		return nil, fmt.Errorf("%s has no more than %d bytes: %w", x.up.Host, offset, store.ErrShort)
	case offset > 0 && (resp.StatusCode == http.StatusRequestedRangeNotSatisfiable || resp.StatusCode == http.StatusBadRequest):
		// It has no ranges without an end, or none at all where it redirects to.
		resp.Body.Close()
		body, err := x.open(ctx, 0)
		if err != nil {
			return nil, err
		}
		return skipTo(body, offset)
	}
	return nil, x.notGiven(resp)
}

// skipTo reads a body for nothing up to an offset.
func skipTo(body io.ReadCloser, offset int64) (io.ReadCloser, error) {
	if _, err := io.CopyN(io.Discard, body, offset); err != nil {
		body.Close()
		return nil, fmt.Errorf("reading up to byte %d: %w", offset, err)
	}
	return body, nil
}

// notGiven closes an answer that isn't what a transfer asked for with the client's credentials, and is the
// error that says so. It is learned as if the client had asked.
func (x *exchange) notGiven(resp *reply) error {
	if x.own(resp.Response) {
		x.learn(resp)
	}
	resp.Body.Close()
	return fmt.Errorf("%s answers a request for a blob, or a part of it, with %s, %q", x.up.Host, resp.Status, resp.Header.Get("Content-Range"))
}

// parallel returns what a transfer reads: the body of resp, which is a blob of size bytes from
// a byte on, or its first part, and what is asked for beside it with the client's credentials.
func (x *exchange) parallel(resp *reply, from, size int64) io.ReadCloser {
	tag, has := resp.Header.Get("Etag"), store.Span{From: from, To: size}
	if resp.firstPart > 0 {
		has.To = resp.firstPart
	}
	return x.h.widths.parallel(x.up.ID(), x.arriving(resp.Body), has, size, func(ctx context.Context, at *url.URL, part store.Span) (io.ReadCloser, *url.URL, error) {
		r, err := x.fetchRanges(ctx, at, part)
		if at != nil && (err != nil || signatureIsOver(r.StatusCode)) && ctx.Err() == nil {
			// What signs its URL may be over. The registry gives another.
			if err == nil {
				r.Body.Close()
			}
			at = nil
			r, err = x.fetchRanges(ctx, nil, part)
		}
		if err != nil {
			return nil, nil, err
		}
		other := r.Header.Get("Etag")
		if sent, total, ok := sentRange(r); !ok || sent != part || total != size || other != "" && tag != "" && other != tag {
			return nil, nil, x.notGiven(r)
		}
		if r.Request != nil && r.Request.URL.Host != x.up.base().Host {
			at = r.Request.URL
		}
		return x.arriving(r.Body), at, nil
	})
}

// signatureIsOver says whether an answer may be to a signed URL that is over: 400 is that of
// Google Cloud Storage, and of Amazon S3 for temporary keys.
func signatureIsOver(status int) bool {
	return status == http.StatusForbidden || status == http.StatusUnauthorized || status == http.StatusBadRequest
}

// fetchRanges asks the upstream for ranges of the blob: where it has redirected to
// before, or at the registry if at is nil.
func (x *exchange) fetchRanges(ctx context.Context, at *url.URL, ranges ...store.Span) (*reply, error) {
	req := x.outgoing(ctx, http.MethodGet, http.Header{"Accept-Encoding": {"identity"}, "Range": {formatRanges(ranges)}})
	if at != nil {
		dropCredentials(req)
		req.URL, req.Host = at, ""
	}
	return x.send(x.up.Transport, req, true)
}

// source opens the blob for a transfer that broke off. It outlives the client's
// request, with the client's credentials.
func (x *exchange) source(ctx context.Context, offset int64) (io.ReadCloser, error) {
	body, err := x.open(ctx, offset)
	if err != nil {
		return nil, err
	}
	return x.arriving(body), nil
}

// ownSource is source for what only this client reads, at its own pace.
func (x *exchange) ownSource(ctx context.Context, offset int64) (io.ReadCloser, error) {
	body, err := x.open(ctx, offset)
	if err != nil {
		return nil, err
	}
	return x.counted(body), nil
}

// arriving counts, and measures, what a transfer reads from the upstream.
func (x *exchange) arriving(body io.ReadCloser) io.ReadCloser {
	return x.stats.arrivals.measure(body, &x.stats.fromUpstream)
}

// counted counts what comes from the upstream.
func (x *exchange) counted(body io.ReadCloser) io.ReadCloser {
	return &countingBody{ReadCloser: body, count: &x.stats.fromUpstream}
}

type countingBody struct {
	io.ReadCloser
	count *atomic.Int64
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.count.Add(int64(n))
	return n, err
}

type cancelBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b *cancelBody) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
}

// own says whether an answer is the registry's own, and not that of where it
// redirected to.
func (x *exchange) own(resp *http.Response) bool {
	return resp.Request == nil || resp.Request.URL.Host == x.up.base().Host
}

// scrub takes URLs out of an error: those of blobs are signed, so that whoever
// reads the log could fetch them.
func scrub(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
