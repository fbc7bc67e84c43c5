// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// modelLedger is what registries have said to weir, and when. It is the
// oracle's own: from what goes over the wire, never from weir's state.
type modelLedger struct {
	right  map[string]time.Time // a registry, repository and client: content was given
	denied map[string]bool      // the same, and a content: it isn't there
	has    map[string]time.Time // a registry, repository and content: its bytes were sent
	// given is when each right was last given, though it may be lost by now: by seq,
	// which counts what was recorded.
	given  map[string]int
	seq    int
	public map[string]time.Time // a registry, repository and network: content was given to an anonymous request
	lied   map[string]bool      // as has: something else was sent in its place
	// deleted is a registry, repository and content that was deleted in one network. Where it may be
	// another registry in each, what is remembered of the others stays.
	deleted map[string]bool
}

func newModelLedger() modelLedger {
	return modelLedger{right: make(map[string]time.Time), denied: make(map[string]bool), has: make(map[string]time.Time), given: make(map[string]int), public: make(map[string]time.Time), lied: make(map[string]bool), deleted: make(map[string]bool)}
}

func (l modelLedger) clone() modelLedger {
	return modelLedger{right: maps.Clone(l.right), denied: maps.Clone(l.denied), has: maps.Clone(l.has), given: maps.Clone(l.given), seq: l.seq, public: maps.Clone(l.public), lied: maps.Clone(l.lied), deleted: maps.Clone(l.deleted)}
}

// modelOrigin is a request of weir's that was redirected.
type modelOrigin struct {
	g    *modelRegistry
	repo string
	q    *modelRequest
}

func (o modelOrigin) key() string {
	return fmt.Sprintf("%s/%s as %s", o.g.name, o.repo, o.q.identity())
}

// hasKey is where a content is: a registry that only a runtime's own CA speaks
// for may be another one in each network.
func hasKey(g *modelRegistry, repo, net string, c *modelContent) string {
	if g.roots == "" {
		net = "any"
	}
	return g.name + "/" + repo + " in " + net + " " + c.name
}

// publicKey is for whom a repository is public: for those of one network, but at the registries
// that everybody uses. Any other may know clients by their network, as far as weir can tell: what
// it says to one says nothing for the others.
func publicKey(g *modelRegistry, repo, net string) string {
	if g.worldwide() && !g.byAddress {
		net = "any"
	}
	return g.name + "/" + repo + " in " + net
}

// sent records that the bytes of a content were sent. Whoever was told before that it isn't there
// may have it by a right to the repository.
func (l modelLedger) sent(now time.Time, has string, o modelOrigin, c *modelContent) {
	l.has[has] = now
	delete(l.deleted, hasKey(o.g, o.repo, "", c))
	maps.DeleteFunc(l.denied, func(key string, _ bool) bool {
		return strings.HasPrefix(key, o.g.name+"/"+o.repo+" as ") && strings.HasSuffix(key, "s "+c.name)
	})
}

// plainly says whether a request names its registry and its repository in the
// one way that weir reads: an answer to any other need not be understood.
func (o modelOrigin) plainly() bool {
	return cleanPath(o.q.path) == o.q.path && (o.q.host == "" || Canonical(o.q.host) == o.g.host || o.q.host == o.g.plain)
}

