// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// keptIn is where an answer from what is kept comes from.
func (x *exchange) keptIn(b *store.Blob, d digest.Digest, stale bool) provenance {
	if stale {
		x.stats.stale.Add(1)
		x.logger(d).Warn("the upstream gives no answer; served what it gave before")
	}
	return provenance{source: sourceOf(b), stale: stale}
}

// headers sets those of an answer with content that is known.
func (x *exchange) headers(d digest.Digest, from provenance) {
	h := x.w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/octet-stream")
	}
	h.Set("Docker-Content-Digest", d.String())
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	h.Set("Etag", `"`+d.String()+`"`)
	x.w.from(from)
	x.w.digest = d
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

// serve answers from a blob of known size: whole, ranges, or just the head. slow is
// whether it may take a while to come.
func (x *exchange) serve(c *content, from provenance, slow bool) {
	x.headers(x.target.digest, from)
	var w http.ResponseWriter = x.w
	if slow {
		w = headFirst{w}
	}
	http.ServeContent(w, x.r, "", time.Time{}, c)
	if c.err != nil && x.r.Context().Err() == nil {
		x.logger(x.target.digest).Warn("a blob broke off", "at", c.off, "err", scrub(c.err))
	}
}

// stream answers with all that r gives. When it fails the connection breaks,
// so that the client can't take what it got for the whole.
func (x *exchange) stream(r io.Reader, from provenance) {
	x.headers(x.target.digest, from)
	if _, err := io.Copy(x.w, r); err != nil {
		x.logger(x.target.digest).Warn("a blob broke off", "err", scrub(err))
		panic(http.ErrAbortHandler)
	}
}

// relay sends the client the upstream's answer.
func (x *exchange) relay(resp *reply) {
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

// sent answers with the whole of a blob that the upstream sends, and that isn't
// kept. Once it was verified the registry has shown that it is in the repository,
// and the client that it may have it.
func (x *exchange) sent(resp *reply) {
	if x.r.Header.Get("Range") != "" || encoded(resp) {
		resp.Body.Close()
		x.forward()
		return
	}
	s := store.NewStream(x.r.Context(), x.target.digest, resp.ContentLength, x.counted(resp.Body), x.ownSource)
	defer s.Close()
	if resp.ContentLength >= 0 {
		x.w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
	}
	x.stream(s, provenance{})
	x.grant(resp.at)
	x.prove(x.provenBy(resp), x.target.digest, resp.at)
}

// serveKept serves a blob that is kept.
func (x *exchange) serveKept(b *store.Blob, stale bool) {
	x.stats.hits.Add(1)
	c := &content{x: x, size: b.Size(), from: b.Reader()}
	defer c.Close()
	// Of one that was never read all is read before the first byte is given.
	x.serve(c, x.keptIn(b, x.target.digest, stale), b.Size() >= largeBlob)
}

// serveTransfer serves a blob from a running transfer. If shown isn't nil, it is
// compared with what arrives before anything is given.
func (x *exchange) serveTransfer(r *store.TransferReader, shown *proof, from provenance) {
	if err := r.Settle(x.r.Context()); err != nil {
		switch {
		case x.r.Context().Err() != nil:
		case errors.Is(err, store.ErrCorrupt):
			// Passed through, the whole of it would reach the client.
			x.unreachable(err)
		default:
			x.logger(x.target.digest).Warn("a blob can't be had; left to the client", "err", scrub(err))
			x.forward()
		}
		return
	}
	if r.Size() < 0 {
		o := &onward{x: x, from: r.WithContext(x.r.Context())}
		defer o.Close()
		x.stream(o, from)
		return
	}
	c := &content{x: x, size: r.Size(), shown: shown}
	defer c.Close()
	ctx := x.r.Context()
	if from.source == SourceTransfer {
		var stop func()
		ctx, stop = x.keepUp(r)
		defer stop()
		c.following = ctx
	}
	c.from = r.WithContext(ctx)
	x.serve(c, from, true)
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
	shown    *proof // what the registry has shown of the blob, to be compared
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
		} else if err = c.compare(); err == nil {
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

// compare compares what the registry has shown, if that is to be compared still,
// with what has arrived: it waits until that has.
func (c *content) compare() error {
	if c.shown == nil {
		return nil
	}
	if err := c.shown.compare(c.from); err != nil {
		return err
	}
	c.x.grant(c.shown.at)
	if r, ok := c.from.(*store.TransferReader); ok && r.Verified() {
		c.x.prove(c.shown.by, c.x.target.digest, c.shown.at)
	}
	c.shown = nil
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
			x.logger(x.target.digest).Info("another client's transfer lags, and is left for the registry", "at", c.off)
			follow = r.Leave
		}
		rest, err := follow(x.r.Context(), x.ownSource)
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
		ctx, detach, cancel := x.detachable()
		resp, err := x.fetch(ctx, 0)
		detach()
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
		if r, err = t.Begin(c.size, body, x.source); err != nil {
			// What was given until here is known to be right.
			rest := store.NewStream(x.r.Context(), x.target.digest, c.size, body, x.ownSource)
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
