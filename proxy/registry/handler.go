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
// it: a tag is what it was, and what is public is given to any client.
package registry

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/singleflight"
	"weir/proxy/rights"
	"weir/proxy/store"
	"weir/proxy/upstream"
)

// Options of a handler. Store is required.
type Options struct {
	Store *store.Store
	// RightsTTL is how long an upstream's grant is remembered. Zero means
	// [DefaultRightsTTL].
	RightsTTL time.Duration
	// StaleIfError is for how long an upstream's answer is good when it gives
	// no other. Zero means never.
	StaleIfError time.Duration
	// TagTTL is for how long a tag is what it was. Nil means that the registry is
	// asked each time.
	TagTTL TagTTL
	// UpstreamConnections is how many connections to its registry one large blob has
	// at most. Zero means [DefaultUpstreamConnections].
	UpstreamConnections int
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
	logins   logins
	tagTTL   TagTTL
	asked    singleflight.Group // in weir's own name
	peers    Peers
	names    names
	widths   *widths
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
	// leaders are the clients to whom the registry sends a blob that arrives, by
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
	if o.UpstreamConnections == 0 {
		o.UpstreamConnections = DefaultUpstreamConnections
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Tracer == nil {
		o.Tracer = noop.Tracer{}
	}
	h := &Handler{
		store: o.Store, peers: o.Peers, tagTTL: o.TagTTL, file: o.File, log: o.Log, pulls: pulls{tracer: o.Tracer, durations: newDurations(o.Metrics)},
		rights:   rights.New(rights.Options{GrantTTL: o.RightsTTL, StaleIfError: o.StaleIfError, Now: o.now}),
		sessions: newSessions(), memory: newQuota(manifestMemory, ownerMemory), outages: outages{upstream.NewHealth(), askTimeout, askTimeoutAgain}, tokens: newTokens(), logins: newLogins(),
		names: newNames(), widths: newWidths(o.UpstreamConnections), lagTime: lagTime, asking: newAsking(),
	}
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

// exchange is a request, and the way of its answer. It isn't changed: what is found
// out about the request is returned, and passed on.
type exchange struct {
	request
	h     *Handler
	w     *delivery
	stats *counters
}

// ServeAnonymous answers like [Handler.Serve]. When the client has no credentials
// and the registry wants to see some, it is asked again with an anonymous token: for
// clients that can't ask for one, because they speak to weir and not to the registry.
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
	stats := h.stats.of(up.name())
	up.Transport = countedAnswers{up.Transport, stats}
	x := &exchange{request: h.parse(r, up), h: h, w: w, stats: stats}
	stats.requests.Add(1)
	w.manifest, w.head = x.target.kind == manifest, r.Method == http.MethodHead
	complete := false // unless it panics, as handlers do to break off
	if x.reading() && (w.manifest || x.target.kind == blob && !w.head) {
		end := h.pulls.begin(x)
		defer func() { end(complete && r.Context().Err() == nil) }()
	}
	realm, tokens := x.tokenPath()
	switch {
	case tokens:
		x.token(realm)
	case !x.reading():
		x.write()
	case (w.manifest || x.target.kind == blob) && x.loginFirst():
	case x.target.kind == blob && w.head:
		x.headBlob()
	case x.target.kind == blob:
		x.blob(true)
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

// logger is for what happens to content.
func (x *exchange) logger(d digest.Digest) *slog.Logger {
	return x.h.log.With("registry", x.up.ID(), "repository", x.target.repo, "digest", d)
}