// record counts an answer to weir.
func (w *modelWorld) record(g *modelRegistry, q *modelRequest, u *url.URL, a *modelAnswer, own bool) {
	l := &w.ledger
	o := modelOrigin{g, a.repo, q}
	switch n, _ := strconv.Atoi(u.Query().Get("n")); {
	case n > 0 && n < len(w.origins): // also where a registry redirects to itself
		o = w.origins[n]
	case !own:
		return
	}
	if q.method == http.MethodGet && a.says && a.truth == nil && a.asked != nil {
		l.lied[hasKey(o.g, o.repo, q.net, a.asked)] = true
	}
	has := ""
	if a.truth != nil {
		has = hasKey(o.g, o.repo, q.net, a.truth)
	}
	switch {
	case o.repo == "" || !o.plainly() || u.Opaque != "": // the absolute form
	case q.method != http.MethodGet && q.method != http.MethodHead:
		if a.truth != nil {
			l.sent(w.now, has, o, a.truth)
		}
		if q.method == http.MethodDelete && a.asked != nil && a.status == http.StatusAccepted {
			delete(l.has, hasKey(o.g, o.repo, q.net, a.asked))
			l.deleted[hasKey(o.g, o.repo, "", a.asked)] = o.g.roots != ""
		}
	case a.says:
		l.right[o.key()] = w.now
		l.seq++
		l.given[o.key()] = l.seq
		if o.q.anonymous() {
			l.public[publicKey(o.g, o.repo, q.net)] = w.now
		}
		for _, c := range []*modelContent{a.truth, a.asked} { // it says that it has that, and may lie
			if c != nil {
				delete(l.denied, o.key()+" blobs "+c.name)
				delete(l.denied, o.key()+" manifests "+c.name)
			}
		}
		if a.truth != nil && q.method == http.MethodGet {
			l.sent(w.now, has, o, a.truth)
		}
	case own && (a.status == http.StatusUnauthorized || a.status == http.StatusForbidden) && a.header.Get("Content-Type") != "text/html":
		if q.header.Get("User-Agent") != "weir" {
			delete(l.right, o.key())
		} else if !o.g.tokens && w.tokens == "" || q.header.Get("Authorization") != "" { // else a token may be all that it wants
			delete(l.public, publicKey(o.g, o.repo, q.net))
		}
	case own && a.status == http.StatusNotFound && a.asked != nil:
		if m := modelPathRE.FindStringSubmatch(cleanPath(q.path)); m != nil {
			l.denied[o.key()+" "+m[2]+" "+a.asked.name] = true
		}
	}
}

// fault is an answer of weir's that it should not have given.
type fault struct {
	kind string // "security", "difference", "corrupt", "hang"
	text string
}

// answered is an answer of weir's, as its client sees it.
type answered struct {
	status int
	header http.Header
	body   []byte
	err    error // it broke off, or there was none
	lost   bool  // the connection ended with an answer before
}

// modelAsk is a request that a client sends to weir, and what the registry would
// answer to it.
type modelAsk struct {
	g           *modelRegistry
	q           *modelRequest // nil when it is none
	raw         string
	last, first *modelAnswer
	bare        *modelAnswer    // without the userinfo of the absolute form
	whole       *modelAnswer    // to GET, without ranges and conditions
	wholeBare   *modelAnswer    // the same without userinfo
	byHead      *modelAnswer    // to HEAD
	placeholder bool            // it had that, and is taken without
	withToken   [2]*modelAnswer // then, to the request with an anonymous token: the last and the first
	anonymous   *modelAnswer    // to whole, with an anonymous token
	wasCut      int             // how many bodies had broken off before
	when        time.Time
	before      modelLedger // what was known when it was sent
}

// ask asks the registry what it would answer.
func (w *modelWorld) ask(x *modelAsk) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if x.placeholder = x.q.placeholder(); x.placeholder {
		x.q = x.q.with("")
	}
	q := x.q
	clone := func() *modelRequest {
		c := *q
		c.header = q.header.Clone()
		return &c
	}
	x.when, x.before, x.wasCut = w.now, w.ledger.clone(), w.wasCut
	x.last, x.first = w.follow(x.g, x.g.url(q.path, q.query), clone())
	if x.placeholder {
		x.withToken[0], x.withToken[1] = w.follow(x.g, x.g.url(q.path, q.query), q.with("Bearer anon-9"))
	}
	bare := clone()
	bare.userinfo = ""
	_, x.bare = w.follow(x.g, x.g.url(q.path, q.query), bare)
	if q.method != http.MethodGet && q.method != http.MethodHead {
		return
	}
	plain := clone()
	plain.method = http.MethodGet
	for _, h := range []string{"Range", "If-None-Match", "If-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range"} {
		plain.header.Del(h)
	}
	x.whole, _ = w.follow(x.g, x.g.url(q.path, q.query), plain)
	head := clone()
	head.method, head.header = http.MethodHead, plain.header.Clone()
	x.byHead, _ = w.follow(x.g, x.g.url(q.path, q.query), head)
	x.wholeBare = x.whole
	if q.userinfo != "" {
		bare := *plain
		bare.userinfo, bare.header = "", plain.header.Clone()
		x.wholeBare, _ = w.follow(x.g, x.g.url(q.path, q.query), &bare)
	}
	if q.nameless() {
		anon := *plain
		anon.header = plain.header.Clone()
		anon.header.Set("Authorization", "Bearer anon-9")
		x.anonymous, _ = w.follow(x.g, x.g.url(q.path, q.query), &anon)
	}
}

