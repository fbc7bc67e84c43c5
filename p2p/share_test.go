// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// drippingContent is a Content that gives half a KiB twice a second of anything, and has
// no more by then. Or it gives no answer at all: its disk hangs.
type drippingContent struct {
	*shelf
	given *atomic.Int64
	hangs bool
}

func (c drippingContent) Open(ctx context.Context, _ digest.Digest) (*Blob, error) {
	if c.hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &Blob{&drips{ctx, c.given}, 100 << 20, false}, nil
}

func (c drippingContent) Progress(digest.Digest) (arrived, size int64, kept bool, err error) {
	if c.hangs {
		select {}
	}
	return c.given.Load(), 100 << 20, false, nil
}

type drips struct {
	ctx   context.Context
	given *atomic.Int64
}

func (d *drips) Close() error { return nil }
func (d *drips) Seek(o int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		return 100 << 20, nil
	}
	return o, nil
}
func (d *drips) Read(p []byte) (int, error) {
	select {
	case <-time.After(time.Second / 2):
	case <-d.ctx.Done():
		return 0, d.ctx.Err()
	}
	d.given.Add(512)
	return min(512, len(p)), nil
}

// among returns a member among others that provide blobs.
func among(t *testing.T, count int, hang bool, blobs ...digest.Digest) *member {
	a := newMember(t, nil)
	var all []*member
	for range count {
		all = append(all, newMember(t, func(o *Options) { o.Content = drippingContent{o.Content.(*shelf), new(atomic.Int64), hang} }, a.addr()))
	}
	until(t, "all known", func() bool { return a.dht.RoutingTable().Size() >= count })
	for _, m := range all {
		until(t, "all known", func() bool { return m.dht.RoutingTable().Size() >= count })
		for _, d := range blobs {
			m.Provide(d)
		}
	}
	return a
}

// wanted is a share of a blob that peers say they have.
func wanted(t *testing.T, a *member, d digest.Digest) (s *Share) {
	until(t, "the blob is found", func() bool {
		if s = a.Want(t.Context(), d, 50<<20); !s.Mine() {
			return true
		}
		s.Close(false)
		return false
	})
	return s
}

// A peer that gives a thousandth of what the registry gives, and hasn't more
// itself, is left.
func TestDrip(t *testing.T) {
	d := digest.FromString("blob")
	body, _, err := wanted(t, among(t, 1, false, d), d).Open(t.Context(), 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	left := make(chan error, 1)
	go func() { _, err := io.Copy(io.Discard, body); left <- err }()
	select {
	case err := <-left:
		if err == nil {
			t.Error("it came to an end")
		}
	case <-time.After(3 * maxLowTicks * watchTime):
		t.Error("it isn't left")
	}
}

// freezer has connections stand still, as those of a process that was stopped.
type freezer struct{ frozen, thawed chan struct{} }

type freezing struct {
	net.Conn
	by     *freezer
	closed chan struct{}
	once   sync.Once
}

func (f *freezer) wrap(c net.Conn) net.Conn {
	return &freezing{Conn: c, by: f, closed: make(chan struct{})}
}

// stand waits for the end, if it is frozen.
func (c *freezing) stand() {
	select {
	case <-c.by.frozen:
		select {
		case <-c.closed:
		case <-c.by.thawed:
		}
	default:
	}
}

func (c *freezing) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.stand()
	return n, err
}

func (c *freezing) Write(p []byte) (int, error) {
	c.stand()
	return c.Conn.Write(p)
}

func (c *freezing) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// A source that is silent has the next one tried beside it, and isn't tried again
// for a while. When all are silent, they cost a pull silentTime together.
func TestSilentSources(t *testing.T) {
	a := newMember(t, nil)
	blob := random(100 << 10)
	var all []*member
	var freezers []*freezer
	for range 3 {
		f := &freezer{make(chan struct{}), make(chan struct{})}
		freezers = append(freezers, f)
		all = append(all, newMember(t, func(o *Options) { o.Wrap = f.wrap }, a.addr()))
		t.Cleanup(func() { close(f.thawed) }) // or it would have no end
	}
	var d digest.Digest
	for _, m := range all {
		until(t, "all known", func() bool { return m.dht.RoutingTable().Size() >= len(all) })
		d = m.put(blob)
		m.Provide(d)
	}
	want := func(sources int) (s *Share) {
		until(t, fmt.Sprintf("%d have it", sources), func() bool {
			if s != nil {
				s.Close(false)
			}
			s = a.Want(t.Context(), d, 0)
			return s != nil && len(s.sources) == sources
		})
		return s
	}
	s := want(3)
	order := slices.Clone(s.sources)
	freeze := func(src source) {
		for i, m := range all {
			if m.host.ID() == src.ID {
				close(freezers[i].frozen)
			}
		}
	}
	freeze(order[0])
	body, size, err := s.Open(t.Context(), 0, -1)
	if err != nil || size != int64(len(blob)) || !bytes.Equal(readAll(t, body), blob) {
		t.Fatalf("%d bytes, %v", size, err)
	}
	s.Close(false)
	until(t, "the silent one is known to be so", func() bool { return a.peers.isMute(order[0].ID) })
	s = want(2)
	freeze(order[1])
	freeze(order[2])
	if _, _, err := s.Open(t.Context(), 0, -1); !errors.Is(err, ErrNoPeer) {
		t.Error(err)
	}
	until(t, "all are known to be silent", func() bool { return a.peers.isMute(order[1].ID) && a.peers.isMute(order[2].ID) })
	// And as stewards: one that has said nothing in its time is not asked again.
	if s := a.Want(t.Context(), d, 0); s != nil && len(s.sources) > 0 {
		t.Errorf("it is to be read from %v", s.sources)
	}
	for _, src := range order {
		if _, err := a.ask(t.Context(), src.ID, question{Op: opFind, Key: must(keyOf(d))}); err == nil || !a.peers.isDown(src.ID) {
			t.Errorf("a silent steward: %v", err)
		}
	}
}

