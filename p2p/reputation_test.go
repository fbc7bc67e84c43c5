// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
)

// seen is something that a node has seen of a peer.
type seen struct {
	when     time.Time
	verified int64 // bytes, if it is positive
	fault    fault // if verified is 0
	report   bool  // if it is one, and counts
}

// isBelieved and isShunned say what a peer has earned, by all that was ever seen of it.
func isBelieved(all []seen, now time.Time) bool {
	sum := int64(0)
	for _, s := range all {
		switch {
		case s.verified > 0:
			sum += s.verified
		case !s.report && s.fault == lie, (s.report || s.fault == partial) && now.Sub(s.when) < lieTime:
			return false
		case s.report || s.fault == partial:
			sum = 0
		}
	}
	return sum >= 32<<20
}

func isShunned(all []seen, now time.Time) bool {
	strikes, until := 0, time.Time{}
	for _, s := range all {
		if s.verified > 0 || s.report {
			continue
		}
		switch strikes++; {
		case s.fault == lie:
			strikes, until = 0, s.when.Add(lieTime)
		case strikes == 3:
			strikes, until = 0, s.when.Add(shunTime)
		}
	}
	return now.Before(until)
}

// Random stories of what some peers send, and say of each other, over days: who is
// believed and who is shunned is what follows from all that was seen.
func TestReputationStories(t *testing.T) {
	believed, shunned := 0, 0
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		now := time.Unix(1<<30, 0)
		rep := newReputation()
		rep.now = func() time.Time { return now }
		peers := []peer.ID{"a", "b", "c"}
		log := make(map[peer.ID][]seen)
		reports := make(map[peer.ID][]time.Time)
		lies := r.IntN(3) // how often something is wrong
		for step := range 100 {
			p := peers[r.IntN(len(peers))]
			switch what := r.IntN(20); {
			case what < 12:
				n := 1 + r.Int64N(16<<20)
				rep.verified(p, n)
				log[p] = append(log[p], seen{when: now, verified: n})
			case what < 12+lies:
				f := fault(r.IntN(3))
				rep.wrong(p, f)
				log[p] = append(log[p], seen{when: now, fault: f})
			case what < 12+2*lies:
				by := peers[r.IntN(len(peers))]
				rep.doubt(by, p)
				// It counts unless there were eight since the first of an hour.
				if first := reports[by]; len(first) == 0 || now.Sub(first[0]) > time.Hour {
					reports[by] = nil
				}
				if reports[by] = append(reports[by], now); len(reports[by]) <= 8 {
					log[p] = append(log[p], seen{when: now, report: true})
				}
			case what < 18:
				now = now.Add(time.Duration(r.IntN(20)) * time.Minute)
			case what == 18:
				now = now.Add(time.Duration(r.IntN(30)) * time.Hour)
			}
			for _, p := range peers {
				if got, want := rep.believed(p), isBelieved(log[p], now); got != want {
					t.Fatalf("seed %d, step %d: believed: %v, want %v; %+v", seed, step, got, want, log[p])
				} else if got {
					believed++
				}
				if got, want := rep.shunned(p), isShunned(log[p], now); got != want {
					t.Fatalf("seed %d, step %d: shunned: %v, want %v; %+v", seed, step, got, want, log[p])
				} else if got {
					shunned++
				}
			}
		}
	}
	if believed < 1000 || shunned < 1000 {
		t.Errorf("the stories are about nothing: %d times believed, %d shunned", believed, shunned)
	}
}

// earn has a node believe another.
func earn(n *member, of *member) {
	n.peers.verified(of.host.ID(), believeBytes)
}

// only gives a blob that one member has, or says to have, and others find there.
func only(t *testing.T, of *member, sent []byte, kept bool, who ...*member) digest.Digest {
	t.Helper()
	d := digest.FromBytes(random(100))
	of.mu.Lock()
	of.shelf.open = func(context.Context, digest.Digest) (*Blob, error) {
		return &Blob{nopCloser{bytes.NewReader(sent)}, int64(len(sent)), kept}, nil
	}
	of.mu.Unlock()
	of.Provide(d)
	for _, m := range who {
		until(t, "it is found", func() bool {
			a, _ := m.consult(t.Context(), question{Op: opFind, Key: must(keyOf(d))})
			return len(a.Sources) == 1
		})
	}
	return d
}

