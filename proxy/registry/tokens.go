// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	lru "github.com/hashicorp/golang-lru/v2"
	"weir/proxy/rights"
)

const (
	// ownRealm is the path of a registry's host to which clients are sent for tokens
	// while its token server fails. No repository has such a name.
	ownRealm = "/v2/_weir/token"
	// placeholder is the token that is given out there when the token server gives
	// none. Whoever sends it is a client without credentials.
	placeholder = "weir.anonymous"
	// placeholderTTL is how long clients may use it.
	placeholderTTL = time.Minute
	// loginTTL is how long a registry's answer to /v2/ is taken to be the same.
	loginTTL = 10 * time.Minute
	// maxLogin bounds the body of that answer, maxTokenRequest that of a request for
	// a token, in bytes.
	maxLogin, maxTokenRequest = 4 << 10, 64 << 10
)

// login is what a registry answers to a client that asks at /v2/ whether it must log
// in.
type login struct {
	status int
	header http.Header
	body   []byte
	realm  *url.URL // of its token server; nil if it has none
	when   time.Time
}

// logins are the answers of registries, by [Upstream.way].
type logins struct{ *lru.Cache[string, login] }

func newLogins() logins {
	c, _ := lru.New[string, login](1 << 10)
	return logins{c}
}

// elsewhere says whether tokens are to be had from another host, whose connections
// weir passes through.
func (l login) elsewhere(up Upstream) bool { return l.realm != nil && l.realm.Host != up.base().Host }

// learnLogin records a registry's answer to a client without credentials, whose body can
// be read again then. For those that begin with a manifest, a refusal of that says
// whether passwords are wanted.
func (x *exchange) learnLogin(resp *reply) error {
	if !rights.Anonymous(x.r.Header) {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxLogin+1))
	resp.Body = readCloser{io.MultiReader(bytes.NewReader(b), resp.Body), resp.Body}
	if err != nil || len(b) > maxLogin || !x.up.authenticated() || x.failed(resp.Response) || !x.own(resp.Response) {
		return nil
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusUnauthorized {
		return nil
	}
	l := login{status: resp.StatusCode, header: make(http.Header), body: b, when: time.Now()}
	for _, name := range []string{"Content-Type", "Docker-Distribution-Api-Version", "Www-Authenticate"} {
		if v, ok := resp.Header[name]; ok {
			l.header[name] = v
		}
	}
	for _, c := range auth.ParseAuthHeader(l.header) {
		if realm, err := url.Parse(c.Parameters["realm"]); c.Scheme == auth.BearerAuth && err == nil && realm.Scheme == "https" && realm.User == nil {
			l.realm = realm
		}
	}
	if x.target.kind == manifest && (l.status != http.StatusUnauthorized || l.realm != nil) {
		return nil
	}
	x.h.logins.Add(x.up.way(), l)
	return nil
}

// answer answers a client. With own, tokens are to be had from weir.
func (x *exchange) answer(l login, own bool) {
	h := x.w.Header()
	maps.Copy(h, l.header)
	if own {
		h["Www-Authenticate"] = nil
		for _, c := range auth.ParseAuthHeader(l.header) {
			switch c.Scheme {
			case auth.BearerAuth:
				h.Add("Www-Authenticate", x.ownChallenge(c.Parameters["service"]))
			case auth.BasicAuth:
				h.Add("Www-Authenticate", fmt.Sprintf("Basic realm=%q", c.Parameters["realm"]))
			}
		}
	}
	h.Set("Content-Length", fmt.Sprint(len(l.body)))
	x.w.from(provenance{source: SourceStore, stale: true})
	x.w.WriteHeader(l.status)
	_, _ = x.w.Write(l.body)
}

// ownChallenge is a challenge by which tokens are to be had from weir.
func (x *exchange) ownChallenge(service string) string {
	return fmt.Sprintf("Bearer realm=%q,service=%q", x.up.base().String()+ownRealm, service)
}

