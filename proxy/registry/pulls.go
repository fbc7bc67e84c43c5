// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"context"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// Pull is what one client has got of one repository, without a longer pause.
type Pull struct {
	Registry   string `json:"registry"`
	Repository string `json:"repository"`
	// Reference is the tag that was asked for, or else the digest of a manifest.
	Reference string    `json:"reference,omitempty"`
	Client    string    `json:"client"`
	Started   time.Time `json:"started"`
	// Ended is when the last answer ended. It is zero while one is being given.
	Ended time.Time `json:"ended,omitzero"`
	// Blobs and Manifests are answers to GET; Failed are those that broke off.
	Blobs     int `json:"blobs"`
	Manifests int `json:"manifests"`
	Failed    int `json:"failed"`
	// Bytes is what the client has got, Size what all these answers have in
	// all, as far as that is known.
	Bytes int64 `json:"bytes"`
	Size  int64 `json:"size"`
	// BytesFromStore and the others say where Bytes came from. What the client
	// got while it was still arriving for another one is from the store.
	BytesFromStore    int64 `json:"bytes_from_store"`
	BytesFromPeers    int64 `json:"bytes_from_peers"`
	BytesFromUpstream int64 `json:"bytes_from_upstream"`
	// Seconds is how long answers were being given. UpstreamSeconds is how long
	// the same bytes would have taken from the registry, at the rate that it
	// gave lately, and 0 when that isn't known.
	Seconds         float64 `json:"seconds"`
	UpstreamSeconds float64 `json:"upstream_seconds,omitempty"`
}

const (
	// pullPause is how long after its last answer a pull can go on.
	pullPause = 5 * time.Second
	// maxPulls are the pulls that are remembered.
	maxPulls = 100
)

// pulls are the running and the latest pulls, the latest first.
type pulls struct {
	tracer    trace.Tracer
	durations durations

	mu  sync.Mutex
	all []*pull
}

type pull struct {
	Pull     // the sum of the answers that have ended
	busy     time.Duration
	begun    time.Time // when the first of the running answers began
	running  []*delivery
	arriving *arrivals
	trace    context.Context // with the span of the pull, of which those of its answers are parts
	pause    *time.Timer     // for it to be over
	over     bool            // its span has ended, and how long it took is recorded
}

// delivery is the answer to a request as its client gets it.
type delivery struct {
	http.ResponseWriter
	manifest bool
	head     bool          // it has no body
	digest   digest.Digest // as far as that is known
	marked   bool          // it says where it comes from, also when that is the registry
	bytes    atomic.Int64
	size     atomic.Int64
	gives    atomic.Bool   // content, from source
	source   Source        // set before gives
	kept     *atomic.Int64 // counts what is given of what is kept, if that is
	headed   bool
	first    time.Time // when it had the first byte of content
}

// from says where the content of the answer comes from. Without it that is the
// registry, whose answer passes through.
func (a *delivery) from(p provenance) {
	a.source = p.source
	a.Header().Set("Cache-Status", p.cacheStatus())
	a.marked = false
}

// begin records an answer that will be given. end has to be called after it.
func (ps *pulls) begin(x *exchange) (end func(complete bool)) {
	a, reference := x.w, ""
	a.digest = x.target.digest
	if a.manifest {
		reference = cmp.Or(x.target.tag, x.target.digest.String())
	}
	now, name := time.Now(), x.up.name()
	ps.mu.Lock()
	defer ps.mu.Unlock()
	i := slices.IndexFunc(ps.all, func(p *pull) bool {
		return p.Registry == name && p.Repository == x.who.Name && p.Client == x.up.Client && (len(p.running) > 0 || now.Sub(p.Ended) < pullPause)
	})
	if i < 0 {
		p := &pull{Pull: Pull{Registry: name, Repository: x.who.Name, Client: x.up.Client, Started: now}, arriving: &x.stats.arrivals}
		p.trace, _ = ps.tracer.Start(context.Background(), "pull", trace.WithTimestamp(now), trace.WithAttributes(
			attribute.String("weir.registry", p.Registry), attribute.String("weir.repository", p.Repository), attribute.String("weir.client", p.Client)))
		ps.all = slices.Insert(ps.all, 0, p)
		ps.drop()
		i = 0
	}
	p := ps.all[i]
	if len(p.running) == 0 {
		p.begun = now
	}
	p.running = append(p.running, a)
	_, span := ps.tracer.Start(p.trace, spanName(a), trace.WithTimestamp(now))
	return func(complete bool) {
		ps.mu.Lock()
		defer ps.mu.Unlock()
		defer span.End()
		a.describe(span, x.target.tag, complete)
		p.running = slices.DeleteFunc(p.running, func(b *delivery) bool { return b == a })
		p.add(a, !complete || a.bytes.Load() < a.size.Load())
		p.Ended = time.Now()
		// Runtimes ask what a tag is, and get what they were told by digest.
		if a.gives.Load() && (p.Reference == "" || x.target.tag != "" && strings.Contains(p.Reference, ":")) {
			p.Reference = reference
		}
		switch {
		case !a.gives.Load():
		case x.target.tag != "":
			observe(ps.durations.resolve, a.source, p.Ended.Sub(now))
		case !a.first.IsZero() && !a.manifest:
			observe(ps.durations.firstByte, a.source, a.first.Sub(now))
		}
		if len(p.running) > 0 {
			return
		}
		p.busy += p.Ended.Sub(p.begun)
		if p.Blobs+p.Manifests == 0 && p.Reference == "" { // it was refused
			ps.all = slices.DeleteFunc(ps.all, func(q *pull) bool { return q == p })
		}
		if p.pause == nil {
			p.pause = time.AfterFunc(pullPause, func() { ps.over(p, pullPause) })
		} else {
			p.pause.Reset(pullPause)
		}
	}
}

