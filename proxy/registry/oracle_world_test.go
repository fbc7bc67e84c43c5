// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// modelContent is a blob or a manifest that registries may have.
type modelContent struct {
	name      string
	mediaType string // of a manifest
	bytes     []byte
	sha256    digest.Digest
	sha512    digest.Digest
}

// modelKnown is how many bytes at the beginning of a blob can be guessed.
const modelKnown = 16

var (
	modelContents = makeModelContents()
	modelByDigest = func() map[string]*modelContent {
		m := make(map[string]*modelContent)
		for _, c := range modelContents {
			m[c.sha256.String()], m[c.sha512.String()] = c, c
		}
		return m
	}()
)

func makeModelContents() map[string]*modelContent {
	all := make(map[string]*modelContent)
	add := func(name, mediaType string, b []byte) *modelContent {
		c := &modelContent{name, mediaType, b, digest.SHA256.FromBytes(b), digest.SHA512.FromBytes(b)}
		all[name] = c
		return c
	}
	for i, size := range []int{0, 2, 4096, 4096, 4096, 5000, 100_000, 150_000} {
		b := bytesOf(uint64(100+i), size)
		copy(b, "\x1f\x8b\x08 as in all of them"[:min(size, modelKnown)])
		add(fmt.Sprint("c", i), "", b)
	}
	list := func(name, config string, layers ...string) {
		m := map[string]any{"schemaVersion": 2, "mediaType": docker2, "config": map[string]any{"digest": all[config].sha256, "size": len(all[config].bytes)}}
		var ls []any
		for _, l := range layers {
			ls = append(ls, map[string]any{"digest": all[l].sha256, "size": len(all[l].bytes)})
		}
		m["layers"] = ls
		b, _ := json.Marshal(m)
		add(name, docker2, b)
	}
	list("m0", "c2", "c6")
	list("m1", "c3", "c7")
	list("m2", "c1", "c0", "c4")
	list("m4", "c4", "c6", "c2") // of one who has none of that
	const index = "application/vnd.oci.image.index.v1+json"
	b, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": index, "manifests": []any{map[string]any{"digest": all["m0"].sha256, "mediaType": docker2}}})
	add("m3", index, b)
	return all
}

// guessed is what can be guessed of a content, and zeros.
func (c *modelContent) guessed() []byte {
	b := make([]byte, len(c.bytes))
	copy(b, c.bytes[:min(len(b), modelKnown)])
	return b
}

// modelRepo is a repository of a registry.
type modelRepo struct {
	public  bool
	readers map[string]bool   // accounts, which may write too
	has     map[string]bool   // contents
	tags    map[string]string // of contents
}

// modelRegistry is a registry as weir and the oracle see it: a function from a
// request to an answer.
type modelRegistry struct {
	name, host string
	plain      string // address and port, without TLS
	net        string // the only network that it can be reached from
	roots      string // the runtime's own certificates that it is verified by
	byAddress  bool   // a client of network n1 is alice
	tokens     bool   // it asks anonymous clients for a token too
	mixed      bool   // it gives manifests as blobs, and blobs as manifests

	repos    map[string]*modelRepo
	redirect string // blobs, all, blind, login
	hops     int    // of redirects
	http     bool   // the last of them goes to http
	fail     string // 429, 500, 503, conn, silence, html200, html403
	quirks   map[string]bool
	lies     map[string]bool
	uploads  map[string][]byte
	sessions int
}

// modelWorld is all registries, and what they have said to weir.
type modelWorld struct {
	mu      sync.Mutex
	now     time.Time
	regs    map[string]*modelRegistry
	expired map[string]bool // credentials
	origins []modelOrigin   // of redirects that weir was sent: by their number
	ledger  modelLedger
	hold    *modelHold
	tokens  string // how the token server fails
	cutAt   int    // where the next bodies break off
	cuts    int    // how many
	wasCut  int    // that did
}

// modelHold stops a body at a byte until it is released.
type modelHold struct {
	at       int
	taken    bool
	released chan struct{}
}

