// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// waitTime is how long a test waits for what should happen within seconds, or when
// peers are looked for again.
const waitTime = 2 * lookAgain

// shelf is a Content in memory.
type shelf struct {
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
	names map[string][]byte
	says  func() []byte // of itself
	// open, if it isn't nil, opens blobs instead.
	open func(context.Context, digest.Digest) (*Blob, error)
}

func (s *shelf) Open(ctx context.Context, d digest.Digest) (*Blob, error) {
	s.mu.Lock()
	b, ok := s.blobs[d]
	open := s.open
	s.mu.Unlock()
	if open != nil {
		return open(ctx, d)
	}
	if !ok {
		return nil, ErrNotHere
	}
	return &Blob{nopCloser{bytes.NewReader(b)}, int64(len(b)), true}, nil
}

func (s *shelf) Progress(d digest.Digest) (arrived, size int64, kept bool, err error) {
	b, err := s.Open(context.Background(), d)
	if err != nil {
		return 0, 0, false, err
	}
	return b.Size, b.Size, b.Kept, nil
}

func (s *shelf) put(b []byte) digest.Digest {
	d := digest.FromBytes(b)
	s.mu.Lock()
	s.blobs[d] = b
	s.mu.Unlock()
	return d
}

func (s *shelf) Export(name string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.names[name]
}

func (s *shelf) Figures() []byte {
	if s.says == nil {
		return nil
	}
	return s.says()
}

type nopCloser struct{ io.ReadSeeker }

func (nopCloser) Close() error { return nil }

type member struct {
	*Node
	*shelf
}

var testKey = bytes.Repeat([]byte{7}, 32)

func testLog(t testing.TB) *slog.Logger {
	if os.Getenv("P2P_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// newMember starts a node on loopback that looks for others at the addresses.
func newMember(t testing.TB, change func(*Options), peers ...string) *member {
	t.Helper()
	if len(peers) == 0 {
		peers = []string{"127.0.0.1:1"} // none; not mDNS
	}
	s := &shelf{blobs: make(map[digest.Digest][]byte), names: make(map[string][]byte)}
	o := Options{Listen: "127.0.0.1:0", Peers: peers, SwarmKey: testKey, Content: s, Log: testLog(t)}
	if change != nil {
		change(&o)
	}
	n, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return &member{n, s}
}

func (m *member) addr() string { return hostPort(m.host.Network().ListenAddresses()[0]) }

// swarm starts nodes that all know each other.
func swarm(t testing.TB, count int, change ...func(*Options)) []*member {
	t.Helper()
	options := func(o *Options) {
		for _, f := range change {
			f(o)
		}
	}
	all := []*member{newMember(t, options)}
	for range count - 1 {
		all = append(all, newMember(t, options, all[0].addr()))
	}
	for _, m := range all {
		until(t, fmt.Sprintf("%s knows %d others", m.ID(), count-1), func() bool { return m.dht.RoutingTable().Size() >= count-1 })
	}
	return all
}

func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(waitTime); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: ", what)
		}
	}
}

func random(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.Read(b)
	return b
}

