// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
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

func (s *shelf) Recall(name string) []byte {
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

// stalling is a blob that stops giving, with or without having more.
type stalling struct {
	io.ReadSeeker
	ctx  context.Context
	left int
}

func (s *stalling) Close() error { return nil }

func (s *stalling) Read(p []byte) (int, error) {
	if s.left <= 0 {
		<-s.ctx.Done()
		return 0, s.ctx.Err()
	}
	k, err := s.ReadSeeker.Read(p[:min(len(p), s.left)])
	s.left -= k
	return k, err
}

func TestStall(t *testing.T) {
	all := swarm(t, 3)
	blob := random(1 << 20)
	d := digest.FromBytes(blob)
	all[0].shelf.open = func(ctx context.Context, _ digest.Digest) (*Blob, error) {
		return &Blob{&stalling{bytes.NewReader(blob), ctx, 100 << 10}, int64(len(blob)), true}, nil
	}
	all[0].Provide(d)
	var s *Share
	until(t, "the blob is found", func() bool { s = all[2].Want(t.Context(), d, 0); return !s.fetch })
	body, _, err := s.Open(t.Context(), 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(body)
	if err == nil || len(got) != 100<<10 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	body.Close()
	if _, _, err := s.Open(t.Context(), int64(len(got)), -1); !errors.Is(err, ErrNoPeer) {
		t.Errorf("then: %v", err)
	}
}

// A stranger is any node without the swarm's key.
func TestStranger(t *testing.T) {
	all := swarm(t, 2)
	d := all[0].put(random(1000))
	all[0].Provide(d)
	stranger := newMember(t, func(o *Options) { o.SwarmKey = bytes.Repeat([]byte{8}, 32) }, all[0].addr())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	// The transfers.
	if c, _, err := stranger.dialPeer(ctx, "", []string{all[0].addr()}); err == nil {
		t.Error("a transfer connection with another key")
		c.Close()
	}
	// libp2p: identify, the DHT, the leases.
	info := all[0].host.Peerstore().PeerInfo(all[0].host.ID())
	if err := stranger.host.Connect(ctx, info); err == nil {
		t.Error("a libp2p connection with another key")
	}
	// No key at all.
	for _, hello := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x13/multistream/1.0.0\n", "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", strings.Repeat("x", 4096)} {
		c, err := net.Dial("tcp", all[0].addr())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(c, hello)
		_ = c.(*net.TCPConn).CloseWrite()
		got, _ := io.ReadAll(c)
		if bytes.Contains(got, []byte("HTTP")) || bytes.Contains(got, []byte("multistream")) {
			t.Errorf("to %q it says %q", hello, got)
		}
		c.Close()
	}
	all[0].says = func() []byte { return []byte(`{}`) }
	if b, err := stranger.figuresOf(ctx, source{ID: all[0].host.ID(), Addrs: []string{all[0].addr()}}); err == nil {
		t.Errorf("a stranger is told %q", b)
	}
	if s := stranger.Want(t.Context(), d, 0); s != nil {
		t.Error("a stranger gets a lease")
	}
	if st := all[0].Status(); len(st.Peers) != 1 || st.Unauthenticated == 0 {
		t.Errorf("status: %+v", st)
	}
}

// Who has the port that peers look for one at, and not the key, isn't taken for
// one, whatever it answers to a peer's proof.
func TestStrangerListens(t *testing.T) {
	all := swarm(t, 2)
	// It speaks libp2p's TLS, for which any node has an identity.
	stranger := newMember(t, func(o *Options) { o.SwarmKey = bytes.Repeat([]byte{8}, 32) })
	secure := func(c net.Conn, side func(net.Conn, *tls.Config) *tls.Conn) *tls.Conn {
		conf, _ := stranger.identity.ConfigForPeer("")
		conf.NextProtos = []string{"http/1.1"}
		return side(c, conf)
	}
	for how, reply := range map[string]func(proof []byte) []byte{
		"nothing":   func([]byte) []byte { return nil },
		"zeros":     func([]byte) []byte { return make([]byte, 32) },
		"the proof": func(proof []byte) []byte { return proof },
		"what another peer says to it": func(proof []byte) []byte {
			c, err := net.Dial("tcp", all[1].addr())
			if err != nil {
				t.Error(err)
				return nil
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			relay := secure(c, tls.Client)
			_, _ = relay.Write(proof)
			theirs, _ := io.ReadAll(io.LimitReader(relay, 32))
			if len(theirs) > 0 {
				t.Errorf("a proof that was made for another connection is taken, and answered with %x", theirs)
			}
			return theirs
		},
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			tc := secure(c, tls.Server)
			proof := make([]byte, 32)
			if _, err := io.ReadFull(tc, proof); err != nil {
				t.Errorf("%s: no proof came: %v", how, err)
				return
			}
			_, _ = tc.Write(reply(proof))
		}()
		if c, _, err := all[0].dialPeer(t.Context(), "", []string{l.Addr().String()}); err == nil {
			t.Errorf("%s makes a stranger a peer", how)
			c.Close()
		}
		l.Close()
	}
}

// What is small is verified too before it is taken, and who sent something else
// is shunned.
func TestSmallComesWrong(t *testing.T) {
	all := swarm(t, 3)
	right := []byte("a manifest")
	d := digest.FromBytes(right)
	all[0].shelf.open = func(context.Context, digest.Digest) (*Blob, error) {
		return &Blob{nopCloser{bytes.NewReader([]byte("another it"))}, 10, true}, nil
	}
	all[0].Provide(d)
	find := question{Op: opFind, Key: must(keyOf(d))}
	until(t, "the liar is found", func() bool {
		a, _ := all[2].consult(t.Context(), find)
		return len(a.Sources) == 1
	})
	if b, err := all[2].Get(t.Context(), d, 1000); !errors.Is(err, ErrNoPeer) {
		t.Errorf("%q, %v", b, err)
	}
	all[1].Provide(all[1].put(right))
	until(t, "another one has it", func() bool {
		b, err := all[2].Get(t.Context(), d, 1000)
		return err == nil && bytes.Equal(b, right)
	})
	for _, p := range all[2].Status().Peers {
		if p.Shunned != (p.ID == all[0].ID()) {
			t.Errorf("%s shunned: %v", p.ID, p.Shunned)
		}
	}
}

func TestNames(t *testing.T) {
	all := swarm(t, 2)
	all[0].names[HashName("a repository")] = []byte(`{"known":1}`)
	all[0].ProvideName("a repository")
	until(t, "the name is known", func() bool {
		got := all[1].Node.Recall(t.Context(), "a repository")
		return len(got) == 1 && string(got[0]) == `{"known":1}`
	})
	if got := all[1].Node.Recall(t.Context(), "another"); len(got) != 0 {
		t.Errorf("%q", got)
	}
}

// Figures are asked of each peer that is connected. One that says nothing, or too
// much, keeps none from the others'.
func TestFigures(t *testing.T) {
	all := swarm(t, 4)
	size := MaxFigures
	all[1].says = func() []byte { return []byte(`{"a":1}`) }
	all[2].says = func() []byte { return bytes.Repeat([]byte{'x'}, size) }
	var got map[string][]byte
	until(t, "two say something", func() bool { got = all[0].Node.Figures(t.Context()); return len(got) == 2 })
	if string(got[all[1].ID()]) != `{"a":1}` || len(got[all[2].ID()]) != size {
		t.Errorf("%d say something", len(got))
	}
	size++
	until(t, "only one does without saying too much", func() bool { return len(all[0].Node.Figures(t.Context())) == 1 })
	// One that takes forever has its time.
	forever := make(chan struct{})
	defer close(forever)
	all[3].says = func() []byte { <-forever; return nil }
	start := time.Now()
	if got := all[0].Node.Figures(t.Context()); len(got) != 1 || time.Since(start) > figuresTime+waitTime/2 {
		t.Errorf("after %v, %d say something", time.Since(start), len(got))
	}
}

func TestProvideAll(t *testing.T) {
	all := swarm(t, 4)
	var ds []digest.Digest
	for range 200 {
		ds = append(ds, all[0].put(random(100)))
	}
	all[0].ProvideAll(ds)
	for _, d := range ds {
		until(t, "a blob is found", func() bool { b, _ := all[3].Get(t.Context(), d, 1000); return b != nil })
	}
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
