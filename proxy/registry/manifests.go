// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// maxManifest bounds a manifest that is kept. The OCI distribution
// specification has registries accept at least 4 MiB.
const maxManifest = 4 << 20

// manifest answers GET and HEAD of a manifest by digest.
func (x *exchange) manifest() {
	body, mediaType, ok := x.keptManifest(x.target.digest)
	if !ok && x.r.Method == http.MethodGet && x.manifestFromPeer(x.target.digest) {
		body, mediaType, ok = x.keptManifest(x.target.digest)
	}
	if !ok || !x.permitted() {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	x.serveManifest(body, mediaType, x.hit())
}

func (x *exchange) serveManifest(body []byte, mediaType, status string) {
	x.stats.hits.Add(1)
	x.w.Header().Set("Content-Type", mediaType)
	x.headers(status)
	if x.r.Method == http.MethodGet {
		x.stats.fromStore.Add(int64(len(body)))
	}
	http.ServeContent(x.w, x.r, "", time.Time{}, bytes.NewReader(body))
}

func (x *exchange) tagKey() tag {
	return tag{x.asker.repository, x.target.tag}
}

// tag answers GET and HEAD of a manifest by tag. What the tag is, is the
// upstream's to say each time. When the answer will probably be kept, a HEAD
// asks for that: registries don't count it as a pull.
func (x *exchange) tag() {
	was, body, mediaType, known := x.knownTag(false)
	if !known && !x.entitled() || conditional(x.r) {
		if x.r.Method == http.MethodGet {
			x.stats.misses.Add(1)
		}
		x.forward()
		return
	}
	usable := func() bool {
		return known && x.h.rights.within(was.when, x.h.rights.stale) && x.h.rights.allowsStale(x.asker, was.digest)
	}
	asked := false
	instead := func() bool {
		if !asked {
			asked = true
			// That it has just refused the asker was the beginning of another pull:
			// while it is silent, nobody is told to come with a token.
			x.h.rights.refused.Remove(x.asker)
			x.recallFromPeers()
			was, body, mediaType, known = x.knownTag(true)
		}
		return usable()
	}
	resp, err := x.head(instead)
	switch {
	case failed(resp, err) && instead():
		x.h.log.Warn("the upstream doesn't say what a tag is; taken for what it was", "registry", x.up.ID(), "repository", x.target.repo, "tag", x.target.tag, "digest", was.digest, "since", was.when, "err", because(resp, err))
		x.stats.stale.Add(1)
		x.target.digest = was.digest
		x.w.Header().Set("Age", strconv.FormatInt(int64(x.h.rights.now().Sub(was.when).Seconds()), 10))
		x.serveManifest(body, mediaType, "hit; detail=stale-if-error")
		return
	case err != nil && x.r.Method == http.MethodGet && x.r.Context().Err() == nil:
		x.forward() // the HEAD was ours
		return
	case err != nil:
		x.unreachable(x.w, x.r, err)
		return
	case x.r.Method == http.MethodHead:
		x.learnTag(resp)
		x.relay(resp)
		return
	}
	x.learn(resp)
	d, ok := x.learnTag(resp)
	if ok {
		body, mediaType, ok = x.keptManifest(d)
	}
	if !ok || mediaType != resp.Header.Get("Content-Type") || !x.up.believed() && !x.h.rights.allows(x.asker, d) {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	x.target.digest = d
	copyHeader(x.w.Header(), resp.Header)
	x.w.Header().Del("Content-Encoding") // of what it would have sent
	x.serveManifest(body, mediaType, "hit; detail=head")
}

// learnTag takes in what an upstream says that a tag is.
func (x *exchange) learnTag(resp *http.Response) (digest.Digest, bool) {
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil || resp.StatusCode != http.StatusOK {
		if resp.StatusCode == http.StatusNotFound {
			x.h.tags.forget(x.asker.repository, x.target.tag)
		}
		return "", false
	}
	x.h.tags.set(x.tagKey(), d, x.h.rights.now())
	x.h.knows(x.asker.repository)
	return d, true
}

// keptManifest reads a manifest from the store if it is of a media type that
// the client accepts.
func (x *exchange) keptManifest(d digest.Digest) ([]byte, string, bool) {
	b, err := x.h.store.Get(d)
	if err != nil {
		return nil, "", false
	}
	defer b.Close()
	if b.Size() > maxManifest {
		return nil, "", false
	}
	body, err := io.ReadAll(b.Reader())
	if err != nil {
		return nil, "", false
	}
	mt, ok := x.h.types.Get(d)
	if !ok {
		mt = mediaTypeOf(body)
		x.h.types.Add(d, mt)
	}
	return body, mt, mt != "" && accepts(x.r, mt)
}

// mediaTypeOf tells a manifest's media type from its content, empty when it
// can't. An OCI manifest need not name its own (image-spec, "manifest.md").
func mediaTypeOf(b []byte) string {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
	}
	if json.Unmarshal(b, &m) != nil || m.SchemaVersion != 2 {
		return ""
	}
	switch {
	case m.MediaType != "":
		if strings.ContainsAny(m.MediaType, "\r\n\x00") || len(m.MediaType) > 255 {
			return ""
		}
		return m.MediaType
	case m.Manifests != nil && m.Config == nil && m.Layers == nil:
		return "application/vnd.oci.image.index.v1+json"
	case m.Config != nil && m.Manifests == nil:
		return "application/vnd.oci.image.manifest.v1+json"
	}
	return ""
}

func accepts(r *http.Request, mediaType string) bool {
	values := r.Header.Values("Accept")
	if len(values) == 0 {
		return true
	}
	for _, v := range values {
		for part := range strings.SplitSeq(v, ",") {
			mt, _, _ := strings.Cut(part, ";")
			switch mt = strings.TrimSpace(mt); {
			case mt == "*/*", strings.EqualFold(mt, mediaType), mt == "application/*" && strings.HasPrefix(mediaType, "application/"):
				return true
			}
		}
	}
	return false
}

func conditional(r *http.Request) bool {
	return slices.ContainsFunc([]string{"If-None-Match", "If-Modified-Since", "If-Match", "If-Unmodified-Since", "Range"},
		func(h string) bool { return r.Header.Get(h) != "" })
}
