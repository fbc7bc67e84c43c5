// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// MaxFigures bounds what a peer may say of itself, in bytes.
	MaxFigures = 64 << 10
	// maxAsked bounds the peers whose figures are asked for, asking those that
	// are asked at the same time.
	maxAsked, asking = 256, 32
	// figuresTime is how long all of them may take.
	figuresTime = 2 * time.Second
)

// sendFigures tells a peer what [Content.Figures] says.
func (n *Node) sendFigures(w http.ResponseWriter, _ *http.Request) {
	b := n.opts.Content.Figures()
	if b == nil {
		http.Error(w, "nothing to say yet", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
}

// Figures asks connected peers for their figures, and returns the
// answers by peer id, each at most [MaxFigures] bytes that are not checked yet.
// Some may give none in time, and of very many peers some aren't asked.
func (n *Node) Figures(ctx context.Context) map[string][]byte {
	ctx, cancel := context.WithTimeout(ctx, figuresTime)
	defer cancel()
	said := make(map[string][]byte)
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(asking)
	peers := n.host.Network().Peers()
	for _, id := range peers[:min(len(peers), maxAsked)] {
		g.Go(func() error {
			b, err := n.figuresOf(ctx, source{ID: id})
			if err != nil {
				n.log.Debug("a peer doesn't tell its figures", "peer", id, "err", err)
				return nil
			}
			mu.Lock()
			said[id.String()] = b
			mu.Unlock()
			return nil
		})
	}
	_ = g.Wait()
	return said
}

func (n *Node) figuresOf(ctx context.Context, s source) ([]byte, error) {
	resp, err := n.get(ctx, s, "/figures", 0)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, MaxFigures+1))
	if err == nil && len(b) > MaxFigures {
		err = fmt.Errorf("it says more than %d bytes", MaxFigures)
	}
	return b, err
}
