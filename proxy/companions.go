// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// Companion is what a host is to a registry that clients of the registry connect to
// as well.
type Companion struct {
	// Role is RoleTokenServer or RoleStorage.
	Role string `json:"role"`
	// Of is the registry's host.
	Of string `json:"of"`
}

// Roles of a companion.
const (
	RoleTokenServer = "token server" // it gives the registry's tokens
	RoleStorage     = "storage"      // the registry redirects to it for content
)

// wellKnownCompanions are known before a registry has been seen to send a client
// there, as it isn't where all runtimes are passed through.
var wellKnownCompanions = map[string]Companion{
	// docs.docker.com/desktop/setup/allow-list
	"auth.docker.io":                   {RoleTokenServer, registry.DockerHub},
	"production.cloudflare.docker.com": {RoleStorage, registry.DockerHub},
	"production.cloudfront.docker.com": {RoleStorage, registry.DockerHub},
	"docker-images-prod.6aa30f8b08e16409b46e0173d6de2f56.r2.cloudflarestorage.com": {RoleStorage, registry.DockerHub},
	// docs.github.com/en/actions/reference/runners/self-hosted-runners
	"pkg-containers.githubusercontent.com": {RoleStorage, "ghcr.io"},
}

// companions are hosts that registries have sent clients to. It is what the
// registries say, shown to people and used for nothing else.
type companions struct {
	mu  sync.Mutex
	all map[string]Companion // by host
}

// find returns what a host is.
func (c *companions) find(host string) (Companion, bool) {
	if known, ok := wellKnownCompanions[host]; ok {
		return known, true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	known, ok := c.all[host]
	return known, ok
}

// add records that a registry has sent a client to u. What a host was first it stays:
// a registry can't rename another's companions.
func (c *companions) add(u *url.URL, role, of string) {
	if u.Scheme != "https" || u.Hostname() == "" || len(u.Host) > maxAuthority {
		return
	}
	host := upstream.ParseHost(u.Host).String()
	if host == of {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.all[host]; !ok && len(c.all) < maxUnknown {
		if c.all == nil {
			c.all = make(map[string]Companion)
		}
		c.all[host] = Companion{role, of}
	}
}

// sends says whether an answer may send the client to another host. Most don't.
func sends(status int) bool { return status == http.StatusUnauthorized || status/100 == 3 }

// see records where an answer of a registry sends the client.
func (c *companions) see(host string, path string, status int, header http.Header) {
	switch {
	case status == http.StatusUnauthorized:
		for _, challenge := range auth.ParseAuthHeader(header) {
			if realm, err := url.Parse(challenge.Parameters["realm"]); err == nil && challenge.Scheme == auth.BearerAuth {
				c.add(realm, RoleTokenServer, host)
			}
		}
	case status/100 == 3 && strings.HasPrefix(path, "/v2/") && (strings.Contains(path, "/blobs/") || strings.Contains(path, "/manifests/")):
		if location, err := url.Parse(header.Get("Location")); err == nil {
			c.add(location, RoleStorage, host)
		}
	}
}

// seeing is the transport of a registry's requests. It sees where the registry sends
// clients.
type seeing struct {
	*upstream.Transport
	host string
	seen *companions
}

// RoundTrip implements http.RoundTripper.
func (s seeing) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := s.Transport.RoundTrip(req)
	if err == nil && sends(resp.StatusCode) && upstream.ParseHost(req.URL.Host).String() == s.host {
		s.seen.see(s.host, req.URL.Path, resp.StatusCode, resp.Header)
	}
	return resp, err
}