// over ends the span of a pull that has paused for so long, and records how long it
// took.
func (ps *pulls) over(p *pull, pause time.Duration) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if p.over || len(p.running) > 0 || time.Since(p.Ended) < pause {
		return
	}
	p.over = true
	ps.durations.ended(&p.Pull)
	span := trace.SpanFromContext(p.trace)
	span.SetAttributes(attribute.String("weir.reference", p.Reference), attribute.Int64("weir.bytes", p.Bytes))
	span.End(trace.WithTimestamp(p.Ended))
}

// close ends the spans of all pulls.
func (ps *pulls) close() {
	ps.mu.Lock()
	all := slices.Clone(ps.all)
	ps.mu.Unlock()
	for _, p := range all {
		ps.over(p, 0)
	}
}

// spanName is what an answer is in a trace.
func spanName(a *delivery) string {
	switch {
	case a.head:
		return "resolve"
	case a.manifest:
		return "manifest"
	}
	return "blob"
}

// describe says in a trace what became of an answer.
func (a *delivery) describe(span trace.Span, tag string, complete bool) {
	if !span.IsRecording() {
		return
	}
	span.SetAttributes(attribute.String("weir.digest", a.digest.String()), attribute.String("weir.tag", tag), attribute.Int64("weir.bytes", a.bytes.Load()))
	if !a.gives.Load() {
		span.SetStatus(codes.Error, "refused, or not modified")
		return
	}
	span.SetAttributes(attribute.String("weir.source", a.source.String()))
	if !complete || a.bytes.Load() < a.size.Load() && !a.head {
		span.SetStatus(codes.Error, "it broke off")
	}
}

// drop forgets the oldest of the ended pulls above the bound.
func (ps *pulls) drop() {
	for i := len(ps.all) - 1; i > 0 && len(ps.all) > maxPulls; i-- {
		if len(ps.all[i].running) == 0 {
			ps.all = slices.Delete(ps.all, i, i+1)
		}
	}
}

// list returns them, the latest first.
func (ps *pulls) list() (all []Pull) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.all {
		out, busy := p.Pull, p.busy
		for _, a := range p.running {
			out.add(a, false)
		}
		if len(p.running) > 0 {
			out.Ended = time.Time{}
			busy += time.Since(p.begun)
		}
		out.Seconds = busy.Seconds()
		if pace := p.arriving.pace(); pace > 0 {
			out.UpstreamSeconds = float64(out.Bytes) / float64(pace)
		}
		all = append(all, out)
	}
	return all
}

// add adds an answer as far as it was given.
func (p *Pull) add(a *delivery, failed bool) {
	switch {
	case a.head || !a.gives.Load(): // it was refused, or not modified, or has not begun
		return
	case a.manifest:
		p.Manifests++
	default:
		p.Blobs++
	}
	n := a.bytes.Load()
	p.Bytes += n
	p.Size += max(n, a.size.Load())
	if failed && (a.size.Load() == 0 || n < a.size.Load()) {
		p.Failed++
	}
	switch a.source {
	case SourceUpstream:
		p.BytesFromUpstream += n
	case SourcePeer:
		p.BytesFromPeers += n
	default:
		p.BytesFromStore += n
	}
}

// Pulls returns the running and the latest pulls, the latest first.
func (h *Handler) Pulls() []Pull { return h.pulls.list() }

// WriteHeader implements http.ResponseWriter.
func (a *delivery) WriteHeader(code int) {
	a.begins(code)
	a.ResponseWriter.WriteHeader(code)
}

func (a *delivery) begins(code int) {
	if a.headed || code < http.StatusOK {
		return
	}
	a.headed = true
	h := a.Header()
	if a.marked {
		h.Add("Cache-Status", provenance{}.cacheStatus())
	}
	if code != http.StatusOK && code != http.StatusPartialContent {
		return
	}
	a.gives.Store(true)
	if size, err := strconv.ParseInt(h.Get("Content-Length"), 10, 64); err == nil {
		a.size.Store(size)
	}
}

// Write implements http.ResponseWriter.
func (a *delivery) Write(b []byte) (int, error) {
	a.begins(http.StatusOK)
	if a.first.IsZero() {
		a.first = time.Now()
	}
	n, err := a.ResponseWriter.Write(b)
	a.bytes.Add(int64(n))
	if a.kept != nil {
		a.kept.Add(int64(n))
	}
	return n, err
}

// pieces are what answers are given in: the unit in which the store checks what
// it reads, so that it needs no copy of it.
var pieces = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// ReadFrom implements io.ReaderFrom, for pieces that are larger than io.Copy's.
func (a *delivery) ReadFrom(r io.Reader) (int64, error) {
	buf := pieces.Get().(*[64 << 10]byte)
	defer pieces.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{a}, struct{ io.Reader }{r}, buf[:])
}

// Unwrap is for http.ResponseController.
func (a *delivery) Unwrap() http.ResponseWriter { return a.ResponseWriter }
