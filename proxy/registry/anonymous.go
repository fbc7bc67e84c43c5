// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/semaphore"
	"weir/proxy/rights"
)

// tokens are the anonymous tokens of registries.
type tokens struct {
	lru *lru.Cache[rights.Vantage, token]
}

type token struct {
	value   string
	expires time.Time
}

func newTokens() *tokens {
	t := &tokens{}
	t.lru, _ = lru.New[rights.Vantage, token](1 << 10)
	return t
}

// anonymous sends requests to a registry without anything by which it could know
// the client.
type anonymous struct {
	h  *Handler
	up Upstream
}

// tokenTimeout bounds the way to a token, and maxToken its length.
const (
	tokenTimeout = 30 * time.Second
	maxToken     = 32 << 10
)

// RoundTrip implements http.RoundTripper. When the registry wants a token, GET and
// HEAD are sent with the one that every client gets (distribution, "Token
// Authentication Specification"). The error is a [*noToken] when that is not to be
// had; a token server that refuses leaves the registry's refusal.
func (a *anonymous) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host != a.up.base().Host || req.Method != http.MethodGet && req.Method != http.MethodHead {
		return a.up.Transport.RoundTrip(req)
	}
	from := a.up.vantage(a.up.repository(repositoryName(parsePath(req.URL.EscapedPath()).repo, req.URL.RawQuery)))
	agent := req.Header["User-Agent"]
	req = req.Clone(req.Context()) // a RoundTripper leaves it as it is
	req.Header = rights.Strip(req.Header)
	req.Header["User-Agent"] = agent
	known, had := a.h.tokens.lru.Get(from)
	if had = had && time.Now().Before(known.expires); had {
		req.Header.Set("Authorization", "Bearer "+known.value)
	}
	resp, err := a.up.Transport.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	t, err := a.token(req.Context(), resp)
	var failed *noToken
	switch {
	case errors.As(err, &failed) && had: // that one is refused
		a.h.tokens.lru.Remove(from)
		return resp, nil
	case errors.As(err, &failed) && (!a.h.rights.Public(from) || a.h.rights.PublicWithToken(from)):
		resp.Body.Close()
		return nil, err
	case err != nil:
		a.h.log.Debug("no token for anonymous clients", "registry", from.Registry, "repository", from.Name, "err", scrub(err))
		return resp, nil
	}
	resp.Body.Close()
	a.h.tokens.lru.Add(from, t)
	req.Header.Set("Authorization", "Bearer "+t.value)
	return a.up.Transport.RoundTrip(req)
}

// token gets a token that a refusal asks for.
func (a *anonymous) token(ctx context.Context, refusal *http.Response) (token, error) {
	for _, c := range auth.ParseAuthHeader(refusal.Header) {
		if c.Scheme != auth.BearerAuth {
			continue
		}
		o, err := auth.GenerateTokenOptions(ctx, "", "", "", c)
		if err != nil {
			return token{}, err
		}
		realm, err := url.Parse(o.Realm)
		if err != nil || realm.Scheme != "https" {
			return token{}, errors.New("the realm is no https URL")
		}
		way := a.up.tokenWay(realm.Host)
		ctx, cancel := context.WithTimeout(ctx, tokenTimeout)
		defer cancel()
		start := time.Now()
		got, err := auth.FetchToken(ctx, &http.Client{Transport: bounded{a.up.Transport}, CheckRedirect: onlyHTTPS}, http.Header{"User-Agent": {"weir"}}, o)
		var status remoteserrors.ErrUnexpectedStatus
		switch {
		case errors.As(err, &status) && !failedTokens(status.StatusCode) && json.Valid(status.Body):
			a.h.outages.Answered(way, time.Since(start))
			return token{}, fmt.Errorf("asking for a token: %w", scrub(err))
		case err != nil:
			if !errors.Is(ctx.Err(), context.Canceled) {
				a.h.outages.Failed(way)
			}
			return token{}, &noToken{scrub(err), status.StatusCode, status.Body}
		}
		a.h.outages.Answered(way, time.Since(start))
		life := 60 * time.Second // the specification's default
		if got.ExpiresInSeconds > 0 {
			life = time.Duration(min(got.ExpiresInSeconds, 3600)) * time.Second
		}
		t := token{got.Token, time.Now().Add(life * 9 / 10)}
		if t.value == "" {
			t.value = got.AccessToken
		}
		if len(t.value) > maxToken {
			return token{}, fmt.Errorf("a token of %d bytes", len(t.value))
		}
		return t, nil
	}
	return token{}, errors.New("it asks for no token")
}

// onlyHTTPS keeps a token server from having weir ask without TLS: in a network
// something may be at any address.
func onlyHTTPS(req *http.Request, via []*http.Request) error {
	if req.URL.Scheme != "https" || len(via) >= 5 {
		return errors.New("a redirect that is not followed")
	}
	return nil
}

// noToken is the failure of a token server.
type noToken struct {
	error
	status int // 0 if it gave no answer
	body   []byte
}

// Unwrap implements errors.
func (e *noToken) Unwrap() []error { return []error{errElsewhere, e.error} }

// failedTokens says whether a token server that answers so has failed.
func failedTokens(status int) bool { return status == http.StatusTooManyRequests || status >= 500 }

