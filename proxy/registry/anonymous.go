// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	lru "github.com/hashicorp/golang-lru/v2"
)

// tokens are what registries give to those without a name.
type tokens struct {
	lru *lru.Cache[repository, token]
}

type token struct {
	value   string
	expires time.Time
}

func newTokens() *tokens {
	t := &tokens{}
	t.lru, _ = lru.New[repository, token](1 << 10)
	return t
}

// anonymous sends requests to a registry in the name of nobody.
type anonymous struct {
	h  *Handler
	up Upstream
}

func (a *anonymous) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host != a.up.base().Host || req.Method != http.MethodGet && req.Method != http.MethodHead {
		return a.up.Transport.RoundTrip(req)
	}
	return a.h.anonymously(req, repository{a.up.ID(), parsePath(req.URL.EscapedPath()).repo}, a.up.Transport)
}

// tokenTimeout bounds the way to a token.
const tokenTimeout = 30 * time.Second

// anonymously sends a request without a name, which is GET or HEAD. When the
// registry wants a token it gets the one that everybody gets (distribution,
// "Token Authentication Specification").
func (h *Handler) anonymously(req *http.Request, repo repository, rt http.RoundTripper) (*http.Response, error) {
	req = req.Clone(req.Context()) // a RoundTripper leaves it as it is
	req.Header.Del("Authorization")
	req.Header.Del("Cookie")
	if t, ok := h.tokens.lru.Get(repo); ok && time.Now().Before(t.expires) {
		req.Header.Set("Authorization", "Bearer "+t.value)
	}
	resp, err := rt.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	t, err := anonymousToken(req.Context(), resp, rt)
	if err != nil {
		h.log.Debug("no token for those without a name", "registry", repo.registry, "repository", repo.name, "err", scrub(err))
		return resp, nil // the refusal is the answer
	}
	resp.Body.Close()
	h.tokens.lru.Add(repo, t)
	req.Header.Set("Authorization", "Bearer "+t.value)
	return rt.RoundTrip(req)
}

func anonymousToken(ctx context.Context, refusal *http.Response, rt http.RoundTripper) (token, error) {
	for _, c := range auth.ParseAuthHeader(refusal.Header) {
		if c.Scheme != auth.BearerAuth {
			continue
		}
		o, err := auth.GenerateTokenOptions(ctx, "", "", "", c)
		if err != nil {
			return token{}, err
		}
		if realm, err := url.Parse(o.Realm); err != nil || realm.Scheme != "https" {
			return token{}, errors.New("the realm is no https URL")
		}
		ctx, cancel := context.WithTimeout(ctx, tokenTimeout)
		defer cancel()
		got, err := auth.FetchToken(ctx, &http.Client{Transport: bounded{rt}}, http.Header{"User-Agent": {"weir"}}, o)
		if err != nil {
			return token{}, fmt.Errorf("asking for a token: %w", scrub(err))
		}
		life := 60 * time.Second // the specification's default
		if got.ExpiresInSeconds > 0 {
			life = time.Duration(min(got.ExpiresInSeconds, 3600)) * time.Second
		}
		t := token{got.Token, time.Now().Add(life * 9 / 10)}
		if t.value == "" {
			t.value = got.AccessToken
		}
		return t, nil
	}
	return token{}, errors.New("it asks for no token")
}

// bounded bounds the bodies that are read whole.
type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(req)
	if err == nil {
		resp.Body = readCloser{io.LimitReader(resp.Body, 1<<20), resp.Body}
	}
	return resp, err
}

// wonder finds out, after the upstream has given a manifest to somebody,
// whether it would have given it to everybody. Nobody waits for that. It is
// what lets public images be pulled while the registry is down: those who pull
// come with a new token each time, so that their own right can't be known.
func (x *exchange) wonder(resp *http.Response) {
	repo := x.asker.repository
	if resp.StatusCode/100 != 2 || x.up.As != "" || !x.h.rights.publicityUnknown(repo) {
		return
	}
	if x.r.Header.Get("Authorization") == "" && x.r.Header.Get("Cookie") == "" {
		x.h.rights.setPublic(repo, true)
		x.h.tags.changed.Store(true)
		return
	}
	if !x.up.believed() || !x.h.asking.TryAcquire(1) {
		return
	}
	x.h.rights.setPublic(repo, false) // until it is known; others needn't ask
	ctx, cancel := context.WithTimeout(x.h.ctx, time.Minute)
	req := x.request(ctx, http.MethodHead, http.Header{"User-Agent": {"weir"}})
	x.h.wg.Go(func() {
		defer x.h.asking.Release(1)
		defer cancel()
		resp, err := x.h.anonymously(req, repo, x.up.Transport)
		if err != nil {
			return
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			x.h.rights.setPublic(repo, true)
			x.h.tags.changed.Store(true)
		}
	})
}
