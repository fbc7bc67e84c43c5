// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// forward sends the client's request to the upstream and its answer back,
// unchanged, and learns from it.
func (x *exchange) forward() {
	p := httputil.ReverseProxy{
		Transport:     x.up.Transport,
		FlushInterval: -1,
		BufferPool:    &x.h.bufs,
		Rewrite: func(pr *httputil.ProxyRequest) {
			base := x.up.base()
			pr.Out.URL.Scheme, pr.Out.URL.Host, pr.Out.Host = base.Scheme, base.Host, pr.In.Host
			pr.Out.URL.RawQuery = pr.In.URL.RawQuery // ReverseProxy drops what it can't parse
			if pr.In.URL.IsAbs() {
				pr.Out.URL.Opaque = absolute(pr.In.URL)
			}
			for _, h := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if v, ok := pr.In.Header[h]; ok { // ReverseProxy drops these too
					pr.Out.Header[h] = v
				}
			}
			if _, ok := pr.In.Header["Accept-Encoding"]; !ok {
				pr.Out.Header.Del("Accept-Encoding")
			}
		},
		ModifyResponse: x.passing,
		ErrorHandler:   x.unreachable,
		ErrorLog:       slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	p.ServeHTTP(x.w, x.r)
}

// absolute is what follows the scheme in a request target in absolute form (RFC
// 9112, section 3.2.2), with the user and password that net/http leaves out.
func absolute(u *url.URL) string {
	user := ""
	if u.User != nil {
		user = u.User.String() + "@"
	}
	return "//" + user + u.Host + u.EscapedPath()
}

// passing sees each forwarded answer.
func (x *exchange) passing(resp *http.Response) error {
	x.h.outages.note(x.up.ID(), false)
	x.answered = x.h.rights.Now()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		if x.r.Header.Get("Upgrade") == "" {
			return errUpgrade
		}
		return nil // its body is the connection
	}
	switch {
	case x.push != nil:
		x.push.answered(x, resp)
	case x.r.Method == http.MethodDelete && resp.StatusCode/100 == 2 && x.target.repo != "":
		if x.target.digest != "" {
			x.h.rights.Remove(x.who.Repository, x.target.digest)
		}
		x.h.rights.ForgetTag(x.who.Repository, cmp.Or(x.target.tag, x.target.digest.String()))
	case x.target.kind == blob && x.reading():
		x.learn(resp)
	case x.target.kind == manifest && x.reading():
		x.followed(resp)
		x.learn(resp)
		x.checkPublic(resp)
		if x.target.tag != "" {
			x.learnTag(resp)
		}
		if x.r.Method == http.MethodGet && resp.StatusCode == http.StatusOK {
			if err := x.keepManifest(resp); err != nil {
				return err
			}
		}
	}
	if _, ok := resp.Header["Content-Type"]; !ok {
		x.w.Header()["Content-Type"] = nil // or net/http would guess one
	}
	resp.Body = x.counted(resp.Body)
	return nil
}

// followed makes an answer that redirects to a manifest what is there, if that can
// be had: what a registry that redirects its manifests (registry.k8s.io) has, and
// what its tags are, would never be known otherwise. Where it can't, the client is
// left to find out why.
func (x *exchange) followed(resp *http.Response) {
	location, err := resp.Location()
	if err != nil || !redirects(resp.StatusCode) || !x.up.authenticated() || location.Scheme != "https" {
		return
	}
	req := x.request(x.r.Context(), x.r.Method, nil)
	if req.URL.Host != location.Host {
		for _, field := range []string{"Authorization", "Cookie", "Proxy-Authorization"} {
			req.Header.Del(field) // as clients do (net/http); all else is the client's still
		}
	}
	if ranges := x.r.Header["Range"]; ranges != nil {
		req.Header["Range"] = ranges
	}
	req.URL, req.Host = location, ""
	there, err := x.send(req, true)
	if err != nil {
		return
	}
	if there.StatusCode != http.StatusOK || foreign(there) {
		there.Body.Close()
		return
	}
	resp.Body.Close()
	*resp = *there
}

func redirects(status int) bool {
	return status == http.StatusMovedPermanently || status == http.StatusFound || status == http.StatusSeeOther ||
		status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect
}