// tokenWay is what is remembered of whether a token server answers.
func (u Upstream) tokenWay(host string) string { return "tokens of " + host + " from " + u.NetworkID }

// bounded bounds the bodies that are read whole.
type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(req)
	if err == nil {
		resp.Body = readCloser{io.LimitReader(resp.Body, 1<<20), resp.Body}
	}
	return resp, err
}

// asking bounds what is asked in the background at a time: of each registry, so
// that one which doesn't answer keeps none from being asked, and in all.
type asking struct {
	all     *semaphore.Weighted
	mu      sync.Mutex
	running map[string]int       // by registry
	until   map[string]time.Time // when those that want it slower may be asked again
}

const (
	maxAsking    = 4
	maxAskingAll = 64
)

func newAsking() *asking {
	return &asking{all: semaphore.NewWeighted(maxAskingAll), running: make(map[string]int), until: make(map[string]time.Time)}
}

func (a *asking) begin(registry string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Now().Before(a.until[registry]) || a.running[registry] >= maxAsking || !a.all.TryAcquire(1) {
		return false
	}
	a.running[registry]++
	return true
}

// pause has a registry that answers 429 be left alone for as long as it says, within
// bounds (RFC 9110, section 10.2.3), or for a minute.
func (a *asking) pause(registry string, resp *http.Response) {
	long := time.Minute
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		long = min(max(time.Duration(seconds)*time.Second, time.Second), time.Hour)
	} else if at, err := http.ParseTime(resp.Header.Get("Retry-After")); err == nil {
		long = min(max(time.Until(at), time.Second), time.Hour)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for r, until := range a.until {
		if time.Now().After(until) {
			delete(a.until, r)
		}
	}
	a.until[registry] = time.Now().Add(long)
}

func (a *asking) paused(registry string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Now().Before(a.until[registry])
}

func (a *asking) end(registry string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all.Release(1)
	if a.running[registry]--; a.running[registry] == 0 {
		delete(a.running, registry)
	}
}

// checkPublic finds out, after the upstream has given a manifest to a client,
// whether its repository is public. No client waits for that. It is what lets public
// images be pulled while the registry is down: clients come with a new token each
// time, so that their own grant can't be known.
func (x *exchange) checkPublic(resp *reply) {
	if resp.StatusCode == http.StatusOK {
		x.askAnonymously(func() string {
			if !x.h.rights.NeedsCheck(x.vantage, false) {
				return ""
			}
			return cmp.Or(x.target.tag, x.target.digest.String())
		})
	}
}

// recheck finds out, after the upstream has refused a client, whether a repository
// that was public still is, and a tag that is known is still there. A client's
// own refusal says nothing of that.
func (x *exchange) recheck(status int) {
	due := false
	x.askAnonymously(func() string {
		if due = x.h.rights.NeedsCheck(x.vantage, true); due {
			return x.h.rights.Reference(x.vantage)
		}
		return ""
	})
	if due && status == http.StatusNotFound && len(x.h.rights.Tag(x.who.Repository, x.target.tag)) > 0 {
		x.askAnonymously(func() string { return x.target.tag })
	}
}

// askAnonymously asks in the background for a manifest, with a request that has
// nothing of any client in it but the network that it is made from. what returns
// its tag or digest, or nothing if none is to be asked for.
func (x *exchange) askAnonymously(what func() string) {
	if x.up.ClientIdentity != "" || !x.h.asking.begin(x.up.ID()) {
		return
	}
	reference := what()
	if reference == "" {
		x.h.asking.end(x.up.ID())
		return
	}
	v := x.vantage
	ctx, cancel := context.WithTimeout(x.h.ctx, time.Minute)
	u := x.up.base()
	name, query, _ := strings.Cut(v.Name, "?")
	u.Path, u.RawQuery = "/v2/"+name+"/manifests/"+reference, query
	req := (&http.Request{Method: http.MethodHead, URL: u, Host: x.r.Host, Header: http.Header{"User-Agent": {"weir"}}}).WithContext(ctx)
	if accept := x.r.Header.Values("Accept"); len(accept) > 0 && x.target.kind == manifest {
		req.Header["Accept"] = accept
	} else {
		req.Header["Accept"] = manifestTypes
	}
	x.h.wg.Go(func() {
		defer x.h.asking.end(x.up.ID())
		defer cancel()
		resp, err := x.up.follow(&anonymous{x.h, x.up}).Do(req)
		if err != nil {
			return
		}
		resp.Body.Close()
		switch resp.StatusCode {
		case http.StatusTooManyRequests:
			x.h.asking.pause(x.up.ID(), resp)
		case http.StatusOK:
			x.h.rights.SetPublic(v, describesManifest(&reply{Response: resp}, ""), reference, hadToken(resp))
		case http.StatusNotFound:
			x.h.rights.ForgetTag(v.Repository, reference)
			if reference != x.h.rights.Reference(v) {
				return // the tag was deleted, which doesn't say more
			}
			x.h.rights.SetPublic(v, false, reference, false)
		case http.StatusUnauthorized, http.StatusForbidden:
			x.h.rights.SetPublic(v, false, reference, false)
		}
	})
}
