// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"sync"

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

// change is a blob that can be had from now on, or not any more.
type change struct {
	digest digest.Digest
	here   bool
}

// manyNew is of how many blobs that come at once stewards aren't told one by one: of
// those that a containerd had before, for one.
const manyNew = 64

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

// changed records that a blob can be had from now on, or not any more. It is called by
// the store.
func (p *peers) changed(d digest.Digest, here bool) {
	if p == nil {
		return
	}
	p.mu.Lock()
	p.changes = append(p.changes, change{d, here})
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// follow announces to peers what this node has from now on, and has no more.
func (p *peers) follow() {
	for {
		p.mu.Lock()
		changes := p.changes
		p.changes = nil
		p.mu.Unlock()
		var came []digest.Digest
		for _, c := range changes {
			switch {
			case !c.here:
				p.ProvideAll(came) // it may be among them
				came = nil
				p.Withdraw(c.digest)
			case len(changes) < manyNew:
				p.Provide(c.digest)
			default:
				came = append(came, c.digest)
			}
		}
		p.ProvideAll(came)
		select {
		case <-p.ctx.Done():
			return
		case <-p.wake:
		}
	}
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
