// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"weir/proxy/rights"
	"weir/proxy/store"
)

// farAhead is how far beyond a running transfer's end a range may begin and
// still wait for it; what is farther is had faster from the upstream.
const farAhead = 8 << 20

// fetch opens the blob at the upstream, from an offset on, following redirects
// to where the registry keeps its blobs.
func (x *exchange) fetch(ctx context.Context, offset int64) (*http.Response, error) {
	extra := http.Header{"Accept-Encoding": {"identity"}}
	if offset > 0 {
		extra.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
	}
	return x.send(x.request(ctx, http.MethodGet, extra), true)
}

// open opens the blob at the upstream for somebody who has its beginning.
func (x *exchange) open(ctx context.Context, offset int64) (io.ReadCloser, error) {
	resp, err := x.fetch(ctx, offset)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusPartialContent && strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", offset)):
	case resp.StatusCode == http.StatusOK:
		if _, err := io.CopyN(io.Discard, resp.Body, offset); err != nil {
			resp.Body.Close()
			return nil, fmt.Errorf("reading up to byte %d: %w", offset, err)
		}
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && resp.Header.Get("Content-Range") == fmt.Sprintf("bytes */%d", offset):
		// RFC 9110, 15.5.17. A client that knows the size takes it.
		resp.Body.Close()
		return nil, fmt.Errorf("%s has no more than %d bytes: %w", x.up.Host, offset, store.ErrShort)
	default:
		resp.Body.Close()
		return nil, fmt.Errorf("%s answers a range of a blob with %s", x.up.Host, resp.Status)
	}
	return resp.Body, nil
}

// source opens the blob for a transfer that broke off. It outlives the
// client's request, with the client's credentials.
func (x *exchange) source() store.Source {
	return func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		body, err := x.open(ctx, offset)
		if err != nil {
			return nil, err
		}
		return x.arriving(body), nil
	}
}

// ownSource is source for what only this client reads, at its own pace.
func (x *exchange) ownSource() store.Source {
	return func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		body, err := x.open(ctx, offset)
		if err != nil {
			return nil, err
		}
		return x.counted(body), nil
	}
}

// arriving counts, and measures, what a transfer reads from the upstream.
func (x *exchange) arriving(body io.ReadCloser) io.ReadCloser {
	return x.stats.arrivals.measure(body, &x.stats.fromUpstream)
}

// origin is where what the exchange brings to the store comes from. Only clients of
// the same repository follow a transfer, and of the same network where the registry,
// or one that it redirects to, may authorize by that: they are given what this
// repository's registry sends, to them or to another of them, which is no more than
// it would send each.
func (x *exchange) origin() store.Origin {
	return store.Origin{Name: x.who.Registry + "/" + x.who.Name + " from " + x.vantage().From, Owner: x.up.owner(), Free: !x.up.authenticated()}
}

// blob answers GET and HEAD of a blob.
func (x *exchange) blob() {
	b, err := x.h.store.Get(x.target.digest)
	switch {
	case err == nil && x.r.Method == http.MethodHead:
		defer b.Close()
		x.headOfKept(b)
	case err == nil:
		defer b.Close()
		x.kept(b)
	case x.r.Method == http.MethodHead:
		x.forward()
	default:
		x.miss()
	}
}

// headOfKept answers HEAD of a blob that is kept with what the registry says, if
// it says anything: a client that pushes asks so what the registry has, and
// doesn't send that.
func (x *exchange) headOfKept(b *store.Blob) {
	stale := x.allowsStale(x.target.digest)
	resp, err := x.ask(x.head(false, func() bool { return stale }))
	switch {
	case x.failed(resp, err) && stale:
		x.stale = true
		x.serveKept(b)
	case err != nil:
		x.unreachable(x.w, x.r, err)
	default:
		x.relay(resp)
	}
}

// kept answers GET of a blob that is kept: with it, if the client may have it.
func (x *exchange) kept(b *store.Blob) {
	d := x.target.digest
	if x.allows(d) {
		x.serveKept(b)
		return
	}
	shown, resp, err := x.askRange(b.Size())
	switch {
	case x.stale:
		x.serveKept(b)
	case shown != nil && shown.compare(b.Reader()) == nil:
		x.grant()
		x.prove(shown.by, d)
		x.serveKept(b)
	default:
		x.notShown(shown, resp, err)
	}
}

