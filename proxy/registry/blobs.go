// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

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
	c := http.Client{Transport: x.up.Transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= 5 || req.URL.Scheme != "https" && req.URL.Host != x.up.Plain {
			return http.ErrUseLastResponse
		}
		req.Header.Del("Referer")
		return nil
	}}
	ctx, cancel := context.WithCancel(ctx)
	timer := time.AfterFunc(headTime, cancel)
	resp, err := c.Do(x.request(ctx, http.MethodGet, extra))
	if timer.Stop(); err != nil {
		cancel()
		return nil, err
	}
	resp.Body = &cancelBody{resp.Body, cancel}
	return resp, nil
}

// headTime bounds the wait for an answer that more than one client may wait for.
const headTime = 2 * time.Minute

// source opens the blob for a transfer that broke off. It outlives the
// client's request, with the client's credentials.
func (x *exchange) source() store.Source {
	return func(ctx context.Context, offset int64) (io.ReadCloser, error) {
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
		default:
			resp.Body.Close()
			return nil, fmt.Errorf("%s answers a range of a blob with %s", x.up.Host, resp.Status)
		}
		return x.counted(resp.Body), nil
	}
}

// blob answers GET and HEAD of a blob.
func (x *exchange) blob() {
	d := x.target.digest
	if b, err := x.h.store.Get(d); err == nil {
		defer b.Close()
		if x.r.Method == http.MethodHead {
			if x.registrySays() {
				return
			}
			x.stale = true
		}
		if x.stale || x.permitted() {
			x.stats.hits.Add(1)
			c := &content{x: x, size: b.Size(), from: b.Reader()}
			defer c.Close()
			// Of one that was never read all is read before the first byte is given.
			x.serve(c, x.hit(), b.Size() >= largeBlob)
			return
		}
		if x.up.believed() {
			x.forward()
			return
		}
	}
	switch {
	case x.r.Method == http.MethodHead:
		x.forward()
	case !x.up.believed():
		x.prove()
	default:
		x.miss()
	}
}

// registrySays answers HEAD of a blob with what the registry says, and returns
// false when it says nothing and what it said before will do. Who pushes asks so
// what the registry has, and doesn't send that.
func (x *exchange) registrySays() bool {
	stale := x.h.rights.allowsStale(x.asker, x.target.digest)
	resp, err := x.head(func() bool { return stale })
	switch {
	case failed(resp, err) && stale:
		return false
	case err != nil:
		x.unreachable(x.w, x.r, err)
	default:
		x.relay(resp)
	}
	return true
}

