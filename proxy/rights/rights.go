// SPDX-License-Identifier: Apache-2.0

// Package rights remembers what registries have answered, and decides by it
// what may be served of the content that this node keeps. Two questions have to
// be answered, each by the registry itself:
//
//   - May this client read this repository? The answer is a grant: the registry
//     answered this client's own request with content (200 or 206), itself or
//     where it redirected to. A redirect alone is no grant: a registry may
//     redirect every path without a look, and a login page is a redirect too.
//   - Is this content in this repository? Content is in a repository when this
//     registry has sent its bytes there, verified by their digest, has accepted
//     them there in a push, or has sent the right bytes of a small range at an
//     offset that it could not foresee. What a registry merely claims counts for
//     nothing: whoever runs one, or a repository that proxies another, can claim
//     any digest (by HEAD, by a manifest that lists it, by a redirect), and would
//     be given another's private layer. What came through a redirect counts for the
//     network that it was asked from: the host that sent it may have authorized
//     the client by its address, which proves nothing for others.
//
// A client is everything in its request that a registry could take for a
// credential: all header fields but those that are known not to be, what it
// shows beside the request (a TLS certificate), and the network that it is in,
// where the registry may authorize by that. What is not understood makes
// another client, never an anonymous one.
//
// While a registry gives no answer, content may also be served to the clients
// of a public repository: one of which weir's own request, with nothing of any
// client in it but the network that it was made from, was answered with
// content. What one client was refused changes only that client's grant;
// whether a repository is still public, weir asks by itself.
//
// All tables are bounded. The registries whose answers can be authenticated
// each have their share of a table; those whose can't (plain HTTP, or a CA that
// only a runtime trusts) share one for each network. The largest share makes
// room, so that no registry and no network can wash out what is known of others.
package rights

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"net/http"
	"net/textproto"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// Repository is a repository of a registry.
type Repository struct {
	// Registry is the registry's identity.
	Registry string
	Name     string
	// Network is empty for a registry whose answers are authenticated. Of any
	// other it names the network from which it is reached, with a prefix, so
	// that it is never empty.
	Network string
}

// share is what a repository's entries are bounded with.
func (r Repository) share() string {
	if r.Network != "" {
		return r.Network
	}
	return r.Registry
}

// Client is a keyed hash of what a client could be authorized by.
type Client [32]byte

// Principal is a client of a repository.
type Principal struct {
	Repository
	Client Client
}

// Vantage is a network from which a repository was asked for. From is empty where
// the network doesn't count, and for the node's: whose registry a node pulls from
// has the content in an image of its own, and gains nothing by proving it.
type Vantage struct {
	Repository
	From string
}

// Tagged is what a tag was, and when the registry said so.
type Tagged struct {
	Digest digest.Digest
	When   time.Time
	// Read says that GET of the tag was answered with it. Otherwise only HEAD was,
	// whose answer may be another.
	Read bool `json:",omitempty"`
	// Differs says that HEAD was answered with another one at the time.
	Differs bool `json:",omitempty"`
	// Without is which media types the client didn't accept, as bits: to others, the
	// tag may be another digest.
	Without uint8 `json:",omitempty"`
}

// ContentTTL is how long content is taken to be in a repository after that was
// proven. Content doesn't move between repositories; who may read one changes,
// and has a bound of its own.
const ContentTTL = 24 * time.Hour

const (
	// publicTTL is how long a repository is taken to be public, or not, before
	// the registry is asked again.
	publicTTL = time.Hour
	// recheckTTL is the same when a client was just refused there.
	recheckTTL = time.Minute
	// maxTagged is how many digests of a tag are remembered: it may be another
	// one for clients that accept other media types.
	maxTagged = 4
	// differTime is how long before GET HEAD was answered for a difference to be one
	// between the two, and not of a tag that has moved.
	differTime = 10 * time.Second
)

// Bounds of the tables, in entries.
const (
	maxGrants  = 1 << 15
	maxContent = 1 << 16
	maxPublic  = 1 << 13
	maxTags    = 1 << 14
)

