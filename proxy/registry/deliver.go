// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"strconv"
	"sync"
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
	if from.source == SourceStore || from.source == SourceContainerd {
		x.w.kept = &x.stats.fromStore
	}
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

// serve answers with a blob: whole, ranges, or just the head. slow is whether it may
// take a while to come. When it fails the connection breaks, so that the client can't
// take what it got for the whole.
func (x *exchange) serve(r io.ReadSeeker, size int64, from provenance, slow bool) {
	x.headers(x.target.digest, from)
	if size < 0 {
		x.copy(r)
		return
	}
	var w http.ResponseWriter = x.w
	if slow {
		w = headFirst{w}
	}
	body := &watched{r: r}
	several := within(x.wanted(), size)
	if len(several) > 1 && x.r.Method == http.MethodGet && !conditionalRange(x.r) {
		serveRanges(w, body, size, several)
	} else {
		http.ServeContent(w, x.r, "", time.Time{}, body)
	}
	if err := body.end(); err != nil && x.r.Context().Err() == nil {
		x.logger(x.target.digest).Warn("a blob broke off", "at", x.w.bytes.Load(), "err", scrub(err))
	}
}

// copy gives all of r.
func (x *exchange) copy(r io.Reader) {
	if _, err := io.Copy(x.w, r); err != nil {
		x.logger(x.target.digest).Warn("a blob broke off", "at", x.w.bytes.Load(), "err", scrub(err))
		panic(http.ErrAbortHandler)
	}
}

// serveRanges answers with several ranges of what has size bytes (RFC 9110, section 15.3.7.2), as http.ServeContent does,
// but for more than 200 as well.
func serveRanges(w http.ResponseWriter, r io.ReadSeeker, size int64, ranges []store.Span) {
	contentType, boundary := w.Header().Get("Content-Type"), multipart.NewWriter(nil).Boundary()
	write := func(to io.Writer, content func(store.Span, io.Writer) error) {
		m := multipart.NewWriter(to)
		_ = m.SetBoundary(boundary)
		for _, e := range ranges {
			part, err := m.CreatePart(textproto.MIMEHeader{
				"Content-Type": {contentType}, "Content-Range": {fmt.Sprintf("bytes %d-%d/%d", e.From, e.To-1, size)},
			})
			if err != nil || content(e, part) != nil {
				return // which the client sees by the length
			}
		}
		m.Close()
	}
	var heads bytes.Buffer
	length := int64(0)
	write(&heads, func(e store.Span, _ io.Writer) error {
		length += e.To - e.From
		return nil
	})
	w.Header().Set("Accept-Ranges", "bytes")
	w.Header().Set("Content-Type", severalRanges+"; boundary="+boundary)
	w.Header().Set("Content-Length", strconv.FormatInt(length+int64(heads.Len()), 10))
	w.WriteHeader(http.StatusPartialContent)
	write(w, func(e store.Span, part io.Writer) error {
		if _, err := r.Seek(e.From, io.SeekStart); err != nil {
			return err
		}
		_, err := io.CopyN(part, r, e.To-e.From)
		return err
	})
}

// watched remembers why reading failed: http.ServeContent doesn't say. Several ranges, of which some are
// from the end, it has a goroutine read, which may go on when it has returned.
type watched struct {
	mu    sync.Mutex
	r     io.ReadSeeker
	err   error
	ended bool
}

// Read implements io.Reader.
func (w *watched) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return 0, http.ErrBodyReadAfterClose
	}
	n, err := w.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		w.err = err
	}
	return n, err
}

// Seek implements io.Seeker.
func (w *watched) Seek(offset int64, whence int) (int64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return 0, http.ErrBodyReadAfterClose
	}
	return w.r.Seek(offset, whence)
}

// end has nothing be read any more, and says why reading failed.
func (w *watched) end() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	return w.err
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
	x.headers(x.target.digest, provenance{})
	x.copy(s)
	x.grant(resp.at)
	x.prove(x.provenBy(resp), x.target.digest, resp.at)
}

// failover is how a blob is read on when where it is read from fails.
func (x *exchange) failover() store.Failover {
	return store.Failover{Origin: x.origin(), Fetch: x.source, Own: x.ownSource}
}