// miss answers GET of a blob that isn't kept: by keeping it.
func (x *exchange) miss() {
	start, ranged := rangeStart(x.r.Header.Get("Range"))
	t, leader := x.h.store.Claim(x.target.digest, x.origin())
	if leader {
		if ranged && start > 0 {
			// Part of a blob can't be verified, so it isn't kept.
			t.Abandon(errNotLed)
			x.stats.misses.Add(1)
			x.forward()
			return
		}
		x.lead(t)
		return
	}
	if !x.permitted() {
		x.forward()
		return
	}
	waiting, stop := context.WithTimeout(x.r.Context(), x.h.lagTime)
	r, err := t.Wait(waiting, x.source())
	stop()
	switch {
	case x.r.Context().Err() != nil:
		return
	case errors.Is(err, context.DeadlineExceeded):
		// The leader still asks. It may be his way that gives no answer.
		x.stats.misses.Add(1)
		x.forward()
		return
	case err != nil:
		// Over by now, or the leader was not given the blob; we may be.
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
	if r.Settle(x.r.Context()) == nil && start > r.Arrived()+farAhead {
		x.forward()
		return
	}
	x.stats.hits.Add(1)
	x.following = true
	x.arriving(r, "hit; detail=following")
}

var errNotLed = errors.New("not to be had from the upstream through this client")

// lead gets a blob for everybody who wants it: from a peer, or from the
// upstream.
func (x *exchange) lead(t *store.Transfer) {
	x.stats.misses.Add(1)
	if share := x.share(); share != nil {
		t.OnEnd(share.Close)
		if x.fromPeer(t, share) {
			return
		}
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
	x.learn(resp)
	if encoded(resp) {
		t.Abandon(errNotLed)
		resp.Body.Close()
		cancel()
		x.forward()
		return
	}
	body := &cancelBody{x.counted(resp.Body), cancel}
	r, err := t.Begin(resp.ContentLength, body, x.source())
	if err == nil {
		defer r.Close()
		x.arriving(r, "fwd=miss; stored")
		return
	}
	x.notKept(err)
	s := store.NewStream(x.r.Context(), x.target.digest, resp.ContentLength, body, x.source())
	defer s.Close()
	if resp.ContentLength >= 0 {
		x.w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
	}
	x.stream(s, "fwd=miss")
}

func (x *exchange) notKept(err error) {
	x.h.log.Info("a blob is served without being kept", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "err", err)
}

// refused answers for a blob that the upstream did not give.
func (x *exchange) refused(resp *http.Response, err error) {
	var at *url.Error
	switch {
	case err == nil && resp.Request.URL.Host == x.up.base().Host:
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

// prove gets a blob from a registry that is taken to have it only when it has
// sent it. Nobody else waits for that: such a registry may send anything.
func (x *exchange) prove() {
	x.stats.misses.Add(1)
	if x.r.Header.Get("Range") != "" {
		x.forward()
		return
	}
	resp, err := x.fetch(x.r.Context(), 0)
	if err != nil || resp.StatusCode != http.StatusOK {
		x.refused(resp, err)
		return
	}
	if encoded(resp) {
		resp.Body.Close()
		x.forward()
		return
	}
	x.learn(resp)
	up := x.h.store.NewUpload(x.origin())
	defer up.Close()
	s := store.NewStream(x.r.Context(), x.target.digest, resp.ContentLength, x.counted(resp.Body), x.source())
	defer s.Close()
	if resp.ContentLength >= 0 {
		x.w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
	}
	x.stream(io.TeeReader(s, up), "fwd=miss")
	x.h.rights.contains(x.asker.repository, x.target.digest)
	if err := up.Commit(x.target.digest); err != nil {
		x.notKept(err)
	}
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
	if _, err := io.Copy(x.w, resp.Body); err != nil {
		panic(http.ErrAbortHandler)
	}
}

// arriving serves a blob from a running transfer.
func (x *exchange) arriving(r *store.TransferReader, status string) {
	if err := r.Settle(x.r.Context()); err != nil {
		switch {
		case x.r.Context().Err() != nil:
		case errors.Is(err, store.ErrCorrupt):
			// Passed through, the whole of it would reach the client.
			x.unreachable(x.w, x.r, err)
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
		here, all := r.Arrived(), x.h.taken()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			was, before := here, all
			here, all = r.Arrived(), x.h.taken()
			switch {
			case here >= r.Size()-1: // it has arrived, or waits for its digest
				return
			case here >= start && lags(here-was, all-before, x.stats.pace.Load(), x.h.lagTime):
				cancel(errLags)
				return
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

// lags says whether a transfer of which so many bytes came in a time, while so
// many came in all, is much slower than a registry that gives pace, or 0 if that
// isn't known.
func lags(got, all, pace int64, in time.Duration) bool {
	if pace == 0 {
		pace = slowPace
	}
	given := int64(float64(pace) * in.Seconds())
	return got < given/4 && all < given/2
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
		} else {
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

// replace finds another way to the rest after cause.
func (c *content) replace(cause error) error {
	x := c.x
	if r, ok := c.from.(*store.TransferReader); ok {
		follow := r.Rest
		if c.following != nil && errors.Is(context.Cause(c.following), errLags) {
			x.h.log.Info("another client's transfer lags, and is left for the registry", "registry", x.up.ID(), "repository", x.target.repo, "digest", x.target.digest, "at", c.off)
			follow = r.Leave
		}
		rest, err := follow(x.r.Context(), x.source())
		if err != nil {
			return err
		}
		c.tail, c.closers = rest, append(c.closers, rest)
		return nil
	}
	if !errors.Is(cause, store.ErrCorrupt) {
		return cause
	}
	// A damaged file: the blob is fetched again, all of it.
	t, leader := x.h.store.Claim(x.target.digest, x.origin())
	var r *store.TransferReader
	if leader {
		ctx := context.WithoutCancel(x.r.Context())
		resp, err := x.fetch(ctx, 0)
		if err == nil && (resp.StatusCode != http.StatusOK || resp.ContentLength != c.size) {
			resp.Body.Close()
			err = fmt.Errorf("%s answers with %s and %d bytes", x.up.Host, resp.Status, resp.ContentLength)
		}
		if err != nil {
			t.Abandon(errNotLed)
			return errors.Join(cause, err)
		}
		if r, err = t.Begin(c.size, x.counted(resp.Body), x.source()); err != nil {
			resp.Body.Close()
			return errors.Join(cause, err)
		}
	} else {
		var err error
		if r, err = t.Wait(x.r.Context(), x.source()); err != nil {
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