func (x *exchange) reading() bool {
	return x.r.Method == http.MethodGet || x.r.Method == http.MethodHead
}

// keepManifest keeps a manifest that passes by. The error is for one that
// isn't what was asked for, or what the upstream says that it is.
func (x *exchange) keepManifest(resp *http.Response) error {
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
	d := x.target.digest
	if d == "" {
		if d, err = digest.Parse(resp.Header.Get("Docker-Content-Digest")); err != nil {
			d = digest.FromBytes(body)
		}
	}
	if strings.HasPrefix(resp.Header.Get("Content-Type"), signedSchema1) {
		return nil
	}
	if d.Algorithm().FromBytes(body) != d {
		return fmt.Errorf("%s sent a manifest that is not %s", x.up.Host, d)
	}
	if err := x.h.store.Put(d, body, x.origin()); err != nil {
		x.h.log.Info("a manifest is not kept", "registry", x.up.ID(), "repository", x.target.repo, "digest", d, "err", err)
	}
	x.prove(x.provenBy(resp), d)
	if mediaTypeOf(body) == "" {
		return nil
	}
	x.grant()
	if x.target.tag != "" {
		x.setTag(d)
	}
	return nil
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

type readCloser struct {
	io.Reader
	io.Closer
}

// base answers GET and HEAD of /v2/. Clients ask there whether they must log in,
// and give up when nobody answers; what everybody was given can then still be
// had without. That isn't said before the whole of patience is over: a client
// that believes it has no way to what is only its own, were the upstream just
// slow. (dockerd waits 15 s for this answer.)
func (x *exchange) base() {
	if !x.h.HasStale(x.up) {
		x.forward()
		return
	}
	client := excused{x.up.ID(), x.up.Client}
	resp, err := x.ask(question{method: x.r.Method, patience: x.h.outages.whole, instead: func() bool { return true }})
	if !x.failed(resp, err) {
		x.h.outages.excused.Remove(client)
		x.relay(resp)
		return
	}
	if err == nil {
		resp.Body.Close()
	}
	x.h.log.Warn("the upstream gives no answer; clients get what everybody was given before", "registry", x.up.ID(), "err", because(resp, err))
	x.stats.stale.Add(1)
	x.h.outages.excused.Add(client, time.Now())
	h := x.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", "2")
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	h.Set("Cache-Status", "weir; hit; detail=stale-if-error")
	_, _ = io.WriteString(x.w, "{}")
}

// unreachable answers for an upstream that gave no answer, in the form of the
// distribution specification's errors.
func (x *exchange) unreachable(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has gone
	}
	err = scrub(err)
	x.stats.errors.Add(1)
	x.h.log.Warn("no answer from the upstream", "registry", x.up.ID(), "method", r.Method, "path", r.URL.Path, "err", err)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		// The client sees the same, and tries again; a 502 it would take for the
		// answer (containerd).
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadGateway)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{
		"code": "UNAVAILABLE", "message": "no answer from " + x.up.Host + ": " + err.Error(),
	}}})
}

func copyHeader(dst, src http.Header) {
	for k, v := range src {
		dst[k] = v
	}
	for _, h := range []string{"Connection", "Keep-Alive", "Content-Length", "Trailer", "Transfer-Encoding", "Upgrade"} {
		dst.Del(h)
	}
}

// rangeStart is where a Range header's only range begins.
func rangeStart(header string) (int64, bool) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	if !ok {
		return 0, header != ""
	}
	from, _, ok := strings.Cut(spec, "-")
	n, err := strconv.ParseInt(from, 10, 64)
	if !ok || err != nil || n < 0 {
		return 1 << 62, true // a suffix, or something else that needs the whole
	}
	return n, true
}

func stripPort(host string) string {
	if i := strings.LastIndexByte(host, ':'); i > 0 && !strings.HasSuffix(host, "]") {
		return host[:i]
	}
	return host
}

// bufferPool lends the buffers for forwarding. One is held while a body is waited
// for; a TLS record has no more than that.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get() []byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, 16<<10)
}

func (p *bufferPool) Put(b []byte) { p.pool.Put(&b) }
