// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// maxManifest bounds a manifest that is kept. The OCI distribution
// specification has registries accept at least 4 MiB.
const maxManifest = 4 << 20

// manifest answers GET and HEAD of a manifest by digest. The registry has to have
// sent it in this repository before.
func (x *exchange) manifest() {
	d := x.target.digest
	contained, stale := x.h.rights.Contains(x.vantage(), d), x.allowsStale(d)
	m := x.keptManifest(d)
	if m == nil && stale && x.r.Method == http.MethodGet && x.manifestFromPeer(d) {
		m = x.keptManifest(d)
	}
	defer func() { m.close() }()
	if m == nil || !contained && !stale {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	if !x.allows(d) {
		resp, err := x.ask(x.head(true, func() bool { return stale }))
		switch {
		case x.failed(resp, err) && stale:
			x.stale = true
		case x.r.Method == http.MethodHead && err == nil && x.answers(resp):
			x.relay(resp)
			return
		case err != nil || !contained || resp.StatusCode != http.StatusOK || !describesManifest(resp, d):
			x.stats.misses.Add(1)
			x.forward()
			return
		default:
			x.grant()
		}
	}
	x.serveManifest(m, x.keptIn(m.Blob))
}

// answers says whether an answer to a question that followed redirects is the one
// to the client's own HEAD: where the registry redirects to may refuse what it
// doesn't refuse the client.
func (x *exchange) answers(resp *http.Response) bool {
	return x.own(resp) || resp.StatusCode == http.StatusOK
}

// describesManifest says whether an answer of 200 is a manifest's, and of this
// digest if it isn't empty: it may be a login page, or a captive portal's.
func describesManifest(resp *http.Response, d digest.Digest) bool {
	if header := resp.Header.Get("Docker-Content-Digest"); header != "" {
		is, err := digest.Parse(header)
		return err == nil && (d == "" || is == d)
	}
	mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return strings.HasPrefix(mediaType, "application/vnd.docker.distribution.manifest.") || strings.HasPrefix(mediaType, "application/vnd.oci.image.")
}

func (x *exchange) serveManifest(m *keptManifest, from provenance) {
	x.stats.hits.Add(1)
	x.w.Header().Set("Content-Type", m.mediaType)
	x.headers(from)
	if x.r.Method == http.MethodGet {
		x.stats.fromStore.Add(m.Size())
	}
	http.ServeContent(x.w, x.r, "", time.Time{}, m.Reader())
}

// tag answers GET and HEAD of a manifest by tag. What the tag is, is the
// upstream's to say each time. When the answer will probably be kept, a HEAD
// asks for that: registries don't count it as a pull.
func (x *exchange) tag() {
	was, m := x.knownTag(false)
	defer func() { m.close() }()
	if m == nil && !x.entitled() || conditional(x.r) {
		if x.r.Method == http.MethodGet {
			x.stats.misses.Add(1)
		}
		x.forward()
		return
	}
	asked := false
	instead := func() bool {
		if !asked {
			asked = true
			x.recallFromPeers()
			m.close()
			was, m = x.knownTag(true)
		}
		return m != nil && x.h.rights.Fresh(was.When) && x.allowsStale(was.Digest)
	}
	resp, err := x.ask(x.head(true, instead))
	switch {
	case x.failed(resp, err) && instead():
		x.h.log.Warn("the upstream doesn't say what a tag is; taken for what it was", "registry", x.up.ID(), "repository", x.target.repo, "tag", x.target.tag, "digest", was.Digest, "since", was.When, "err", because(resp, err))
		x.stats.stale.Add(1)
		x.target.digest = was.Digest
		x.w.Header().Set("Age", strconv.FormatInt(int64(x.h.rights.Now().Sub(was.When).Seconds()), 10))
		x.serveManifest(m, provenance{source: sourceOf(m.Blob), stale: true})
		return
	case err != nil && x.r.Method == http.MethodGet && x.r.Context().Err() == nil:
		x.forward() // the HEAD was ours
		return
	case err != nil:
		x.unreachable(x.w, x.r, err)
		return
	case x.r.Method == http.MethodHead && !x.answers(resp):
		x.forward() // where it redirects to has refused
		return
	case x.r.Method == http.MethodHead:
		x.learnTag(resp)
		x.checkPublic(resp)
		x.relay(resp)
		return
	}
	d, ok := x.learnTag(resp)
	if ok {
		x.grant()
		x.checkPublic(resp)
		m.close()
		m = x.keptManifest(d)
	}
	if !ok || m == nil || m.mediaType != resp.Header.Get("Content-Type") || !x.h.rights.Contains(x.vantage(), d) {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	x.target.digest = d
	copyHeader(x.w.Header(), resp.Header)
	x.w.Header().Del("Content-Encoding") // of what it would have sent
	x.serveManifest(m, provenance{source: sourceOf(m.Blob), resolved: true})
}

// learnTag records what an upstream says that a tag is.
func (x *exchange) learnTag(resp *http.Response) (digest.Digest, bool) {
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil || resp.StatusCode != http.StatusOK {
		return "", false
	}
	x.setTag(d)
	return d, true
}

func (x *exchange) setTag(d digest.Digest) {
	x.h.rights.SetTag(x.who.Repository, x.target.tag, d, x.h.rights.Now())
	x.h.knows(x.who.Repository)
}

// keptManifest is a manifest in the store, which is served from its file: a client
// may take as long as it likes to read it, and has no more of memory for that than
// for a blob.
type keptManifest struct {
	*store.Blob
	mediaType string
}

// close closes the file, if there is one.
func (m *keptManifest) close() {
	if m != nil {
		m.Close()
	}
}

// keptManifest opens a manifest in the store, if it is whole and of a media type
// that the client accepts, or returns nil.
func (x *exchange) keptManifest(d digest.Digest) *keptManifest {
	b, err := x.h.store.Get(d)
	if err != nil {
		return nil
	}
	m := &keptManifest{Blob: b}
	if b.Size() <= maxManifest && x.read(m, d) && m.mediaType != "" && accepts(x.r, m.mediaType) {
		return m
	}
	m.close()
	return nil
}

// read reads a manifest once, to see that it is whole and what its media type is.
func (x *exchange) read(m *keptManifest, d digest.Digest) bool {
	var known bool
	if m.mediaType, known = x.h.types.Get(d); known {
		_, err := io.Copy(io.Discard, m.Reader())
		return err == nil
	}
	buf := x.buffer()
	defer buf.release()
	if buf.fill(m.Reader()) != nil || buf.over {
		return false
	}
	m.mediaType = mediaTypeOf(buf.bytes)
	x.h.types.Add(d, m.mediaType)
	return true
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
