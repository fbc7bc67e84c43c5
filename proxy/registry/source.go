// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"net/http"

	"weir/proxy/store"
)

// Source is where the content of an answer comes from.
type Source int

// The sources of content.
const (
	SourceUpstream   Source = iota // the registry
	SourceStore                    // weir's own store
	SourceContainerd               // the content store of a containerd, read in place
	SourceTransfer                 // a transfer into the store that another client began
	SourcePeer                     // another node
)

// String names the source, as figures and traces do.
func (s Source) String() string {
	return [...]string{"upstream", "store", "containerd", "transfer", "peer"}[s]
}

// sourceOf is the source of a blob that is kept.
func sourceOf(b *store.Blob) Source {
	if b.Foreign() {
		return SourceContainerd
	}
	return SourceStore
}

// provenance is what an answer's Cache-Status (RFC 9211) says: its source, and what
// else there is to know of it.
type provenance struct {
	source   Source
	stored   bool // it is stored on its way from the upstream
	resolved bool // the upstream was asked what the tag is
	stale    bool // the upstream gave no answer: it is what it said before
	ranged   bool // the upstream was asked for ranges, and the client asked for all
}

func (p provenance) cacheStatus() string {
	detail := map[Source]string{SourceContainerd: "containerd", SourceTransfer: "following", SourcePeer: "peer"}[p.source]
	switch {
	case p.stored:
		return "weir; fwd=miss; stored"
	case p.source == SourceUpstream:
		return "weir; fwd=miss"
	case p.stale:
		detail = "stale-if-error"
	case p.resolved:
		detail = "head"
	}
	if detail == "" {
		return "weir; hit"
	}
	return "weir; hit; detail=" + detail
}

// FromUpstream says whether an answer of [Handler.ServeAnonymous] comes from the
// registry. Its Cache-Status has a member for each cache on the way, of which the
// last one is weir's own.
func FromUpstream(h http.Header) bool {
	members := h.Values("Cache-Status")
	if len(members) == 0 {
		return true
	}
	own := members[len(members)-1]
	return own == provenance{}.cacheStatus() || own == provenance{stored: true}.cacheStatus()
}
