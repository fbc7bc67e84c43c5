// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
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

func (a *anonymous) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host != a.up.base().Host || req.Method != http.MethodGet && req.Method != http.MethodHead {
		return a.up.Transport.RoundTrip(req)
	}
	return a.h.anonymously(req, a.up.vantage(a.up.repository(parsePath(req.URL.EscapedPath()).repo)), a.up.Transport)
}

// tokenTimeout bounds the way to a token, and maxToken its length.
const (
	tokenTimeout = 30 * time.Second
	maxToken     = 32 << 10
)

// anonymously sends a request without anything of a client in it, which is GET or
// HEAD. When the registry wants a token it gets the one that every client gets
// (distribution, "Token Authentication Specification").
func (h *Handler) anonymously(req *http.Request, from rights.Vantage, rt http.RoundTripper) (*http.Response, error) {
	agent := req.Header["User-Agent"]
	req = req.Clone(req.Context()) // a RoundTripper leaves it as it is
	req.Header = rights.Strip(req.Header)
	req.Header["User-Agent"] = agent
	if t, ok := h.tokens.lru.Get(from); ok && time.Now().Before(t.expires) {
		req.Header.Set("Authorization", "Bearer "+t.value)
	}
	resp, err := rt.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	t, err := anonymousToken(req.Context(), resp, rt)
	if err != nil {
		h.log.Debug("no token for anonymous clients", "registry", from.Registry, "repository", from.Name, "err", scrub(err))
		return resp, nil // the refusal is the answer
	}
	resp.Body.Close()
	h.tokens.lru.Add(from, t)
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
		if len(t.value) > maxToken {
			return token{}, fmt.Errorf("a token of %d bytes", len(t.value))
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

// asking bounds what is asked in the background at a time: of each registry, so
// that one which doesn't answer keeps none from being asked, and in all.
type asking struct {
	all     *semaphore.Weighted
	mu      sync.Mutex
	running map[string]int // by registry
}

const (
	maxAsking    = 4
	maxAskingAll = 64
)

func newAsking() *asking {
	return &asking{all: semaphore.NewWeighted(maxAskingAll), running: make(map[string]int)}
}

func (a *asking) begin(registry string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running[registry] >= maxAsking || !a.all.TryAcquire(1) {
		return false
	}
	a.running[registry]++
	return true
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
	u.Path = "/v2/" + v.Name + "/manifests/" + reference
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
		case http.StatusOK:
			x.h.rights.SetPublic(v, describesManifest(&reply{Response: resp}, ""), reference)
		case http.StatusNotFound:
			x.h.rights.ForgetTag(v.Repository, reference)
			if reference != x.h.rights.Reference(v) {
				return // the tag was deleted, which doesn't say more
			}
			x.h.rights.SetPublic(v, false, reference)
		case http.StatusUnauthorized, http.StatusForbidden:
			x.h.rights.SetPublic(v, false, reference)
		}
	})
}

// manifestTypes are the media types of manifests.
var manifestTypes = []string{
	"application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json",
	"application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.docker.distribution.manifest.v2+json",
}
