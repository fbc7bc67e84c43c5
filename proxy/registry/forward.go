// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"weir/proxy/upstream"
)

// forward sends the client's request to the upstream and its answer back,
// unchanged, and learns from it.
func (x *exchange) forward() { x.pass(x.r, x.passed) }

// pass sends a request of the client's to the upstream and its answer back. learn
// sees the answer before; its error is answered instead.
func (x *exchange) pass(r *http.Request, learn func(*reply) error) {
	start := time.Now()
	p := httputil.ReverseProxy{
		Transport:     x.up.Transport,
		FlushInterval: -1,
		BufferPool:    &x.h.bufs,
		Rewrite: func(pr *httputil.ProxyRequest) {
			base := x.up.base()
			pr.Out.URL.Scheme, pr.Out.URL.Host, pr.Out.Host = base.Scheme, base.Host, pr.In.Host
			pr.Out.URL.RawQuery = pr.In.URL.RawQuery // ReverseProxy drops what it can't parse
			pr.Out.Trailer = pr.In.Trailer           // its values come with the body's end, and ReverseProxy has a copy
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
		ModifyResponse: func(resp *http.Response) error {
			if r.ContentLength == 0 { // how long a body takes says nothing
				x.h.outages.Answered(x.up.way(), time.Since(start))
			}
			if resp.StatusCode == http.StatusSwitchingProtocols {
				if x.r.Header.Get("Upgrade") == "" {
					return errUpgrade
				}
				return nil // its body is the connection
			}
			a := &reply{Response: resp, at: x.h.rights.Now()}
			if err := learn(a); err != nil {
				return err
			}
			if a.Response != resp {
				*resp = *a.Response
			}
			if _, ok := resp.Header["Content-Type"]; !ok {
				x.w.Header()["Content-Type"] = nil // or net/http would guess one
			}
			resp.Body = x.counted(resp.Body)
			return nil
		},
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) { x.unreachable(err) },
		ErrorLog:     slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	p.ServeHTTP(x.w, r)
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

// passed sees the answer to a request to read that passes through.
func (x *exchange) passed(resp *reply) error {
	switch x.target.kind {
	case blob:
		x.learn(resp)
	case manifest:
		x.followRedirect(resp)
		x.learn(resp)
		x.checkPublic(resp)
		switch {
		case x.r.Method == http.MethodGet && resp.StatusCode == http.StatusOK:
			return x.keepManifest(resp)
		case x.r.Method == http.MethodHead && x.target.tag != "":
			x.learnTag(resp)
		}
	}
	return nil
}

// followRedirect makes an answer that redirects to a manifest what is there, if that
// can be had: what a registry that redirects its manifests (registry.k8s.io) has, and
// what its tags are, would never be known otherwise. Where it can't, the client is
// left to find out why.
func (x *exchange) followRedirect(resp *reply) {
	location, err := resp.Location()
	if err != nil || !redirects(resp.StatusCode) || !x.up.authenticated() || location.Scheme != "https" {
		return
	}
	req := x.outgoing(x.r.Context(), x.r.Method, nil)
	if req.URL.Host != location.Host {
		dropCredentials(req)
	}
	if ranges := x.r.Header["Range"]; ranges != nil {
		req.Header["Range"] = ranges
	}
	req.URL, req.Host = location, ""
	there, err := x.send(x.up.Transport, req, true)
	if err != nil {
		return
	}
	if there.StatusCode != http.StatusOK || foreign(there.Response) {
		there.Body.Close()
		return
	}
	resp.Body.Close()
	resp.Response = there.Response
}

func redirects(status int) bool {
	return status == http.StatusMovedPermanently || status == http.StatusFound || status == http.StatusSeeOther ||
		status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect
}

type readCloser struct {
	io.Reader
	io.Closer
}

// unreachable answers for an upstream that gave no answer.
func (x *exchange) unreachable(err error) {
	if x.r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has gone
	}
	if no, ok := errors.AsType[*noToken](err); ok && failedTokens(no.status) { // as it said it
		x.w.Header().Set("Content-Type", "application/json")
		x.w.WriteHeader(no.status)
		_, _ = x.w.Write(no.body)
		return
	}
	err = scrub(err)
	x.stats.errors.Add(1)
	x.h.log.Warn("no answer from the upstream", "registry", x.up.ID(), "method", x.r.Method, "path", x.r.URL.Path, "err", err)
	if errors.Is(err, upstream.ErrTunnel) || // the proxy tells it why
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		// The client sees the same, and tries again; a 502 it would take for the
		// answer (containerd).
		panic(http.ErrAbortHandler)
	}
	x.fail(http.StatusBadGateway, "UNAVAILABLE", "no answer from "+x.up.Host+": "+err.Error())
}

// fail answers with an error of weir's own (distribution specification, "Error Codes").
func (x *exchange) fail(status int, code, message string) {
	x.w.Header().Set("Content-Type", "application/json")
	x.w.WriteHeader(status)
	_ = json.NewEncoder(x.w).Encode(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
}

func copyHeader(dst, src http.Header) {
	maps.Copy(dst, src)
	for _, h := range []string{"Connection", "Keep-Alive", "Content-Length", "Trailer", "Transfer-Encoding", "Upgrade"} {
		dst.Del(h)
	}
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
