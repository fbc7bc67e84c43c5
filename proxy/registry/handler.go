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
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"weir/proxy/rights"
	"weir/proxy/store"
	"weir/proxy/upstream"
)

// Upstream is the registry that a client has connected to.
type Upstream struct {
	// Host is HOST or HOST:PORT in canonical form: what clients call it.
	Host string
	// Plain is the address and port of a registry that is spoken to without
	// TLS, and empty for all others. Since nothing says who answers there, it
	// is part of the registry's identity.
	Plain string
	// NetworkID names the network that the client is in: a registry without TLS
	// is another one in each network, and any may authorize a client by its
	// address. Empty means the node's.
	NetworkID string
	// AnyNetwork says that it answers requests without credentials alike in each
	// network.
	AnyNetwork bool
	// TrustRootsID stands for the certificates that the client's runtime verifies
	// the registry with where this node doesn't trust it, and is empty for all
	// others. Whoever has the runtime can pose by them as any registry. So they
	// are part of the registry's identity.
	TrustRootsID string
	// ClientIdentity tells clients apart that the registry knows by something
	// that isn't in their requests, such as a TLS certificate. Empty means nothing.
	ClientIdentity string
	// Client names the client for people. It gives no rights.
	Client string
	// Transport sends requests there, and to where the registry redirects,
	// as the client would. It verifies TLS.
	Transport http.RoundTripper
}

// ID is the registry's identity: what it says of its repositories holds for
// those of no other.
func (u Upstream) ID() string {
	if u.Plain != "" && u.NetworkID != "" {
		return u.name() + "#" + u.NetworkID
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
	if u.TrustRootsID != "" {
		return host + "#" + u.TrustRootsID
	}
	return host
}

// authenticated says whether the registry's answers are known to be its own.
func (u Upstream) authenticated() bool { return u.Plain == "" && u.TrustRootsID == "" }

// repository is a repository of the registry.
func (u Upstream) repository(name string) rights.Repository {
	repo := rights.Repository{Registry: u.ID(), Name: name}
	if !u.authenticated() {
		repo.Network = rights.UnauthenticatedNetwork(u.NetworkID)
	}
	return repo
}

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
	// Metrics collects how long clients waited. Nil means nowhere.
	Metrics prometheus.Registerer
	Log     *slog.Logger // nil means slog.Default()

	now func() time.Time // nil means time.Now
}

// Defaults of [Options].
const (
	DefaultRightsTTL    = 5 * time.Minute
	DefaultStaleIfError = 24 * time.Hour
)

