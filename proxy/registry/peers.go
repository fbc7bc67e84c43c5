// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"weir/proxy/rights"
	"weir/proxy/store"
)

// Peers are other nodes that may have what this node has not. They get no
// credentials and know nothing of rights: what comes from them goes to a client
// only when its own upstream allows it.
type Peers interface {
	// Ready says whether there is any peer.
	Ready() bool
	// Want says that this node wants a blob that it will be given at pace
	// bytes per second by the upstream, 0 if that isn't known. It returns nil
	// when there is no peer to ask.
	Want(ctx context.Context, d digest.Digest, pace int64) Share
	// Get returns a small blob, verified, of at most limit bytes.
	Get(ctx context.Context, d digest.Digest, limit int64) ([]byte, error)
	// ProvideName says that this node knows something of a name, and LoadName
	// returns what other nodes do. To others a name is the hexadecimal SHA-256 of it.
	ProvideName(name string)
	LoadName(ctx context.Context, name string) [][]byte
}

// Share is this node's part in the getting of one blob by all nodes that want
// it.
type Share interface {
	// Mine says that this node is the one to get it from the upstream.
	Mine() bool
	// Open reads the blob from a peer, from an offset on, and returns its size,
	// or -1. size is what it must be, or -1. An error means that it is to be
	// had from the upstream.
	Open(ctx context.Context, offset, size int64) (io.ReadCloser, int64, error)
	// Believed says whether what Open has returned may be given to clients before it
	// is verified.
	Believed() bool
	// Range reads a few bytes at an offset from the peer that Open reads from.
	Range(ctx context.Context, offset int64, p []byte) error
	// Wrong says that what it gave was not the blob.
	Wrong()
	// Close ends it. kept is whether this node has the blob now.
	Close(kept bool)
}

// peerTime is how long peers may take to say who has a blob, and to give what is
// small.
const peerTime = 2 * time.Second

// hasPeers says whether there is any peer.
func (x *exchange) hasPeers() bool { return x.h.peers != nil && x.h.peers.Ready() }

// share finds out whether the blob is to be had from a peer. It returns nil when
// peers can't help.
func (x *exchange) share() Share {
	if !x.hasPeers() {
		return nil
	}
	ctx, cancel := context.WithTimeout(x.r.Context(), peerTime)
	defer cancel()
	return x.h.peers.Want(ctx, x.target.digest, x.stats.arrivals.pace())
}

// fromPeer begins a transfer from a peer and serves the client from it. It
// returns false when no peer gives the blob, or the registry doesn't give it to
// the client.
func (x *exchange) fromPeer(t *store.Transfer, share Share) bool {
	if share.Mine() {
		return false
	}
	ctx, detach, cancel := x.detachable()
	open, size, err := share.Open(ctx, 0, -1)
	if err != nil {
		cancel()
		return false
	}
	body := &cancelBody{x.countedPeer(open), cancel}
	if !detach() {
		body.Close()
		return false
	}
	believed := size > smallBlob && share.Believed()
	var shown *proof
	if !x.allows(x.target.digest) {
		var resp *reply
		shown, resp, err = x.requestProof(size)
		if shown == nil && !errors.Is(err, errOutage) {
			if err == nil {
				resp.Body.Close()
			}
			body.Close()
			return false
		}
		if shown != nil && believed {
			has := make([]byte, len(shown.bytes))
			shown.agreed = share.Range(x.r.Context(), shown.offset, has) == nil && bytes.Equal(has, shown.bytes)
		}
	}
	more := func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		if body, _, err := share.Open(ctx, offset, size); err == nil {
			if !believed || share.Believed() {
				return x.countedPeer(body), nil
			}
			body.Close() // clients have what came before, and would have this
		}
		return x.source(ctx, offset)
	}
	asked := false
	again := func(ctx context.Context) (io.ReadCloser, int64, error) {
		if asked {
			return nil, 0, errors.New("and the upstream's is wrong as well")
		}
		if body, size, err := share.Open(ctx, 0, -1); err == nil {
			return x.countedPeer(body), size, nil
		}
		asked = true
		return x.anew(ctx)
	}
	r, err := t.BeginUnverified(size, body, more, store.Unverified{Believed: believed, Wrong: share.Wrong, Refetch: again})
	if err == nil {
		defer r.Close()
		x.serveTransfer(r, shown, provenance{source: SourcePeer})
		return true
	}
	// It can't be kept, and what isn't kept can't be verified before a client
	// gets it: it comes from the upstream.
	body.Close()
	x.notKept(err)
	x.forward()
	return true
}

