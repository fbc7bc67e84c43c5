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
//
// When the upstream can't answer (no connection, 429, 5xx), what it said last
// is good for a while longer, as the directive stale-if-error of RFC 5861 has
// it: a tag is what it was, and what everybody was given is given to everybody.
package registry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/semaphore"
	"weir/proxy/store"
)

// Upstream is the registry that a client has connected to.
type Upstream struct {
	// Host is HOST or HOST:PORT in canonical form: what clients call it.
	Host string
	// Plain is the address and port of a registry that is spoken to without
	// TLS, and empty for all others. Since nothing says who answers there, it
	// is part of the registry's identity, and such a registry's word that it
	// has a blob is not taken: it has to send it once.
	Plain string
	// Place stands for the network in which Plain is an address: in a pod's,
	// whoever may set it up there can be at any address. So it is part of the
	// identity of a registry without TLS, too. Empty means the node's.
	Place string
	// Own stands for the certificates that the client's runtime verifies the
	// registry with where this node doesn't trust it, and is empty for all
	// others. Whoever has the runtime can say by them that he is any registry.
	// So they are part of the registry's identity too, and its word isn't taken.
	Own string
	// As tells clients apart that the registry knows by something that isn't
	// in their requests, such as a TLS certificate. Empty means nothing.
	As string
	// Client names the client for people. It gives no rights.
	Client string
	// Transport sends requests there, and to where the registry redirects,
	// as the client would. It verifies TLS.
	Transport http.RoundTripper
}

// ID is the registry's identity: what it says of its repositories holds for
// those of no other.
func (u Upstream) ID() string {
	if u.Plain != "" && u.Place != "" {
		return u.name() + "#" + u.Place
	}
	return u.name()
}

// name is the identity as people see it: one registry is one line in figures,
// from wherever it is reached.
func (u Upstream) name() string {
	if u.Plain != "" {
		return "http://" + u.Host + "@" + u.Plain
	}
	host := u.Host
	if host == dockerHubIndex {
		host = DockerHub
	}
	if u.Own != "" {
		return host + "#" + u.Own
	}
	return host
}

// believed says whether the upstream's word is enough that it has a blob. Any
// other may say so of somebody else's secret: it has to send it once.
func (u Upstream) believed() bool { return u.Plain == "" && u.Own == "" }

// base is where requests go.
func (u Upstream) base() *url.URL {
	if u.Plain != "" {
		return &url.URL{Scheme: "http", Host: u.Plain}
	}
	host := u.Host
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is6() {
		host = "[" + host + "]"
	}
	return &url.URL{Scheme: "https", Host: host}
}

// Options of a handler. Store is required.
type Options struct {
	Store *store.Store
	// RightsTTL is how long an upstream's grant is remembered. Zero means
	// [DefaultRightsTTL].
	RightsTTL time.Duration
	// StaleIfError is for how long an upstream's answer is good when it gives
	// no other. Zero means never.
	StaleIfError time.Duration
	// Peers may have what this node has not. Nil means that there are none.
	Peers Peers
	// File keeps what is known of tags over restarts. Empty means nowhere.
	File string
	// Tracer gets a span for each pull and each of its parts. Nil means none.
	Tracer trace.Tracer
	Log    *slog.Logger // nil means slog.Default()
}

// Defaults of [Options].
const (
	DefaultRightsTTL    = 5 * time.Minute
	DefaultStaleIfError = 24 * time.Hour
)

// Handler serves the requests of clients to upstreams.
type Handler struct {
	store    *store.Store
	rights   *rights
	tags     *tags
	sessions *sessions
	memory   *quota // of manifests that pass by
	outages  outages
	tokens   *tokens
	peers    Peers
	names    names
	types    *lru.Cache[digest.Digest, string] // media types of manifests that are kept
	file     string
	log      *slog.Logger
	stats    statsTable
	pulls    pulls
	bufs     bufferPool
	lagTime  time.Duration

	ctx    context.Context // ends what runs in the background
	cancel context.CancelFunc
	wg     sync.WaitGroup
	asking *semaphore.Weighted // bounds what is asked in the background
}

// saveInterval is how often what changed is written to Options.File.
const saveInterval = 10 * time.Second

