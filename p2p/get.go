// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
)

// Get returns a small blob from a peer, verified, at most limit bytes. The
// error is [ErrNoPeer] when none gives it.
func (n *Node) Get(ctx context.Context, d digest.Digest, limit int64) ([]byte, error) {
	k, err := keyOf(d)
	if err != nil {
		return nil, err
	}
	a, ok := n.consult(ctx, question{Op: opFind, Key: k})
	if !ok {
		return nil, ErrNoPeer
	}
	_, b, err := firstOf(ctx, n.goodOf(a.Sources), n.opts.next, func(src source) ([]byte, error) {
		b, kept, err := n.small(n.ctx, src, "/blobs/"+d.String(), limit)
		switch {
		case err != nil:
		case d.Algorithm().FromBytes(b) == d:
			n.peers.verified(src.ID, int64(len(b)))
		case kept:
			n.penalize(src.ID, d, lie)
			err = errors.New("it is another blob")
		default:
			n.penalize(src.ID, d, unverified)
			err = errors.New("it is another blob")
		}
		return b, err
	}, nil, nil)
	if err != nil {
		return nil, ErrNoPeer
	}
	return b, nil
}

// small reads something small from a peer, and says whether that claims to have
// verified it. One that doesn't give it in time is left out for a while.
func (n *Node) small(ctx context.Context, src source, path string, limit int64) (b []byte, kept bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, silentTime)
	defer cancel()
	resp, err := n.get(ctx, src, path, 0)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			n.mute(src)
		}
		return nil, false, err
	}
	defer resp.Body.Close()
	b, err = io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	n.peers.took(src.ID, int64(len(b)))
	return b, resp.Header.Get(keptHeader) != "", err
}

// LoadName returns what peers know under a name that they provide. Those that are
// silent while others answer are waited for a moment.
func (n *Node) LoadName(ctx context.Context, name string) (all [][]byte) {
	k := nameKey(name)
	a, _ := n.consult(ctx, question{Op: opFind, Key: k})
	sources := n.goodOf(a.Sources)
	answers := make(chan []byte, len(sources))
	for _, src := range sources {
		go func() {
			b, _, _ := n.small(n.ctx, src, "/names/"+HashName(name), maxName)
			answers <- b
		}()
	}
	var enough <-chan time.Time
	for range sources {
		select {
		case b := <-answers:
			if b == nil {
				continue
			}
			if all = append(all, b); enough == nil {
				enough = time.After(secondTime)
			}
		case <-enough:
			return all
		case <-ctx.Done():
			return all
		}
	}
	return all
}

// HashName is what [Content.Export] gets for a name.
func HashName(name string) string { return fmt.Sprintf("%x", nameKey(name)[2:]) }
