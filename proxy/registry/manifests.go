// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/rights"
	"weir/proxy/store"
)

// maxManifest bounds a manifest that is kept. The OCI distribution
// specification has registries accept at least 4 MiB.
const maxManifest = 4 << 20

// manifest answers GET and HEAD of a manifest by digest. The registry has to have
// sent it in this repository before.
func (x *exchange) manifest() {
	d := x.target.digest
	contained, may := x.contains(d), x.allowsStale(d)
	m := x.keptManifest(d)
	if m == nil && may && x.r.Method == http.MethodGet {
		m = x.manifestFromPeer(d)
	}
	defer func() { m.close() }()
	if m == nil || !contained && !may {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	stale := false
	if !x.allows(d) {
		resp, err := x.ask(x.head(true, x.stale(d)))
		switch {
		case errors.Is(err, errOutage):
			stale = true
		case x.r.Method == http.MethodHead && err == nil && x.answers(resp):
			x.relay(resp)
			return
		case err != nil || !contained || resp.StatusCode != http.StatusOK || !describesManifest(resp, d):
			x.stats.misses.Add(1)
			x.forward()
			return
		default:
			x.grant(resp.at)
		}
	}
	x.serveManifest(m, x.keptIn(m.Blob, d, stale))
}

// answers says whether an answer to a question that followed redirects is the one
// to the client's own HEAD: where the registry redirects to may refuse what it
// doesn't refuse the client.
func (x *exchange) answers(resp *reply) bool {
	return x.own(resp.Response) || resp.StatusCode == http.StatusOK
}

// describesManifest says whether an answer of 200 is a manifest's, and of this
// digest if it isn't empty: it may be a login page, or a captive portal's.
func describesManifest(resp *reply, d digest.Digest) bool {
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
	x.headers(m.digest, from)
	http.ServeContent(x.w, x.r, "", time.Time{}, m.Reader())
}

// tag answers GET and HEAD of a manifest by tag. What the tag is, is the
// upstream's to say each time. When the answer will probably be kept, a HEAD
// asks for that: registries don't count it as a pull.
func (x *exchange) tag() {
	known, m := x.knownTag(false)
	defer func() { m.close() }()
	if m == nil && !x.entitled() || conditional(x.r) || x.r.Header.Get("Range") != "" {
		if x.r.Method == http.MethodGet {
			x.stats.misses.Add(1)
		}
		x.forward()
		return
	}
	if m != nil && x.h.rights.Within(known.When, x.h.tagTTL.of(x.up)) && x.allows(known.Digest) && (known.Read || x.r.Method == http.MethodHead) {
		x.serveKnownTag(known, m, provenance{source: sourceOf(m.Blob), resolved: true})
		return
	}
	looked := false
	stale := func() bool {
		if !looked {
			looked = true
			x.mergeFromPeers()
			m.close()
			known, m = x.knownTag(true)
		}
		return m != nil && x.h.rights.Fresh(known.When) && x.allowsStale(known.Digest)
	}
	resp, err := x.ask(x.head(true, stale))
	switch {
	case errors.Is(err, errForeign) && x.refusesHead(stale):
		x.forward()
	case errors.Is(err, errOutage):
		x.logger(known.Digest).Warn("the upstream doesn't say what a tag is; taken for what it was", "tag", x.target.tag, "since", known.When, "err", err)
		x.stats.stale.Add(1)
		x.serveKnownTag(known, m, provenance{source: sourceOf(m.Blob), stale: true})
	case err != nil && (x.r.Method == http.MethodGet || x.inOwnName() || errors.Is(err, errElsewhere)) && x.r.Context().Err() == nil:
		x.forward() // the HEAD was ours, or is the client's to follow
	case err != nil:
		x.unreachable(err)
	case x.r.Method == http.MethodHead && (!x.answers(resp) || x.toWeir(resp.Response) && !x.isKept(resp)):
		x.forward() // where it redirects to has refused, or it is a cold pull
	case x.r.Method == http.MethodHead:
		x.learnTag(resp)
		x.checkPublic(resp)
		x.relay(resp)
	default:
		x.resolved(resp)
	}
}

// refusesHead says whether a registry, of whose answer to HEAD it isn't sure that it is
// the registry's, is there all the same: what is before it refuses HEAD, maybe with a
// page, and not GET.
func (x *exchange) refusesHead(stale func() bool) bool {
	resp, err := x.ask(question{method: http.MethodGet, base: true, stale: stale})
	if err != nil {
		return false
	}
	resp.Body.Close()
	return true
}

// serveKnownTag answers with what a tag was.
func (x *exchange) serveKnownTag(known rights.Tagged, m *keptManifest, from provenance) {
	x.w.Header().Set("Age", strconv.FormatInt(int64(x.h.rights.Now().Sub(known.When).Seconds()), 10))
	x.serveManifest(m, from)
}

// isKept says whether what a tag is now can be served.
func (x *exchange) isKept(resp *reply) bool {
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	return err == nil && x.contains(d) && x.h.store.Has(d)
}

// resolved answers GET of a manifest by tag, of which the upstream has said what it
// is. Some say to HEAD another digest than they give to GET, as that of an index's
// manifest for some platform: GET has to have been answered with it, unless it is an index,
// or the registry one of those that the public uses, of which none does so.
func (x *exchange) resolved(resp *reply) {
	d, ok := x.learnTag(resp)
	var m *keptManifest
	if ok {
		x.grant(resp.at)
		x.checkPublic(resp)
		m = x.keptManifest(d)
	}
	defer m.close()
	if m == nil || m.mediaType != resp.Header.Get("Content-Type") || !x.contains(d) || !x.wasRead(d) && !isIndex(m.mediaType) && !x.up.Worldwide {
		x.stats.misses.Add(1)
		x.forward()
		return
	}
	copyHeader(x.w.Header(), resp.Header)
	x.w.Header().Del("Content-Encoding") // of what it would have sent
	x.serveManifest(m, provenance{source: sourceOf(m.Blob), resolved: true})
}

// isIndex says whether a media type is that of a list of manifests for platforms.
func isIndex(mediaType string) bool {
	return mediaType == "application/vnd.oci.image.index.v1+json" || mediaType == "application/vnd.docker.distribution.manifest.list.v2+json"
}

// learnTag records what an upstream's answer to HEAD says that a tag is.
func (x *exchange) learnTag(resp *reply) (digest.Digest, bool) {
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil || resp.StatusCode != http.StatusOK {
		return "", false
	}
	x.setTag(rights.Tagged{Digest: d, Without: unaccepted(x.r)})
	return d, true
}

// setTag records what a tag is now.
func (x *exchange) setTag(is rights.Tagged) {
	is.When = x.h.rights.Now()
	x.h.rights.SetTag(x.who.Repository, x.target.tag, is)
	x.h.knows(x.who.Repository)
}

// keptManifest is a manifest in the store, which is served from its file: a client
// may take as long as it likes to read it, and has no more of memory for that than
// for a blob.
type keptManifest struct {
	*store.Blob
	digest    digest.Digest
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
	m := &keptManifest{Blob: b, digest: d}
	if b.Size() <= maxManifest && x.read(m) && m.mediaType != "" && accepts(x.r, m.mediaType) {
		return m
	}
	m.close()
	return nil
}

// read reads a manifest once, to see that it is whole and what its media type is.
func (x *exchange) read(m *keptManifest) bool {
	var known bool
	if m.mediaType, known = x.h.types.Get(m.digest); known {
		_, err := io.Copy(io.Discard, m.Reader())
		return err == nil
	}
	buf := x.buffer()
	defer buf.release()
	if buf.fill(m.Reader()) != nil || buf.over {
		return false
	}
	m.mediaType = mediaTypeOf(buf.bytes)
	x.h.types.Add(m.digest, m.mediaType)
	return true
}

// keepManifest keeps a manifest that passes by. The error is for one that
// isn't what was asked for.
func (x *exchange) keepManifest(resp *reply) error {
	if resp.ContentLength > maxManifest {
		return nil // the client may refuse it for its length, and be gone before it has come
	}
	raw, plain := x.buffer(), x.buffer()
	defer plain.release()
	err := raw.fill(resp.Body)
	resp.Body = &replayed{buffer: raw, ReadCloser: resp.Body}
	if err != nil || raw.over {
		return nil // the client will see the same
	}
	body, ok := decoded(resp.Header.Get("Content-Encoding"), raw.bytes, plain)
	if !ok {
		return nil
	}
	d := x.digestOf(resp, body)
	if strings.HasPrefix(resp.Header.Get("Content-Type"), signedSchema1) {
		return nil
	}
	if d.Algorithm().FromBytes(body) != d {
		if x.target.digest == "" { // the client didn't ask for it
			x.logger(d).Info("a manifest is not kept: the registry says that it is another")
			return nil
		}
		return fmt.Errorf("%s sent a manifest that is not %s", x.up.Host, d)
	}
	if err := x.h.store.Put(d, body, x.origin()); err != nil {
		x.logger(d).Info("a manifest is not kept", "err", err)
	}
	x.prove(x.provenBy(resp), d, resp.at)
	if mediaTypeOf(body) == "" {
		return nil
	}
	x.grant(resp.at)
	if x.target.tag != "" {
		x.setTag(rights.Tagged{Digest: d, Read: true, Without: unaccepted(x.r)})
	}
	return nil
}

// digestOf is the digest of a manifest that was asked for or pushed: as the client says, or else the registry, or
// else that of its bytes.
func (x *exchange) digestOf(resp *reply, manifest []byte) digest.Digest {
	if x.target.digest != "" {
		return x.target.digest
	}
	if d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest")); err == nil {
		return d
	}
	return digest.FromBytes(manifest)
}

// signedSchema1 is a media type of manifests whose digest is not that of their
// bytes, but of what is signed in them (distribution, "Image Manifest Version 2,
// Schema 1").
const signedSchema1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"

// decoded undoes a content encoding that is known, into a buffer.
func decoded(encoding string, raw []byte, to *buffer) ([]byte, bool) {
	switch encoding {
	case "":
		return raw, true
	case "gzip":
		zr, err := gzip.NewReader(bytes.NewReader(raw))
		if err != nil {
			return nil, false
		}
		err = to.fill(zr)
		return to.bytes, err == nil && !to.over
	}
	return nil, false
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
