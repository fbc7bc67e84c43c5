// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"io"
	"mime"
	"net/http"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"weir/proxy/rights"
)

// Timeouts of an upstream when there is an answer without it. A runtime would wait
// longer by itself, but it would not have an answer at the end.
const (
	askTimeout      = 10 * time.Second
	askTimeoutAgain = time.Second      // of one that has just failed
	againTTL        = 30 * time.Second // how long that counts
)

// outages remembers when upstreams failed to answer in time.
type outages struct {
	lru          *lru.Cache[string, time.Time] // by identity
	first, again time.Duration                 // timeouts
	// anonymous are clients that were told in an upstream's stead that there is
	// nothing to log in to.
	anonymous *lru.Cache[outageClient, time.Time]
}

// outageClient is a client of an upstream.
type outageClient struct{ registry, client string }

// anonymousTTL bounds the length of a pull that began in an outage.
const anonymousTTL = time.Hour

func newOutages() outages {
	o := outages{first: askTimeout, again: askTimeoutAgain}
	o.lru, _ = lru.New[string, time.Time](1 << 10)
	o.anonymous, _ = lru.New[outageClient, time.Time](1 << 10)
	return o
}

// timeout is how long an upstream has to answer.
func (o outages) timeout(id string) time.Duration {
	if when, ok := o.lru.Get(id); ok && time.Since(when) < againTTL {
		return o.again
	}
	return o.first
}

func (o outages) note(id string, down bool) {
	if down {
		o.lru.Add(id, time.Now())
	} else {
		o.lru.Remove(id)
	}
}

// anonymousInOutage says whether the client comes without a token because weir
// told it that it needs none. Should the upstream be back by now, and want one, the
// client would give up: dockerd looks for who gives tokens in the answer of /v2/
// alone.
func (h *Handler) anonymousInOutage(q request) bool {
	if !rights.Anonymous(q.r.Header) || !h.rights.Public(q.vantage) {
		return false
	}
	when, ok := h.outages.anonymous.Get(outageClient{q.up.ID(), q.up.Client})
	return ok && time.Since(when) < anonymousTTL
}

// base answers GET and HEAD of /v2/. Clients ask there whether they must log in,
// and give up without an answer; what is public can then still be had without. That
// isn't said before the whole timeout is over: a client that goes on without a login
// has no way to what is only its own, were the upstream just slow. (dockerd waits
// 15 s for this answer.)
func (x *exchange) base() {
	if !x.h.HasStale(x.up) {
		x.forward()
		return
	}
	client := outageClient{x.up.ID(), x.up.Client}
	resp, err := x.ask(question{method: x.r.Method, timeout: x.h.outages.first, stale: func() bool { return true }})
	if err == nil {
		x.h.outages.anonymous.Remove(client)
		x.relay(resp)
		return
	}
	x.h.log.Warn("clients get what is public, as it was before", "registry", x.up.ID(), "err", err)
	x.stats.stale.Add(1)
	x.h.outages.anonymous.Add(client, time.Now())
	h := x.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", "2")
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	x.w.from(provenance{source: SourceStore, stale: true})
	_, _ = io.WriteString(x.w, "{}")
}

// stale says whether the client may have a digest while the upstream gives no
// answer, as a question needs it.
func (x *exchange) stale(d digest.Digest) func() bool {
	may := x.allowsStale(d)
	return func() bool { return may }
}

// failed says whether an answer is none to the question: 429 or 5xx says something
// about the upstream, and nothing about what was asked for, and what isn't the
// registry's says nothing at all. Where the registry redirects to, a page or a
// refusal is an answer: a login page, for one.
func (x *exchange) failed(resp *http.Response) bool {
	return resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500 || x.own(resp) && foreign(resp)
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
