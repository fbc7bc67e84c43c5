// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"weir/proxy/upstream"
)

// Unknown is a host that clients connect to with TLS and that isn't among the
// known registries: it is passed through.
type Unknown struct {
	Host        string    `json:"host"` // in canonical form
	Connections int64     `json:"connections"`
	LastSeen    time.Time `json:"last_seen"`
	// Registry says that it speaks the distribution API.
	Registry bool `json:"registry"`
	// Problem says why that could not be found out.
	Problem string `json:"problem,omitempty"`
}

const (
	// maxUnknown bounds the table of unknown hosts.
	maxUnknown = 256
	// askAgain is when an unknown host is asked again whether it is a
	// registry.
	askAgain = time.Hour
	// askTimeout bounds that.
	askTimeout = 15 * time.Second
)

type unknowns struct {
	mu  sync.Mutex
	all map[string]*unknownHost
}

type unknownHost struct {
	Unknown
	asked time.Time
}

func newUnknowns() unknowns { return unknowns{all: make(map[string]*unknownHost)} }

// Unknowns returns the hosts that were passed through because they aren't
// known to be registries, those first that are.
func (p *Proxy) Unknowns() []Unknown {
	p.unknown.mu.Lock()
	defer p.unknown.mu.Unlock()
	all := make([]Unknown, 0, len(p.unknown.all))
	for host, u := range p.unknown.all {
		if _, ok := p.opts.Hosts.Find(host); !ok { // it may have become one
			all = append(all, u.Unknown)
		}
	}
	slices.SortFunc(all, func(a, b Unknown) int {
		if a.Registry != b.Registry {
			return map[bool]int{true: -1, false: 1}[a.Registry]
		}
		return cmp.Or(cmp.Compare(b.Connections, a.Connections), cmp.Compare(a.Host, b.Host))
	})
	return all
}

// see counts a connection to an unknown host, and has it asked what it is.
func (p *Proxy) see(ctx context.Context, host string, f Flow) {
	p.unknown.mu.Lock()
	defer p.unknown.mu.Unlock()
	u, ok := p.unknown.all[host]
	if !ok {
		if len(p.unknown.all) >= maxUnknown {
			return
		}
		u = &unknownHost{Unknown: Unknown{Host: host}}
		p.unknown.all[host] = u
	}
	u.Connections++
	u.LastSeen = time.Now()
	if time.Since(u.asked) < askAgain {
		return
	}
	u.asked = u.LastSeen
	go func() {
		is, err := speaksDistribution(ctx, host, f)
		p.unknown.mu.Lock()
		defer p.unknown.mu.Unlock()
		was := u.Registry
		u.Registry, u.Problem = is, ""
		if err != nil {
			u.Problem = err.Error()
		}
		if is && !was {
			p.log.Info("a registry that weir doesn't know is passed through; add it with --registry to have it cached", "registry", host)
		}
	}()
}

// speaksDistribution asks a host, the way that a client has just taken, whether
// it is a registry: OCI distribution specification, "Determining support".
func speaksDistribution(ctx context.Context, host string, f Flow) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	target := upstream.Target{Host: upstream.ParseHost(host), Addr: f.Dst}
	if err := f.Egress.Verify(ctx, target); err != nil {
		if upstream.Refused(err) {
			return false, fmt.Errorf("its certificate can't be verified; if it is a registry, name its CA too: %w", err)
		}
		return false, errors.New("no connection")
	}
	status, header, err := f.Egress.Base(ctx, target)
	if err != nil {
		return false, errors.New("no answer")
	}
	if strings.HasPrefix(header.Get("Docker-Distribution-Api-Version"), "registry/2.") {
		return true, nil
	}
	if status == http.StatusUnauthorized {
		for _, c := range auth.ParseAuthHeader(header) {
			if c.Scheme == auth.BearerAuth && c.Parameters["service"] != "" {
				return true, nil
			}
		}
	}
	return false, nil
}
