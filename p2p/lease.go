// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/multiformats/go-multihash"
	"github.com/opencontainers/go-digest"
)

// The lease protocol: one question and one answer a stream, each a JSON value.
const leaseProtocol protocol.ID = "/weir/lease/1"

const (
	// maxMessage bounds a question and an answer, in bytes.
	maxMessage = 64 << 10
	// secondTime is how long the other stewards may take to say that they know
	// more than the first one.
	secondTime = 200 * time.Millisecond
	// answerTime is how long a question, and its answer, may take to arrive.
	answerTime = 5 * time.Second
	// maxEntries bounds the keys that a steward remembers, maxHolders the
	// holders of each, maxSources those that an answer names, maxAvoid those
	// that a question may exclude.
	maxEntries = 1 << 14
	maxHolders = 1 << 11
	maxSources = 4
	maxAvoid   = 64
	maxAddrs   = 8
	// leaseTime is how long a node that was told to fetch is taken to do so.
	leaseTime = 15 * time.Minute
)

// question is what a steward is asked.
type question struct {
	Op  string `json:"op"`
	Key key    `json:"key,omitempty"`
	// Keys are those of opProvide.
	Keys []key `json:"keys,omitempty"`
	// Avoid are peers that the requester could not read it from.
	Avoid []peer.ID `json:"avoid,omitempty"`
	// From is the peer that the requester reads from, for opNote, or has read from, for
	// opLie.
	From peer.ID `json:"from,omitempty"`
}

// Operations.
const (
	opWant = "want" // who should I read it from? I'll be a source then
	opFind = "find" // who has it?
	opNote = "note" // I'm getting it
	opHave = "have" // I have it
	opGone = "gone" // I have it no more
	// opProvide puts provider records into the DHT: I have all these.
	opProvide = "provide"
	opNear    = "near" // who do you know that is close to it?
	// opLie tells all peers: what From gave me as this isn't it.
	opLie = "lie"
)

// answer is what the steward says to opWant, opFind and opNear.
type answer struct {
	// Fetch says that no peer has it, and that the requester is the one to fetch
	// it now.
	Fetch   bool     `json:"fetch,omitempty"`
	Sources []source `json:"sources,omitempty"` // the best first
	// Near are peers close to the key, for opNear.
	Near []source `json:"near,omitempty"`
}

// source is a peer that a blob may be read from.
type source struct {
	ID    peer.ID  `json:"id"`
	Addrs []string `json:"addrs,omitempty"` // HOST:PORT
	// Kept is that it has the whole blob, and not only a part by now.
	Kept bool `json:"kept,omitempty"`
	// Readers is how many the steward has sent there.
	Readers int `json:"readers,omitempty"`
}

// key names what is looked for, as its multihash: a blob's digest, or the hash
// of a name.
type key string

func keyOf(d digest.Digest) (key, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("%q: %w", d, err)
	}
	code, ok := map[digest.Algorithm]uint64{digest.SHA256: multihash.SHA2_256, digest.SHA512: multihash.SHA2_512}[d.Algorithm()]
	if !ok {
		return nameKey(d.String()), nil
	}
	raw, err := hex.DecodeString(d.Encoded())
	if err != nil {
		return "", err
	}
	mh, err := multihash.Encode(raw, code)
	return key(mh), err
}

// nameKey is the key of something that isn't content.
func nameKey(name string) key {
	sum := sha256.Sum256([]byte(name))
	mh, _ := multihash.Encode(sum[:], multihash.SHA2_256)
	return key(mh)
}

// MarshalText implements encoding.TextMarshaler.
func (k key) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString([]byte(k))), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *key) UnmarshalText(b []byte) error {
	raw, err := hex.DecodeString(string(b))
	if err != nil {
		return errors.New("a key is not hexadecimal")
	}
	if _, err := multihash.Decode(raw); err != nil || len(raw) > 80 {
		return errors.New("a key is not a multihash")
	}
	*k = key(raw)
	return nil
}

