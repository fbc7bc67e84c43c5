// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"net/http"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/golang-lru/v2/expirable"
	"github.com/opencontainers/go-digest"
)

// rights remembers what an upstream has granted. Nothing that is kept is
// served without two of its answers: that these credentials may read the
// repository (a right), and that the digest is in the repository (a member).
//
// A member is never learned from a manifest that names it: anybody may push a
// manifest naming a digest that is somebody else's secret, and registries
// don't all check.
type rights struct {
	key     [32]byte // of the credentials' hash, so that it is of no use elsewhere
	granted *expirable.LRU[grant, struct{}]
	members *expirable.LRU[member, struct{}]
	tags    *lru.Cache[tag, digest.Digest] // what a tag was; only a hint
}

type credentials [32]byte // a keyed hash

type grant struct {
	registry, repo string
	who            credentials
}

type member struct {
	registry, repo string
	digest         digest.Digest
}

// tag also has what the client accepts: a tag has several answers.
type tag struct {
	registry, repo, tag, accept string
}

// memberTTL bounds how long a digest is taken to be in a repository after the
// upstream said so.
const memberTTL = time.Hour

func newRights(ttl time.Duration) *rights {
	r := &rights{
		granted: expirable.NewLRU[grant, struct{}](1<<15, nil, ttl),
		members: expirable.NewLRU[member, struct{}](1<<17, nil, memberTTL),
	}
	r.tags, _ = lru.New[tag, digest.Digest](1 << 14)
	_, _ = rand.Read(r.key[:])
	return r
}

// credentialsOf hashes what a request authenticates itself with.
func (r *rights) credentialsOf(req *http.Request) credentials {
	mac := hmac.New(sha256.New, r.key[:])
	for _, header := range []string{"Authorization", "Cookie"} {
		for _, v := range req.Header.Values(header) {
			mac.Write([]byte(v))
			mac.Write([]byte{0})
		}
		mac.Write([]byte{1})
	}
	return credentials(mac.Sum(nil))
}

// allows says whether a digest may be given to the asker without asking the
// upstream again.
func (r *rights) allows(a asker, d digest.Digest) bool {
	_, granted := r.granted.Get(grant(a))
	_, is := r.members.Get(member{a.registry, a.repo, d})
	return granted && is
}

// learn takes in an upstream's answer to a request about a target.
func (r *rights) learn(a asker, t target, resp *http.Response) {
	switch code := resp.StatusCode; {
	case code >= 200 && code < 300 || t.kind == blob && redirects(code):
		r.granted.Add(grant(a), struct{}{})
		d := t.digest
		if d == "" {
			var err error
			if d, err = digest.Parse(resp.Header.Get("Docker-Content-Digest")); err != nil {
				return
			}
		}
		r.members.Add(member{a.registry, a.repo, d}, struct{}{})
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		r.granted.Remove(grant(a))
	case code == http.StatusNotFound && t.digest != "":
		r.members.Remove(member{a.registry, a.repo, t.digest})
	}
}

func (r *rights) forget(a asker, d digest.Digest) {
	r.members.Remove(member{a.registry, a.repo, d})
}

// asker is who asks, and where.
type asker struct {
	registry, repo string
	who            credentials
}

func redirects(code int) bool {
	return code == http.StatusMovedPermanently || code == http.StatusFound || code == http.StatusSeeOther ||
		code == http.StatusTemporaryRedirect || code == http.StatusPermanentRedirect
}
