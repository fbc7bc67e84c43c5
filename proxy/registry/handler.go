// SPDX-License-Identifier: Apache-2.0

// Package registry speaks the OCI distribution protocol between a client and
// the registry that it meant: it answers from the store what the client may
// have and the store has, keeps what passes by, and forwards everything else
// unchanged.
//
// Three rules hold for every answer:
//   - A client gets only what the upstream would give to its own credentials
//     (see rights).
//   - A client never gets the whole of a blob whose digest is not the one that
//     it asked for.
//   - Whatever can't be done here is the upstream's to answer, with the very
//     request that the client sent.
package registry

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// maxManifest bounds a manifest that is kept. The OCI distribution
// specification has registries accept at least 4 MiB.
const maxManifest = 4 << 20

// farAhead is how far beyond a running transfer's end a range may begin and
// still wait for it; what is farther is had faster from the upstream.
const farAhead = 8 << 20

// Upstream is the registry that a client has connected to.
type Upstream struct {
	// Host is HOST or HOST:PORT, in canonical form: the registry's identity.
	Host string
	// Transport sends requests there, and to where the registry redirects,
	// as the client would. It verifies TLS.
	Transport http.RoundTripper
}

// Options of a handler. Store is required.
type Options struct {
	Store *store.Store
	// RightsTTL is how long an upstream's grant is remembered. Zero means
	// five minutes.
	RightsTTL time.Duration
	Log       *slog.Logger // nil means slog.Default()
}

// Handler serves the requests of clients to upstreams.
type Handler struct {
	store  *store.Store
	rights *rights
	log    *slog.Logger
	stats  statsTable
	bufs   bufferPool
}