// Options of the memory of rights.
type Options struct {
	// GrantTTL is how long a grant is remembered.
	GrantTTL time.Duration
	// StaleIfError is for how long the last answer of a registry that gives no
	// other is good. Zero means never.
	StaleIfError time.Duration
	// Now is the clock. Nil means time.Now.
	Now func() time.Time
}

// Rights is what registries have answered. Its methods may be called
// concurrently.
type Rights struct {
	opts Options
	key  [32]byte // of clients' hashes, so that they are of no use elsewhere

	grants  *shares[Principal, time.Time]
	denials *shares[denial, time.Time]
	content *shares[located, time.Time]
	// claimed is content that peers say is there. It counts while the registry gives
	// no answer.
	claimed *shares[located, time.Time]
	public  *shares[Vantage, publicity]

	tagMu sync.Mutex
	tags  *shares[tag, []Tagged] // most recently said first
	// tagged is when a tag of a registry was last said; its repositories have no name.
	tagged  *shares[Repository, time.Time]
	changed atomic.Bool // since it was last saved
}

type located struct {
	Vantage
	digest digest.Digest
}

// denial is of content of which the registry has told a client that it isn't there.
type denial struct {
	Principal
	digest digest.Digest
}

type tag struct {
	Repository
	tag string
}

type publicity struct {
	is    bool
	when  time.Time // when weir's own request was answered
	asked time.Time // when it was last made
	// reference is the tag or digest that was answered with content.
	reference string
	token     bool // the registry wanted one for that
}

// New returns an empty memory.
func New(o Options) *Rights {
	if o.Now == nil {
		o.Now = time.Now
	}
	r := &Rights{
		opts:    o,
		grants:  newShares[Principal, time.Time](maxGrants),
		denials: newShares[denial, time.Time](maxGrants),
		content: newShares[located, time.Time](maxContent),
		claimed: newShares[located, time.Time](maxContent),
		public:  newShares[Vantage, publicity](maxPublic),
		tags:    newShares[tag, []Tagged](maxTags),
		tagged:  newShares[Repository, time.Time](maxTags),
	}
	_, _ = rand.Read(r.key[:])
	return r
}

// noCredential are the header fields that can't be credentials: what they mean
// is defined (RFC 9110, RFC 9112, W3C Trace Context and Baggage, which dockerd 29
// sends, and the version of the distribution API, which podman and skopeo send) and
// says nothing of who sends them. They differ between the requests of one client.
var noCredential = func() map[string]bool {
	m := make(map[string]bool)
	for _, name := range []string{
		"Accept", "Accept-Encoding", "Baggage", "Cache-Control", "Connection", "Content-Length", "Content-Type", "Docker-Distribution-Api-Version", "Expect",
		"If-Match", "If-Modified-Since", "If-None-Match", "If-Range", "If-Unmodified-Since", "Keep-Alive", "Pragma",
		"Range", "Te", "Traceparent", "Tracestate", "Trailer", "Transfer-Encoding",
	} {
		m[name] = true
	}
	return m
}()

// Anonymous says whether a request has no header field that a registry could
// take for a credential. The name of the client's program doesn't count.
func Anonymous(h http.Header) bool {
	for name := range h {
		if name != "User-Agent" && !noCredential[name] {
			return false
		}
	}
	return true
}

// Strip returns the header fields of a request that can't be credentials.
func Strip(h http.Header) http.Header {
	kept := make(http.Header)
	for name, values := range h {
		if noCredential[name] {
			kept[name] = slices.Clone(values)
		}
	}
	return kept
}

