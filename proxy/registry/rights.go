// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"net/http"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
)

// rights remembers what an upstream has granted. Nothing that is kept is
// served without two of its answers: that these credentials
// may read the repository, which is a right, and that the digest is in the
// repository, which is a member.
//
// A member is never learned from a manifest that names it: anybody may push a
// manifest naming a digest that is somebody else's secret, and registries
// don't all check.
type rights struct {
	key   [32]byte // of the credentials' hash, so that it is of no use elsewhere
	ttl   time.Duration
	stale time.Duration
	now   func() time.Time

	granted *lru.Cache[asker, time.Time]
	// refused are those whom the upstream has just refused: clients begin
	// without a token, and to ask for them once more is for nothing.
	refused *lru.Cache[asker, time.Time]
	// public are repositories that the upstream gives to everybody, to those
	// without a name too. The time is when it last said so, or, with isn't,
	// when it last said the opposite.
	public  *lru.Cache[repository, publicity]
	members *lru.Cache[member, time.Time]
	// told are members by the word of peers. It counts while the upstream gives
	// no answer, and not a moment longer.
	told *lru.Cache[member, time.Time]
}

type credentials [32]byte // a keyed hash

// asker is who asks, and where.
type asker struct {
	repository
	who credentials
}

// repository is a repository of a registry, by the registry's identity.
type repository struct{ registry, name string }

type member struct {
	repository
	digest digest.Digest
}

type publicity struct {
	is   bool
	when time.Time
}

const (
	// memberTTL bounds how long a digest is taken to be in a repository after
	// the upstream said so. Content doesn't change its place; who may read
	// the place does, and has a bound of its own.
	memberTTL = 24 * time.Hour
	// refusedTTL is for how long it isn't worth while to ask again for whom the
	// upstream has refused: the time of one pull.
	refusedTTL = 10 * time.Second
	// publicTTL is how long it is taken for granted that a repository is, or
	// isn't, public, before the upstream is asked again.
	publicTTL = time.Hour
)

func newRights(ttl, stale time.Duration) *rights {
	r := &rights{ttl: ttl, stale: stale, now: time.Now}
	r.granted, _ = lru.New[asker, time.Time](1 << 15)
	r.refused, _ = lru.New[asker, time.Time](1 << 13)
	r.public, _ = lru.New[repository, publicity](1 << 13)
	r.members, _ = lru.New[member, time.Time](1 << 15)
	r.told, _ = lru.New[member, time.Time](1 << 15)
	_, _ = rand.Read(r.key[:])
	return r
}

// credentialsOf hashes what a client authenticates itself with.
func (r *rights) credentialsOf(req *http.Request, as string) credentials {
	mac := hmac.New(sha256.New, r.key[:])
	mac.Write([]byte(as))
	mac.Write([]byte{0})
	for _, header := range []string{"Authorization", "Cookie"} {
		for _, v := range req.Header.Values(header) {
			mac.Write([]byte(v))
			mac.Write([]byte{0})
		}
		mac.Write([]byte{1})
	}
	return credentials(mac.Sum(nil))
}

// within says whether something that the upstream said is younger than age.
func (r *rights) within(when time.Time, age time.Duration) bool {
	d := r.now().Sub(when)
	return d > -time.Minute && d < age // a clock that was set far back proves nothing
}

// allows says whether a digest may be given to the asker without asking the
// upstream again.
func (r *rights) allows(a asker, d digest.Digest) bool {
	return r.isMember(a.repository, d, memberTTL) && r.isGranted(a)
}

// isRefused says whether the upstream would hardly allow the asker anything. Its
// own answer to him is then the only one to give.
func (r *rights) isRefused(a asker) bool {
	when, ok := r.refused.Get(a)
	return ok && r.within(when, refusedTTL)
}

// allowsStale says the same for when the upstream gives no answer: what it has
// given to everybody may then be given for longer.
func (r *rights) allowsStale(a asker, d digest.Digest) bool {
	return (r.isMember(a.repository, d, max(memberTTL, r.stale)) || r.isTold(a.repository, d)) && (r.isPublic(a.repository) || r.isGranted(a))
}

func (r *rights) isPublic(repo repository) bool {
	p, ok := r.public.Get(repo)
	return ok && p.is && r.within(p.when, r.stale)
}

func (r *rights) isGranted(a asker) bool {
	when, ok := r.granted.Get(a)
	return ok && r.within(when, r.ttl)
}

func (r *rights) isMember(repo repository, d digest.Digest, age time.Duration) bool {
	when, ok := r.members.Get(member{repo, d})
	return ok && r.within(when, age)
}

func (r *rights) isTold(repo repository, d digest.Digest) bool {
	when, ok := r.told.Get(member{repo, d})
	return ok && r.within(when, max(memberTTL, r.stale))
}

// publicityUnknown says whether it is time to ask whether a repository is
// public.
func (r *rights) publicityUnknown(repo repository) bool {
	p, ok := r.public.Peek(repo)
	return !ok || !r.within(p.when, publicTTL)
}

func (r *rights) setPublic(repo repository, is bool) {
	r.public.Add(repo, publicity{is, r.now()})
}

// contains takes in that a digest is in a repository.
func (r *rights) contains(repo repository, d digest.Digest) {
	r.members.Add(member{repo, d}, r.now())
}

// add takes in what has just been said of somebody, in a table of what counts
// for ttl. Those of whom it has been longest lose their place when that is over:
// each pull comes with a new token, and would take one for good.
func (r *rights) add(table *lru.Cache[asker, time.Time], a asker, ttl time.Duration) {
	table.Add(a, r.now())
	for {
		oldest, when, ok := table.GetOldest()
		if !ok || r.within(when, ttl) {
			return
		}
		table.Remove(oldest)
	}
}

// learn takes in an upstream's answer to a request to read a target. byWord is
// whether the upstream's word is enough that it has a digest.
func (r *rights) learn(a asker, t target, resp *http.Response, byWord bool) {
	switch code := resp.StatusCode; {
	case code >= 200 && code < 300 || t.kind == blob && redirects(code):
		r.add(r.granted, a, r.ttl)
		r.refused.Remove(a)
		d := t.digest
		if d == "" {
			var err error
			if d, err = digest.Parse(resp.Header.Get("Docker-Content-Digest")); err != nil {
				return
			}
		}
		if byWord {
			r.contains(a.repository, d)
		}
	case code == http.StatusUnauthorized, code == http.StatusForbidden, code == http.StatusNotFound:
		r.granted.Remove(a)
		if code != http.StatusNotFound {
			r.add(r.refused, a, refusedTTL)
		}
		if code != http.StatusNotFound && resp.Request != nil && resp.Request.Header.Get("Authorization") != "" {
			// What somebody with a name may not read is hardly everybody's.
			r.public.Remove(a.repository)
		}
		if code == http.StatusNotFound && t.digest != "" {
			r.members.Remove(member{a.repository, t.digest})
			r.told.Remove(member{a.repository, t.digest})
		}
	}
}

// forget takes in that something was deleted from a repository.
func (r *rights) forget(a asker, d digest.Digest) {
	r.granted.Remove(a)
	r.public.Remove(a.repository)
	if d != "" {
		r.members.Remove(member{a.repository, d})
		r.told.Remove(member{a.repository, d})
	}
}

func redirects(code int) bool {
	return code == http.StatusMovedPermanently || code == http.StatusFound || code == http.StatusSeeOther ||
		code == http.StatusTemporaryRedirect || code == http.StatusPermanentRedirect
}