// A peer that is believed lies: all others believe it no more, and read from it once
// each at most. One that has not verified, or gave a part, need not have lied.
func TestLie(t *testing.T) {
	for _, tt := range []struct {
		name                     string
		kept, whole              bool
		shunned, believed, other bool // by who read, and by the others
	}{
		{"the whole, verified", true, true, true, false, false},
		{"a part, verified", true, false, false, false, false},
		{"not verified", false, true, false, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			all := swarm(t, 4)
			liar, a := all[0], all[1]
			for _, m := range all[1:] {
				earn(m, liar)
			}
			sent := random(100 << 10)
			d := only(t, liar, sent, tt.kept, a)
			s := a.Want(t.Context(), d, 0)
			body, size, err := s.Open(t.Context(), 0, -1)
			if err != nil || size != int64(len(sent)) {
				t.Fatal(size, err)
			}
			if s.Believed() != tt.kept {
				t.Errorf("believed: %v", s.Believed())
			}
			part := make([]byte, 1000)
			until(t, "it gives a range", func() bool { return s.Range(t.Context(), 5000, part) == nil })
			if !bytes.Equal(part, sent[5000:6000]) {
				t.Error("it is another range")
			}
			if !tt.whole {
				if _, err := io.ReadFull(body, make([]byte, 10)); err != nil {
					t.Error(err)
				}
				body.Close()
			} else if !bytes.Equal(readAll(t, body), sent) {
				t.Error("other bytes than were sent")
			}
			s.Wrong()
			s.Close(false)
			if a.peers.shunned(liar.host.ID()) != tt.shunned || a.peers.believed(liar.host.ID()) != tt.believed {
				t.Errorf("shunned: %v, believed: %v", a.peers.shunned(liar.host.ID()), a.peers.believed(liar.host.ID()))
			}
			for _, m := range all[2:] {
				if !tt.other {
					until(t, "the others know", func() bool { return !m.peers.believed(liar.host.ID()) })
				}
				if m.peers.believed(liar.host.ID()) != tt.other || !m.good(source{ID: liar.host.ID()}) {
					t.Error("what others think of it is not their own to say")
				}
			}
		})
	}
}

// What was verified is to the credit of those who gave it.
func TestCredit(t *testing.T) {
	all := swarm(t, 2)
	for i := range 3 {
		sent := random(believeBytes/3 + 1)
		d := only(t, all[0], sent, true, all[1])
		s := all[1].Want(t.Context(), d, 0)
		body, _, err := s.Open(t.Context(), 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		if s.Believed() {
			t.Errorf("it is believed after %d blobs", i)
		}
		readAll(t, body)
		s.Close(true)
	}
	if !all[1].peers.believed(all[0].host.ID()) || !all[1].Status().Peers[0].Believed {
		t.Error("it isn't believed")
	}
}

// A peer that says of all others that they lie has them verified before anything of
// them is passed on, of some, and no more: they are read from as before.
func TestDefamation(t *testing.T) {
	all := swarm(t, 3)
	honest, liar, a := all[0], all[1], all[2]
	earn(a, honest)
	earn(a, liar)
	k := nameKey("something")
	say := func(of peer.ID) {
		t.Helper()
		if _, err := liar.exchange(t.Context(), a.host.ID(), question{Op: opLie, Key: k, From: of}); err != nil {
			t.Error(err)
		}
	}
	say(honest.host.ID())
	if a.peers.believed(honest.host.ID()) || !a.peers.believed(liar.host.ID()) {
		t.Error("what it says is for nothing")
	}
	blob := random(100 << 10)
	d := honest.put(blob)
	honest.Provide(d)
	until(t, "it is found", func() bool { s := a.Want(t.Context(), d, 0); defer s.Close(false); return !s.Mine() })
	s := a.Want(t.Context(), d, 0)
	body, _, err := s.Open(t.Context(), 0, -1)
	if err != nil || s.Believed() || !bytes.Equal(readAll(t, body), blob) {
		t.Errorf("it is not read from: %v", err)
	}
	s.Close(true)
	// Of itself, and of who is asked, it can say what it likes.
	say(liar.host.ID())
	say(a.host.ID())
	if !a.peers.believed(liar.host.ID()) || a.peers.doubted(a.host.ID()) {
		t.Error("it may say so")
	}
	counted := 1
	for i := range 3 * maxReports {
		p := peer.ID(nameKey(fmt.Sprint(i)))
		say(p)
		if a.peers.doubted(p) {
			counted++
		}
	}
	if counted != maxReports {
		t.Errorf("%d of its reports count, want %d", counted, maxReports)
	}
}