// placeholder says whether a request has the token that weir gives out in a token
// server's stead, and nameless whether it has no credentials.
func (q *modelRequest) placeholder() bool {
	return slices.Equal(q.header.Values("Authorization"), []string{"Bearer " + placeholder})
}

func (q *modelRequest) nameless() bool { return q.identity() == (&modelRequest{net: q.net}).identity() }

// with is a request with other credentials, or none.
func (q *modelRequest) with(auth string) *modelRequest {
	own := *q
	own.header = q.header.Clone()
	if own.header.Del("Authorization"); auth != "" {
		own.header.Set("Authorization", auth)
	}
	return &own
}

// forToken says whether weir's answer to a request for a token is one that it may
// give: the placeholder only for pulling from what was given to an anonymous request.
func (w *modelWorld) forToken(x *modelAsk, got *answered, stale time.Duration) *fault {
	if !bytes.Contains(got.body, []byte(placeholder)) {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	params, _ := url.ParseQuery(x.q.query)
	for _, scope := range strings.Fields(strings.Join(params["scope"], " ")) {
		repo, ok := strings.CutPrefix(scope, "repository:")
		repo, pull := strings.CutSuffix(repo, ":pull")
		var at time.Time
		for _, l := range []modelLedger{x.before, w.ledger} {
			if t := l.public[publicKey(x.g, repo, x.q.net)]; t.After(at) {
				at = t
			}
		}
		if !ok || !pull || at.IsZero() || x.when.Sub(at) >= stale {
			return &fault{"security", fmt.Sprintf("the placeholder is given for %q", scope)}
		}
	}
	return nil
}

var nonceRE = regexp.MustCompile(`(n=|n%3D)\d+`)

func samePlace(a, b string) bool {
	return nonceRE.ReplaceAllString(a, "n=") == nonceRE.ReplaceAllString(b, "n=")
}

// lies says whether an answer has nothing but what the registry had made up of a content, or had sent
// of it, at their places.
func (w *modelWorld) lies(x *modelAsk, repo string, c *modelContent, got *answered) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	key := hasKey(x.g, repo, x.q.net, c)
	if !w.ledger.lied[key] {
		return false
	}
	at, made, has := 0, c.guessed(), !w.ledger.has[key].IsZero()
	if got.status == http.StatusPartialContent {
		if _, err := fmt.Sscanf(got.header.Get("Content-Range"), "bytes %d-", &at); err != nil {
			return false
		}
	}
	for i, b := range got.body {
		if at+i >= len(made) || b != made[at+i] && (!has || b != c.bytes[at+i]) {
			return false
		}
	}
	return true
}

// cutSince is how many bodies have broken off since a request was sent.
func (w *modelWorld) cutSince(x *modelAsk) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wasCut - x.wasCut
}

// silent says whether an answer is none: it says nothing of what was asked for.
func (a *modelAnswer) silent() bool {
	return a.err != nil || a.status == http.StatusTooManyRequests || a.status >= 500 || a.header.Get("Content-Type") == "text/html"
}

// equals says whether weir's answer is one that the registry would have given.
func (got *answered) equals(a *modelAnswer, method string) bool {
	if a.err != nil {
		return got.err != nil && got.status == 0 || got.status == http.StatusBadGateway
	}
	if got.err != nil || got.status != a.status || !samePlace(got.header.Get("Location"), a.header.Get("Location")) {
		return false
	}
	if method == http.MethodHead {
		return got.header.Get("Content-Length") == a.header.Get("Content-Length") || a.header.Get("Content-Length") == ""
	}
	ours, end := partsOf(got.header, got.body)
	its, itsEnd := partsOf(a.header, a.body)
	if end == nil || itsEnd == nil {
		return end == nil && itsEnd == nil && bytes.Equal(got.body, a.body)
	}
	return end.Error() == itsEnd.Error() && slices.EqualFunc(ours, its, func(a, b rangePart) bool { // the boundary is random
		return a.contentRange == b.contentRange && bytes.Equal(a.bytes, b.bytes)
	})
}