// parseQuestion reads a question.
func parseQuestion(b []byte) (question, error) {
	var q question
	if err := json.Unmarshal(b, &q); err != nil {
		return q, err
	}
	one := q.Key != "" && len(q.Keys) == 0 && slices.Contains([]string{opWant, opFind, opNote, opHave, opGone, opNear, opLie}, q.Op)
	many := q.Key == "" && len(q.Keys) <= maxKeys && q.Op == opProvide && !slices.Contains(q.Keys, "")
	if !one && !many || len(q.Avoid) > maxAvoid || q.Op == opLie && q.From.Validate() != nil {
		return q, errors.New("not a question of the lease protocol")
	}
	return q, nil
}

// parseAnswer reads an answer.
func parseAnswer(b []byte) (answer, error) {
	var a answer
	if err := json.Unmarshal(b, &a); err != nil {
		return a, err
	}
	if len(a.Sources) > maxSources || len(a.Near) > bucketSize {
		return a, errors.New("an answer with too many sources")
	}
	for _, s := range slices.Concat(a.Sources, a.Near) {
		if s.ID.Validate() != nil || len(s.Addrs) > maxAddrs {
			return a, errors.New("an answer with a source that can't be")
		}
		for _, addr := range s.Addrs {
			if _, _, err := net.SplitHostPort(addr); err != nil {
				return a, errors.New("an answer with an address that can't be")
			}
		}
	}
	return a, nil
}

// ledger is what a steward knows of who has, or is getting, what.
type ledger struct {
	mu  sync.Mutex
	lru *lru.Cache[key, *entry]
	seq int64
	now func() time.Time
}

type entry struct{ holders map[peer.ID]*holder }

type holder struct {
	seq  int64 // order of arrival: no holder reads from a later one
	kept bool
	from peer.ID // the holder that it reads from, while it does
	when time.Time
}

func newLedger() *ledger {
	l := &ledger{now: time.Now}
	l.lru, _ = lru.New[key, *entry](maxEntries)
	return l
}

// of returns the entry of a key. The caller holds l.mu.
func (l *ledger) of(k key) *entry {
	e, ok := l.lru.Get(k)
	if !ok {
		e = &entry{holders: make(map[peer.ID]*holder)}
		l.lru.Add(k, e)
	}
	for id, h := range e.holders {
		age := leaseTime
		if h.kept {
			age = 2 * reprovide
		}
		if l.now().Sub(h.when) > age {
			delete(e.holders, id)
		}
	}
	return e
}

func (l *ledger) holder(e *entry, who peer.ID) *holder {
	h, ok := e.holders[who]
	if !ok {
		if len(e.holders) >= maxHolders {
			return &holder{} // not remembered
		}
		l.seq++
		h = &holder{seq: l.seq}
		e.holders[who] = h
	}
	h.when = l.now()
	return h
}

// want records that who wants the key, and returns the peers to read it from, or
// that it is the one to fetch it. provided are peers that once said they have it.
func (l *ledger) want(k key, who peer.ID, avoid, provided []peer.ID) answer {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.of(k)
	me, again := e.holders[who]
	if again && me.kept {
		delete(e.holders, who) // it has lost it
	}
	me = l.holder(e, who)
	me.from = ""
	sources := e.sources(who, me.seq, avoid, provided)
	if len(sources) == 0 {
		return answer{Fetch: true}
	}
	me.from = sources[0].ID
	return answer{Sources: sources}
}

// find says who has, or is getting, a key.
func (l *ledger) find(k key, who peer.ID, avoid, provided []peer.ID) answer {
	l.mu.Lock()
	defer l.mu.Unlock()
	return answer{Sources: l.of(k).sources(who, l.seq+1, avoid, provided)}
}