func newModelWorld() *modelWorld {
	w := &modelWorld{now: time.Now(), regs: make(map[string]*modelRegistry), expired: make(map[string]bool), origins: make([]modelOrigin, 1), ledger: newModelLedger()}
	for _, g := range []*modelRegistry{
		{name: "hub", host: DockerHub, tokens: true},
		{name: "gh", host: "ghcr.io", mixed: true},
		{name: "corp", host: "registry.corp.test", roots: "roots-corp"},
		{name: "fake", host: DockerHub, roots: "roots-fake", mixed: true}, // with a CA that one runtime trusts
		{name: "plain", host: "10.0.0.5:5000", plain: "10.0.0.5:5000", net: "n1"},
		{name: "pod", host: "10.0.0.5:5000", plain: "10.0.0.5:5000", net: "n2", mixed: true}, // in another network
		{name: "lan", host: "lan.corp.test", byAddress: true},
		{name: "evil", host: "evil.test", mixed: true},
	} {
		g.repos, g.quirks, g.lies, g.uploads = make(map[string]*modelRepo), make(map[string]bool), make(map[string]bool), make(map[string][]byte)
		w.regs[g.name] = g
	}
	return w
}

func (g *modelRegistry) repo(name string) *modelRepo {
	r := g.repos[name]
	if r == nil {
		r = &modelRepo{readers: make(map[string]bool), has: make(map[string]bool), tags: make(map[string]string)}
		g.repos[name] = r
	}
	return r
}

// modelRequest is a request as it is on the wire, and where it comes from.
type modelRequest struct {
	method, path, query, host string
	header                    http.Header
	userinfo                  string // of the absolute form
	net, cert                 string
	body                      []byte
}

// modelAnswer is what a registry, or whoever it redirects to, answers.
type modelAnswer struct {
	status int
	header http.Header
	body   []byte
	length bool // it is announced
	err    error
	// says is whether it is the registry's yes: not a page for people.
	says bool
	// truth is the content that body is of, or for HEAD would be. It is nil for
	// a lie.
	truth *modelContent
	repo  string
	asked *modelContent // by digest
}

// modelHarmless are the fields in which no registry of the model looks for
// credentials.
var modelHarmless = map[string]bool{"Accept": true, "Accept-Encoding": true, "User-Agent": true, "Range": true, "If-None-Match": true, "If-Match": true,
	"If-Modified-Since": true, "If-Range": true, "If-Unmodified-Since": true, "Connection": true, "Content-Length": true, "Content-Type": true, "Referer": true, "Content-Range": true}

// identity is all by which a registry could tell clients apart.
func (q *modelRequest) identity() string {
	var all []string
	for k, vs := range q.header {
		if !modelHarmless[k] {
			all = append(all, fmt.Sprintf("%s=%q", k, vs))
		}
	}
	if q.userinfo != "" && q.header.Get("Authorization") == "" {
		all = append(all, fmt.Sprintf("Authorization=%q", []string{modelBasic(q.userinfo)}))
	}
	slices.Sort(all)
	return fmt.Sprintf("net=%s cert=%s query=%q %v", q.net, q.cert, q.query, all)
}

// anonymous says whether the request has nothing by which a registry could know
// the client, but for its network and an anonymous token.
func (q *modelRequest) anonymous() bool {
	for k, vs := range q.header {
		if !modelHarmless[k] && (k != "Authorization" || !strings.HasPrefix(vs[0], "Bearer anon-") || len(vs) > 1) {
			return false
		}
	}
	return q.userinfo == "" && q.cert == "" && q.query == ""
}

func modelBasic(userinfo string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(userinfo))
}

// account finds out whose request it is: an account, or with valid no account
// but an anonymous token, or with shown just something.
func (w *modelWorld) account(g *modelRegistry, q *modelRequest) (account string, valid, shown bool) {
	var values []string
	if auth := q.header.Values("Authorization"); len(auth) > 0 {
		if g.tokens {
			values = append(values, auth[0])
		} else {
			values = append(values, auth[len(auth)-1])
		}
	} else if q.userinfo != "" {
		values = append(values, modelBasic(q.userinfo))
	}
	if !g.tokens {
		for k, vs := range q.header {
			if !modelHarmless[k] && k != "Authorization" {
				values = append(values, vs...)
			}
		}
		if params, err := url.ParseQuery(q.query); err == nil && params.Has("access_token") {
			values = append(values, params.Get("access_token"))
		}
		if q.cert != "" {
			values = append(values, q.cert)
		}
	}
	slices.Sort(values)
	for _, v := range values {
		shown = true
		if w.expired[v] {
			continue
		}
		if rest, ok := strings.CutPrefix(v, "Basic "); ok {
			b, _ := base64.StdEncoding.DecodeString(rest)
			if name, ok := strings.CutSuffix(string(b), ":password"); ok && name != "wrong" {
				return name, true, true
			}
		}
		for _, prefix := range []string{"Bearer ", "key-", "session="} {
			rest, ok := strings.CutPrefix(v, prefix)
			name, _, numbered := strings.Cut(rest, "-")
			switch {
			case !ok || name == "wrong" || prefix == "Bearer " && !numbered:
			case name == "anon":
				return "", true, true
			default:
				return name, true, true
			}
		}
	}
	if g.byAddress && q.net == "n1" && !shown {
		return "alice", true, false
	}
	return "", false, shown
}