// waitingContent is a Content that waits for its own source, and says so.
type waitingContent struct {
	*shelf
	asked *atomic.Int64
}

func (c waitingContent) Open(ctx context.Context, _ digest.Digest) (*Blob, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (c waitingContent) Progress(digest.Digest) (arrived, size int64, kept bool, err error) {
	c.asked.Add(1)
	return 0, -1, false, nil
}

// Beside a source that waits for its own another one is had, before that one is given
// up: a peer, or the upstream.
func TestWaitingSource(t *testing.T) {
	blob := random(100 << 10)
	a := newMember(t, nil)
	var asked atomic.Int64
	waiting := newMember(t, func(o *Options) { o.Content = waitingContent{o.Content.(*shelf), &asked} }, a.addr())
	other := newMember(t, nil, a.addr())
	for _, m := range []*member{a, waiting, other} {
		until(t, "all known", func() bool { return m.dht.RoutingTable().Size() == 2 })
	}
	d := digest.FromBytes(blob)
	open := func() (*Share, io.ReadCloser, error) {
		t.Helper()
		asked.Store(0)
		var s *Share
		until(t, "it is known who has it", func() bool {
			if s != nil {
				s.Close(false)
			}
			s = a.Want(t.Context(), d, 0)
			return s != nil && slices.ContainsFunc(s.sources, func(x source) bool { return x.ID == waiting.host.ID() })
		})
		s.sources = slices.DeleteFunc(s.sources, func(x source) bool { return x.ID != waiting.host.ID() })
		body, _, err := s.Open(t.Context(), 0, -1)
		if n := asked.Load(); n < hedgeTicks || n >= maxIdleTicks {
			t.Errorf("it was asked %d times how far it is", n)
		}
		return s, body, err
	}
	waiting.Provide(d)
	if s, _, err := open(); !errors.Is(err, ErrNoPeer) || !s.Mine() {
		t.Errorf("where no other has it: %v", err)
	} else {
		s.Close(false)
	}
	other.put(blob)
	other.Provide(d)
	until(t, "the other is known", func() bool {
		s := a.Want(t.Context(), d, 0)
		if s == nil {
			return false
		}
		defer s.Close(false)
		return len(s.sources) == 2
	})
	if _, body, err := open(); err != nil || !bytes.Equal(readAll(t, body), blob) {
		t.Errorf("where another has it: %v", err)
	}
}

// A steward that answers late is passed over only until it has.
func TestLateSteward(t *testing.T) {
	f := &freezer{make(chan struct{}), make(chan struct{})}
	a := newMember(t, nil)
	steward := newMember(t, func(o *Options) { o.Wrap = f.wrap }, a.addr())
	until(t, "all known", func() bool { return a.dht.RoutingTable().Size() == 1 && steward.dht.RoutingTable().Size() == 1 })
	close(f.frozen)
	answered := make(chan error, 1)
	go func() {
		_, err := a.ask(t.Context(), steward.host.ID(), question{Op: opFind, Key: nameKey("something")})
		answered <- err
	}()
	until(t, "it is passed over", func() bool { return a.peers.isDown(steward.host.ID()) })
	close(f.thawed)
	if err := <-answered; err != nil || a.peers.isDown(steward.host.ID()) {
		t.Errorf("it has answered: %v, and is passed over: %v", err, a.peers.isDown(steward.host.ID()))
	}
}

// Peers whose disks hang don't have a pull wait for each of them, nor for each
// blob.
func TestHangingPeers(t *testing.T) {
	blobs := []digest.Digest{digest.FromString("one"), digest.FromString("two"), digest.FromString("three"), digest.FromString("four")}
	a := among(t, 4, true, blobs...)
	begun := time.Now()
	for _, d := range blobs {
		var s *Share
		until(t, "the stewards answer", func() bool { s = a.Want(t.Context(), d, 50<<20); return s != nil })
		if _, _, err := s.Open(t.Context(), 0, -1); !errors.Is(err, ErrNoPeer) {
			t.Fatal(err)
		}
	}
	// One of them was 16 s, and so was each.
	if took := time.Since(begun); took > 30*time.Second {
		t.Errorf("the upstream is asked for the fourth blob after %s", took)
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

// A peer that was silent is read from again as soon as it answers.
func TestSilentIsBack(t *testing.T) {
	a := newMember(t, nil)
	f := &freezer{make(chan struct{}), make(chan struct{})}
	b := newMember(t, func(o *Options) { o.Wrap = f.wrap }, a.addr())
	thaw := sync.OnceFunc(func() { close(f.thawed) })
	t.Cleanup(thaw)
	d := b.put([]byte("a blob"))
	b.Provide(d)
	src := source{ID: b.host.ID()}
	until(t, "it is known", func() bool {
		s := a.Want(t.Context(), d, 0)
		if s == nil {
			return false
		}
		defer s.Close(false)
		if len(s.sources) == 1 {
			src = s.sources[0]
		}
		return len(s.sources) == 1
	})
	close(f.frozen)
	a.mute(src)
	if a.good(src) {
		t.Error("it is read from")
	}
	thaw()
	until(t, "it is read from again", func() bool { return a.good(src) })
}