// Handler serves the requests of clients to upstreams.
type Handler struct {
	store    *store.Store
	saved    chan error // of saving, while that is done
	rights   *rights.Rights
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
	asking *asking
	// leaders are the clients to whom the registry sends what a transfer takes, by
	// *store.Transfer. Those from peers have none.
	leaders sync.Map
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
	h := &Handler{store: o.Store, pulls: pulls{tracer: o.Tracer, durations: newDurations(o.Metrics)},
		rights:   rights.New(rights.Options{GrantTTL: o.RightsTTL, StaleIfError: o.StaleIfError, Now: o.now}),
		sessions: newSessions(), memory: newQuota(manifestMemory, ownerMemory), outages: newOutages(), tokens: newTokens(), peers: o.Peers, names: newNames(), file: o.File, log: o.Log, lagTime: lagTime, asking: newAsking()}
	h.types, _ = lru.New[digest.Digest, string](4096)
	h.ctx, h.cancel = context.WithCancel(context.Background())
	if h.file == "" {
		return h
	}
	if err := h.rights.Load(h.file); err != nil {
		h.log.Warn("what was known of repositories can't be read, and is forgotten", "file", h.file, "err", err)
	}
	for _, repo := range h.rights.Repositories() {
		h.knows(repo)
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

// saveTime is how long saving is waited for: a disk that hangs must not keep the
// handler from ending.
const saveTime = time.Second

// save keeps what is known, unless that is still being done. It is for one
// goroutine at a time.
func (h *Handler) save() {
	begun := h.saved == nil
	if begun {
		saved := make(chan error, 1)
		h.saved = saved
		go func() { saved <- h.rights.Save(h.file) }()
	}
	select {
	case err := <-h.saved:
		h.saved = nil
		if err != nil {
			h.log.Warn("what is known of repositories can't be kept", "file", h.file, "err", err)
		}
	case <-time.After(saveTime):
		if begun {
			h.log.Warn("what is known of repositories is not kept yet; the disk does not answer", "file", h.file)
		}
	}
}

// HasStale says whether there may be something to serve of an upstream while it
// can't be reached.
func (h *Handler) HasStale(up Upstream) bool { return h.rights.HasStale(up.repository("")) }

// Close ends what runs in the background and keeps what is known.
func (h *Handler) Close() {
	h.cancel()
	h.wg.Wait()
	h.sessions.close()
	h.pulls.close()
	if h.file != "" {
		h.save()
	}
}

// exchange is one request on its way through.
type exchange struct {
	h      *Handler
	w      *delivery
	r      *http.Request
	up     Upstream
	target target
	who    rights.Principal
	stats  *counters
	push   *push  // what the request's body is part of
	again  bool   // the blob's transfer was somebody else's, and came to nothing
	shown  *proof // what the registry has shown of the blob that arrives, to be compared
	stale  bool   // the answer is what the upstream said before it fell silent
	// answered is when the upstream last answered this client.
	answered time.Time
	// following says that the blob is read from another client's transfer.
	following bool
}

// ServeAnonymous answers like [Handler.Serve]. When the client has no
// credentials and the registry wants to see some, it is asked again with the
// token that everybody gets: for clients that can't ask for one, because they
// speak to weir and not to the registry.
//
// Every answer says in its Cache-Status where it comes from, see [FromUpstream].
func (h *Handler) ServeAnonymous(w http.ResponseWriter, r *http.Request, up Upstream) {
	if r.Header.Get("Authorization") == "" {
		up.Transport = &anonymous{h, up}
	}
	h.serve(&delivery{ResponseWriter: w, marked: true}, r, up)
}

// Serve answers a request that a client sent to an upstream.
func (h *Handler) Serve(w http.ResponseWriter, r *http.Request, up Upstream) {
	h.serve(&delivery{ResponseWriter: w}, r, up)
}

func (h *Handler) serve(w *delivery, r *http.Request, up Upstream) {
	x := &exchange{h: h, w: w, r: r, up: up, target: parsePath(r.URL.EscapedPath()), stats: h.stats.of(up.name())}
	x.up.Transport = counted{up.Transport, x.stats}
	x.stats.requests.Add(1)
	// What is not the plain form of the distribution API is the upstream's business:
	// another host than the connection's, a request target with a scheme (and maybe
	// with a user and a password), and what a query or a body may ask for, or prove.
	if Canonical(r.Host) != up.Host && Canonical(r.Host) != stripPort(up.Host) || r.URL.IsAbs() || x.reading() && (r.URL.RawQuery != "" || r.ContentLength != 0) {
		x.target = target{}
	}
	x.who = rights.Principal{Repository: up.repository(x.target.repo), Client: h.rights.Client(r.Header, up.ClientIdentity, up.NetworkID)}
	if x.excused() {
		x.up.Transport = &anonymous{h, x.up}
	}
	w.manifest, w.head = x.target.kind == manifest, r.Method == http.MethodHead
	complete := false // unless it panics, as handlers do to break off
	if x.reading() && (w.manifest || x.target.kind == blob && !w.head) {
		end := h.pulls.begin(x)
		defer func() { end(complete && r.Context().Err() == nil) }()
	}
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		x.write()
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

// learn records an upstream's own answer to a request to read.
func (x *exchange) learn(resp *http.Response) {
	if foreign(resp) {
		return
	}
	switch resp.StatusCode {
	case http.StatusOK:
		if x.target.kind == manifest && describesManifest(resp, x.target.digest) {
			x.grant()
		}
	case http.StatusPartialContent:
		if x.target.kind == blob {
			x.grant()
		}
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound:
		x.h.rights.Refuse(x.who)
		x.recheck(resp.StatusCode)
	}
}

// grant records that the client was answered with content, and prove that what it
// was answered with proves that content is in the repository.
func (x *exchange) grant() { x.h.rights.Grant(x.who, x.answered) }

func (x *exchange) prove(by rights.Vantage, d digest.Digest) { x.h.rights.Prove(by, d, x.answered) }

// vantage is a network from which a repository is asked for, where that counts.
func (u Upstream) vantage(repo rights.Repository) rights.Vantage {
	if u.AnyNetwork && u.authenticated() {
		return rights.Vantage{Repository: repo}
	}
	return rights.Vantage{Repository: repo, From: u.NetworkID}
}

// vantage is where the client asks for its repository.
func (x *exchange) vantage() rights.Vantage { return x.up.vantage(x.who.Repository) }

// allows says whether the client may have a digest without a question to the
// upstream.
func (x *exchange) allows(d digest.Digest) bool {
	return x.h.rights.Allows(x.who, x.vantage().From, d)
}

// provenBy is for whom an answer of content proves that it is in the repository:
// for the client's network, where it is that of where the registry redirected to.
func (x *exchange) provenBy(resp *http.Response) rights.Vantage {
	if x.own(resp) {
		return rights.Vantage{Repository: x.who.Repository}
	}
	return x.vantage()
}

// allowsStale says whether the client may have a digest while the upstream gives
// no answer.
func (x *exchange) allowsStale(d digest.Digest) bool {
	return x.h.rights.AllowsStale(x.who, x.vantage().From, d)
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
	if !rights.Anonymous(x.r.Header) || !x.h.rights.Public(x.vantage()) {
		return false
	}
	when, ok := x.h.outages.excused.Get(excused{x.up.ID(), x.up.Client})
	return ok && time.Since(when) < excuseTTL
}

// question is a request that weir makes to find out what the client may have: the
// client's own request, without its body.
type question struct {
	method string
	extra  http.Header // over the client's
	// follow says that redirects are followed, as the client would.
	follow bool
	// patience is how long the upstream has, once instead says that there is
	// another answer. Without one it has as long as the client gives it.
	patience time.Duration
	instead  func() bool
}

// head is the question for what the client asked for, without its content.
func (x *exchange) head(follow bool, instead func() bool) question {
	return question{method: http.MethodHead, follow: follow, patience: x.h.outages.patience(x.up.ID()), instead: instead}
}

// ask asks the upstream. The answer to a HEAD has no body.
func (x *exchange) ask(q question) (*http.Response, error) {
	ctx, cancel := context.WithCancel(x.r.Context())
	looked := make(chan struct{})
	timer := time.AfterFunc(q.patience, func() {
		defer close(looked)
		if q.instead() {
			cancel()
		}
	})
	resp, err := x.send(x.request(ctx, q.method, q.extra), q.follow)
	if !timer.Stop() {
		<-looked
		if err == nil && ctx.Err() != nil && q.method != http.MethodHead {
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
	x.answered = x.h.rights.Now()
	resp.Body = &cancelBody{resp.Body, cancel}
	if q.method == http.MethodHead {
		resp.Body.Close()
	}
	return resp, nil
}

// send sends a request to the upstream. What follows redirects goes on to https
// only, or stays at a registry without TLS.
func (x *exchange) send(req *http.Request, follow bool) (*http.Response, error) {
	rt := transport(func(req *http.Request) (*http.Response, error) {
		resp, err := x.up.Transport.RoundTrip(req)
		if err == nil && resp.StatusCode == http.StatusSwitchingProtocols {
			resp.Body.Close()
			return nil, errUpgrade
		}
		return resp, err
	})
	if !follow {
		return rt(req)
	}
	// Where a redirect leads may be out of weir's reach, and not of the client's,
	// which may go there by a proxy: it is left to the client then.
	return x.up.follow(rt).Do(req.WithContext(upstream.WithDialBudget(req.Context(), redirectTime)))
}

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

// follow is a client that follows redirects from the registry.
func (u Upstream) follow(rt http.RoundTripper) *http.Client {
	return &http.Client{Transport: rt, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= 5 || req.URL.Scheme != "https" && req.URL.Host != u.Plain {
			return http.ErrUseLastResponse
		}
		req.Header.Del("Referer")
		return nil
	}}
}

// own says whether an answer is the registry's own, and not that of where it
// redirected to.
func (x *exchange) own(resp *http.Response) bool {
	return resp.Request == nil || resp.Request.URL.Host == x.up.base().Host
}

// failed says whether an upstream has not answered the question: an answer of
// 429 or 5xx says something about the upstream, and nothing about what was
// asked for, and what isn't the registry's says nothing at all. Where the registry
// redirects to, a page or a refusal is an answer: a login page, for one.
func (x *exchange) failed(resp *http.Response, err error) bool {
	return err != nil || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500 || x.own(resp) && foreign(resp)
}

// foreign says whether an answer is hardly a registry's, but that of something in
// its stead: a page for people (a challenge, a captive portal), or a refusal
// without a word. A registry's own has the version of the API in its header, or a
// challenge (distribution specification, "Error Codes"; RFC 9110, section 11.6.1),
// or an error in JSON.
func foreign(resp *http.Response) bool {
	if resp.Header.Get("Cf-Mitigated") != "" {
		return true
	}
	if resp.Header.Get("Docker-Distribution-Api-Version") != "" || resp.Header.Get("Www-Authenticate") != "" || resp.Header.Get("Docker-Content-Digest") != "" {
		return false
	}
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	switch resp.StatusCode {
	case http.StatusOK, http.StatusUnauthorized:
		return mediaType == "text/html"
	case http.StatusForbidden:
		return mediaType == "text/html" || mediaType == ""
	}
	return false
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

// scrub takes URLs out of an error: those of blobs are signed, so that whoever
// reads the log could fetch them.
func scrub(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
