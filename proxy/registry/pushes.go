// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/rights"
	"weir/proxy/store"
)

// What is pushed passes through, and a copy of it goes to the store: what was
// built here is most likely to be wanted here. The upstream alone decides what
// a push comes to, so that nothing is kept before it has accepted it.

// session is the push of a blob: OCI distribution specification, "Pushing
// blobs". Its requests come one after the other.
type session struct {
	repo  string
	owner string
	timer *time.Timer // gives it up

	mu     sync.Mutex
	upload *store.Upload // nil when there is no copy, or none worth having
}

func (s *session) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.upload != nil {
		s.upload.Close()
		s.upload = nil
	}
}

// sessions are the pushes under way, by registry and the path of their
// location.
type sessions struct {
	mu    sync.Mutex
	all   map[string]*session
	quota *quota
}

const (
	maxSessions   = 256
	ownerSessions = 32
	// sessionTTL is how long a push may rest between two requests.
	sessionTTL = 30 * time.Minute
	// maxLocation bounds the path of a push's next request, which is held as long.
	maxLocation = 4 << 10
)

func newSessions() *sessions {
	return &sessions{all: make(map[string]*session), quota: newQuota(maxSessions, ownerSessions)}
}

// take takes the session out: it is expected at another place next, or over.
func (ss *sessions) take(key string) *session {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	s := ss.all[key]
	if s != nil {
		s.timer.Stop()
		ss.remove(key, s)
	}
	return s
}

// remove takes a session out of the table. The caller holds ss.mu.
func (ss *sessions) remove(key string, s *session) {
	delete(ss.all, key)
	ss.quota.give(s.owner, 1)
}

// expect waits for the session's next request, or gives it up when there are
// too many already.
func (ss *sessions) expect(key string, s *session) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.all[key] != nil || !ss.quota.take(s.owner, 1) {
		s.drop()
		return
	}
	ss.all[key] = s
	s.timer = time.AfterFunc(sessionTTL, func() {
		ss.mu.Lock()
		if ss.all[key] == s {
			ss.remove(key, s)
		}
		ss.mu.Unlock()
		s.drop()
	})
}

// close gives all of them up.
func (ss *sessions) close() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for key, s := range ss.all {
		s.timer.Stop()
		s.drop()
		ss.remove(key, s)
	}
}

// push is what a request's body is part of.
type push struct {
	session  *session
	goesOn   bool          // the session is expected to have another request
	digest   digest.Digest // of the blob, when the request ends it
	manifest *buffer
}

// write answers requests that aren't for reading.
func (x *exchange) write() {
	q := x.r.URL.Query()
	var p push
	r := x.r
	switch {
	case x.target.kind == manifest && r.Method == http.MethodPut:
		p.manifest = x.buffer()
		defer p.manifest.release()
		r = withBody(r, readCloser{io.TeeReader(r.Body, p.manifest), r.Body})
	case x.target.kind == uploads && r.Method == http.MethodPost:
		p.session = &session{repo: x.target.repo, owner: x.up.owner()}
		if d, err := digest.Parse(q.Get("digest")); err == nil { // all in one request
			p.digest = d
			r = x.tee(p.session)
		}
	default:
		p.session = x.h.sessions.take(x.up.ID() + " " + r.URL.EscapedPath())
		if p.session != nil && (r.Method == http.MethodPut || r.Method == http.MethodPatch) {
			if d, err := digest.Parse(q.Get("digest")); err == nil && r.Method == http.MethodPut {
				p.digest = d
			}
			r = x.tee(p.session)
		}
	}
	defer func() { // it panics to break off
		if p.session != nil && !p.goesOn {
			p.session.drop() // whatever it came to, it is over
		}
	}()
	x.pass(r, func(resp *reply) error {
		switch {
		case p.manifest != nil || p.session != nil:
			p.answered(x, resp)
		case r.Method == http.MethodDelete && (resp.StatusCode/100 == 2 || redirects(resp.StatusCode)) && x.target.repo != "":
			// Where it is redirected to, it is not seen what it comes to.
			if x.target.digest != "" {
				x.h.rights.Remove(x.who.Repository, x.target.digest)
			}
			x.h.rights.ForgetTag(x.who.Repository, cmp.Or(x.target.tag, x.target.digest.String()))
		}
		return nil
	})
}