// base answers GET and HEAD of /v2/. Clients ask there whether they must log in,
// where tokens are to be had, and give up without an answer. What is stored can be had
// without one: then they are told what the registry said before. While its token
// server fails, tokens are to be had from weir (see [exchange.token]). Whether it
// fails is asked in the place of the registry, whose answer doesn't change from one
// pull to the next.
func (x *exchange) base() {
	if !rights.Anonymous(x.r.Header) || x.r.URL.RawQuery != "" || !x.h.HasStale(x.up) {
		x.pass(x.r, x.learnLogin)
		return
	}
	known, ok := x.h.logins.Get(x.up.way())
	if ok && known.elsewhere(x.up) && time.Since(known.when) < loginTTL {
		// Without the registry tokens are of no use.
		x.answer(known, x.h.outages.Failing(x.up.way()) || !x.givesTokens(known))
		return
	}
	resp, err := x.ask(question{method: x.r.Method, stale: always})
	if err == nil {
		_ = x.learnLogin(resp)
		if known, ok = x.h.logins.Get(x.up.way()); ok && known.elsewhere(x.up) && !x.givesTokens(known) {
			resp.Body.Close()
			x.answer(known, true)
			return
		}
		x.relay(resp)
		return
	}
	if x.r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has gone
	}
	x.h.log.Warn("clients get what is public, as it was before", "registry", x.up.ID(), "err", err)
	x.stats.stale.Add(1)
	if !ok {
		known = login{status: http.StatusOK, body: []byte("{}"), header: http.Header{"Content-Type": {"application/json"}, "Docker-Distribution-Api-Version": {"registry/2.0"}}}
		if x.up.authenticated() { // and it may want a token once it is back
			known.status = http.StatusUnauthorized
			known.header.Set("Www-Authenticate", x.ownChallenge(x.up.Host))
		}
	}
	x.answer(known, ok && known.elsewhere(x.up))
}

// loginFirst answers a client that comes without its name and password to a registry
// that asks for them, while that gives no answer, with what it would say: the client
// may have a right that is remembered. It returns false, and has not answered, where
// that isn't so.
func (x *exchange) loginFirst() bool {
	known, ok := x.h.logins.Get(x.up.way())
	if !ok || known.status != http.StatusUnauthorized || known.realm != nil || !rights.Anonymous(x.r.Header) || !x.h.HasStale(x.up) || x.allowsStale(x.target.digest) {
		return false
	}
	q := question{method: x.r.Method, stale: always}
	if x.target.kind == blob {
		if !x.h.store.Has(x.target.digest) {
			return false
		}
		q.extra = http.Header{"Range": {"bytes=0-0"}} // a refusal is the same
	}
	resp, err := x.ask(q)
	switch {
	case errors.Is(err, errOutage):
		x.answer(known, false)
	case err == nil && resp.StatusCode == http.StatusUnauthorized:
		x.relay(resp)
	case err == nil:
		resp.Body.Close()
		return false
	default:
		return false
	}
	return true
}

// givesTokens says whether a registry's token server answers. It is asked with a
// request that has nothing of a client in it, once for all that come at a time.
func (x *exchange) givesTokens(l login) bool {
	way := x.up.tokenWay(l.realm.Host)
	if x.h.outages.Fresh(way) {
		return true
	}
	u := *l.realm
	q := u.Query()
	for _, c := range auth.ParseAuthHeader(l.header) {
		if c.Scheme == auth.BearerAuth && c.Parameters["service"] != "" {
			q.Set("service", c.Parameters["service"])
		}
	}
	u.RawQuery = q.Encode()
	answered, looked := make(chan struct{}), make(chan struct{})
	x.h.wg.Go(func() {
		defer close(looked)
		select {
		case <-time.After(x.h.outages.first * 3 / 10):
			x.look()
		case <-answered:
		}
	})
	resp, err := x.h.attempt(x.r.Context(), way, always, func(ctx context.Context) (*http.Response, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("User-Agent", "weir")
		return x.h.together(ctx, way, func(ctx context.Context) (*http.Response, error) { return x.tokens(req.WithContext(ctx)) })
	})
	close(answered)
	if err != nil {
		<-looked
		x.h.log.Warn("the token server gives no answer; clients get what is public without", "registry", x.up.ID(), "server", l.realm.Host, "err", scrub(err))
		return false
	}
	resp.Body.Close()
	return true
}

// always is for questions to which there is another answer in any case.
func always() bool { return true }

// look finds out whether the registry answers, beside a token server that is silent:
// if all of the outside is, what the client wants next doesn't wait for that again.
func (x *exchange) look() {
	resp, err := x.ask(question{method: http.MethodGet, base: true, stale: always})
	switch {
	case err == nil:
		resp.Body.Close()
	case x.h.outages.Failing(x.up.way()): // and it isn't that the client has gone
		x.h.Unreachable(x.up)
	}
}