// refusal is why the request may not read the repository, or nil.
func (w *modelWorld) refusal(g *modelRegistry, q *modelRequest, repo string, write bool) *modelAnswer {
	account, valid, shown := w.account(g, q)
	r := g.repos[repo]
	switch {
	case shown && !valid, !valid && (g.tokens || r == nil || !r.public || write), account == "" && write:
		a := modelError(http.StatusUnauthorized, "UNAUTHORIZED")
		a.header.Set("Www-Authenticate", `Bearer realm="https://auth.test/token",service="`+g.name+`",scope="repository:`+repo+`:pull"`)
		return a
	case r == nil:
		return modelError(http.StatusNotFound, "NAME_UNKNOWN")
	case r.readers[account], r.public && !write:
		return nil
	}
	return modelError(http.StatusForbidden, "DENIED")
}

func modelError(status int, code string) *modelAnswer {
	a := &modelAnswer{status: status, header: http.Header{"Content-Type": {"application/json"}}, length: true}
	a.body = []byte(`{"errors":[{"code":"` + code + `"}]}`)
	return a
}

func modelHTML(status int) *modelAnswer {
	return &modelAnswer{status: status, header: http.Header{"Content-Type": {"text/html"}}, length: true, body: []byte("<html>Please log in, or solve this.</html>")}
}

// modelPathRE reads a path in the way of the model: the shape of what is asked.
var modelPathRE = regexp.MustCompile(`^/v2/(.+)/(blobs|manifests)/([^/]+)$`)

var modelUploadRE = regexp.MustCompile(`^/v2/(.+)/blobs/uploads(/[^/]*)?$`)

// cleanPath undoes what many servers undo before they look at a path.
func cleanPath(p string) string {
	if un, err := url.PathUnescape(p); err == nil {
		p = un
	}
	c := path.Clean(p)
	if strings.HasSuffix(p, "/") && c != "/" {
		c += "/"
	}
	return c
}

// answer is what a registry answers. With live it is weir's request, which may
// change something.
func (w *modelWorld) answer(g *modelRegistry, q *modelRequest, live bool) *modelAnswer {
	switch g.fail {
	case "conn":
		return &modelAnswer{err: errors.New("connection refused")}
	case "silence":
		return &modelAnswer{err: errors.New("i/o timeout")}
	case "429", "500", "503":
		status, _ := strconv.Atoi(g.fail)
		return modelError(status, "UNAVAILABLE")
	case "html200":
		return modelHTML(200)
	case "html403":
		return modelHTML(403)
	}
	if g.name == "hub" && q.host != "" && Canonical(q.host) != g.host {
		return modelError(http.StatusNotFound, "NO_SUCH_HOST")
	}
	p := cleanPath(q.path)
	if p == "/v2/" || p == "/v2" {
		if _, valid, shown := w.account(g, q); !valid && (g.tokens || shown) {
			return w.refusal(g, q, "", false)
		}
		return &modelAnswer{status: 200, header: http.Header{"Content-Type": {"application/json"}}, body: []byte("{}"), length: true}
	}
	if q.method != http.MethodGet && q.method != http.MethodHead {
		return w.write(g, q, p, live)
	}
	if m := modelPathRE.FindStringSubmatch(p); m != nil && !strings.HasPrefix(m[3], "uploads") {
		a := w.read(g, q, m[1], m[2], m[3], live)
		a.repo, a.asked = m[1], modelByDigest[m[3]]
		return a
	}
	if repo, ok := strings.CutSuffix(strings.TrimPrefix(p, "/v2/"), "/tags/list"); ok {
		if a := w.refusal(g, q, repo, false); a != nil {
			return a
		}
		b, _ := json.Marshal(map[string]any{"name": repo, "tags": slices.Sorted(maps.Keys(g.repos[repo].tags))})
		return &modelAnswer{status: 200, header: http.Header{"Content-Type": {"application/json"}}, body: b, length: true, says: true, repo: repo}
	}
	return modelError(http.StatusNotFound, "PAGE_UNKNOWN")
}