// Client returns who sends a request: by its header fields, by what it shows
// beside them, and by its network, which are empty where they don't count.
func (r *Rights) Client(h http.Header, identity, network string) Client {
	mac := hmac.New(sha256.New, r.key[:])
	var length [8]byte
	add := func(s string) { // no two lists of texts are the same bytes
		for i := range length {
			length[i] = byte(len(s) >> (8 * i))
		}
		mac.Write(length[:])
		mac.Write([]byte(s))
	}
	add(identity)
	add(network)
	names := make([]string, 0, len(h))
	for name := range h {
		if !noCredential[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		add(textproto.CanonicalMIMEHeaderKey(name))
		for _, v := range h[name] {
			add("=" + v)
		}
	}
	return Client(mac.Sum(nil))
}

// Within says whether something that a registry said then is younger than age. A
// clock that was set far back proves nothing.
func (r *Rights) Within(then time.Time, age time.Duration) bool {
	d := r.opts.Now().Sub(then)
	return d > -time.Minute && d < age
}

// Fresh says whether something that a registry said then is good while it gives
// no answer.
func (r *Rights) Fresh(then time.Time) bool { return r.Within(then, r.opts.StaleIfError) }

// Now is the time by the clock of the memory.
func (r *Rights) Now() time.Time { return r.opts.Now() }

// Grant records that the registry then answered a client with content of the
// repository. Grants that are over make room: each pull comes with a new token.
func (r *Rights) Grant(p Principal, when time.Time) {
	if was, ok := r.grants.get(p.share(), p); ok && was.After(when) && r.Within(was, r.opts.GrantTTL) {
		return
	}
	r.grants.put(p.share(), p, when)
	r.grants.expire(p.share(), func(when time.Time) bool { return !r.Within(when, r.opts.GrantTTL) })
}

// Refuse records that the registry has refused a client.
func (r *Rights) Refuse(p Principal) { r.grants.remove(p.share(), p) }

// Deny records that the registry then told a client that content isn't there, which was
// proven to be before: it isn't given to that client any more, until that is proven again.
func (r *Rights) Deny(p Principal, from string, d digest.Digest, when time.Time) {
	if r.Contains(Vantage{p.Repository, from}, d) {
		r.denials.put(p.share(), denial{p, d}, when)
	}
}

// denied says whether a client was told that content isn't there since that was proven.
func (r *Rights) denied(p Principal, d digest.Digest, proven time.Time) bool {
	when, ok := r.denials.get(p.share(), denial{p, d})
	return ok && !when.Before(proven)
}

// Granted says whether a grant is remembered.
func (r *Rights) Granted(p Principal) bool {
	when, ok := r.grants.get(p.share(), p)
	return ok && r.Within(when, r.opts.GrantTTL)
}

// Prove records that content was proven to be in a repository by what the registry
// then answered, for the network of the vantage, or for all if it names none.
func (r *Rights) Prove(v Vantage, d digest.Digest, when time.Time) {
	r.content.put(v.share(), located{v, d}, when)
	r.changed.Store(true)
}

// Remove records that content was deleted from a repository.
func (r *Rights) Remove(repo Repository, d digest.Digest) {
	for k := range r.content.all(repo.share()) {
		if k.Repository == repo && k.digest == d {
			r.content.remove(repo.share(), k)
		}
	}
	r.claimed.remove(repo.share(), located{Vantage{Repository: repo}, d})
	r.changed.Store(true)
}

// Contains says whether content was proven to be in a repository, for the network
// of the vantage.
func (r *Rights) Contains(v Vantage, d digest.Digest) bool {
	_, ok := r.contains(r.content, v, d, ContentTTL)
	return ok
}

// contains says whether a table has content of a repository, and when it was last recorded.
func (r *Rights) contains(table *shares[located, time.Time], v Vantage, d digest.Digest, age time.Duration) (last time.Time, ok bool) {
	for _, v := range []Vantage{{Repository: v.Repository}, v} {
		if when, there := table.get(v.share(), located{v, d}); there && r.Within(when, age) && (!ok || when.After(last)) {
			last, ok = when, true
		}
	}
	return last, ok
}

// Allows says whether content may be served to a client, which asks from a network,
// without a question to the registry.
func (r *Rights) Allows(p Principal, from string, d digest.Digest) bool {
	proven, ok := r.contains(r.content, Vantage{p.Repository, from}, d, ContentTTL)
	return ok && r.Granted(p) && !r.denied(p, d, proven)
}

// AllowsStale says whether content may be served to a client, which asks from a
// network, while the registry gives no answer.
func (r *Rights) AllowsStale(p Principal, from string, d digest.Digest) bool {
	age, v := max(ContentTTL, r.opts.StaleIfError), Vantage{p.Repository, from}
	proven, ok := r.contains(r.content, v, d, age)
	if !ok {
		proven, ok = r.contains(r.claimed, v, d, age)
	}
	return ok && (r.Public(v) || r.Granted(p) && !r.denied(p, d, proven))
}

// Public says whether a repository was found to be public from a network.
func (r *Rights) Public(v Vantage) bool {
	p, ok := r.public.get(v.share(), v)
	return ok && p.is && r.Fresh(p.when)
}

// PublicWithToken says whether a registry wanted a token to show that a repository is
// public: one that did not has refused it when it does.
func (r *Rights) PublicWithToken(v Vantage) bool {
	p, ok := r.public.get(v.share(), v)
	return ok && p.is && p.token
}

// SetPublic records the answer to weir's own request for a reference, which had a
// token or not.
func (r *Rights) SetPublic(v Vantage, is bool, reference string, token bool) {
	now := r.opts.Now()
	r.public.put(v.share(), v, publicity{is, now, now, reference, token})
	r.changed.Store(true)
}

// Reference returns the tag or digest that weir's own request was last for.
func (r *Rights) Reference(v Vantage) string {
	p, _ := r.public.get(v.share(), v)
	return p.reference
}

// NeedsCheck says whether it is time to ask whether a repository is public from a
// network, and records that it is asked now. doubt is for a repository that was
// public, when there is a reason to think that it isn't any more.
func (r *Rights) NeedsCheck(v Vantage, doubt bool) bool {
	r.public.mu.Lock()
	defer r.public.mu.Unlock()
	p, ok := r.public.peek(v.share(), v)
	ttl := publicTTL
	if doubt {
		ttl = recheckTTL
	}
	if ok && r.Within(p.asked, ttl) || doubt && !p.is {
		return false
	}
	p.asked = r.opts.Now()
	r.public.add(v.share(), v, p)
	return true
}

// Tag returns what a tag was, what was said last first.
func (r *Rights) Tag(repo Repository, name string) []Tagged {
	all, _ := r.tags.get(repo.share(), tag{repo, name})
	return all
}

// SetTag records what a registry said that a tag is. What GET is answered with counts
// more than what HEAD was shortly before.
func (r *Rights) SetTag(repo Repository, name string, t Tagged) {
	r.tagMu.Lock()
	defer r.tagMu.Unlock()
	all := []Tagged{t}
	for _, o := range r.Tag(repo, name) {
		switch alike := o.Without == t.Without; {
		case alike && o.Digest == t.Digest:
			all[0].Read = t.Read || o.Read
			all[0].Differs = t.Read && (t.Differs || o.Differs)
			continue
		case alike && t.Read && !o.Read:
			all[0].Differs = all[0].Differs || t.When.Sub(o.When) < differTime
			continue
		}
		if len(all) < maxTagged {
			all = append(all, o)
		}
	}
	r.tags.put(repo.share(), tag{repo, name}, all)
	repo.Name = ""
	if last, _ := r.tagged.get(repo.share(), repo); t.When.After(last) || !r.Fresh(last) { // the clock may have been ahead
		r.tagged.put(repo.share(), repo, t.When)
	}
	r.changed.Store(true)
}

// ForgetTag forgets the tags of a repository that are the reference: a tag, or a
// digest.
func (r *Rights) ForgetTag(repo Repository, reference string) {
	r.tagMu.Lock()
	defer r.tagMu.Unlock()
	r.changed.Store(true)
	var last time.Time
	for k, all := range r.tags.all(repo.share()) {
		if k.Repository == repo {
			left := slices.DeleteFunc(slices.Clone(all), func(v Tagged) bool { return k.tag == reference || v.Digest.String() == reference })
			switch {
			case len(left) == 0:
				r.tags.remove(repo.share(), k)
			case len(left) < len(all):
				r.tags.put(repo.share(), k, left)
			}
			all = left
		}
		if k.Registry == repo.Registry && len(all) > 0 && all[0].When.After(last) && r.Fresh(all[0].When) {
			last = all[0].When
		}
	}
	repo.Name = ""
	r.tagged.put(repo.share(), repo, last)
}

// HasStale says whether there may be something to serve of a registry while it
// gives no answer.
func (r *Rights) HasStale(repo Repository) bool {
	repo.Name = ""
	last, ok := r.tagged.get(repo.share(), repo)
	return ok && r.Fresh(last)
}