// pieceOf says whether weir's answer has nothing but bytes of b, at the places
// that it names, and the size of b. What broke off may have less.
func (got *answered) pieceOf(b []byte, method string) bool {
	size := strconv.Itoa(len(b))
	at := func(contentRange string, piece []byte) bool {
		var from, to, all int
		if _, err := fmt.Sscanf(contentRange, "bytes %d-%d/%d", &from, &to, &all); err != nil || all != len(b) || to >= all || from > to {
			return len(b) == 0 && len(piece) == 0 // net/http names a range of nothing then
		}
		return bytes.Equal(piece, b[from:to+1]) || (got.err != nil || method == http.MethodHead) && bytes.HasPrefix(b[from:], piece)
	}
	length := got.header.Get("Content-Length")
	switch got.status {
	case http.StatusOK:
		return (length == "" || length == size) && (bytes.Equal(got.body, b) || (got.err != nil || method == http.MethodHead) && bytes.HasPrefix(b, got.body))
	case http.StatusPartialContent:
		parts, end := partsOf(got.header, got.body)
		if end == nil {
			return at(got.header.Get("Content-Range"), got.body)
		}
		for _, part := range parts {
			if !at(part.contentRange, part.bytes) {
				return false
			}
		}
		return errors.Is(end, io.EOF) || got.err != nil || method == http.MethodHead
	case http.StatusRequestedRangeNotSatisfiable:
		all, ok := strings.CutPrefix(got.header.Get("Content-Range"), "bytes */")
		return !ok || all == size
	}
	return true // that something is there, and no more
}

// leads says whether weir's answer is a redirect that leads to what the registry
// gives: weir may have followed the first ones of several.
func (w *modelWorld) leads(x *modelAsk, got *answered) bool {
	to, err := url.Parse(got.header.Get("Location"))
	if err != nil || !to.IsAbs() || got.status/100 != 3 || x.whole == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	onward := *x.q
	onward.header, onward.host, onward.userinfo = x.q.header.Clone(), to.Host, ""
	if to.Host != x.g.url("/", "").Host {
		onward.header.Del("Authorization")
		onward.header.Del("Cookie")
	}
	a, _ := w.follow(x.g, to, &onward)
	return a.err == nil && x.last.err == nil && a.status == x.last.status && bytes.Equal(a.body, x.last.body)
}

// wholly says whether a request is for all of a content, in the one way that weir
// reads: under a condition it passes through.
func (x *modelAsk) wholly() bool {
	return strings.HasPrefix(x.raw, "GET /") && x.q.query == "" && x.q.host != "" && !slices.ContainsFunc([]string{"Range", "If-None-Match", "If-Match"}, func(h string) bool { return x.q.header.Get(h) != "" }) &&
		modelOrigin{x.g, "", x.q}.plainly() && modelPathRE.MatchString(x.q.path)
}