// read answers GET and HEAD of a blob or a manifest.
func (w *modelWorld) read(g *modelRegistry, q *modelRequest, repo, kind, ref string, live bool) *modelAnswer {
	r := g.repos[repo]
	c := modelByDigest[ref]
	have := r != nil && c != nil && r.has[c.name]
	if a := w.lie(g, q, repo, kind, ref, c, have, live); a != nil {
		return a
	}
	if _, _, shown := w.account(g, q); g.redirect == "login" && !shown {
		return w.to(g, q, repo, "https://login.test/?", live)
	}
	scheme := "https"
	if g.http {
		scheme = "http"
	}
	at := &url.URL{Scheme: scheme, Host: "cdn.test", Path: "/" + g.name + "/v2/" + repo + "/" + kind + "/" + ref}
	target := at.String() + "?"
	for i := range g.hops {
		target = fmt.Sprintf("https://hop.test/%d?to=%s&", i, url.QueryEscape(target))
	}
	if g.redirect == "blind" {
		return w.to(g, q, repo, target, live)
	}
	if a := w.refusal(g, q, repo, false); a != nil {
		return a
	}
	if kind == "manifests" && c == nil {
		c = modelContents[r.tags[ref]]
		have = c != nil && r.has[c.name]
	}
	if !have || !g.mixed && (kind == "manifests") != (c.mediaType != "") {
		return modelError(http.StatusNotFound, "UNKNOWN")
	}
	if g.redirect == "all" || g.redirect == "blobs" && kind == "blobs" {
		return w.to(g, q, repo, strings.Replace(target, "cdn.test/", "cdn.test/signed/", 1), live)
	}
	return w.give(g, q, c, ref)
}

// to redirects. The number in what it redirects to tells whom it redirected.
func (w *modelWorld) to(g *modelRegistry, q *modelRequest, repo, target string, live bool) *modelAnswer {
	n := 0
	if live {
		n = len(w.origins)
		w.origins = append(w.origins, modelOrigin{g, repo, q})
	}
	status := http.StatusTemporaryRedirect
	if strings.Contains(target, "login.test") {
		status = http.StatusFound
	}
	return &modelAnswer{status: status, header: http.Header{"Location": {fmt.Sprintf("%sn=%d", target, n)}}, length: true}
}

// give sends content as an HTTP server does, but for the registry's quirks.
func (w *modelWorld) give(g *modelRegistry, q *modelRequest, c *modelContent, ref string) *modelAnswer {
	header := q.header
	if g.quirks["norange"] && header.Get("Range") != "" {
		header = header.Clone()
		header.Del("Range")
	}
	if g.quirks["range416"] && header.Get("Range") != "" {
		return modelError(http.StatusRequestedRangeNotSatisfiable, "RANGE")
	}
	rec := httptest.NewRecorder()
	mt := "application/octet-stream"
	if c.mediaType != "" {
		mt = c.mediaType
	}
	rec.Header().Set("Content-Type", mt)
	dig := c.sha256.String()
	if modelByDigest[ref] != nil {
		dig = ref
	}
	rec.Header().Set("Etag", `"`+dig+`"`)
	if !g.quirks["nodigest"] {
		rec.Header().Set("Docker-Content-Digest", dig)
	}
	http.ServeContent(rec, &http.Request{Method: q.method, Header: header}, "", time.Time{}, bytes.NewReader(c.bytes))
	a := &modelAnswer{status: rec.Code, header: rec.Header(), body: rec.Body.Bytes(), length: !g.quirks["nolength"], truth: c, says: rec.Code < 300}
	if q.method == http.MethodHead {
		a.length = true
		if len(a.header["Content-Length"]) == 0 && a.says {
			a.header.Set("Content-Length", strconv.Itoa(len(c.bytes)))
		}
	}
	return a
}