func (x *exchange) countedPeer(body io.ReadCloser) io.ReadCloser {
	return &countingBody{ReadCloser: body, count: &x.stats.fromPeers}
}

// manifestFromPeer gets a manifest that isn't kept from a peer, for a client that
// may have it, or returns nil.
func (x *exchange) manifestFromPeer(d digest.Digest) *keptManifest {
	if !x.hasPeers() {
		return nil
	}
	ctx, cancel := context.WithTimeout(x.r.Context(), peerTime)
	defer cancel()
	b, err := x.h.peers.Get(ctx, d, maxManifest)
	if err != nil || mediaTypeOf(b) == "" {
		return nil
	}
	x.stats.fromPeers.Add(int64(len(b)))
	if x.h.store.Put(d, b, x.origin()) != nil {
		return nil
	}
	return x.keptManifest(d)
}

// names are the repositories of which something is known, by the hash of the
// name that peers ask for.
type names struct {
	lru *lru.Cache[string, rights.Repository]
}

func newNames() names {
	var n names
	n.lru, _ = lru.New[string, rights.Repository](1 << 13)
	return n
}

// peerName is what a repository is called among peers.
func peerName(r rights.Repository) string { return "repository " + r.Registry + "/" + r.Name }

// knows records that something is known of a repository. Others are registries
// for this node alone if their answers can't be authenticated.
func (h *Handler) knows(repo rights.Repository) {
	if h.peers == nil || repo.Network != "" {
		return
	}
	sum := sha256.Sum256([]byte(peerName(repo)))
	if had, _ := h.names.lru.ContainsOrAdd(hex.EncodeToString(sum[:]), repo); !had {
		h.peers.ProvideName(peerName(repo))
	}
}

// Export returns what this node knows of the repository with a hash, for a
// peer, or nil. It is what the upstream said its tags are, and which digests
// are in it, and nothing of who may read it.
func (h *Handler) Export(hash string) []byte {
	repo, ok := h.names.lru.Get(hash)
	if !ok {
		return nil
	}
	b, err := json.Marshal(h.rights.Export(repo))
	if err != nil {
		return nil
	}
	return b
}

// mergeFromPeers records what peers know of the client's repository. Whoever has
// the right to read it is for this node's own upstream to say.
func (x *exchange) mergeFromPeers() {
	if !x.hasPeers() || x.who.Network != "" {
		return
	}
	ctx, cancel := context.WithTimeout(x.r.Context(), peerTime)
	defer cancel()
	for _, b := range x.h.peers.LoadName(ctx, peerName(x.who.Repository)) {
		var m rights.Memory
		if json.Unmarshal(b, &m) == nil {
			x.h.rights.Merge(m, x.who.Repository)
		}
	}
}

// knownTag returns what a tag was and its manifest, if that is kept, or to be had
// from a peer.
func (x *exchange) knownTag(peers bool) (rights.Tagged, *keptManifest) {
	all := slices.DeleteFunc(slices.Clone(x.h.rights.Tag(x.who.Repository, x.target.tag)), func(was rights.Tagged) bool { return !x.concerns(was) })
	if x.r.Method == http.MethodGet && slices.ContainsFunc(all, func(was rights.Tagged) bool { return was.Differs }) {
		all = slices.DeleteFunc(all, func(was rights.Tagged) bool { return !was.Read })
	}
	for _, was := range all {
		m := x.keptManifest(was.Digest)
		if m == nil && peers {
			m = x.manifestFromPeer(was.Digest)
		}
		if m != nil {
			return was, m
		}
	}
	return rights.Tagged{}, nil
}

// concerns says whether what a tag was to some client it was to this one as well: that
// one accepted no less.
func (x *exchange) concerns(was rights.Tagged) bool { return was.Without&^unaccepted(x.r) == 0 }

// wasRead says whether GET of the tag has been answered with a digest.
func (x *exchange) wasRead(d digest.Digest) bool {
	return slices.ContainsFunc(x.h.rights.Tag(x.who.Repository, x.target.tag), func(was rights.Tagged) bool {
		return was.Digest == d && was.Read && x.concerns(was)
	})
}

// entitled says whether the client could be given something of the repository if
// the upstream were silent.
func (x *exchange) entitled() bool {
	return x.hasPeers() && (x.h.rights.Granted(x.who) || x.h.rights.Public(x.vantage))
}