func (x *exchange) serveKept(b *store.Blob) {
	x.stats.hits.Add(1)
	c := &content{x: x, size: b.Size(), from: b.Reader()}
	defer c.Close()
	// Of one that was never read all is read before the first byte is given.
	x.serve(c, x.hit(), b.Size() >= largeBlob)
}

// proof is what a registry has shown of a blob, by which it is told from one that
// only claims to have it.
type proof struct {
	offset int64
	bytes  []byte
	by     rights.Vantage // for whom it counts
}

// proofSize is how many bytes a registry has to show.
const proofSize = 1 << 10

// askRange asks the upstream, with the client's own request, for a small range of
// a blob of size bytes at an offset that can't be foreseen. It returns what it has
// shown, or else its answer, whose body is the caller's to close. It sets stale
// instead when the upstream gives no answer and the client may have the blob all
// the same.
func (x *exchange) askRange(size int64) (*proof, *http.Response, error) {
	n := min(size, proofSize)
	if n <= 0 {
		return nil, nil, errNothingToShow
	}
	at, err := rand.Int(rand.Reader, big.NewInt(size-n+1))
	if err != nil {
		return nil, nil, err
	}
	p := &proof{offset: at.Int64(), bytes: make([]byte, n)}
	wanted := fmt.Sprintf("bytes %d-%d/", p.offset, p.offset+n-1)
	extra := http.Header{"Accept-Encoding": {"identity"}, "Range": {fmt.Sprintf("bytes=%d-%d", p.offset, p.offset+n-1)}}
	stale := x.allowsStale(x.target.digest)
	resp, err := x.ask(question{method: http.MethodGet, extra: extra, follow: true,
		patience: x.h.outages.patience(x.up.ID()), instead: func() bool { return stale }})
	if stale && x.failed(resp, err) {
		if err == nil {
			resp.Body.Close()
		}
		x.stale = true
		return nil, nil, err
	}
	if err != nil {
		return nil, nil, err
	}
	total, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), wanted)
	if resp.StatusCode != http.StatusPartialContent || !ok || total != "*" && total != strconv.FormatInt(size, 10) || encoded(resp) {
		return nil, resp, nil
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(x.counted(resp.Body), p.bytes); err != nil {
		return nil, nil, fmt.Errorf("reading a range of a blob: %w", err)
	}
	p.by = x.provenBy(resp)
	return p, resp, nil
}

var errNothingToShow = errors.New("the blob has no bytes to show")

// errNotShown says that a registry has shown other bytes than there are.
var errNotShown = errors.New("the registry has shown other bytes of the blob")