// lie is what a hostile registry says of content that it hasn't, or nil.
func (w *modelWorld) lie(g *modelRegistry, q *modelRequest, repo, kind, ref string, c *modelContent, have, live bool) *modelAnswer {
	head := func(c *modelContent) *modelAnswer {
		a := &modelAnswer{status: 200, says: true, length: true, header: http.Header{
			"Content-Type": {"application/octet-stream"}, "Content-Length": {strconv.Itoa(len(c.bytes))}, "Docker-Content-Digest": {c.sha256.String()}}}
		if modelByDigest[ref] != nil {
			a.header.Set("Docker-Content-Digest", ref)
		}
		if c.mediaType != "" {
			a.header.Set("Content-Type", c.mediaType)
		}
		return a
	}
	secret := w.regs["hub"].repo("acme/secret")
	switch {
	case len(g.lies) == 0 || have:
		return nil
	case kind == "manifests" && c == nil && g.lies["tag"] && q.method == http.MethodHead:
		return head(modelContents["m0"])
	case c == nil:
		return nil
	case g.lies["elsewhere"]:
		return w.to(g, q, repo, "https://"+DockerHub+"/v2/acme/secret/"+kind+"/"+ref+"?", live)
	case g.lies["lan"]:
		return w.to(g, q, repo, "https://lan.corp.test/v2/acme/secret/"+kind+"/"+ref+"?", live)
	case q.method == http.MethodHead && (g.lies["head"] || g.lies["relay"] && secret.has[c.name]):
		return head(c)
	case q.method == http.MethodGet && q.header.Get("Range") != "" && g.lies["part"]:
		// What can be guessed of it, and zeros.
		fake := c.guessed()
		a := w.give(&modelRegistry{}, q, &modelContent{bytes: fake, sha256: c.sha256, mediaType: c.mediaType}, ref)
		if a.truth = nil; bytes.Equal(fake, c.bytes) {
			a.truth = c
		}
		return a
	case q.method == http.MethodGet && g.lies["own"]:
		a := head(c)
		a.body = append(bytes.Clone(c.bytes[:min(len(c.bytes), modelKnown)]), "and what comes then, it makes up"...)
		a.header.Set("Content-Length", strconv.Itoa(len(a.body)))
		return a
	}
	return nil
}

// write answers pushes and deletions.
func (w *modelWorld) write(g *modelRegistry, q *modelRequest, p string, live bool) *modelAnswer {
	params, _ := url.ParseQuery(q.query)
	content := func(claimed string) *modelContent {
		if c := modelByDigest[claimed]; c != nil && bytes.Equal(c.bytes, q.body) {
			return c
		}
		return nil
	}
	created := func(a *modelAnswer, d string) *modelAnswer {
		a.status, a.header = 201, http.Header{"Docker-Content-Digest": {d}}
		return a
	}
	a := &modelAnswer{status: 202, header: http.Header{}, length: true}
	allowed := func(repo string) *modelAnswer {
		if g.lies["accept"] {
			return nil
		}
		return w.refusal(g, q, repo, true)
	}
	if m := modelUploadRE.FindStringSubmatch(p); m != nil {
		repo := m[1]
		a.repo = repo
		if refused := allowed(repo); refused != nil {
			return refused
		}
		at := strings.TrimPrefix(m[2], "/")
		switch {
		case q.method == http.MethodPost && at == "":
			mount, from := modelByDigest[params.Get("mount")], g.repos[params.Get("from")]
			switch d := modelByDigest[params.Get("digest")]; {
			case mount != nil && g.lies["accept"]:
				return created(a, params.Get("mount"))
			case mount != nil && from != nil && from.has[mount.name] && w.refusal(g, q, params.Get("from"), false) == nil:
				if live {
					g.repo(repo).has[mount.name] = true
				}
				return created(a, params.Get("mount"))
			case d != nil && (content(params.Get("digest")) != nil || g.lies["accept"]):
				if c := content(params.Get("digest")); live && c != nil {
					g.repo(repo).has[c.name] = true
					a.truth = c
				}
				return created(a, params.Get("digest"))
			}
			name := fmt.Sprintf("/v2/%s/blobs/uploads/u%d", repo, g.sessions)
			if live {
				g.sessions++
				g.uploads[name] = nil
			}
			a.header.Set("Location", name)
			return a
		case q.method == http.MethodPatch:
			b, ok := g.uploads[p]
			if !ok {
				return modelError(404, "BLOB_UPLOAD_UNKNOWN")
			}
			if live {
				g.uploads[p] = append(b, q.body...)
			}
			a.header.Set("Location", p)
			return a
		case q.method == http.MethodPut:
			b, ok := g.uploads[p]
			if !ok {
				return modelError(404, "BLOB_UPLOAD_UNKNOWN")
			}
			q.body = append(bytes.Clone(b), q.body...)
			c := content(params.Get("digest"))
			if c == nil && !g.lies["accept"] {
				return modelError(400, "DIGEST_INVALID")
			}
			if live {
				delete(g.uploads, p)
				if c != nil {
					g.repo(repo).has[c.name] = true
					a.truth = c
				}
			}
			return created(a, params.Get("digest"))
		}
		return modelError(405, "UNSUPPORTED")
	}
	m := modelPathRE.FindStringSubmatch(p)
	if m == nil {
		return modelError(405, "UNSUPPORTED")
	}
	a.repo = m[1]
	if refused := allowed(m[1]); refused != nil {
		return refused
	}
	r := g.repo(m[1])
	switch {
	case q.method == http.MethodPut && m[2] == "manifests":
		var c *modelContent
		for _, have := range modelContents {
			if have.mediaType != "" && bytes.Equal(have.bytes, q.body) {
				c = have
			}
		}
		if c == nil || strings.Contains(m[3], ":") && modelByDigest[m[3]] != c {
			if g.lies["accept"] {
				return created(a, m[3])
			}
			return modelError(400, "MANIFEST_INVALID")
		}
		if live {
			r.has[c.name] = true
			a.truth = c
			if !strings.Contains(m[3], ":") {
				r.tags[m[3]] = c.name
			}
		}
		return created(a, c.sha256.String())
	case q.method == http.MethodDelete:
		c := modelByDigest[m[3]]
		if c == nil && m[2] == "manifests" {
			if live {
				delete(r.tags, m[3])
			}
			return a
		}
		if c == nil || !r.has[c.name] {
			return modelError(404, "UNKNOWN")
		}
		a.asked = c
		if live {
			delete(r.has, c.name)
		}
		return a
	}
	return modelError(405, "UNSUPPORTED")
}