// serveKept serves a blob that is kept.
func (x *exchange) serveKept(b *store.Blob, stale bool) {
	x.stats.hits.Add(1)
	r := b.Reader().With(x.r.Context(), x.failover())
	defer r.Close()
	// Of one that was never read all is read before the first byte is given.
	x.serve(r, b.Size(), x.keptIn(b, x.target.digest, stale), b.Size() >= largeBlob)
}

// serveTransfer serves a blob from a running transfer. If shown isn't nil, it is
// compared with what arrives before anything is given.
func (x *exchange) serveTransfer(r *store.Reader, shown *proof, from provenance) {
	err := r.WaitReadable(x.r.Context())
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
		case errors.Is(err, store.ErrCorrupt) && (errors.Is(err, errNotAnew) || from.ranged):
			x.askForAll()
		case errors.Is(err, store.ErrCorrupt):
			// Passed through, the whole of it would reach the client.
			x.notThere(err)
		default:
			x.logger(x.target.digest).Warn("a blob can't be had; left to the client", "err", scrub(err))
			x.forward()
		}
		return
	}
	r.With(x.r.Context(), x.failover())
	if from.source == SourceTransfer && r.Size() >= 0 {
		defer x.keepUp(r)()
	}
	var body io.ReadSeeker = r
	if shown != nil {
		body = &compared{Reader: r, x: x, shown: shown}
	}
	x.serve(body, r.Size(), from, true)
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
	x.logger(x.target.digest).Warn("the registry sends something else than the blob", "err", err)
	x.fail(http.StatusNotFound, "BLOB_UNKNOWN", "what "+x.up.Host+" sends has another digest")
}

// askForAll answers with what the registry gives to a request for all of a blob, of which
// ranges were wrong.
func (x *exchange) askForAll() {
	resp, err := x.fetch(x.r.Context(), 0)
	if err != nil || resp.StatusCode != http.StatusOK {
		x.refused(resp, err)
		return
	}
	x.sent(resp)
}

// compared is a reader of a transfer that gives nothing before what the registry has
// shown was compared with what has arrived; or, where the peer that it comes from, which
// is believed, has agreed, nothing from there on.
type compared struct {
	*store.Reader
	x     *exchange
	shown *proof // nil once it was
}

// Read implements io.Reader.
func (c *compared) Read(p []byte) (int, error) {
	if shown := c.shown; shown != nil {
		at, err := c.Seek(0, io.SeekCurrent)
		if rest := shown.offset - at; err == nil && shown.agreed && rest > 0 {
			return c.Reader.Read(p[:min(int64(len(p)), rest)])
		}
		if err == nil {
			err = shown.compare(c.Reader)
		}
		if err == nil {
			_, err = c.Seek(at, io.SeekStart)
		}
		if errors.Is(err, errNotShown) && shown.agreed {
			_ = c.Ended(c.x.r.Context()) // or the client's next try would be of the same transfer
		}
		if err != nil {
			return 0, err
		}
		c.x.grant(shown.at)
		if c.Verified() {
			c.x.prove(shown.by, c.x.target.digest, shown.at)
		}
		c.shown = nil
	}
	return c.Reader.Read(p)
}

const (
	// lagTime is how long a transfer may lag before those who follow it leave it.
	lagTime = 10 * time.Second
	// slowPace is what a registry gives that wasn't measured, in bytes per
	// second.
	slowPace = 256 << 10
)

// keepUp has a reader leave another client's transfer when that lags, until stop is
// called: it goes the other client's way, which may have a bound, or be held up on
// purpose. It doesn't lag where the node gets what the registry gives, and shares it
// among many transfers.
func (x *exchange) keepUp(r *store.Reader) (stop context.CancelFunc) {
	ctx, stop := context.WithCancel(x.r.Context())
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
			case lags(here-was, progress(before, each), x.stats.arrivals.pace(), x.h.lagTime):
				x.logger(x.target.digest).Info("another client's transfer lags, and is left for the registry", "at", here)
				r.Detach()
				return
			}
		}
	}()
	return stop
}