// compare compares what was shown with what r has there. The error is
// [errNotShown] if that differs.
func (p *proof) compare(r io.ReadSeeker) error {
	has := make([]byte, len(p.bytes))
	if _, err := r.Seek(p.offset, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.ReadFull(r, has); err != nil {
		return err
	}
	if !bytes.Equal(has, p.bytes) {
		return errNotShown
	}
	return nil
}

// notShown answers with what the upstream gives, which has not shown by a range
// that it has what is kept.
func (x *exchange) notShown(shown *proof, resp *http.Response, err error) {
	x.stats.misses.Add(1)
	switch {
	case err != nil && x.r.Context().Err() != nil:
		panic(http.ErrAbortHandler) // the client has gone
	case shown != nil, errors.Is(err, errNothingToShow): // other bytes, or none
		x.unkept()
	case err != nil:
		x.forward()
	case resp.StatusCode == http.StatusOK:
		x.sent(resp)
	case x.own(resp) && refusesAnyway(resp.StatusCode):
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

// unkept answers GET with a blob from the upstream that is verified on its way,
// and not kept.
func (x *exchange) unkept() {
	resp, err := x.fetch(x.r.Context(), 0)
	if err != nil || resp.StatusCode != http.StatusOK {
		x.refused(resp, err)
		return
	}
	x.answered = x.h.rights.Now()
	x.sent(resp)
}

// sent answers with the whole of a blob that the upstream sends. Once it was
// verified the registry has shown that it is in the repository, and the client
// that it may have it.
func (x *exchange) sent(resp *http.Response) {
	if x.r.Header.Get("Range") != "" || encoded(resp) {
		resp.Body.Close()
		x.forward()
		return
	}
	s := store.NewStream(x.r.Context(), x.target.digest, resp.ContentLength, x.counted(resp.Body), x.ownSource())
	defer s.Close()
	if resp.ContentLength >= 0 {
		x.w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
	}
	x.stream(s, "fwd=miss")
	x.grant()
	x.prove(x.provenBy(resp), x.target.digest)
}

// miss answers GET of a blob that isn't kept: by keeping it.
func (x *exchange) miss() {
	start, ranged := rangeStart(x.r.Header.Get("Range"))
	t, leader := x.h.store.Claim(x.target.digest, x.origin())
	if !leader {
		x.follow(t, start)
		return
	}
	if ranged && start > 0 {
		// Part of a blob can't be verified, so it isn't kept.
		t.Abandon(errNotLed)
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	x.lead(t)
}

// follow answers from a transfer that another client of the repository leads.
func (x *exchange) follow(t *store.Transfer, start int64) {
	waiting, stop := context.WithTimeout(x.r.Context(), x.h.lagTime)
	r, err := t.Wait(waiting)
	stop()
	switch {
	case x.r.Context().Err() != nil:
		return
	case errors.Is(err, context.DeadlineExceeded):
		// The leader still asks. It may be its way that gives no answer.
		x.stats.misses.Add(1)
		x.forward()
		return
	case err != nil:
		// Over by now, or the leader was not given the blob; this client may be.
		if !x.again {
			x.again = true
			x.blob()
			return
		}
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	defer r.Close()
	// What the registry sends to the leader is in the repository, and the leader
	// may have it. What a peer sends is shown to be there by the registry.
	leader, fromRegistry := x.h.leaders.Load(t)
	proven := fromRegistry || x.h.rights.Contains(x.vantage(), x.target.digest)
	if leader != x.who.Client && (!proven || !x.h.rights.Granted(x.who)) && !x.askFor(r.Size(), proven) {
		return
	}
	r.AddSource(x.source())
	if r.Settle(x.r.Context()) == nil && start > r.Arrived()+farAhead {
		x.forward()
		return
	}
	x.stats.hits.Add(1)
	x.following = true
	x.fromTransfer(r, "hit; detail=following")
}

// askFor asks the registry whether the client may have a blob of size bytes that
// is arriving; proven says that it is known to be in the repository. It answers the
// client with what the registry gives, and returns false, if that isn't shown.
func (x *exchange) askFor(size int64, proven bool) bool {
	shown, resp, err := x.askRange(size)
	switch {
	case x.stale:
	case shown == nil:
		x.notShown(shown, resp, err)
		return false
	case proven:
		x.grant()
	default:
		x.shown = shown
	}
	return true
}

var errNotLed = errors.New("not to be had from the upstream through this client")

// lead gets a blob for all clients that want it: from a peer, or from the
// upstream.
func (x *exchange) lead(t *store.Transfer) {
	x.stats.misses.Add(1)
	share := x.share()
	var when time.Time // the registry answered with the blob
	t.OnEnd(func(kept bool) {
		if share != nil {
			share.Close(kept)
		}
		if _, fromRegistry := x.h.leaders.LoadAndDelete(t); kept && fromRegistry {
			x.h.rights.Grant(x.who, when)
			x.h.rights.Prove(x.vantage(), x.target.digest, when) // it may have been redirected on the way
		}
	})
	if share != nil && x.fromPeer(t, share) {
		return
	}
	// Until it is known that the upstream gives the blob, the request ends
	// with the client's; from then on it belongs to the transfer.
	ctx, cancel := context.WithCancel(context.WithoutCancel(x.r.Context()))
	stop := context.AfterFunc(x.r.Context(), cancel)
	resp, err := x.fetch(ctx, 0)
	if err != nil || resp.StatusCode != http.StatusOK || !stop() {
		t.Abandon(errNotLed)
		defer cancel()
		x.refused(resp, err)
		return
	}
	if encoded(resp) {
		t.Abandon(errNotLed)
		resp.Body.Close()
		cancel()
		x.forward()
		return
	}
	if foreign(resp) {
		// A login page, say: the registry may give the blob to those who follow.
		t.Abandon(errNotLed)
		defer cancel()
		x.sent(resp)
		return
	}
	when = x.h.rights.Now()
	x.answered = when
	x.h.leaders.Store(t, x.who.Client)
	body := &cancelBody{x.arriving(resp.Body), cancel}
	r, err := t.Begin(resp.ContentLength, body, x.source())
	if err == nil {
		defer r.Close()
		x.fromTransfer(r, "fwd=miss; stored")
		return
	}
	x.notKept(err)
	resp.Body = body
	x.sent(resp)
}

func (x *exchange) notKept(err error) {
	x.h.log.Info("a blob is served without being kept", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "err", err)
}

// refused answers for a blob that the upstream did not give.
func (x *exchange) refused(resp *http.Response, err error) {
	var at *url.Error
	switch {
	case err == nil && x.own(resp):
		x.relay(resp)
		return
	case err == nil:
		resp.Body.Close()
	case errors.As(err, &at) && strings.HasPrefix(at.URL, x.up.base().String()+"/"):
		x.unreachable(x.w, x.r, err)
		return
	case x.r.Context().Err() == nil:
		x.h.log.Warn("a blob can't be fetched; left to the client", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "err", scrub(err))
	}
	// Where the registry redirected to refuses: to the client it may not, or
	// the client can tell why.
	x.forward()
}

// encoded says whether what comes is not the blob's own bytes, though they were
// asked for. The client may know how to decode it.
func encoded(resp *http.Response) bool {
	e := resp.Header.Get("Content-Encoding")
	return e != "" && e != "identity"
}

// relay sends the client the upstream's answer.
func (x *exchange) relay(resp *http.Response) {
	defer resp.Body.Close()
	x.learn(resp)
	copyHeader(x.w.Header(), resp.Header)
	if resp.ContentLength >= 0 {
		x.w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
	}
	x.w.WriteHeader(resp.StatusCode)
	if _, err := io.Copy(x.w, x.counted(resp.Body)); err != nil {
		panic(http.ErrAbortHandler)
	}
}

// fromTransfer serves a blob from a running transfer.
func (x *exchange) fromTransfer(r *store.TransferReader, status string) {
	err := r.Settle(x.r.Context())
	if err == nil && r.Size() >= 0 && r.Size() <= smallBlob {
		ctx, cancel := context.WithTimeout(x.r.Context(), smallTime)
		if e := r.Ended(ctx); errors.Is(e, store.ErrCorrupt) {
			err = e
		}
		cancel()
	}
	if err != nil {
		switch {
		case x.r.Context().Err() != nil:
		case errors.Is(err, store.ErrCorrupt):
			// Passed through, the whole of it would reach the client.
			x.notThere(err)
		default:
			x.h.log.Warn("a blob can't be had; left to the client", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "err", scrub(err))
			x.forward()
		}
		return
	}
	if r.Size() < 0 {
		o := &onward{x: x, from: r.WithContext(x.r.Context())}
		defer o.Close()
		x.stream(o, status)
		return
	}
	c := &content{x: x, size: r.Size()}
	defer c.Close()
	ctx := x.r.Context()
	if x.following {
		var stop func()
		ctx, stop = x.keepUp(r)
		defer stop()
		c.following = ctx
	}
	c.from = r.WithContext(ctx)
	x.serve(c, status, true)
}

const (
	// smallBlob is of how many bytes a blob is that is verified before its head is
	// sent: image configurations are.
	smallBlob = 64 << 10
	// smallTime is how long that may take. It arrives at once, or its registry is
	// slow.
	smallTime = 500 * time.Millisecond
)

// notThere answers for a blob in whose place the registry has sent something else:
// there is none of that digest, which is final. An answer that breaks off has clients
// try again, though without weir they find out themselves, and give up (dockerd
// tries six times).
func (x *exchange) notThere(err error) {
	x.stats.errors.Add(1)
	x.h.log.Warn("the registry sends something else than the blob", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "err", err)
	x.w.Header().Set("Content-Type", "application/json")
	x.w.WriteHeader(http.StatusNotFound)
	_ = json.NewEncoder(x.w).Encode(map[string]any{"errors": []map[string]string{{
		"code": "BLOB_UNKNOWN", "message": "what " + x.up.Host + " sends has another digest",
	}}})
}

// errLags says that another client's transfer is much slower than the registry.
var errLags = errors.New("it comes much slower than the registry gives")

const (
	// lagTime is how long a transfer may lag before those who follow it leave it.
	lagTime = 10 * time.Second
	// slowPace is what a registry gives that nobody has measured, in bytes per
	// second.
	slowPace = 256 << 10
)

// keepUp returns a context for reading from another client's transfer, which
// ends when the transfer lags: it goes the other client's way, which may have a
// bound, or be held up on purpose. It doesn't lag where the node gets what the
// registry gives, and shares it among many transfers.
func (x *exchange) keepUp(r *store.TransferReader) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(x.r.Context())
	start, _ := rangeStart(x.r.Header.Get("Range"))
	go func() {
		t := time.NewTicker(x.h.lagTime)
		defer t.Stop()
		here, each := r.Arrived(), x.stats.arrivals.sample()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			was, before := here, each
			here, each = r.Arrived(), x.stats.arrivals.sample()
			switch {
			case here >= r.Size()-1: // it has arrived, or waits for its digest
				return
			case here >= start && lags(here-was, progress(before, each), x.stats.arrivals.pace(), x.h.lagTime):
				cancel(errLags)
				return
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

// hit is the cache status of an answer from what is kept.
func (x *exchange) hit() string {
	if x.stale {
		x.stats.stale.Add(1)
		x.h.log.Warn("the upstream gives no answer; served what it gave before", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest)
		return "hit; detail=stale-if-error"
	}
	return "hit"
}

func (x *exchange) headers(status string) {
	h := x.w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/octet-stream")
	}
	h.Set("Docker-Content-Digest", x.target.digest.String())
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	h.Set("Etag", `"`+x.target.digest.String()+`"`)
	h.Set("Cache-Status", "weir; "+status) // RFC 9211
}

// largeBlob is of how many bytes a blob is that takes a moment to read.
const largeBlob = 32 << 20

// headFirst sends the head of an answer before there is anything to follow it:
// clients wait for the one (containerd 30 s), and longer for the other.
type headFirst struct{ http.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (w headFirst) WriteHeader(code int) {
	w.ResponseWriter.WriteHeader(code)
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}

// ReadFrom implements io.ReaderFrom, by that of the writer behind it.
func (w headFirst) ReadFrom(r io.Reader) (int64, error) { return io.Copy(w.ResponseWriter, r) }

// serve answers from content of known size: whole, ranges, or just the head.
// slow is whether it may take a while to come.
func (x *exchange) serve(c *content, status string, slow bool) {
	x.headers(status)
	w := x.w
	if slow {
		w = headFirst{w}
	}
	http.ServeContent(w, x.r, "", time.Time{}, c)
	if c.err != nil && x.r.Context().Err() == nil {
		x.h.log.Warn("a blob broke off", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "at", c.off, "err", scrub(c.err))
	}
}

// stream answers with all that r gives. When it fails the connection breaks,
// so that the client can't take what it got for the whole.
func (x *exchange) stream(r io.Reader, status string) {
	x.headers(status)
	if _, err := io.Copy(x.w, r); err != nil {
		x.h.log.Warn("a blob broke off", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "err", scrub(err))
		panic(http.ErrAbortHandler)
	}
}

// content reads a blob for an answer, and changes over to another source at
// the same offset when one fails.
type content struct {
	x        *exchange
	size     int64
	off      int64
	from     io.ReadSeeker
	tail     io.Reader // set when from can't go on; sequential
	closers  []io.Closer
	replaced bool
	err      error
	// following ends when from lags, which is another client's transfer then.
	following context.Context
}

func (c *content) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += c.off
	case io.SeekEnd:
		offset += c.size
	}
	if c.tail != nil && offset != c.off {
		return 0, errors.New("seek in a blob that is being streamed")
	}
	c.off = offset
	return offset, nil
}

func (c *content) Read(p []byte) (n int, err error) {
	for {
		if c.tail != nil {
			n, err = c.tail.Read(p)
		} else if err = c.x.compare(c.from); err == nil {
			if _, err = c.from.Seek(c.off, io.SeekStart); err == nil {
				n, err = c.from.Read(p)
			}
		}
		c.off += int64(n)
		if n > 0 || err == nil || errors.Is(err, io.EOF) {
			if _, kept := c.from.(*store.BlobReader); kept {
				c.x.stats.fromStore.Add(int64(n))
			}
			if n > 0 {
				err = nil
			}
			return n, err
		}
		if c.replaced || c.x.r.Context().Err() != nil {
			c.err = err
			return 0, err
		}
		c.replaced = true
		if rerr := c.replace(err); rerr != nil {
			c.err = rerr
			return 0, rerr
		}
	}
}

// compare compares what the registry has shown, if anything is to be compared
// still, with what has arrived: it waits until that has.
func (x *exchange) compare(from io.ReadSeeker) error {
	if x.shown == nil {
		return nil
	}
	shown := x.shown
	if err := shown.compare(from); err != nil {
		return err
	}
	x.shown = nil
	x.grant()
	if r, ok := from.(*store.TransferReader); ok && r.Verified() {
		x.prove(shown.by, x.target.digest)
	}
	return nil
}

// replace finds another way to the rest after cause.
func (c *content) replace(cause error) error {
	x := c.x
	if errors.Is(cause, errNotShown) {
		return cause
	}
	if r, ok := c.from.(*store.TransferReader); ok {
		follow := r.Rest
		if c.following != nil && errors.Is(context.Cause(c.following), errLags) {
			x.h.log.Info("another client's transfer lags, and is left for the registry", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "at", c.off)
			follow = r.Leave
		}
		rest, err := follow(x.r.Context(), x.ownSource())
		if err != nil {
			return err
		}
		c.tail, c.closers = rest, append(c.closers, rest)
		return nil
	}
	if !errors.Is(cause, store.ErrCorrupt) && !errors.Is(cause, store.ErrDiskHangs) {
		return cause
	}
	// A damaged file, or a disk that hangs: the blob is fetched again, all of it.
	t, leader := x.h.store.Claim(x.target.digest, x.origin())
	var r *store.TransferReader
	if leader {
		ctx, cancel := context.WithCancel(context.WithoutCancel(x.r.Context()))
		stop := context.AfterFunc(x.r.Context(), cancel)
		resp, err := x.fetch(ctx, 0)
		stop()
		if err == nil && (resp.StatusCode != http.StatusOK || resp.ContentLength != c.size) {
			resp.Body.Close()
			err = fmt.Errorf("%s answers with %s and %d bytes", x.up.Host, resp.Status, resp.ContentLength)
		}
		if err != nil {
			cancel()
			t.Abandon(errNotLed)
			return errors.Join(cause, err)
		}
		body := &cancelBody{x.arriving(resp.Body), cancel}
		if r, err = t.Begin(c.size, body, x.source()); err != nil {
			// What was given until here is known to be right.
			rest := store.NewStream(x.r.Context(), x.target.digest, c.size, body, x.ownSource())
			c.closers = append(c.closers, rest)
			if _, err := io.CopyN(io.Discard, rest, c.off); err != nil {
				return errors.Join(cause, err)
			}
			c.tail = rest
			return nil
		}
	} else {
		var err error
		if r, err = t.Wait(x.r.Context()); err != nil {
			return errors.Join(cause, err)
		}
	}
	c.from, c.closers = r.WithContext(x.r.Context()), append(c.closers, r)
	return nil
}

func (c *content) Close() error {
	for _, cl := range c.closers {
		cl.Close()
	}
	return nil
}