// sources are the peers that one who came at seq may read from, those with the
// fewest readers first.
func (e *entry) sources(who peer.ID, seq int64, avoid, provided []peer.ID) []source {
	readers := make(map[peer.ID]int)
	for _, h := range e.holders {
		if h.from != "" && !h.kept {
			readers[h.from]++
		}
	}
	var all []source
	for id, h := range e.holders {
		if id != who && (h.kept || h.seq < seq) && !slices.Contains(avoid, id) {
			all = append(all, source{ID: id, Kept: h.kept, Readers: readers[id]})
		}
	}
	for _, id := range provided {
		if _, ok := e.holders[id]; !ok && id != who && !slices.Contains(avoid, id) {
			all = append(all, source{ID: id, Kept: true, Readers: readers[id]})
		}
	}
	slices.SortFunc(all, func(a, b source) int {
		if c := cmp.Compare(a.Readers, b.Readers); c != 0 {
			return c
		}
		if a.Kept != b.Kept {
			return map[bool]int{true: -1, false: 1}[a.Kept]
		}
		return cmp.Compare(a.ID, b.ID)
	})
	return all[:min(len(all), maxSources)]
}

// update records what a holder says of itself.
func (l *ledger) update(q question, who peer.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.of(q.Key)
	switch q.Op {
	case opGone:
		delete(e.holders, who)
	case opHave:
		h := l.holder(e, who)
		h.kept, h.from = true, ""
	case opNote:
		l.holder(e, who).from = q.From
	}
}

// lost forgets what a peer was getting: it has gone.
func (l *ledger) lost(who peer.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range l.lru.Keys() {
		if e, ok := l.lru.Peek(k); ok {
			if h := e.holders[who]; h != nil && !h.kept {
				delete(e.holders, who)
			}
		}
	}
}

// judge answers a question as a steward.
func (n *Node) judge(ctx context.Context, who peer.ID, q question) answer {
	switch q.Op {
	case opProvide:
		n.record(ctx, who, q.Keys)
		return answer{}
	case opNear:
		return answer{Near: n.knownNear(q.Key, who)}
	case opLie:
		n.reported(who, q)
		return answer{}
	case opNote, opHave, opGone:
		n.ledger.update(q, who)
		return answer{}
	}
	var provided []peer.ID
	infos, err := n.dht.ProviderStore().GetProviders(ctx, []byte(q.Key))
	if err == nil {
		for _, i := range infos[:min(len(infos), maxHolders)] {
			provided = append(provided, i.ID)
		}
	}
	var a answer
	if q.Op == opWant {
		a = n.ledger.want(q.Key, who, q.Avoid, provided)
	} else {
		a = n.ledger.find(q.Key, who, q.Avoid, provided)
	}
	for i := range a.Sources {
		s := &a.Sources[i]
		if s.ID != n.host.ID() {
			addrs := n.addrsOf(s.ID)
			s.Addrs = addrs[:min(len(addrs), maxAddrs)]
		}
	}
	return a
}

// answerLease serves the lease protocol.
func (n *Node) answerLease(s network.Stream) {
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(answerTime))
	b, err := io.ReadAll(io.LimitReader(s, maxMessage+1))
	if err == nil && len(b) > maxMessage {
		err = errors.New("too long")
	}
	var q question
	if err == nil {
		q, err = parseQuestion(b)
	}
	if err != nil {
		n.log.Debug("a question that isn't one", "peer", s.Conn().RemotePeer(), "err", err)
		_ = s.Reset()
		return
	}
	_ = json.NewEncoder(s).Encode(n.judge(n.ctx, s.Conn().RemotePeer(), q))
}

// ask asks one steward. One that is silent for longer than consult waits is passed
// over until it answers, or for a while.
func (n *Node) ask(ctx context.Context, steward peer.ID, q question) (answer, error) {
	own, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	start := time.Now()
	silent := time.AfterFunc(n.answers.enough(), func() { n.peers.down(steward) })
	a, err := n.exchange(own, steward, q)
	if err == nil && steward != n.host.ID() {
		n.answers.took(time.Since(start))
	}
	switch late := !silent.Stop(); {
	case err == nil && late: // it has much to do, as all have when many want the same
		n.peers.up(steward)
	case err != nil && ctx.Err() == nil: // the steward had no more time, and not the caller
		n.log.Debug("a peer doesn't answer", "peer", steward, "err", err)
		n.peers.down(steward)
	}
	return a, err
}