// New returns a handler. Close it before its store.
func New(o Options) *Handler {
	if o.RightsTTL == 0 {
		o.RightsTTL = DefaultRightsTTL
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Tracer == nil {
		o.Tracer = noop.Tracer{}
	}
	h := &Handler{store: o.Store, pulls: pulls{tracer: o.Tracer}, rights: newRights(o.RightsTTL, o.StaleIfError), tags: newTags(),
		sessions: newSessions(), memory: newQuota(manifestMemory, ownerMemory), outages: newOutages(), tokens: newTokens(), peers: o.Peers, names: newNames(), file: o.File, log: o.Log, lagTime: lagTime, asking: semaphore.NewWeighted(4)}
	h.types, _ = lru.New[digest.Digest, string](4096)
	h.ctx, h.cancel = context.WithCancel(context.Background())
	if h.file == "" {
		return h
	}
	if err := h.recall(); err != nil {
		h.log.Warn("what was known of tags can't be read, and is forgotten", "file", h.file, "err", err)
	}
	h.wg.Go(func() {
		t := time.NewTicker(saveInterval)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				h.save()
			case <-h.ctx.Done():
				return
			}
		}
	})
	return h
}

func (h *Handler) save() {
	if err := h.remember(); err != nil {
		h.log.Warn("what is known of tags can't be kept", "file", h.file, "err", err)
	}
}

// Close ends what runs in the background and keeps what is known.
func (h *Handler) Close() {
	h.cancel()
	h.wg.Wait()
	h.sessions.close()
	h.pulls.close()
	h.save()
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
	push   *push // what the request's body is part of
	again  bool  // the blob's transfer was somebody else's, and came to nothing
	size   int64 // of the blob, as the upstream says, or -1
	stale  bool  // the answer is what the upstream said before it fell silent
	// following says that the blob is read from another client's transfer.
	following bool
}

// ServeAnonymous answers like [Handler.Serve]. When the client has no
// credentials and the registry wants to see some, it is asked again with the
// token that everybody gets: for clients that can't ask for one, because they
// speak to weir and not to the registry.
func (h *Handler) ServeAnonymous(w http.ResponseWriter, r *http.Request, up Upstream) {
	if r.Header.Get("Authorization") == "" {
		up.Transport = &anonymous{h, up}
	}
	h.Serve(w, r, up)
}

// Serve answers a request that a client sent to an upstream.
func (h *Handler) Serve(w http.ResponseWriter, r *http.Request, up Upstream) {
	x := &exchange{h: h, w: w, r: r, up: up, target: parsePath(r.URL.EscapedPath()), stats: h.stats.of(up.name()), size: -1}
	x.stats.requests.Add(1)
	// A host that isn't the one of the connection is the upstream's business.
	if Canonical(r.Host) != up.Host && Canonical(r.Host) != stripPort(up.Host) {
		x.target = target{}
	}
	x.asker = asker{repository{up.ID(), x.target.repo}, h.rights.credentialsOf(r, up.As)}
	if x.excused() {
		x.up.Transport = &anonymous{h, up}
	}
	complete := false // unless it panics, as handlers do to break off
	if x.reading() && r.URL.RawQuery == "" && (x.target.kind == manifest || x.target.kind == blob && r.Method == http.MethodGet) {
		a, end := h.pulls.begin(x)
		x.w = a
		defer func() { end(complete && r.Context().Err() == nil) }()
	}
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		x.write()
	case r.URL.RawQuery != "":
		x.forward()
	case x.target.kind == blob:
		x.blob()
	case x.target.kind == manifest && x.target.digest != "":
		x.manifest()
	case x.target.kind == manifest:
		x.tag()
	case x.target.kind == base:
		x.base()
	default:
		x.forward()
	}
	complete = true
}

// learn takes in an upstream's answer to a request to read.
func (x *exchange) learn(resp *http.Response) {
	x.h.rights.learn(x.asker, x.target, resp, x.up.believed())
}

// permitted says whether the asker may have the target's digest, asking the
// upstream with a HEAD when no answer of its is remembered.
func (x *exchange) permitted() bool {
	if x.h.rights.allows(x.asker, x.target.digest) {
		return true
	}
	if x.h.rights.isRefused(x.asker) {
		return false
	}
	stale := x.h.rights.allowsStale(x.asker, x.target.digest)
	resp, err := x.head(func() bool { return stale }) //nolint:bodyclose // send has closed that of a HEAD
	if failed(resp, err) {
		x.stale = stale
		return stale
	}
	x.learn(resp)
	if x.target.kind == blob && resp.StatusCode == http.StatusOK {
		x.size = resp.ContentLength
	}
	return x.h.rights.allows(x.asker, x.target.digest)
}

// Patience with an upstream when there is an answer without it. A runtime would
// wait longer by itself, but it would not have an answer at the end.
const (
	patience      = 10 * time.Second
	lostPatience  = time.Second // it has just tried it
	patienceAgain = 30 * time.Second
)