func readAll(t testing.TB, r io.ReadCloser) []byte {
	t.Helper()
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestPeerLeaves(t *testing.T) {
	all := swarm(t, 5)
	d := digest.FromString("something")
	first := all[0].Want(t.Context(), d, 0)
	if first == nil || !first.fetch {
		t.Fatal("the first isn't to fetch it")
	}
	all[0].Close()
	for _, m := range all[1:] {
		until(t, "the one that left is forgotten", func() bool { return len(m.Status().Peers) == 3 })
	}
	until(t, "another node is to fetch it", func() bool { s := all[1].Want(t.Context(), d, 0); return s != nil && s.fetch })
	// It comes back, with its identity.
	again := newMember(t, nil, all[1].addr())
	until(t, "it is known again", func() bool { return len(again.Status().Peers) >= 4 })
}

func TestIdentity(t *testing.T) {
	file := filepath.Join(t.TempDir(), "identity")
	a := newMember(t, func(o *Options) { o.IdentityFile = file })
	id := a.ID()
	a.Close()
	if b := newMember(t, func(o *Options) { o.IdentityFile = file }); b.ID() != id {
		t.Error("another identity after a restart")
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := os.WriteFile(file, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := identity(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Error(err)
	}
}

func TestSwarmKey(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	for text, ok := range map[string]bool{
		"/key/swarm/psk/1.0.0/\n/base16/\n" + strings.Repeat("ab", 32) + "\n": true,
		"/key/swarm/psk/1.0.0/\n/base16/\nabcd\n":                             false,
		strings.Repeat("ab", 32):                                              false,
		"":                                                                    false,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		key, err := ReadSwarmKey(file)
		if (err == nil) != ok || ok && !bytes.Equal(key, bytes.Repeat([]byte{0xab}, 32)) {
			t.Errorf("%q: %v", text, err)
		}
		if err != nil && strings.Contains(err.Error(), "abcd") {
			t.Errorf("the error shows the key: %v", err)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func FuzzSwarmKey(f *testing.F) {
	f.Add([]byte("/key/swarm/psk/1.0.0/\n/base16/\n5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a\n"))
	f.Add([]byte("/key/swarm/psk/1.0.0/\n/base64/\nAAAA\n"))
	f.Add([]byte("/key/swarm/psk/1.0.0/\n/bin/\n"))
	file := filepath.Join(f.TempDir(), "swarm.key")
	_ = os.WriteFile(file, nil, 0o600)
	_, err := ReadSwarmKey(file)
	fixed := err.Error() // whatever the file has
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		key, err := ReadSwarmKey(file)
		if err == nil && len(key) != 32 {
			t.Errorf("a key of %d bytes", len(key))
		}
		if err != nil && strings.Contains(strings.TrimPrefix(err.Error(), file), string(b)) && !strings.Contains(fixed, string(b)) {
			t.Errorf("the error shows the file: %v", err)
		}
	})
}

func TestOneFetches(t *testing.T) {
	all := swarm(t, 6, func(o *Options) { o.next = waitTime }) // however busy the machine is
	d := digest.FromString("wanted by all")
	var mu sync.Mutex
	var fetchers int
	var wg sync.WaitGroup
	shares := make([]*Share, len(all))
	for i, m := range all {
		wg.Go(func() {
			s := m.Want(t.Context(), d, 0)
			if s == nil {
				t.Error("no peer to ask")
				return
			}
			shares[i] = s
			mu.Lock()
			defer mu.Unlock()
			if s.fetch {
				fetchers++
			} else if len(s.sources) == 0 {
				t.Error("neither to fetch nor to read")
			}
		})
	}
	wg.Wait()
	if fetchers != 1 {
		t.Fatalf("%d nodes are to fetch it, want 1", fetchers)
	}
	// Each reads from another one: a chain.
	from := make(map[string]int)
	for _, s := range shares {
		if !s.fetch {
			from[s.sources[0].ID.String()]++
		}
	}
	if len(from) != len(all)-1 {
		t.Errorf("%d readers share %d sources", len(all)-1, len(from))
	}
}

func TestReadFromPeer(t *testing.T) {
	all := swarm(t, 3)
	blob := random(3 << 20)
	d := all[0].put(blob)
	all[0].Provide(d)
	var s *Share
	until(t, "the blob is found", func() bool {
		s = all[2].Want(t.Context(), d, 0)
		return s != nil && !s.fetch
	})
	for _, offset := range []int64{0, 1, 1 << 20, int64(len(blob)) - 1} {
		body, size, err := s.Open(t.Context(), offset, int64(len(blob)))
		if err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, body); size != int64(len(blob)) || !bytes.Equal(got, blob[offset:]) {
			t.Errorf("from %d: %d bytes of %d", offset, len(got), size)
		}
		s = all[2].Want(t.Context(), d, 0)
	}
	if b, err := all[1].Get(t.Context(), d, 4<<20); err != nil || !bytes.Equal(b, blob) {
		t.Errorf("Get: %d bytes, %v", len(b), err)
	}
	if _, err := all[1].Get(t.Context(), d, 1<<20); !errors.Is(err, ErrNoPeer) {
		t.Errorf("Get of more than the limit: %v", err)
	}
	if st := all[0].Status(); len(st.Peers) != 2 || st.Sent < int64(len(blob)) {
		t.Errorf("status: %+v", st)
	}
}

// Records that lead nowhere cost a question, and then the node fetches.
func TestEvicted(t *testing.T) {
	all := swarm(t, 3)
	d := all[0].put(random(1000))
	all[0].Provide(d)
	until(t, "the blob is found", func() bool { b, _ := all[1].Get(t.Context(), d, 1<<20); return b != nil })
	all[0].mu.Lock()
	delete(all[0].blobs, d)
	all[0].mu.Unlock()
	s := all[2].Want(t.Context(), d, 0)
	if s == nil || s.fetch {
		t.Fatal("the record is gone already")
	}
	if _, _, err := s.Open(t.Context(), 0, -1); !errors.Is(err, ErrNoPeer) || !s.fetch {
		t.Errorf("Open: %v, fetch %v", err, s.fetch)
	}
}

func TestWrongBytes(t *testing.T) {
	all := swarm(t, 4)
	right := random(100 << 10)
	d := digest.FromBytes(right)
	for i, m := range all[:2] {
		m.shelf.open = func(context.Context, digest.Digest) (*Blob, error) {
			wrong := bytes.Repeat([]byte{byte(i)}, len(right))
			return &Blob{nopCloser{bytes.NewReader(wrong)}, int64(len(wrong)), true}, nil
		}
		m.Provide(d)
	}
	until(t, "both are found", func() bool {
		a, _ := all[3].consult(t.Context(), question{Op: opFind, Key: must(keyOf(d))})
		return len(a.Sources) == 2
	})
	s := all[3].Want(t.Context(), d, 0)
	for range 2 {
		body, _, err := s.Open(t.Context(), 0, int64(len(right)))
		if err != nil {
			t.Fatal(err)
		}
		readAll(t, body)
		s.Wrong()
	}
	if _, _, err := s.Open(t.Context(), 0, -1); !errors.Is(err, ErrNoPeer) {
		t.Errorf("after two liars: %v", err)
	}
	for _, p := range all[3].Status().Peers {
		if liar := p.ID == all[0].ID() || p.ID == all[1].ID(); p.Shunned != liar {
			t.Errorf("%s shunned: %v", p.ID, p.Shunned)
		}
	}
	// A size that can't be is noticed before a byte.
	all[2].shelf.open = all[0].shelf.open
	all[2].Provide(d)
	until(t, "the third is found", func() bool {
		s = all[3].Want(t.Context(), d, 0)
		return !s.fetch
	})
	if _, _, err := s.Open(t.Context(), 0, 12); !errors.Is(err, ErrNoPeer) {
		t.Errorf("another size: %v", err)
	}
}