// errTokens says that a token server has answered, and given nothing.
type errTokens struct{ *http.Response }

func (e errTokens) Error() string { return "the token server answers with " + e.Status }

// tokens sends a request to a token server. The error is [errTokens] if the answer
// is none.
func (x *exchange) tokens(req *http.Request) (*http.Response, error) {
	resp, err := x.up.Transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if failedTokens(resp.StatusCode) || foreign(resp) {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxTokenRequest))
		resp.Body.Close()
		resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
		return nil, errTokens{resp}
	}
	return resp, nil
}

// tokenPath says whether a request is one for a token that weir is to see to, and
// from where tokens are to be had: nil where that isn't known yet.
func (x *exchange) tokenPath() (realm *url.URL, is bool) {
	if !x.up.authenticated() || !x.reading() && x.r.Method != http.MethodPost || x.r.URL.IsAbs() || x.target.kind != other {
		return nil, false
	}
	known, _ := x.h.logins.Get(x.up.way())
	if x.r.URL.Path != ownRealm && (known.realm == nil || known.elsewhere(x.up) || x.r.URL.Path != known.realm.Path) {
		return nil, false
	}
	return known.realm, true
}

// token answers a request for a token with what the registry's token server says.
// While that fails, who only wants to pull what is public gets the placeholder.
func (x *exchange) token(realm *url.URL) {
	body, err := io.ReadAll(io.LimitReader(x.r.Body, maxTokenRequest+1))
	if err != nil || len(body) > maxTokenRequest {
		x.w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	}
	asked := x.r.URL.Query()
	if form, err := url.ParseQuery(string(body)); err == nil && x.r.Method == http.MethodPost {
		asked = form
	}
	public := x.arePublic(asked["scope"])
	if realm == nil && !x.h.outages.Failing(x.up.way()) {
		base, err := x.ask(question{method: http.MethodGet, base: true, stale: func() bool { return public }})
		if err == nil {
			_ = x.learnLogin(base)
			known, _ := x.h.logins.Get(x.up.way())
			if realm = known.realm; realm == nil && !public {
				x.relay(base) // it has no token server, or says something else
				return
			}
			base.Body.Close()
		}
	}
	var resp *http.Response
	err = errors.New("it isn't known who gives the registry's tokens")
	switch {
	case public && x.h.outages.Failing(x.up.way()):
		err = errors.New("the registry, which they would be for, gives no answer")
	case realm != nil:
		resp, err = x.h.attempt(x.r.Context(), x.up.tokenWay(realm.Host), func() bool { return public }, func(ctx context.Context) (*http.Response, error) { //nolint:bodyclose // relay closes it
			req := x.outgoing(ctx, x.r.Method, nil)
			u := *realm
			u.RawQuery = strings.Trim(realm.RawQuery+"&"+x.r.URL.RawQuery, "&")
			req.URL, req.Host = &u, ""
			if len(body) > 0 {
				req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
				req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
			}
			return x.tokens(req)
		})
	}
	var failed errTokens
	switch {
	case err == nil:
		x.relay(&reply{Response: resp, at: x.h.rights.Now()})
	case x.r.Context().Err() != nil:
		panic(http.ErrAbortHandler) // the client has gone
	case public:
		x.h.log.Warn("the token server gives no answer; a client gets what is public without", "registry", x.up.ID(), "err", scrub(err))
		x.w.Header().Set("Content-Type", "application/json")
		x.w.Header().Set("Cache-Control", "no-store")
		_ = json.NewEncoder(x.w).Encode(map[string]any{"token": placeholder, "access_token": placeholder, "expires_in": int(placeholderTTL.Seconds())})
	case errors.As(err, &failed):
		x.relay(&reply{Response: failed.Response, at: x.h.rights.Now()})
	default:
		x.unreachable(err)
	}
}

// arePublic says whether scopes ask for nothing but to pull from repositories that
// are public (distribution, "Token Scope Documentation").
func (x *exchange) arePublic(scopes []string) bool {
	all := strings.Fields(strings.Join(scopes, " "))
	return len(all) > 0 && !slices.ContainsFunc(all, func(scope string) bool {
		kind, rest, _ := strings.Cut(scope, ":")
		i := strings.LastIndexByte(rest, ':')
		return kind != "repository" || i < 0 || rest[i+1:] != "pull" || !isName(rest[:i]) || !x.h.rights.Public(x.up.vantage(x.up.repository(rest[:i])))
	})
}