// outages remembers when upstreams failed to answer in time.
type outages struct {
	lru         *lru.Cache[string, time.Time] // by identity
	whole, rest time.Duration                 // patience, and what is left of it
	// excused are clients that were told in an upstream's stead that there is
	// nothing to log in to.
	excused *lru.Cache[excused, time.Time]
}

// excused is a client of an upstream.
type excused struct{ registry, client string }

// excuseTTL bounds the length of a pull that began in an outage.
const excuseTTL = time.Hour

func newOutages() outages {
	o := outages{whole: patience, rest: lostPatience}
	o.lru, _ = lru.New[string, time.Time](1 << 10)
	o.excused, _ = lru.New[excused, time.Time](1 << 10)
	return o
}

func (o outages) patience(id string) time.Duration {
	if when, ok := o.lru.Get(id); ok && time.Since(when) < patienceAgain {
		return o.rest
	}
	return o.whole
}

func (o outages) note(id string, down bool) {
	if down {
		o.lru.Add(id, time.Now())
	} else {
		o.lru.Remove(id)
	}
}

// excused says whether the client comes without a token because it was told by
// us that it needs none. Should the upstream be back by now, and want one, the
// client would give up: dockerd looks for who gives tokens in the answer of /v2/
// alone.
func (x *exchange) excused() bool {
	if x.r.Header.Get("Authorization") != "" || x.r.Header.Get("Cookie") != "" || !x.h.rights.isPublic(x.asker.repository) {
		return false
	}
	when, ok := x.h.outages.excused.Get(excused{x.up.ID(), x.up.Client})
	return ok && time.Since(when) < excuseTTL
}

// head asks the upstream with a HEAD for what the client asked for. The answer
// has no body. instead is that of send.
func (x *exchange) head(instead func() bool) (*http.Response, error) {
	return x.send(http.MethodHead, x.h.outages.patience(x.up.ID()), instead)
}

// send sends the client's request, which has no body, with another method,
// following no redirect. When the upstream has not answered within patience, and
// instead says that there is another answer, it is given up; without one it has
// as long as the client gives it.
func (x *exchange) send(method string, patience time.Duration, instead func() bool) (*http.Response, error) {
	ctx, cancel := context.WithCancel(x.r.Context())
	looked := make(chan struct{})
	timer := time.AfterFunc(patience, func() {
		defer close(looked)
		if instead() {
			cancel()
		}
	})
	resp, err := x.up.Transport.RoundTrip(x.request(ctx, method, nil))
	if !timer.Stop() {
		<-looked
		if err == nil && ctx.Err() != nil && method != http.MethodHead {
			resp.Body.Close() // it came as it was given up, and would end in the middle
			err = ctx.Err()
		}
	}
	if x.r.Context().Err() == nil {
		x.h.outages.note(x.up.ID(), err != nil)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	resp.Body = &cancelBody{resp.Body, cancel}
	if method == http.MethodHead {
		resp.Body.Close()
	}
	return resp, nil
}

// failed says whether an upstream has not answered the question: an answer of
// 429 or 5xx says something about the upstream, and nothing about what was
// asked for.
func failed(resp *http.Response, err error) bool {
	return err != nil || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500
}

// because says why an upstream has failed, for the log.
func because(resp *http.Response, err error) string {
	if err != nil {
		return scrub(err).Error()
	}
	return resp.Status
}

// request is the client's request, as it goes to the upstream, with another
// method and without its body. extra headers go over the client's.
func (x *exchange) request(ctx context.Context, method string, extra http.Header) *http.Request {
	req := x.r.Clone(ctx)
	req.Method = method
	base := x.up.base()
	req.URL.Scheme, req.URL.Host = base.Scheme, base.Host
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

// counted counts, and measures, what comes from the upstream.
func (x *exchange) counted(body io.ReadCloser) io.ReadCloser {
	return &countingBody{ReadCloser: body, count: &x.stats.fromUpstream, pace: &x.stats.pace, since: time.Now()}
}

type countingBody struct {
	io.ReadCloser
	count *atomic.Int64
	pace  *atomic.Int64 // bytes per second, as it was lately; may be nil
	since time.Time
	n     atomic.Int64 // it may be closed while it is being read
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.count.Add(int64(n))
	b.n.Add(int64(n))
	return n, err
}

// measurable is how many bytes say something about the pace.
const measurable = 1 << 20

func (b *countingBody) Close() error {
	if n := b.n.Swap(0); b.pace != nil && n >= measurable {
		pace := int64(float64(n) / time.Since(b.since).Seconds())
		if old := b.pace.Load(); old > 0 {
			pace = (pace + old) / 2
		}
		b.pace.Store(pace)
	}
	return b.ReadCloser.Close()
}

type cancelBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b *cancelBody) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
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
