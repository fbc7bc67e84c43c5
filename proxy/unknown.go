// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"github.com/hashicorp/golang-lru/v2/simplelru"
	"weir/proxy/registry"
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
	// Companion is what it is to a registry, nil if that isn't known.
	Companion *Companion `json:"companion,omitempty"`
}

const (
	// maxUnknown bounds the table of unknown hosts. Those that have not been seen for
	// longest go first: clients name what they like.
	maxUnknown = 256
	// askAgain is when an unknown host is asked again whether it is a
	// registry.
	askAgain = time.Hour
	// askTimeout bounds that.
	askTimeout = 15 * time.Second
	// maxAsked bounds the networks that it is remembered for when a host was asked.
	maxAsked = 64
)

type unknowns struct {
	mu  sync.Mutex
	all *simplelru.LRU[string, *unknownHost]
}

type unknownHost struct {
	Unknown
	asked map[string]asked // by the client's network
}

// asked is when a host was asked, and whether it is no registry.
type asked struct {
	at   time.Time
	none bool
}

// errSilent says that a host has not answered.
var errSilent = errors.New("it gives no answer")

func newUnknowns() unknowns {
	all, _ := simplelru.NewLRU[string, *unknownHost](maxUnknown, nil)
	return unknowns{all: all}
}

// Unknowns returns the hosts that were passed through because they aren't
// known to be registries, those first that are.
func (p *Proxy) Unknowns() []Unknown {
	p.unknown.mu.Lock()
	defer p.unknown.mu.Unlock()
	all := make([]Unknown, 0, p.unknown.all.Len())
	for _, u := range p.unknown.all.Values() {
		if _, ok := p.opts.Hosts.Find(u.Host); !ok { // it may have become one
			shown := u.Unknown
			if c, ok := p.companions.find(u.Host); ok {
				shown.Companion = &c
			}
			all = append(all, shown)
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
	u, ok := p.unknown.all.Get(host)
	if !ok {
		u = &unknownHost{Unknown: Unknown{Host: host}, asked: make(map[string]asked)}
		p.unknown.all.Add(host, u)
	}
	u.Connections++
	u.LastSeen = time.Now()
	last, again := u.asked[f.NetworkID]
	if again && last.none && time.Since(last.at) < askAgain {
		p.leave(f)
		return
	}
	if f.Unsure != nil {
		f.Unsure(host, true)
	}
	if again && time.Since(last.at) < askAgain {
		return
	}
	if len(u.asked) >= maxAsked {
		clear(u.asked)
	}
	u.asked[f.NetworkID] = asked{at: u.LastSeen}
	go func() {
		is, ownRoots, err := p.speaksDistribution(ctx, host, f)
		none := !is && !errors.Is(err, errSilent)
		if is {
			p.serving.Add(place{f.NetworkID, f.Dst}, struct{}{})
			if f.Learn != nil {
				err = f.Learn(host, ownRoots)
			}
		}
		if none {
			p.leave(f)
			if f.Unsure != nil {
				f.Unsure(host, false)
			}
		}
		p.unknown.mu.Lock()
		defer p.unknown.mu.Unlock()
		was := u.Registry
		u.asked[f.NetworkID] = asked{u.LastSeen, none}
		u.Registry, u.Problem = is, ""
		if err != nil {
			u.Problem = err.Error()
		}
		if is && !was && (err != nil || f.Learn == nil) {
			p.log.Info("a registry that weir doesn't know is passed through; add it with --registry to have it cached", "registry", host, "why", err)
		}
	}()
}

// Registry returns the known registry that a client names in what it says first to a
// destination.
func (p *Proxy) Registry(dst netip.AddrPort, said []byte) (host string, known bool) {
	h := peek(bytes.NewReader(said))
	if h.protocol != tlsHello || h.host == "" {
		return "", false
	}
	host = upstream.ParseHost(net.JoinHostPort(h.host, portOf(dst))).String()
	_, known = p.opts.Hosts.Find(host)
	return host, known
}

// isCut says whether a client's first words are the beginning of a TLS record that is
// longer: the rest was in another packet. The client has to say it all here.
func isCut(said []byte) bool {
	const header = 5 // RFC 8446, section 5.1
	return len(said) > 0 && said[0] == 22 && (len(said) < header || len(said) < header+int(said[3])<<8+int(said[4]))
}

// Look takes what a client has said first to a destination that it is connected to
// without weir, as much as is known of it, and finds out whether a registry is there.
func (p *Proxy) Look(ctx context.Context, f Flow, said []byte) {
	h := peek(bytes.NewReader(said))
	switch {
	case h.registry != "", h.connect != "", h.protocol == opaque && isCut(said):
		if h.connect != "" {
			p.serving.Add(place{f.NetworkID, f.Dst}, struct{}{})
		}
		if f.Want != nil {
			f.Want()
		}
	case h.protocol == tlsHello && h.http1:
		name := h.host
		if name == "" {
			name = f.Dst.Addr().String()
		}
		host := upstream.ParseHost(net.JoinHostPort(name, portOf(f.Dst))).String()
		if _, ok := p.opts.Hosts.Find(host); !ok {
			p.see(ctx, host, f)
		}
	}
}

// speaksDistribution asks a host, the way that a client has just taken, whether
// it is a registry: OCI distribution specification, "Determining support". ownRoots
// says that the node can't verify it, and the client's runtime can.
func (p *Proxy) speaksDistribution(ctx context.Context, host string, f Flow) (is, ownRoots bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var s upstream.Settings
	if f.Settings != nil {
		if s, err = f.Settings(registry.Known{Host: host}, host); err != nil {
			return false, false, fmt.Errorf("the runtime's settings for it can't be used: %w", err)
		}
	}
	target := f.target(upstream.ParseHost(host))
	target.Settings = s.WithoutRoots()
	err = f.Egress.Verify(ctx, target)
	if err != nil && s.Roots != nil && upstream.Refused(err) {
		ownRoots, target.Settings = true, s
		err = f.Egress.Verify(ctx, target)
	}
	if err != nil {
		if upstream.Refused(err) {
			return false, false, fmt.Errorf("its certificate can't be verified; if it is a registry, name its CA too: %w", err)
		}
		return false, false, fmt.Errorf("no connection: %w", errSilent)
	}
	status, header, err := f.Egress.Base(ctx, target)
	if err != nil {
		return false, false, errSilent
	}
	is = strings.HasPrefix(header.Get("Docker-Distribution-Api-Version"), "registry/2.")
	if status == http.StatusUnauthorized {
		for _, c := range auth.ParseAuthHeader(header) {
			is = is || c.Scheme == auth.BearerAuth && c.Parameters["service"] != ""
		}
	}
	if is && !ownRoots {
		p.companions.see(host, "/v2/", status, header)
	}
	return is, ownRoots, nil
}