// elsewhere is what a host answers that isn't the connection's registry.
func (w *modelWorld) elsewhere(host string, q *modelRequest, live bool) *modelAnswer {
	params, _ := url.ParseQuery(q.query)
	switch host {
	case "auth.test":
		switch w.tokens {
		case "conn":
			return &modelAnswer{err: errors.New("connection refused")}
		case "429", "503":
			status, _ := strconv.Atoi(w.tokens)
			return modelError(status, "UNAVAILABLE")
		case "html403":
			return modelHTML(403)
		}
		return &modelAnswer{status: 200, header: http.Header{"Content-Type": {"application/json"}}, body: []byte(`{"token":"anon-9"}`), length: true}
	case "login.test":
		return modelHTML(200)
	case "hop.test":
		return &modelAnswer{status: 307, header: http.Header{"Location": {params.Get("to") + "n=" + params.Get("n")}}, length: true}
	case "cdn.test":
		p, signed := strings.CutPrefix(cleanPath(q.path), "/signed")
		name, p, _ := strings.Cut(strings.TrimPrefix(p, "/"), "/")
		g, m := w.regs[name], modelPathRE.FindStringSubmatch("/"+p)
		if g == nil || m == nil {
			return modelError(404, "UNKNOWN")
		}
		r := g.repos[m[1]]
		if r == nil || !signed && !r.public {
			return modelHTML(403)
		}
		c := modelByDigest[m[3]]
		if c == nil {
			c = modelContents[r.tags[m[3]]]
		}
		if c == nil || !r.has[c.name] {
			return modelHTML(404)
		}
		a := w.give(g, q, c, m[3])
		a.repo, a.asked = m[1], c
		return a
	}
	for _, g := range w.regs {
		if g.host == host && g.roots == "" && g.plain == "" {
			return w.answer(g, q, live)
		}
	}
	return &modelAnswer{err: errors.New("no such host")}
}

// dispatch finds who answers at a URL, for a connection to a registry.
func (w *modelWorld) dispatch(g *modelRegistry, u *url.URL, q *modelRequest, live bool) (a *modelAnswer, own bool) {
	if g.plain != "" && u.Scheme == "http" && u.Host == g.plain || g.plain == "" && u.Scheme == "https" && Canonical(u.Host) == g.host {
		return w.answer(g, q, live), true
	}
	other := *q
	other.cert = ""
	return w.elsewhere(Canonical(u.Host), &other, live), false
}

