// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/agent/service"
	"weir/p2p"
	"weir/proxy/registry"
	"weir/proxy/store"
)

// peers joins this node's store and registries to the swarm. A nil one does
// nothing.
type peers struct {
	*p2p.Node
	ctx      context.Context
	store    *store.Store
	ready    chan struct{} // closed once what follows is set
	registry *registry.Handler
	figures  func() []byte // this node's figures

	mu      sync.Mutex
	changes []change
	wake    chan struct{}
	wg      sync.WaitGroup
}

// change is a blob that came to the store or left it.
type change struct {
	digest digest.Digest
	kept   bool
}

// foreignInterval is how often it is looked at what containerd has.
const foreignInterval = 10 * time.Second

// joinPeers starts the peer side, if there is a swarm key.
func (a *Agent) joinPeers() (stop func(), err error) {
	if a.conf.SwarmKey == "" {
		if len(a.conf.Peers) > 0 {
			return nil, errors.New("--peer without --swarm-key: peers recognize each other by the key that they share; make one as the README shows, and give it to each node")
		}
		return nil, nil
	}
	key, err := p2p.ReadSwarmKey(a.conf.SwarmKey)
	if err != nil {
		return nil, err
	}
	a.peers, err = newPeers(a.ctx, a.store, p2p.Options{Listen: a.conf.PeerListen, Peers: a.conf.Peers, SwarmKey: key,
		IdentityFile: filepath.Join(a.conf.DataDir, service.IdentityFile), UploadLimit: a.conf.PeerUpload, Log: a.log})
	if err != nil {
		return nil, err
	}
	return a.peers.close, nil
}

// newPeers joins a store to the swarm until ctx is done.
func newPeers(ctx context.Context, s *store.Store, o p2p.Options) (*peers, error) {
	p := &peers{ctx: ctx, store: s, ready: make(chan struct{}), wake: make(chan struct{}, 1)}
	o.Content = content{p}
	var err error
	if p.Node, err = p2p.New(o); err != nil {
		return nil, err
	}
	p.ProvideAll(s.Digests())
	p.wg.Go(p.follow)
	return p, nil
}

// serve lets peers ask for what the registries' handler knows, and for this
// node's figures.
func (p *peers) serve(h *registry.Handler, figures func() []byte) {
	if p != nil {
		p.registry, p.figures = h, figures
		close(p.ready)
	}
}

func (p *peers) close() {
	p.wg.Wait() // it ends with the agent's context
	p.Close()
}

// changed records that a blob was stored or removed. It is called by the store.
func (p *peers) changed(d digest.Digest, kept bool) {
	if p == nil {
		return
	}
	p.mu.Lock()
	p.changes = append(p.changes, change{d, kept})
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// follow announces to peers what this node stores and removes.
func (p *peers) follow() {
	foreign := make(map[string]map[digest.Digest]bool) // by directory
	t := time.NewTicker(foreignInterval)
	defer t.Stop()
	for {
		p.mu.Lock()
		changes := p.changes
		p.changes = nil
		p.mu.Unlock()
		for _, c := range changes {
			if c.kept {
				p.Provide(c.digest)
			} else {
				p.Withdraw(c.digest)
			}
		}
		select {
		case <-p.ctx.Done():
			return
		case <-p.wake:
		case <-t.C:
			p.provideForeign(foreign)
		}
	}
}

// provideForeign provides what the content stores of others have by now.
func (p *peers) provideForeign(foreign map[string]map[digest.Digest]bool) {
	dirs := p.store.Foreign()
	for _, dir := range dirs {
		now := make(map[digest.Digest]bool)
		names, err := os.ReadDir(filepath.Join(dir, digest.SHA256.String()))
		if err != nil {
			continue
		}
		for _, n := range names {
			if d := digest.NewDigestFromEncoded(digest.SHA256, n.Name()); d.Validate() == nil {
				now[d] = true
			}
		}
		before := foreign[dir]
		foreign[dir] = now
		var came []digest.Digest
		for d := range now {
			if !before[d] {
				came = append(came, d)
			}
		}
		if len(came) > 0 {
			p.ProvideAll(came)
		}
		for d := range before {
			if !now[d] && !p.store.Has(d) {
				p.Withdraw(d)
			}
		}
	}
	maps.DeleteFunc(foreign, func(dir string, _ map[digest.Digest]bool) bool { return !slices.Contains(dirs, dir) })
}

// Want implements registry.Peers.
func (p *peers) Want(ctx context.Context, d digest.Digest, pace int64) registry.Share {
	if s := p.Node.Want(ctx, d, pace); s != nil {
		return s
	}
	return nil
}

// content is what peers get: p2p.Content has names in common with p2p.Node.
type content struct{ *peers }

// Export implements p2p.Content.
func (c content) Export(hash string) []byte {
	select {
	case <-c.ready:
		return c.registry.Export(hash)
	default:
		return nil
	}
}

// Figures implements p2p.Content.
func (c content) Figures() []byte {
	select {
	case <-c.ready:
		return c.figures()
	default:
		return nil
	}
}

// Open implements p2p.Content.
func (p *peers) Open(ctx context.Context, d digest.Digest) (*p2p.Blob, error) {
	if b, err := p.openKept(d); err == nil {
		return b, nil
	}
	r, err := p.store.Follow(ctx, d)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, p2p.ErrNotHere
	case err != nil: // it came to nothing, or is over by now
		return p.openKept(d)
	}
	return &p2p.Blob{ReadSeekCloser: r.With(ctx, store.Failover{}), Size: r.Size()}, nil
}

func (p *peers) openKept(d digest.Digest) (*p2p.Blob, error) {
	b, err := p.store.Get(d)
	if err != nil {
		return nil, p2p.ErrNotHere
	}
	return &p2p.Blob{ReadSeekCloser: openBlob{b.Reader(), b}, Size: b.Size(), Kept: true}, nil
}

type openBlob struct {
	io.ReadSeeker
	io.Closer
}

// Progress implements p2p.Content.
func (p *peers) Progress(d digest.Digest) (arrived, size int64, kept bool, err error) {
	if arrived, size, err = p.store.Arriving(d); err == nil {
		return arrived, size, false, nil // which the disk, that is busy then, isn't asked for
	}
	b, err := p.store.Get(d)
	if err != nil {
		return 0, 0, false, p2p.ErrNotHere
	}
	defer b.Close()
	return b.Size(), b.Size(), true, nil
}