// check compares weir's answer with the registry's. why is the reason that
// allows an answer which is another.
func (w *modelWorld) check(x *modelAsk, got *answered, ttl, stale time.Duration) (why string, f *fault) {
	method := x.q.method
	if c := modelByDigest[path.Base(x.q.path)]; c != nil && x.wholly() && got.status == http.StatusOK && got.err == nil && !bytes.Equal(got.body, c.bytes) {
		return "", &fault{"corrupt", fmt.Sprintf("the whole of %s came with other bytes: %v, %.60q", c.name, got.header, got.body)}
	}
	if got.equals(x.first, method) || got.equals(x.last, method) {
		return "equal", nil
	}
	if got.equals(x.bare, method) {
		return "without userinfo", nil
	}
	if x.placeholder && (got.equals(x.withToken[0], method) || got.equals(x.withToken[1], method)) {
		return "with an anonymous token", nil
	}
	if x.q.path == ownRealm && x.g.plain == "" && x.g.roots == "" {
		return "a token", w.forToken(x, got, stale)
	}
	if w.leads(x, got) {
		return "redirected", nil
	}
	if x.whole != nil && got.equals(x.whole, method) {
		return "without a range", nil
	}
	said := func(kind, because string) *fault {
		a := x.last
		return &fault{kind, fmt.Sprintf("%s\n  weir:     %d %v, %d bytes %.60q, %v\n  directly: %d %v, %d bytes %.60q, %v", because,
			got.status, got.header, len(got.body), got.body, got.err, a.status, a.header, len(a.body), a.body, a.err)}
	}
	m := modelPathRE.FindStringSubmatch(x.q.path)
	reading := method == http.MethodGet || method == http.MethodHead
	var target *modelContent
	if m != nil {
		target = modelByDigest[m[3]]
	}
	broken := got.status == 0 || got.status == http.StatusBadGateway || got.status == http.StatusNotFound
	switch {
	case !reading:
		return "", said("difference", "a request that writes is answered in another way")
	case x.q.path == "/v2/" && x.first.silent() && (got.status == http.StatusOK || got.status == http.StatusUnauthorized):
		return "base while the registry is silent", nil
	case x.q.path == "/v2/" && x.first.status == http.StatusUnauthorized && got.status == http.StatusUnauthorized && w.tokens != "":
		return "base while the token server fails", nil
	case got.status == 0 && w.cutSince(x) > 0:
		return "it broke off", nil
	case broken && (x.q.nameless() || x.placeholder) && w.tokens != "":
		return "the token server's failure", nil
	case x.placeholder && w.tokens != "" && (got.status == http.StatusTooManyRequests || got.status == http.StatusServiceUnavailable):
		return "the token server's failure", nil
	case m != nil && got.status == http.StatusUnauthorized && x.first.silent() && x.q.nameless():
		return "a login while the registry is silent", nil
	case m == nil:
		return "", said("difference", "a request for no content is answered in another way")
	case broken && target != nil && method == http.MethodGet && x.last.truth == nil && x.last.status/100 == 2:
		return "wrong bytes", nil
	case broken && x.whole.status == http.StatusOK && x.whole.truth == nil && target != nil:
		return "wrong bytes", nil
	}
	content := target
	if content == nil { // of a tag
		content = modelByDigest[got.header.Get("Docker-Content-Digest")]
	}
	switch got.status {
	case http.StatusOK, http.StatusPartialContent, http.StatusNotModified, http.StatusPreconditionFailed, http.StatusRequestedRangeNotSatisfiable:
	default:
		return "", said("difference", "the registry would have answered otherwise")
	}
	liar := x.whole.status == http.StatusOK && x.whole.truth == nil && bytes.HasPrefix(x.whole.body, got.body)
	if got.err != nil && content != nil && (liar || w.lies(x, m[1], content, got)) {
		return "wrong bytes", nil
	}
	// What the registry gives to this request, though cut, or broken off.
	for _, whole := range []*modelAnswer{x.whole, x.wholeBare} {
		if whole.err != nil || whole.status != http.StatusOK || !got.pieceOf(whole.body, method) {
			continue
		}
		if got.err != nil && whole.truth != nil && w.cutSince(x) == 0 {
			return "", said("difference", "what the registry gives broke off")
		}
		return "a part", nil
	}
	if content == nil || !got.pieceOf(content.bytes, method) {
		return "", said("security", "it is neither what the registry gives nor what was asked for")
	}
	if a := x.anonymous; a != nil && a.truth == content && !a.silent() {
		return "anonymous", nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	keys := []string{modelOrigin{x.g, m[1], x.q}.key()}
	nameless := x.q.nameless()
	if nameless { // weir asks in its own name
		keys = append(keys, modelOrigin{x.g, m[1], x.q.with("Bearer anon-9")}.key())
	}
	within := func(t time.Time, age time.Duration) bool { return !t.IsZero() && x.when.Sub(t) < age }
	kind := "blobs" // as which the content is asked for, if it is to be had
	if content.mediaType != "" {
		kind = "manifests"
	}
	// Other requests of the same moment may have changed what is known.
	for _, l := range []modelLedger{x.before, w.ledger} {
		right := slices.ContainsFunc(keys, func(key string) bool {
			// Another request of the same moment may have been given it, and this one lost it.
			return (within(l.right[key], ttl) || l.given[key] > x.before.seq) && (!l.denied[key+" "+kind+" "+content.name] || l.deleted[hasKey(x.g, m[1], "", content)])
		})
		has := l.has[hasKey(x.g, m[1], x.q.net, content)]
		public := within(l.public[publicKey(x.g, m[1], x.q.net)], stale)
		switch {
		case (x.first.silent() || nameless && w.tokens != "") && (right || public) && within(has, max(oracleContentTTL, stale)):
			return "stale", nil
		case target == nil && !x.last.silent() && modelByDigest[x.byHead.header.Get("Docker-Content-Digest")] != content && right && within(has, oracleContentTTL):
			return "", said("difference", "a tag is what the registry says now")
		case right && within(has, oracleContentTTL):
			return "remembered", nil
		}
		f = said("security", fmt.Sprintf("%s is given without a right (a right: %v; its bytes came from there: %v; public: %v)", content.name, right, has, public))
	}
	return "", f
}