// exchange asks a peer, which may be this node.
func (n *Node) exchange(ctx context.Context, to peer.ID, q question) (answer, error) {
	if to == n.host.ID() {
		return n.judge(ctx, to, q), nil
	}
	s, err := n.host.NewStream(ctx, to, leaseProtocol)
	if err != nil {
		return answer{}, err
	}
	defer s.Close()
	stop := context.AfterFunc(ctx, func() { _ = s.Reset() })
	defer stop()
	b, err := json.Marshal(q)
	if err != nil {
		return answer{}, err
	}
	if _, err := s.Write(b); err != nil {
		return answer{}, err
	}
	if err := s.CloseWrite(); err != nil {
		return answer{}, err
	}
	if b, err = io.ReadAll(io.LimitReader(s, maxMessage+1)); err != nil {
		return answer{}, err
	}
	return parseAnswer(b)
}

// consult asks the closest steward that answers, and sends the others the same in
// the background. It returns false when no other node answers. Stewards that are
// silent cost silentTime, all together, and nothing for a while then.
func (n *Node) consult(ctx context.Context, q question) (answer, bool) {
	if !n.Ready() || n.ctx.Err() != nil {
		return answer{}, false
	}
	ctx, cancel := context.WithTimeout(ctx, n.answers.enough())
	defer cancel()
	// Those that don't answer make room for the next. That one knows of nobody counts
	// when those before it have no answer: they may have sent others to fetch.
	all := n.closest(ctx, q.Key, 2*stewards)
	steward, a, err := firstOf(ctx, all, n.opts.next, func(s peer.ID) (answer, error) { return n.ask(n.ctx, s, q) },
		func(a answer) bool { return len(a.Sources) > 0 }, nil)
	if err != nil {
		return answer{}, false
	}
	others := slices.DeleteFunc(all, func(s peer.ID) bool { return s == steward || n.peers.isDown(s) })
	others = others[:min(stewards-1, len(others))]
	if len(a.Sources) == 0 {
		if more := n.second(ctx, others, q); len(more) > 0 {
			a = answer{Sources: more}
		}
	}
	if q.Op == opWant {
		n.log.Debug("a steward has answered", "steward", steward, "key", q.Key, "fetch", a.Fetch, "avoid", len(q.Avoid))
		note := question{Op: opNote, Key: q.Key}
		if len(a.Sources) > 0 {
			note.From = a.Sources[0].ID
		}
		n.tell(others, note)
	}
	return a, true
}

// second asks the other stewards who has something that the first one, which
// may have come later, knows nothing of. It returns those who have all of it:
// of two that are getting it, each could be sent to read from the other.
func (n *Node) second(ctx context.Context, others []peer.ID, q question) []source {
	ctx, cancel := context.WithTimeout(ctx, secondTime)
	defer cancel()
	answers := make(chan answer, len(others))
	for _, s := range others {
		go func() {
			a, _ := n.ask(ctx, s, question{Op: opFind, Key: q.Key, Avoid: q.Avoid})
			answers <- a
		}()
	}
	for range others {
		a := <-answers
		if kept := slices.DeleteFunc(a.Sources, func(s source) bool { return !s.Kept }); len(kept) > 0 {
			return kept
		}
	}
	return nil
}

// tell tells peers something, in the background. What only this node can say is said
// again to those that give no answer.
func (n *Node) tell(all []peer.ID, q question) {
	if n.ctx.Err() != nil {
		return
	}
	tries := 1
	if q.Op == opLie {
		tries = reportTries
	}
	for _, s := range all {
		n.wg.Go(func() {
			for range tries {
				ctx, cancel := context.WithTimeout(n.ctx, answerTime)
				_, err := n.exchange(ctx, s, q)
				cancel()
				if err == nil || n.ctx.Err() != nil {
					return
				}
				n.log.Debug("a peer can't be told", "peer", s, "op", q.Op, "err", err)
			}
		})
	}
}
