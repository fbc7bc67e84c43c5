// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"weir/proxy/rights"
)

// request is what a client asks of a registry. It is parsed once, and not changed.
type request struct {
	r       *http.Request
	up      Upstream
	target  target
	who     rights.Principal
	vantage rights.Vantage // from where the client asks for its repository
	// via sends questions to the upstream: as the client's requests go, or, in its
	// stead, in weir's own name, for one without credentials that may have what is
	// public.
	via   http.RoundTripper
	stead bool
}

// parse understands a client's request. What is not the plain form of the
// distribution API is the upstream's business: another host than the connection's
// (HTTP/1.0 need not name any), a request target with a scheme (and maybe with a user and a password), and what a
// body, or a query but for a mirror's, may ask for, or prove.
func (h *Handler) parse(r *http.Request, up Upstream) request {
	if slices.Equal(r.Header["Authorization"], []string{"Bearer " + placeholder}) {
		r = r.WithContext(r.Context())
		r.Header = r.Header.Clone()
		r.Header.Del("Authorization")
		up.Transport = &anonymous{h, up}
	}
	q := request{r: r, up: up, target: parsePath(r.URL.EscapedPath()), via: up.Transport}
	ofMirror := q.target.repo != "" && ofMirrorRE.MatchString(r.URL.RawQuery)
	if r.Host != "" && Canonical(r.Host) != up.Host && Canonical(r.Host) != stripPort(up.Host) || r.URL.IsAbs() || q.reading() && (r.URL.RawQuery != "" && !ofMirror || r.ContentLength != 0) {
		q.target = target{}
	}
	q.who = rights.Principal{Repository: up.repository(repositoryName(q.target.repo, r.URL.RawQuery)), Client: h.rights.Client(r.Header, up.ClientIdentity, up.NetworkID)}
	q.vantage = up.vantage(q.who.Repository)
	// Who asks whether a blob is there is about to push, and needs a token anyway.
	pulls := q.reading() && q.target.repo != "" && (q.target.kind != blob || r.Method != http.MethodHead)
	if _, is := up.Transport.(*anonymous); !is && pulls && up.authenticated() && up.ClientIdentity == "" &&
		rights.Anonymous(r.Header) && h.rights.Public(q.vantage) && !h.asking.paused(up.ID()) {
		q.via, q.stead = &anonymous{h, up}, true
	}
	return q
}

// ofMirrorRE is a query by which a mirror is told which registry's image it is asked
// for (containerd, docs/hosts.md, "Registry Host Namespace").
var ofMirrorRE = regexp.MustCompile(`^ns=[A-Za-z0-9.-]{1,255}((:|%3A)[0-9]{1,5})?$`)

// repositoryName is what a repository of a path is called with a query: a mirror may
// have another of that path for each registry that it mirrors. No name has a "?".
func repositoryName(repo, query string) string {
	if repo == "" || !ofMirrorRE.MatchString(query) {
		return repo
	}
	return repo + "?" + query
}

func (q request) reading() bool {
	return q.r.Method == http.MethodGet || q.r.Method == http.MethodHead
}

// kind is what a request's path names.
type kind int

const (
	other    kind = iota // nothing that is kept: it is forwarded
	blob                 // /v2/NAME/blobs/DIGEST
	manifest             // /v2/NAME/manifests/REFERENCE
	base                 // /v2/, where clients ask whether they must log in
	uploads              // /v2/NAME/blobs/uploads/, where pushes of blobs begin
)

// target is what a path of the distribution API asks for.
type target struct {
	kind   kind
	repo   string
	digest digest.Digest // empty for a tag
	tag    string
}

// The grammar of the OCI distribution specification, "Pulling manifests".
var (
	nameRE = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagRE  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

// parsePath reads the (escaped) path of a request. Whatever it isn't sure of
// is other.
func parsePath(path string) target {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok || len(rest) > 1024 {
		return target{}
	}
	if rest == "" {
		return target{kind: base}
	}
	if repo, ok := strings.CutSuffix(strings.TrimSuffix(rest, "/"), "/blobs/uploads"); ok && isName(repo) {
		return target{kind: uploads, repo: repo}
	}
	// A repository's name may itself contain "blobs" or "manifests": the last
	// one in the path counts.
	i, k := strings.LastIndex(rest, "/manifests/"), manifest
	sep := len("/manifests/")
	if j := strings.LastIndex(rest, "/blobs/"); j > i {
		i, k, sep = j, blob, len("/blobs/")
	}
	if i < 0 {
		return target{}
	}
	t := target{kind: k, repo: rest[:i]}
	ref := rest[i+sep:]
	if !isName(t.repo) {
		return target{}
	}
	if d, err := digest.Parse(ref); err == nil {
		t.digest = d
		return t
	}
	if k == manifest && tagRE.MatchString(ref) {
		t.tag = ref
		return t
	}
	return target{}
}

func isName(repo string) bool { return len(repo) <= 255 && nameRE.MatchString(repo) }

// manifestTypes are the media types of manifests. What a client doesn't name of them is kept over restarts by
// their places here.
var manifestTypes = []string{
	"application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json",
	"application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.docker.distribution.manifest.v2+json",
}

// accepted are the media types that a request names.
func accepted(r *http.Request) (types []string) {
	for _, v := range r.Header.Values("Accept") {
		for part := range strings.SplitSeq(v, ",") {
			mt, _, _ := strings.Cut(part, ";")
			types = append(types, strings.TrimSpace(mt))
		}
	}
	return types
}

func accepts(r *http.Request, mediaType string) bool {
	types := accepted(r)
	return len(types) == 0 || slices.ContainsFunc(types, func(mt string) bool {
		return mt == "*/*" || strings.EqualFold(mt, mediaType) || mt == "application/*" && strings.HasPrefix(mediaType, "application/")
	})
}

// noAccept is the bit of unaccepted for requests that say nothing of media types.
const noAccept = 1 << 7

// unaccepted is which of the media types of manifests a request doesn't name, as bits:
// what a registry has for a tag depends on that.
func unaccepted(r *http.Request) (bits uint8) {
	types := accepted(r)
	for i, mediaType := range manifestTypes {
		if !slices.ContainsFunc(types, func(mt string) bool { return strings.EqualFold(mt, mediaType) }) {
			bits |= 1 << i
		}
	}
	if len(types) == 0 {
		bits |= noAccept
	}
	return bits
}

// conditional says whether an answer depends on what the client has already (RFC 9110, section 13.1), and
// conditionalRange whether a range is asked for under a condition.
func conditional(r *http.Request) bool {
	return slices.ContainsFunc([]string{"If-None-Match", "If-Modified-Since", "If-Match", "If-Unmodified-Since"},
		func(h string) bool { return r.Header.Get(h) != "" })
}

func conditionalRange(r *http.Request) bool { return conditional(r) || r.Header.Get("If-Range") != "" }

func stripPort(host string) string {
	if i := strings.LastIndexByte(host, ':'); i > 0 && !strings.HasSuffix(host, "]") {
		return host[:i]
	}
	return host
}
