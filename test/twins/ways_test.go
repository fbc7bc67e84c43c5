// SPDX-License-Identifier: Apache-2.0

package twins

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/test/lab"
)

// way is how a registry behaves.
type way struct {
	name     string
	registry func(*world) *lab.Registry // nil means ghcr.io
	serve    func(p *play, w *recorded, r *http.Request, next http.Handler)
	image    func(*lab.Image)
	pushed   func(*play)         // the image is there
	slow     bool                // it takes minutes
	inTurn   bool                // the node with weir comes after the one without
	fits     func(st story) bool // nil means all
	// any says that which error a failure gives, and what else is asked, depends on
	// when the client gives up, or in which order it asks: weir resumes what breaks
	// off, too.
	any bool
}

func hub(w *world) *lab.Registry  { return w.hub }
func corp(w *world) *lab.Registry { return w.corp }

func isBlob(r *http.Request) bool {
	return strings.Contains(r.URL.Path, "/blobs/sha256:") && r.Method == http.MethodGet
}
func isManifest(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }
func isUpload(r *http.Request) bool   { return strings.Contains(r.URL.Path, "/blobs/uploads/") }

// authorized says whether a request will not be answered by a challenge: a way
// that changes what is answered leaves those alone.
func authorized(r *http.Request) bool { return r.Header.Get("Authorization") != "" }

// first says whether something happens for the first time in a play.
func (p *play) first(what string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count[what]++
	return p.count[what] == 1
}

// isConfig says whether a request is for the image's configuration: it is asked for at
// the same time as the layers, and some clients that try again for those don't for it.
func (p *play) isConfig(r *http.Request) bool {
	return isBlob(r) && strings.HasSuffix(r.URL.Path, p.im.Config.String())
}

// tooManyOnce answers the first of some requests with 429.
func tooManyOnce(of func(*play, *http.Request) bool) func(*play, *recorded, *http.Request, http.Handler) {
	return func(p *play, w *recorded, r *http.Request, next http.Handler) {
		if of(p, r) && authorized(r) && p.first("429") {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		next.ServeHTTP(w, r)
	}
}

// slowBlob says whether a blob is the one that is slow, however often it is asked
// for: the first that was.
func (p *play) slowBlob(r *http.Request) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.slow == "" {
		p.slow = r.URL.Path
	}
	return p.slow == r.URL.Path
}

// head has the head of an answer changed.
func head(f func(p *play, r *http.Request, h http.Header, status int) int) func(*play, *recorded, *http.Request, http.Handler) {
	return func(p *play, w *recorded, r *http.Request, next http.Handler) {
		w.head = func(h http.Header, status int) int { return f(p, r, h, status) }
		next.ServeHTTP(w, r)
	}
}

// wait waits, as long as the client does.
func wait(r *http.Request, d time.Duration) {
	select {
	case <-time.After(d):
	case <-r.Context().Done():
	}
}

func slowHead(d time.Duration) func(*play, *recorded, *http.Request, http.Handler) {
	return func(p *play, w *recorded, r *http.Request, next http.Handler) {
		if isBlob(r) && authorized(r) && p.slowBlob(r) {
			wait(r, d)
		}
		next.ServeHTTP(w, r)
	}
}

