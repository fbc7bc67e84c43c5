// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
)

// The readers of a blob form a chain, none reads from one that came later, and
// a reader whose source died goes on where others are.
func TestLedger(t *testing.T) {
	l := newLedger()
	now := time.Now()
	l.now = func() time.Time { return now }
	k := must(keyOf(digest.FromString("x")))
	who := func(i int) peer.ID { return peer.ID(fmt.Sprintf("peer %02d", i)) }
	if a := l.want(k, who(0), nil, nil); !a.Fetch || len(a.Sources) > 0 {
		t.Fatalf("the first: %+v", a)
	}
	for i := 1; i < 10; i++ {
		if a := l.want(k, who(i), nil, nil); a.Fetch || a.Sources[0].ID != who(i-1) {
			t.Errorf("peer %d: %+v", i, a)
		}
	}
	// The fetcher is gone. The second goes on, and not by reading from the third.
	l.lost(who(0))
	if a := l.want(k, who(1), []peer.ID{who(0)}, nil); !a.Fetch {
		t.Errorf("the second: %+v", a)
	}
	// The middle one is gone: its reader reads from an earlier one.
	l.lost(who(5))
	a := l.want(k, who(6), []peer.ID{who(5)}, nil)
	if a.Fetch || slices.ContainsFunc(a.Sources, func(s source) bool { return s.ID > who(6) }) {
		t.Errorf("the sixth: %+v", a)
	}
	// One that has it all serves all, those that provide it too.
	l.update(question{Op: opHave, Key: k}, who(9))
	if a := l.find(k, who(20), nil, []peer.ID{who(30)}); len(a.Sources) == 0 || !a.Sources[0].Kept || a.Fetch {
		t.Errorf("found: %+v", a)
	}
	// Who loses it can't be its source.
	if a := l.want(k, who(9), nil, nil); slices.ContainsFunc(a.Sources, func(s source) bool { return s.ID == who(9) }) {
		t.Errorf("the ninth: %+v", a)
	}
	// What is long past is forgotten.
	now = now.Add(leaseTime + time.Second)
	if a := l.want(k, who(40), nil, nil); !a.Fetch {
		t.Errorf("after the leases: %+v", a)
	}
}

// A steward's memory is bounded, whoever asks for what.
func TestLedgerBounds(t *testing.T) {
	l := newLedger()
	for i := range maxEntries + 100 {
		l.want(nameKey(fmt.Sprint(i)), "a", nil, nil)
	}
	if n := l.lru.Len(); n != maxEntries {
		t.Errorf("%d entries", n)
	}
	k := nameKey("one")
	for i := range maxHolders + 100 {
		l.update(question{Op: opHave, Key: k}, peer.ID(fmt.Sprint(i)))
	}
	e, _ := l.lru.Get(k)
	if len(e.holders) != maxHolders {
		t.Errorf("%d holders", len(e.holders))
	}
	if a := l.find(k, "me", nil, nil); len(a.Sources) != maxSources {
		t.Errorf("%d sources", len(a.Sources))
	}
}

func FuzzQuestion(f *testing.F) {
	b, _ := json.Marshal(question{Op: opWant, Key: nameKey("x"), Avoid: []peer.ID{"a"}, From: "b"})
	f.Add(b)
	f.Add([]byte(`{"op":"want","key":"1220"}`))
	f.Add([]byte(`{"op":"provide","keys":["1220"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQuestion(b)
		if err != nil {
			return
		}
		if len(q.Avoid) > maxAvoid || len(q.Keys) > maxKeys || (q.Key == "") != (q.Op == opProvide) {
			t.Errorf("%+v", q)
		}
		l := newLedger()
		l.update(q, "somebody")
		if a := l.want(q.Key, "me", q.Avoid, nil); len(a.Sources) > maxSources {
			t.Errorf("%+v", a)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	b, _ := json.Marshal(answer{Sources: []source{{ID: "12D3KooWAo5CPfTaEvEHttsTHjkvqzqdKYZdc84XAVKZuHVSpVWL", Addrs: []string{"10.0.0.1:5053"}, Kept: true}}})
	f.Add(b)
	f.Add([]byte(`{"fetch":true}`))
	f.Add([]byte(`{"near":[{"id":"12D3KooWAo5CPfTaEvEHttsTHjkvqzqdKYZdc84XAVKZuHVSpVWL","addrs":["10.0.0.1:5053"]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAnswer(b)
		if err != nil {
			return
		}
		if len(a.Sources) > maxSources || len(a.Near) > bucketSize {
			t.Errorf("%+v", a)
		}
		for _, s := range slices.Concat(a.Sources, a.Near) {
			if s.ID == "" || len(s.Addrs) > maxAddrs {
				t.Errorf("%+v", s)
			}
		}
	})
}