func withBody(r *http.Request, body io.ReadCloser) *http.Request {
	r = r.WithContext(r.Context()) // a copy
	r.Body = body
	return r
}

// tee is the request, whose body is copied to the session's upload as it is sent on.
func (x *exchange) tee(s *session) *http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x.r.Body == nil || x.r.Body == http.NoBody {
		return x.r
	}
	if s.upload == nil {
		s.upload = x.h.store.NewUpload(x.origin())
	}
	return withBody(x.r, &teeBody{x.r.Body, s})
}

type teeBody struct {
	io.ReadCloser
	s *session
}

func (b *teeBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.s.mu.Lock()
		if b.s.upload != nil {
			_, _ = b.s.upload.Write(p[:n])
		}
		b.s.mu.Unlock()
	}
	return n, err
}

// answered records what the upstream says to a part of a push.
func (p *push) answered(x *exchange, resp *reply) {
	switch code := resp.StatusCode; {
	case p.manifest != nil:
		if body, whole := p.manifest.whole(); code == http.StatusCreated && whole {
			x.pushedManifest(body, resp)
		}
	case code == http.StatusCreated && p.digest != "":
		p.pushedBlob(x, resp)
	case code == http.StatusAccepted && x.r.Method != http.MethodDelete:
		if p.digest != "" { // it didn't take it all in one request
			p.session.drop()
		}
		p.next(x, resp)
	}
}

// next expects the next request where the upstream says.
func (p *push) next(x *exchange, resp *reply) {
	here, err := x.up.base().Parse(x.r.URL.EscapedPath())
	if err != nil {
		return
	}
	location, err := here.Parse(resp.Header.Get("Location"))
	if err != nil || !sameHost(location, x.up) || len(location.EscapedPath()) > maxLocation {
		return
	}
	p.goesOn = true
	x.h.sessions.expect(x.up.ID()+" "+location.EscapedPath(), p.session)
}

func sameHost(u *url.URL, up Upstream) bool {
	return strings.EqualFold(u.Host, up.base().Host) || Canonical(u.Host) == up.Host
}

// pushedBlob keeps a blob that the upstream has accepted.
func (p *push) pushedBlob(x *exchange, resp *reply) {
	repo := x.up.repository(p.session.repo)
	p.session.mu.Lock()
	defer p.session.mu.Unlock()
	if p.session.upload == nil {
		return
	}
	err := p.session.upload.Commit(p.digest)
	p.session.upload = nil
	if err != nil {
		x.h.log.Info("a pushed blob is not kept", "registry", x.up.ID(), "repository", repo.Name, "digest", p.digest, "err", err)
		return
	}
	x.stats.pushed.Add(1)
	x.prove(rights.Vantage{Repository: repo}, p.digest, resp.at)
}

// pushedManifest keeps a manifest that the upstream has accepted.
func (x *exchange) pushedManifest(body []byte, resp *reply) {
	d, repo := x.digestOf(resp, body), x.who.Repository
	if x.target.tag != "" {
		x.h.rights.ForgetTag(repo, x.target.tag)
	}
	if err := x.h.store.Put(d, body, x.origin()); err != nil {
		x.h.log.Info("a pushed manifest is not kept", "registry", x.up.ID(), "repository", repo.Name, "digest", d, "err", err)
		return
	}
	x.stats.pushed.Add(1)
	x.prove(rights.Vantage{Repository: repo}, d, resp.at)
	if x.target.tag != "" && mediaTypeOf(body) != "" {
		x.setTag(rights.Tagged{Digest: d, Read: true})
	}
}