// follow is what a client gets that sends the request to the registry itself,
// and goes where it is redirected to.
func (w *modelWorld) follow(g *modelRegistry, u *url.URL, q *modelRequest) (last, first *modelAnswer) {
	for range 10 {
		q.path, q.query = u.EscapedPath(), u.RawQuery
		a, _ := w.dispatch(g, u, q, false)
		if first == nil {
			first = a
		}
		location := a.header.Get("Location")
		if a.status/100 != 3 || location == "" || q.method != http.MethodGet && q.method != http.MethodHead {
			return a, first
		}
		next, err := u.Parse(location)
		if err != nil {
			return a, first
		}
		onward := *q
		onward.header = q.header.Clone()
		onward.host = next.Host
		if next.Host != u.Host {
			onward.header.Del("Authorization")
			onward.header.Del("Cookie")
			onward.userinfo = ""
		}
		q, u = &onward, next
	}
	return &modelAnswer{err: errors.New("too many redirects")}, first
}

func (g *modelRegistry) url(path, query string) *url.URL {
	u := &url.URL{Scheme: "https", Host: g.host, RawQuery: query}
	if g.plain != "" {
		u.Scheme, u.Host = "http", g.plain
	}
	u.RawPath = path
	if un, err := url.PathUnescape(path); err == nil {
		u.Path = un
	}
	return u
}

// modelWire is weir's way to a registry, from a client's network and with its
// certificate.
type modelWire struct {
	w         *modelWorld
	g         *modelRegistry
	net, cert string
}

// RoundTrip implements http.RoundTripper.
func (t *modelWire) RoundTrip(req *http.Request) (*http.Response, error) {
	q := &modelRequest{method: req.Method, path: req.URL.EscapedPath(), query: req.URL.RawQuery, host: req.Host, header: req.Header.Clone(), net: t.net, cert: t.cert}
	if q.host == "" {
		q.host = req.URL.Host
	}
	if req.Body != nil {
		var err error
		q.body, err = io.ReadAll(req.Body)
		req.Body.Close()
		if err != nil {
			return nil, err
		}
	}
	for k, vs := range q.header { // a field that is nil isn't sent
		if len(vs) == 0 {
			delete(q.header, k)
		}
	}
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	w := t.w
	w.mu.Lock()
	defer w.mu.Unlock()
	a, own := w.dispatch(t.g, req.URL, q, true)
	if a.err != nil {
		return nil, a.err
	}
	w.record(t.g, q, req.URL, a, own)
	resp := &http.Response{StatusCode: a.status, Status: fmt.Sprint(a.status, " ", http.StatusText(a.status)), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: a.header.Clone(), Request: req, ContentLength: -1}
	if a.length {
		resp.ContentLength = int64(len(a.body))
	} else {
		resp.Header.Del("Content-Length")
	}
	if req.Method == http.MethodHead {
		n, err := strconv.ParseInt(a.header.Get("Content-Length"), 10, 64)
		if err != nil {
			n = -1
		}
		resp.ContentLength, resp.Body = n, http.NoBody
		return resp, nil
	}
	if a.length {
		resp.Header.Set("Content-Length", strconv.Itoa(len(a.body)))
	}
	b := &modelBody{rest: a.body, done: req.Context().Done()}
	if h := w.hold; h != nil && !h.taken && a.truth != nil && req.Method == http.MethodGet && len(a.body) > h.at {
		h.taken = true
		b.held, b.until = a.body[h.at:], h.released
		b.rest = a.body[:h.at]
	}
	if w.cuts > 0 && a.truth != nil && a.truth.mediaType == "" && req.Method == http.MethodGet && b.held == nil {
		from := 0
		_, _ = fmt.Sscanf(a.header.Get("Content-Range"), "bytes %d-", &from)
		if n := max(0, w.cutAt-from); n < len(b.rest) {
			b.rest, b.cut = b.rest[:n], true
			w.cuts--
			w.wasCut++
		}
	}
	resp.Body = b
	return resp, nil
}

// modelBody is a body of which a part may be held back.
type modelBody struct {
	rest, held []byte
	cut        bool // it breaks off
	until      <-chan struct{}
	done       <-chan struct{}
}

func (b *modelBody) Read(p []byte) (int, error) {
	if len(b.rest) == 0 && len(b.held) > 0 {
		select {
		case <-b.until:
			b.rest, b.held = b.held, nil
		case <-b.done:
			return 0, errors.New("the request was given up")
		}
	}
	if len(b.rest) == 0 && b.cut {
		return 0, io.ErrUnexpectedEOF
	}
	if len(b.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *modelBody) Close() error { return nil }