// New returns a handler.
func New(o Options) *Handler {
	if o.RightsTTL == 0 {
		o.RightsTTL = 5 * time.Minute
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return &Handler{store: o.Store, rights: newRights(o.RightsTTL), log: o.Log}
}

// exchange is one request on its way through.
type exchange struct {
	h      *Handler
	w      http.ResponseWriter
	r      *http.Request
	up     Upstream
	target target
	asker  asker
	stats  *counters
	again  bool // the blob's transfer was somebody else's, and came to nothing
}

// Serve answers a request that a client sent to an upstream.
func (h *Handler) Serve(w http.ResponseWriter, r *http.Request, up Upstream) {
	x := &exchange{h: h, w: w, r: r, up: up, target: parsePath(r.URL.EscapedPath()), stats: h.stats.of(up.Host)}
	x.stats.requests.Add(1)
	// A host that isn't the one of the connection is the upstream's business.
	if Canonical(r.Host) != up.Host && Canonical(r.Host) != stripPort(up.Host) {
		x.target = target{}
	}
	x.asker = asker{up.Host, x.target.repo, h.rights.credentialsOf(r)}
	reading := r.Method == http.MethodGet || r.Method == http.MethodHead
	switch {
	case !reading || r.URL.RawQuery != "":
		x.forward()
	case x.target.kind == blob:
		x.blob()
	case x.target.kind == manifest && x.target.digest != "":
		x.manifest()
	case x.target.kind == manifest && r.Method == http.MethodGet:
		x.tag()
	default:
		x.forward()
	}
}

// permitted says whether the asker may have the target's digest, asking the
// upstream with a HEAD when no answer of its is remembered.
func (x *exchange) permitted() bool {
	if x.h.rights.allows(x.asker, x.target.digest) {
		return true
	}
	resp, err := x.send(x.r.Context(), http.MethodHead, nil)
	if err != nil {
		return false
	}
	resp.Body.Close()
	x.h.rights.learn(x.asker, x.target, resp)
	return x.h.rights.allows(x.asker, x.target.digest)
}

// send sends the client's request with another method, once, following no
// redirect. extra headers go over the client's.
func (x *exchange) send(ctx context.Context, method string, extra http.Header) (*http.Response, error) {
	return x.up.Transport.RoundTrip(x.request(ctx, method, extra))
}

func (x *exchange) request(ctx context.Context, method string, extra http.Header) *http.Request {
	req := x.r.Clone(ctx)
	req.Method = method
	req.URL.Scheme, req.URL.Host = "https", x.up.Host
	req.RequestURI = ""
	req.Body, req.ContentLength = http.NoBody, 0
	req.Header = req.Header.Clone()
	for _, h := range []string{"Connection", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Range", "If-Range"} {
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

// fetch opens the blob at the upstream, from an offset on, following redirects
// to where the registry keeps its blobs.
func (x *exchange) fetch(ctx context.Context, offset int64) (*http.Response, error) {
	extra := http.Header{"Accept-Encoding": {"identity"}}
	if offset > 0 {
		extra.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
	}
	c := http.Client{Transport: x.up.Transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= 5 || req.URL.Scheme != "https" {
			return http.ErrUseLastResponse
		}
		req.Header.Del("Referer")
		return nil
	}}
	return c.Do(x.request(ctx, http.MethodGet, extra))
}

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

// counted counts what comes from the upstream.
func (x *exchange) counted(body io.ReadCloser) io.ReadCloser {
	return &countingBody{body, x.stats}
}

type countingBody struct {
	io.ReadCloser
	stats *counters
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.stats.fromUpstream.Add(int64(n))
	return n, err
}

// blob answers GET and HEAD of a blob.
func (x *exchange) blob() {
	d := x.target.digest
	if b, err := x.h.store.Get(d); err == nil {
		defer b.Close()
		if !x.permitted() {
			x.forward()
			return
		}
		x.stats.hits.Add(1)
		c := &content{x: x, size: b.Size(), from: b.Reader()}
		defer c.Close()
		x.serve(c, "hit")
		return
	}
	if x.r.Method == http.MethodHead {
		x.forward()
		return
	}
	x.miss()
}

// miss answers GET of a blob that isn't kept: by keeping it.
func (x *exchange) miss() {
	start, ranged := rangeStart(x.r.Header.Get("Range"))
	t, leader := x.h.store.Claim(x.target.digest)
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
	r, err := t.Wait(x.r.Context(), x.source())
	switch {
	case x.r.Context().Err() != nil:
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
	if start > r.Arrived()+farAhead {
		x.forward()
		return
	}
	x.stats.hits.Add(1)
	x.arriving(r, "hit; detail=following")
}

var errNotLed = errors.New("not to be had from the upstream through this client")

// lead gets a blob from the upstream for everybody who wants it.
func (x *exchange) lead(t *store.Transfer) {
	x.stats.misses.Add(1)
	// Until it is known that the upstream gives the blob, the request ends
	// with the client's; from then on it belongs to the transfer.
	ctx, cancel := context.WithCancel(context.WithoutCancel(x.r.Context()))
	stop := context.AfterFunc(x.r.Context(), cancel)
	resp, err := x.fetch(ctx, 0)
	if err != nil || resp.StatusCode != http.StatusOK || !stop() {
		t.Abandon(errNotLed)
		defer cancel()
		if err == nil {
			defer resp.Body.Close()
			if resp.Request.URL.Host == x.up.Host {
				x.relay(resp)
				return
			}
			// Where the registry redirected to refuses: to the client it
			// may not, or the client can tell why.
		}
		if err != nil && x.r.Context().Err() == nil {
			x.h.log.Warn("a blob can't be fetched; left to the client", "registry", x.up.Host, "repository", x.target.repo, "digest", x.target.digest, "err", scrub(err))
		}
		x.forward()
		return
	}
	x.h.rights.learn(x.asker, x.target, resp)
	body := &cancelBody{x.counted(resp.Body), cancel}
	r, err := t.Begin(resp.ContentLength, body, x.source())
	if err == nil {
		defer r.Close()
		x.arriving(r, "fwd=miss; stored")
		return
	}
	x.h.log.Info("a blob is served without being kept", "registry", x.up.Host, "repository", x.target.repo, "digest", x.target.digest, "err", err)
	s := store.NewStream(x.r.Context(), x.target.digest, resp.ContentLength, body, x.source())
	defer s.Close()
	if resp.ContentLength >= 0 {
		x.w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
	}
	x.stream(s, "fwd=miss")
}

// relay sends the client the upstream's refusal.
func (x *exchange) relay(resp *http.Response) {
	x.h.rights.learn(x.asker, x.target, resp)
	copyHeader(x.w.Header(), resp.Header)
	if resp.ContentLength >= 0 {
		x.w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
	}
	x.w.WriteHeader(resp.StatusCode)
	if _, err := io.Copy(x.w, resp.Body); err != nil {
		panic(http.ErrAbortHandler)
	}
}

type cancelBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b *cancelBody) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
}

// arriving serves a blob from a running transfer.
func (x *exchange) arriving(r *store.TransferReader, status string) {
	if r.Size() < 0 {
		x.stream(r.WithContext(x.r.Context()), status)
		return
	}
	c := &content{x: x, size: r.Size(), from: r.WithContext(x.r.Context())}
	defer c.Close()
	x.serve(c, status)
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

// serve answers from content of known size: whole, ranges, or just the head.
func (x *exchange) serve(c *content, status string) {
	x.headers(status)
	http.ServeContent(x.w, x.r, "", time.Time{}, c)
	if c.err != nil && x.r.Context().Err() == nil {
		x.h.log.Warn("a blob broke off", "registry", x.up.Host, "repository", x.target.repo, "digest", x.target.digest, "at", c.off, "err", scrub(c.err))
	}
}

// stream answers with all that r gives. When it fails the connection breaks,
// so that the client can't take what it got for the whole.
func (x *exchange) stream(r io.Reader, status string) {
	x.headers(status)
	if _, err := io.Copy(x.w, r); err != nil {
		x.h.log.Warn("a blob broke off", "registry", x.up.Host, "repository", x.target.repo, "digest", x.target.digest, "err", scrub(err))
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
		rest, err := r.Rest(x.r.Context(), x.source())
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
	t, leader := x.h.store.Claim(x.target.digest)
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

// manifest answers GET and HEAD of a manifest by digest.
func (x *exchange) manifest() {
	body, mediaType, ok := x.keptManifest(x.target.digest)
	if !ok || !x.permitted() {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	x.stats.hits.Add(1)
	x.stats.fromStore.Add(int64(len(body)))
	x.w.Header().Set("Content-Type", mediaType)
	x.headers("hit")
	http.ServeContent(x.w, x.r, "", time.Time{}, bytes.NewReader(body))
}

// tag answers GET of a manifest by tag. What the tag is, is the upstream's to
// say each time; a HEAD asks for that when the answer will probably be kept.
func (x *exchange) tag() {
	key := tag{x.up.Host, x.target.repo, x.target.tag, strings.Join(x.r.Header.Values("Accept"), ",")}
	was, known := x.h.rights.tags.Get(key)
	if !known || !x.h.store.Has(was) || conditional(x.r) {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	resp, err := x.send(x.r.Context(), http.MethodHead, nil)
	if err != nil {
		x.forward()
		return
	}
	resp.Body.Close()
	x.h.rights.learn(x.asker, x.target, resp)
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if resp.StatusCode != http.StatusOK || err != nil {
		x.forward()
		return
	}
	x.h.rights.tags.Add(key, d)
	body, mediaType, ok := x.keptManifest(d)
	if !ok || mediaType != resp.Header.Get("Content-Type") {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	x.stats.hits.Add(1)
	x.stats.fromStore.Add(int64(len(body)))
	x.target.digest = d
	copyHeader(x.w.Header(), resp.Header)
	x.headers("hit; detail=head")
	x.w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = x.w.Write(body)
}

// keptManifest reads a manifest from the store if it is of a media type that
// the client accepts.
func (x *exchange) keptManifest(d digest.Digest) ([]byte, string, bool) {
	b, err := x.h.store.Get(d)
	if err != nil {
		return nil, "", false
	}
	defer b.Close()
	if b.Size() > maxManifest {
		return nil, "", false
	}
	body, err := io.ReadAll(b.Reader())
	if err != nil {
		return nil, "", false
	}
	mt := mediaTypeOf(body)
	return body, mt, mt != "" && accepts(x.r, mt)
}

// mediaTypeOf tells a manifest's media type from its content, empty when it
// can't. An OCI manifest need not name its own (image-spec, "manifest.md").
func mediaTypeOf(b []byte) string {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
	}
	if json.Unmarshal(b, &m) != nil || m.SchemaVersion != 2 {
		return ""
	}
	switch {
	case m.MediaType != "":
		if strings.ContainsAny(m.MediaType, "\r\n\x00") || len(m.MediaType) > 255 {
			return ""
		}
		return m.MediaType
	case m.Manifests != nil && m.Config == nil && m.Layers == nil:
		return "application/vnd.oci.image.index.v1+json"
	case m.Config != nil && m.Manifests == nil:
		return "application/vnd.oci.image.manifest.v1+json"
	}
	return ""
}

func accepts(r *http.Request, mediaType string) bool {
	values := r.Header.Values("Accept")
	if len(values) == 0 {
		return true
	}
	for _, v := range values {
		for part := range strings.SplitSeq(v, ",") {
			mt, _, _ := strings.Cut(part, ";")
			switch mt = strings.TrimSpace(mt); {
			case mt == "*/*", strings.EqualFold(mt, mediaType), mt == "application/*" && strings.HasPrefix(mediaType, "application/"):
				return true
			}
		}
	}
	return false
}

func conditional(r *http.Request) bool {
	return slices.ContainsFunc([]string{"If-None-Match", "If-Modified-Since", "If-Match", "If-Unmodified-Since", "Range"},
		func(h string) bool { return r.Header.Get(h) != "" })
}

// forward sends the client's request to the upstream and its answer back,
// unchanged, and learns from it.
func (x *exchange) forward() {
	p := httputil.ReverseProxy{
		Transport:     x.up.Transport,
		FlushInterval: -1,
		BufferPool:    &x.h.bufs,
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Scheme, pr.Out.URL.Host, pr.Out.Host = "https", x.up.Host, pr.In.Host
			pr.Out.URL.RawQuery = pr.In.URL.RawQuery // ReverseProxy drops what it can't parse
			if _, ok := pr.In.Header["Accept-Encoding"]; !ok {
				pr.Out.Header.Del("Accept-Encoding")
			}
		},
		ModifyResponse: x.passing,
		ErrorHandler:   x.unreachable,
		ErrorLog:       slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	p.ServeHTTP(x.w, x.r)
}

// passing sees each forwarded answer.
func (x *exchange) passing(resp *http.Response) error {
	if x.target.kind != other {
		switch x.r.Method {
		case http.MethodGet, http.MethodHead:
			x.h.rights.learn(x.asker, x.target, resp)
		case http.MethodDelete:
			if x.target.digest != "" {
				x.h.rights.forget(x.asker, x.target.digest)
			}
		}
	}
	if x.r.Method == http.MethodGet && x.target.kind == manifest && resp.StatusCode == http.StatusOK {
		if err := x.keepManifest(resp); err != nil {
			return err
		}
	}
	resp.Body = x.counted(resp.Body)
	return nil
}

// keepManifest keeps a manifest that passes by. The error is for one that
// isn't what was asked for.
func (x *exchange) keepManifest(resp *http.Response) error {
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	rest := resp.Body
	resp.Body = readCloser{io.MultiReader(bytes.NewReader(raw), rest), rest}
	if err != nil || len(raw) > maxManifest {
		return nil // the client will see the same
	}
	body := raw
	switch resp.Header.Get("Content-Encoding") {
	case "":
	case "gzip":
		zr, err := gzip.NewReader(bytes.NewReader(raw))
		if err != nil {
			return nil
		}
		if body, err = io.ReadAll(io.LimitReader(zr, maxManifest+1)); err != nil || len(body) > maxManifest {
			return nil
		}
	default:
		return nil
	}
	d := x.target.digest
	if d == "" {
		if d, err = digest.Parse(resp.Header.Get("Docker-Content-Digest")); err != nil {
			d = digest.FromBytes(body)
		}
	}
	switch err := x.h.store.Put(d, body); {
	case errors.Is(err, store.ErrCorrupt) && x.target.digest != "":
		return fmt.Errorf("%s sent a manifest that is not %s", x.up.Host, d)
	case err != nil:
		x.h.log.Info("a manifest is not kept", "registry", x.up.Host, "repository", x.target.repo, "digest", d, "err", err)
		return nil
	}
	if x.target.tag != "" && mediaTypeOf(body) != "" {
		x.h.rights.tags.Add(tag{x.up.Host, x.target.repo, x.target.tag, strings.Join(x.r.Header.Values("Accept"), ",")}, d)
	}
	return nil
}

type readCloser struct {
	io.Reader
	io.Closer
}

// unreachable answers for an upstream that gave no answer, in the form of the
// distribution specification's errors.
func (x *exchange) unreachable(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has gone
	}
	err = scrub(err)
	x.stats.errors.Add(1)
	x.h.log.Warn("no answer from the upstream", "registry", x.up.Host, "method", r.Method, "path", r.URL.Path, "err", err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadGateway)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{
		"code": "UNAVAILABLE", "message": "no answer from " + x.up.Host + ": " + err.Error(),
	}}})
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

func copyHeader(dst, src http.Header) {
	for k, v := range src {
		dst[k] = v
	}
	for _, h := range []string{"Connection", "Keep-Alive", "Content-Length", "Transfer-Encoding"} {
		dst.Del(h)
	}
}

// rangeStart is where a Range header's only range begins.
func rangeStart(header string) (int64, bool) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	if !ok {
		return 0, header != ""
	}
	from, _, ok := strings.Cut(spec, "-")
	n, err := strconv.ParseInt(from, 10, 64)
	if !ok || err != nil || n < 0 {
		return 1 << 62, true // a suffix, or something else that needs the whole
	}
	return n, true
}

func stripPort(host string) string {
	if i := strings.LastIndexByte(host, ':'); i > 0 && !strings.HasSuffix(host, "]") {
		return host[:i]
	}
	return host
}

// bufferPool lends the buffers for forwarding.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get() []byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, 32<<10)
}

func (p *bufferPool) Put(b []byte) { p.pool.Put(&b) }