// slowBody sends a head, and its body later.
func slowBody(d time.Duration) func(*play, *recorded, *http.Request, http.Handler) {
	return func(p *play, w *recorded, r *http.Request, next http.Handler) {
		if !isBlob(r) || !authorized(r) || !p.slowBlob(r) {
			next.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		copyHead(w, rec)
		_ = http.NewResponseController(w).Flush()
		wait(r, d)
		_, _ = w.Write(rec.Body.Bytes())
	}
}

func copyHead(w http.ResponseWriter, rec *httptest.ResponseRecorder) {
	for k, v := range rec.Header() {
		w.Header()[k] = v
	}
	w.WriteHeader(rec.Code)
}

// byHand answers on the connection itself.
func byHand(w *recorded, r *http.Request, rec *httptest.ResponseRecorder, proto string) {
	c, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	w.status = rec.Code
	w.answered(w.status)
	fmt.Fprintf(buf, "%s %d %s\r\n", proto, rec.Code, http.StatusText(rec.Code))
	_ = rec.Header().Write(buf)
	fmt.Fprint(buf, "\r\n")
	if r.Method != http.MethodHead {
		_, _ = buf.Write(rec.Body.Bytes())
	}
	_ = buf.Flush()
}

// answer answers all that match.
func answer(match func(*http.Request) bool, status int, header http.Header, body string) func(*play, *recorded, *http.Request, http.Handler) {
	return func(_ *play, w *recorded, r *http.Request, next http.Handler) {
		if !match(r) {
			next.ServeHTTP(w, r)
			return
		}
		for k, v := range header {
			w.Header()[k] = v
		}
		w.WriteHeader(status)
		if r.Method != http.MethodHead {
			_, _ = io.WriteString(w, body)
		}
	}
}

func redirect(w http.ResponseWriter, r *http.Request, host string) {
	w.Header().Set("Location", "https://"+host+r.URL.Path)
	w.WriteHeader(http.StatusTemporaryRedirect)
}

// bearer asks for a token, with more challenges beside, and gives out one of a size.
func bearer(size int, more ...string) func(*play, *recorded, *http.Request, http.Handler) {
	token := strings.Repeat("token.", size/6+1)[:size]
	return func(p *play, w *recorded, r *http.Request, _ http.Handler) {
		switch {
		case r.URL.Path == "/token":
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"token":%q,"access_token":%q,"expires_in":300}`, token, token)
		case r.Header.Get("Authorization") == "Bearer "+token:
			p.reg.Open().ServeHTTP(w, r)
		default:
			for _, m := range more {
				w.Header().Add("Www-Authenticate", m)
			}
			w.Header().Add("Www-Authenticate", fmt.Sprintf(`Bearer realm="https://%s/token",service="twins",scope="repository:%s:pull,push"`, p.reg.Host, p.repo))
			w.WriteHeader(http.StatusUnauthorized)
		}
	}
}

// padded answers for the image's manifest, which is larger than registries take,
// by tag and digest: there is white space in it.
func padded(p *play, w http.ResponseWriter, r *http.Request, next http.Handler) {
	if !isManifest(r) || r.Method != http.MethodGet && r.Method != http.MethodHead {
		next.ServeHTTP(w, r)
		return
	}
	ref := path.Base(r.URL.Path)
	tagged := r.Clone(r.Context())
	tagged.Method = http.MethodGet
	if strings.HasPrefix(ref, "sha256:") {
		tagged.URL.Path = path.Dir(r.URL.Path) + "/" + p.tag
	}
	rec := httptest.NewRecorder()
	next.ServeHTTP(rec, tagged)
	b := append(bytes.Repeat([]byte(" "), 5<<20), rec.Body.Bytes()...)
	d := digest.FromBytes(b).String()
	if rec.Code != http.StatusOK || path.Base(tagged.URL.Path) != p.tag || ref != p.tag && ref != d {
		next.ServeHTTP(w, r)
		return
	}
	for _, k := range []string{"Docker-Content-Digest", "Etag", "Content-Length"} {
		rec.Header().Set(k, map[string]string{"Docker-Content-Digest": d, "Etag": `"` + d + `"`, "Content-Length": strconv.Itoa(len(b))}[k])
	}
	copyHead(w, rec)
	if r.Method == http.MethodGet {
		_, _ = w.Write(b)
	}
}

func uploadsAt(host string) func(*play, *recorded, *http.Request, http.Handler) {
	return head(func(_ *play, r *http.Request, h http.Header, status int) int {
		if u, err := url.Parse(h.Get("Location")); isUpload(r) && err == nil && u.Path != "" && status == http.StatusAccepted {
			u.Scheme, u.Host = "https", host
			h.Set("Location", u.String())
		}
		return status
	})
}

var ways = []way{
	{name: ""},
	{name: "Docker Hub: a token server and a CDN of their own", registry: hub},
	{name: "Basic", registry: corp, serve: func(p *play, w *recorded, r *http.Request, _ http.Handler) {
		if name, pass, _ := r.BasicAuth(); name != user || pass != password {
			w.Header().Set("Www-Authenticate", `Basic realm="corp"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		p.reg.Open().ServeHTTP(w, r)
	}},
	{name: "private, with tokens", registry: corp},
	{name: "cookies", serve: head(func(p *play, r *http.Request, h http.Header, status int) int {
		h.Add("Set-Cookie", "route=abc; Path=/; Secure; HttpOnly")
		return status
	})},
	{name: "Connection: close", serve: head(func(_ *play, _ *http.Request, h http.Header, status int) int {
		h.Set("Connection", "close")
		return status
	})},
	// Clients that use a connection again run into a race, with and without weir.
	{name: "closes each connection after its answer, and doesn't say so", fits: func(st story) bool { return st.client == "raw" }, serve: func(_ *play, w *recorded, r *http.Request, next http.Handler) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		if r.Method != http.MethodHead && rec.Header().Get("Content-Length") == "" && rec.Code != http.StatusNoContent {
			rec.Header().Set("Content-Length", strconv.Itoa(rec.Body.Len()))
		}
		byHand(w, r, rec, "HTTP/1.1")
	}},
	{name: "HTTP/1.0", serve: func(_ *play, w *recorded, r *http.Request, next http.Handler) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		rec.Header().Del("Content-Length")
		byHand(w, r, rec, "HTTP/1.0")
	}},
	{name: "no length", serve: head(func(_ *play, r *http.Request, h http.Header, status int) int {
		if r.Method == http.MethodGet {
			h.Del("Content-Length")
		}
		return status
	})},
	{name: "uploads on another host", serve: uploadsAt("upload.example")},
	{name: "uploads on another port", serve: uploadsAt("upload.example:8443")},
	{name: "a chain of redirects to blobs", serve: func(p *play, w *recorded, r *http.Request, next http.Handler) {
		switch {
		case isBlob(r) && r.Host == "cdn1.example":
			redirect(w, r, "cdn2.example")
		case isBlob(r) && authorized(r) && r.Host == p.reg.Host:
			redirect(w, r, "cdn1.example")
		default:
			next.ServeHTTP(w, r)
		}
	}},
	{name: "redirects manifests and blobs, without a look", serve: func(p *play, w *recorded, r *http.Request, next http.Handler) {
		if (isBlob(r) || isManifest(r) && r.Method != http.MethodPut) && r.Host == p.reg.Host {
			redirect(w, r, "cdn1.example")
			return
		}
		next.ServeHTTP(w, r)
	}},
	{name: "slow head: 3 s", serve: slowHead(3 * time.Second)},
	{name: "slow body: 3 s after its head", serve: slowBody(3 * time.Second)},
	{name: "slow head: 125 s", serve: slowHead(125 * time.Second), slow: true},
	{name: "slow body: 35 s after its head", serve: slowBody(35 * time.Second), slow: true},
	{name: "HEAD refused", serve: answer(func(r *http.Request) bool { return r.Method == http.MethodHead }, http.StatusMethodNotAllowed, nil, "")},
	{name: "HEAD 404 unless Accept has the exact type", serve: head(func(_ *play, r *http.Request, h http.Header, status int) int {
		if r.Method == http.MethodHead && isManifest(r) && status == http.StatusOK && !strings.Contains(strings.Join(r.Header["Accept"], ","), h.Get("Content-Type")) {
			return http.StatusNotFound
		}
		return status
	})},
	{name: "Range ignored", serve: func(_ *play, w *recorded, r *http.Request, next http.Handler) {
		r.Header.Del("Range")
		next.ServeHTTP(w, r)
	}},
	// The raw client is given them all the same: weir asks for their pieces.
	{name: "416 for open ranges", fits: func(st story) bool { return st.client != "raw" }, serve: answer(func(r *http.Request) bool { return isBlob(r) && strings.HasSuffix(r.Header.Get("Range"), "-") }, http.StatusRequestedRangeNotSatisfiable, nil, "")},
	{name: "no Accept-Ranges", serve: head(func(_ *play, _ *http.Request, h http.Header, status int) int {
		h.Del("Accept-Ranges")
		return status
	})},
	{name: "no digest header", serve: head(func(_ *play, r *http.Request, h http.Header, status int) int {
		if !isUpload(r) {
			h.Del("Docker-Content-Digest")
		}
		return status
	})},
	{name: "no digest header, HEAD refused", serve: func(p *play, w *recorded, r *http.Request, next http.Handler) {
		w.head = func(h http.Header, status int) int { h.Del("Docker-Content-Digest"); return status }
		answer(func(r *http.Request) bool { return r.Method == http.MethodHead }, http.StatusMethodNotAllowed, nil, "")(p, w, r, next)
	}},
	{name: "gzip", serve: func(_ *play, w *recorded, r *http.Request, next http.Handler) {
		if r.Method != http.MethodGet || r.URL.Path == "/token" || !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") || r.Header.Get("Range") != "" {
			next.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		if rec.Code != http.StatusOK {
			copyHead(w, rec)
			_, _ = w.Write(rec.Body.Bytes())
			return
		}
		rec.Header().Del("Content-Length")
		rec.Header().Set("Content-Encoding", "gzip")
		copyHead(w, rec)
		gz := gzip.NewWriter(w)
		_, _ = gz.Write(rec.Body.Bytes())
		gz.Close()
	}},
	{name: "a challenge page", any: true, serve: answer(func(*http.Request) bool { return true }, http.StatusForbidden, http.Header{"Content-Type": {"text/html"}}, "<html>are you human?</html>")},
	{name: "429", serve: answer(func(*http.Request) bool { return true }, http.StatusTooManyRequests, http.Header{"Retry-After": {"1"}}, `{"errors":[{"code":"TOOMANYREQUESTS"}]}`), any: true},
	// Of several ranges it is chance which one gets the 429: weir asks for what is between them, too.
	{name: "429 for the first layer", any: true, fits: func(st story) bool { return st.op != "ranges" }, serve: tooManyOnce(func(p *play, r *http.Request) bool { return isBlob(r) && !p.isConfig(r) })},
	{name: "429 for the image configuration", any: true, fits: func(st story) bool { return st.op != "ranges" }, serve: tooManyOnce((*play).isConfig)},
	{name: "503 for manifests", serve: answer(func(r *http.Request) bool { return isManifest(r) && authorized(r) }, http.StatusServiceUnavailable, nil, ""), any: true},
	{name: "the token server fails", serve: answer(func(r *http.Request) bool { return r.URL.Path == "/token" }, http.StatusServiceUnavailable, nil, "out of order"), any: true},
	{name: "not there", serve: answer(func(r *http.Request) bool { return isManifest(r) && r.Method != http.MethodPut && authorized(r) }, http.StatusNotFound,
		http.Header{"Content-Type": {"application/json"}}, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`)},
	{name: "denied", serve: answer(func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v2/t") && authorized(r) }, http.StatusForbidden,
		http.Header{"Content-Type": {"application/json"}}, `{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}`)},
	{name: "tokens of 20 KB", serve: bearer(20 << 10)},
	// The raw client has no token then, and ends while its body is being refused.
	{name: "several challenges", fits: func(st story) bool { return st.client != "raw" }, serve: bearer(60, "Negotiate")},
	{name: "monolithic POST is taken", serve: func(p *play, w *recorded, r *http.Request, next http.Handler) {
		digest := r.URL.Query().Get("digest")
		if r.Method != http.MethodPost || !isUpload(r) || digest == "" {
			next.ServeHTTP(w, r)
			return
		}
		if !authorized(r) {
			_, _ = io.Copy(io.Discard, r.Body)
			next.ServeHTTP(w, r)
			return
		}
		begin := r.Clone(r.Context())
		begin.Body, begin.ContentLength, begin.URL.RawQuery = http.NoBody, 0, ""
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, begin)
		loc, err := url.Parse(rec.Header().Get("Location"))
		if err != nil || loc.Path == "" {
			copyHead(w, rec)
			return
		}
		q := loc.Query()
		q.Set("digest", digest)
		end := r.Clone(r.Context())
		end.Method, end.URL.Path, end.URL.RawQuery = http.MethodPut, loc.Path, q.Encode()
		next.ServeHTTP(w, end)
	}},
	{name: "cuts the first layer off", any: true, serve: func(p *play, w *recorded, r *http.Request, next http.Handler) {
		if !isBlob(r) || p.isConfig(r) || !authorized(r) || !p.first("cut") {
			next.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		copyHead(w, rec)
		_, _ = w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
		panic(http.ErrAbortHandler)
	}},
	{name: "drops the first request", any: true, serve: func(p *play, w *recorded, r *http.Request, next http.Handler) {
		if authorized(r) && r.Method == http.MethodGet && p.first("drop") {
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(w, r)
	}},
	{name: "a signed URL is good once", serve: func(p *play, w *recorded, r *http.Request, next http.Handler) {
		if isBlob(r) && r.Host == "cdn1.example" {
			if !p.first(r.URL.RawQuery) {
				w.Header().Set("Content-Type", "application/xml")
				w.WriteHeader(http.StatusBadRequest)
				return
			}
		} else if isBlob(r) && authorized(r) {
			p.mu.Lock()
			p.count["urls"]++
			n := p.count["urls"]
			p.mu.Unlock()
			w.Header().Set("Location", fmt.Sprintf("https://cdn1.example%s?n=%d", r.URL.Path, n))
			w.WriteHeader(http.StatusTemporaryRedirect)
			return
		}
		next.ServeHTTP(w, r)
	}},
	{name: "announces 1 % more of a blob than there is", any: true, serve: head(func(_ *play, r *http.Request, h http.Header, status int) int {
		if n, err := strconv.Atoi(h.Get("Content-Length")); isBlob(r) && err == nil && status == http.StatusOK && n > 100 {
			h.Set("Content-Length", strconv.Itoa(n+n/100)) // the connection ends before
		}
		return status
	})},
	{name: "mounts and other uploads refused: 403", serve: answer(func(r *http.Request) bool { return r.Method == http.MethodPost && authorized(r) }, http.StatusForbidden,
		http.Header{"Content-Type": {"application/json"}}, `{"errors":[{"code":"DENIED","message":"no pushing"}]}`)},
	{name: "manifests by tag have no type", serve: head(func(_ *play, r *http.Request, h http.Header, status int) int {
		if isManifest(r) && status == http.StatusOK {
			h.Set("Content-Type", "application/octet-stream")
		}
		return status
	})},
	// The raw client doesn't look at digests, and takes whatever comes.
	{name: "another file under the digest", any: true, fits: func(st story) bool { return st.client != "raw" }, serve: func(_ *play, w *recorded, r *http.Request, next http.Handler) {
		if !isBlob(r) || !authorized(r) {
			next.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		copyHead(w, rec)
		b := rec.Body.Bytes()
		if len(b) > 0 {
			b[len(b)/2] ^= 1
		}
		_, _ = w.Write(b)
	}},
	{name: "manifests of 5 MiB", image: func(im *lab.Image) { im.Index = false },
		pushed: func(p *play) {
			rec := httptest.NewRecorder()
			padded(p, rec, httptest.NewRequest(http.MethodHead, "/v2/"+p.repo+"/manifests/"+p.tag, nil), p.reg.Open())
			p.im.Manifest = digest.Digest(rec.Header().Get("Docker-Content-Digest"))
			p.im.Digest = p.im.Manifest
		},
		serve: func(p *play, w *recorded, r *http.Request, next http.Handler) { padded(p, w, r, next) }},
	{name: "429 for some requests more at once than there were without weir", inTurn: true, any: true,
		image: func(im *lab.Image) { im.Layers = []int{20_000, 20_001, 20_002, 20_003, 20_004, 20_005, 20_006} },
		serve: func(p *play, w *recorded, r *http.Request, next http.Handler) {
			p.mu.Lock()
			p.now++
			now := p.now
			p.mu.Unlock()
			defer func() {
				p.mu.Lock()
				defer p.mu.Unlock()
				p.now--
			}()
			if p.agent == nil {
				p.most.Store(max(p.most.Load(), now))
			} else if now > p.most.Load()+2 { // one may have been answered, and not have ended here
				w.Header().Set("Retry-After", "1")
				w.WriteHeader(http.StatusTooManyRequests)
				return
			}
			if isBlob(r) {
				wait(r, 200*time.Millisecond)
			}
			next.ServeHTTP(w, r)
		}},
	{name: "large image configuration", image: func(im *lab.Image) { im.Layers = append(im.Layers, make([]int, 40)...) }},
}

// explained is how often weir may ask a registry for what the client without it
// asked in another way, of which without is what was asked: each with its reason.
func explained(q string, without map[string]int) int {
	switch {
	// A tag that a client asks for by GET is resolved by a HEAD, with the client's
	// credentials, and its manifest is spared; where HEAD is refused, it is not.
	case strings.HasPrefix(q, "HEAD ") && strings.Contains(q, "/manifests/"):
		path, _, _ := strings.Cut(strings.TrimPrefix(q, "HEAD "), " → ")
		n := 0
		for other, m := range without {
			if strings.HasPrefix(other, "GET "+path+" →") {
				n += m
			}
		}
		return n
	// A blob of which a client asks a range comes into the store whole.
	case strings.HasPrefix(q, "GET ") && strings.Contains(q, "/blobs/sha256:") && strings.HasSuffix(q, "200"):
		return without[strings.TrimSuffix(q, "200")+"206"]
	}
	return 0
}
