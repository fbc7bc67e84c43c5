// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multihash"
	"github.com/opencontainers/go-digest"
	"weir/p2p"
	"weir/test/lab"
)

// Faults among peers: a new image each round, which all nodes pull at the same
// time while something breaks at a random moment. No pull of a node that isn't
// broken itself may fail. WEIR_FAULT_PULLS is how many pulls each test makes
// (`make soak`: 100).

type faultySwarm struct {
	*world
	t        *testing.T
	nodes    []*lab.Node
	agents   []*lab.Agent
	runtimes []*lab.Containerd
	pulls    int
}

func newFaultySwarm(t *testing.T, count int) *faultySwarm {
	s := &faultySwarm{t: t, world: newWorld(t)}
	s.nodes, s.agents = cluster(t, s.world, count)
	for i, n := range s.nodes {
		c := n.Containerd()
		s.agents[i].Runtime(c.PID())
		s.runtimes = append(s.runtimes, c)
		n.Shape(100)
	}
	return s
}

// rounds calls f until so many pulls have been made as are wanted.
func (s *faultySwarm) rounds(f func(ref string, im lab.Pushed)) {
	s.t.Helper()
	want := fromEnv(s.t, "WEIR_FAULT_PULLS", 4)
	for i := 0; s.pulls < want; i++ {
		ref := fmt.Sprintf("acme/faulty:%d", i)
		f(ref, s.hub.Push(ref, lab.Image{Layers: []int{8 << 20, 5 << 20, 200_000}, Seed: uint64(1000 + i)}))
	}
	s.t.Logf("%d pulls", s.pulls)
}

// start has nodes begin to pull an image. What it returns waits for the end and
// fails the test for each pull that fails, or, for those whose number is in
// broken, tries again.
func (s *faultySwarm) start(ref string, im lab.Pushed, who []int) (wait func(broken ...int)) {
	errs := make([]chan error, len(who))
	for k, i := range who {
		errs[k] = make(chan error, 1)
		go func() { errs[k] <- s.runtimes[i].TryPull(ref) }()
	}
	return func(broken ...int) {
		s.t.Helper()
		for k, i := range who {
			err := <-errs[k]
			isBroken := false
			for _, b := range broken {
				isBroken = isBroken || b == i
			}
			switch {
			case isBroken && err != nil:
				// containerd 1.6 doesn't repeat a request that was cut before its
				// answer began; whoever wanted the image tries again.
				s.t.Logf("the broken node's own pull of %s: %v", ref, err)
				s.runtimes[i].Pull(ref)
			case err != nil:
				s.t.Errorf("node %d: pull of %s: %v", i, ref, err)
				continue
			}
			if !isBroken {
				s.pulls++
			}
			s.runtimes[i].Same(ref, im)
			s.runtimes[i].Remove(ref, im)
		}
	}
}

// begun waits until a node gets a blob.
func begun(t testing.TB, a *lab.Agent) {
	t.Helper()
	if err := lab.Eventually(nil, func(ctx context.Context) error {
		// Not by `weir status`, whose start may take as long as the blob.
		s, err := a.AskStatus(ctx)
		if err != nil {
			return err
		}
		if s.Store.Running == 0 {
			return errors.New("not begun")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// signalFetcher has node 0 begin to get an image, the others follow it, and
// signals its agent in the middle of that.
func (s *faultySwarm) signalFetcher(ref string, im lab.Pushed, sig syscall.Signal) (first, others func(broken ...int)) {
	s.t.Helper()
	first = s.start(ref, im, []int{0})
	begun(s.t, s.agents[0])
	others = s.start(ref, im, all(len(s.nodes))[1:])
	someTime()
	s.agents[0].Signal(sig)
	return first, others
}

// someTime is the fault's moment, which nothing depends on.
func someTime() { time.Sleep(rand.N(700 * time.Millisecond)) }

// restart starts agents again that were killed, and waits until they are known.
func (s *faultySwarm) restart(who ...int) {
	s.t.Helper()
	for _, i := range who {
		s.agents[i].Kill()
		s.agents[i].Start()
	}
	s.known(len(s.nodes) - 1)
}

func (s *faultySwarm) known(count int) {
	s.t.Helper()
	for i, a := range s.agents {
		if err := lab.Eventually(nil, func(context.Context) error {
			if n := len(a.Status().Peers.Peers); n < count {
				return fmt.Errorf("node %d has %d peers, want %d", i, n, count)
			}
			return nil
		}); err != nil {
			s.t.Fatal(err)
		}
	}
}

func all(count int) (who []int) {
	for i := range count {
		who = append(who, i)
	}
	return who
}

// The node that fetches, and that others read from, is killed.
func TestFaultFetcherDies(t *testing.T) {
	t.Parallel()
	s := newFaultySwarm(t, 5)
	s.rounds(func(ref string, im lab.Pushed) {
		first, others := s.signalFetcher(ref, im, syscall.SIGKILL)
		others()
		first(0)
		s.restart(0)
	})
}

// A steward of the largest layer is killed.
func TestFaultStewardDies(t *testing.T) {
	t.Parallel()
	s := newFaultySwarm(t, 5)
	s.rounds(func(ref string, im lab.Pushed) {
		steward := s.steward(im.Layers[0])
		var others []int
		for i := range 5 {
			if i != steward {
				others = append(others, i)
			}
		}
		wait := s.start(ref, im, others)
		someTime()
		s.agents[steward].Signal(syscall.SIGKILL)
		wait()
		s.restart(steward)
	})
}

// steward is the node that is closest to a digest.
func (s *faultySwarm) steward(d digest.Digest) int {
	s.t.Helper()
	number := make(map[peer.ID]int)
	var ids []peer.ID
	for i, a := range s.agents {
		id, err := peer.Decode(a.Status().Peers.ID)
		if err != nil {
			s.t.Fatal(err)
		}
		number[id] = i
		ids = append(ids, id)
	}
	mh, err := multihash.FromHexString("1220" + d.Encoded())
	if err != nil {
		s.t.Fatal(err)
	}
	return number[kb.SortClosestPeers(ids, kb.ConvertKey(string(mh)))[0]]
}

// A quarter of the nodes are killed.
func TestFaultQuarterDies(t *testing.T) {
	t.Parallel()
	s := newFaultySwarm(t, 8)
	s.rounds(func(ref string, im lab.Pushed) {
		wait := s.start(ref, im, all(8))
		someTime()
		dead := rand.Perm(8)[:2]
		for _, i := range dead {
			s.agents[i].Signal(syscall.SIGKILL)
		}
		wait(dead...)
		s.restart(dead...)
	})
}

// The network between the nodes parts for 10 seconds.
func TestFaultPartition(t *testing.T) {
	t.Parallel()
	s := newFaultySwarm(t, 8)
	s.rounds(func(ref string, im lab.Pushed) {
		wait := s.start(ref, im, all(8))
		someTime()
		var side []*lab.Node
		for _, i := range rand.Perm(8)[:4] {
			side = append(side, s.nodes[i])
		}
		mend := s.Part(side...)
		parted := time.After(10 * time.Second)
		wait()
		// One that begins while the network is parted.
		again := ref + "-again"
		im = s.hub.Push(again, lab.Image{Layers: []int{5 << 20}, Seed: rand.Uint64() >> 8})
		s.start(again, im, all(8))()
		<-parted
		mend()
		s.known(len(s.nodes) - 1)
	})
}

// The node that others read from stalls, without closing.
func TestFaultStall(t *testing.T) {
	t.Parallel()
	s := newFaultySwarm(t, 5)
	s.rounds(func(ref string, im lab.Pushed) {
		first, others := s.signalFetcher(ref, im, syscall.SIGSTOP)
		others()
		s.agents[0].Signal(syscall.SIGCONT)
		first()
		s.known(len(s.nodes) - 1)
	})
}

// A member says that it has everything, and sends something else.
func TestFaultWrongBytes(t *testing.T) {
	t.Parallel()
	s := newFaultySwarm(t, 5)
	liar := s.Node()
	liar.WriteFile("/etc/weir.key", fmt.Sprintf(swarmKey, strings.Repeat("5a", 32)))
	bin := clientNamed(t, "liar")
	kinds := []string{"wrong", "short", "long", "cut"}
	round := rand.IntN(len(kinds))
	s.rounds(func(ref string, im lab.Pushed) {
		// Each time a new peer, which no peer shuns yet.
		args := []string{bin, "client", "liar", "/etc/weir.key", kinds[round%len(kinds)], s.nodes[0].Addr().String()}
		round++
		for i, d := range im.Layers {
			args = append(args, fmt.Sprintf("%s=%d", d, im.Sizes[i]))
		}
		p := liar.Spawn("liar", args...)
		p.Says("told")
		s.start(ref, im, all(5))()
		if log := p.Log(1 << 20); !strings.Contains(log, "lied") {
			t.Errorf("no node read from the liar: %s", log)
		}
		p.Kill()
		s.known(len(s.nodes) - 1)
	})
}

// A node's disk is full, or gets full.
func TestFaultFullDisk(t *testing.T) {
	t.Parallel()
	s := newFaultySwarm(t, 5)
	s.agents[0].Stop()
	s.nodes[0].Run("mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", "/var/lib/weir")
	s.agents[0].Start()
	s.agents[0].Runtime(s.runtimes[0].PID())
	s.known(len(s.nodes) - 1)
	s.rounds(func(ref string, im lab.Pushed) {
		first := s.start(ref, im, []int{0})
		others := s.start(ref, im, all(5)[1:])
		begun(s.t, s.agents[0])
		_, _ = s.nodes[0].Output("dd", "if=/dev/zero", "of=/var/lib/weir/fill", "bs=1M") // until it is full
		others()
		first()
		s.nodes[0].Run("rm", "-f", "/var/lib/weir/fill")
	})
}

// lie is a member that says it has what it is told of, and sends something
// else.
func lie(keyFile, kind, other string, blobs []string) error {
	key, err := p2p.ReadSwarmKey(keyFile)
	if err != nil {
		return err
	}
	l := &liar{kind: kind, sizes: make(map[digest.Digest]int64)}
	var ds []digest.Digest
	for _, b := range blobs {
		d, size, _ := strings.Cut(b, "=")
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil {
			return err
		}
		l.sizes[digest.Digest(d)] = n
		ds = append(ds, digest.Digest(d))
	}
	n, err := p2p.New(p2p.Options{Listen: ":" + p2p.DefaultPort, Peers: []string{other}, SwarmKey: key, Content: l, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	for n.Status().Known < 5 {
		time.Sleep(10 * time.Millisecond)
	}
	for _, d := range ds {
		n.Provide(d)
	}
	time.Sleep(2 * time.Second) // the stewards are told in the background
	fmt.Println("told")
	select {}
}

type liar struct {
	kind  string
	sizes map[digest.Digest]int64
	once  sync.Once
}

// Open implements p2p.Content.
func (l *liar) Open(_ context.Context, d digest.Digest) (*p2p.Blob, error) {
	size, ok := l.sizes[d]
	if !ok {
		return nil, p2p.ErrNotHere
	}
	l.once.Do(func() { fmt.Println("lied") })
	switch l.kind {
	case "short":
		size--
	case "long":
		size += 1000
	}
	b := bytes.NewReader(make([]byte, size))
	if l.kind == "cut" {
		return &p2p.Blob{ReadSeekCloser: &cutReader{b, 100_000}, Size: size, Kept: true}, nil
	}
	return &p2p.Blob{ReadSeekCloser: struct {
		io.ReadSeeker
		io.Closer
	}{b, io.NopCloser(nil)}, Size: size, Kept: true}, nil
}

// Progress implements p2p.Content.
func (l *liar) Progress(d digest.Digest) (int64, int64, bool, error) {
	if size, ok := l.sizes[d]; ok {
		return size, size, true, nil
	}
	return 0, 0, false, p2p.ErrNotHere
}

// Export implements p2p.Content.
func (*liar) Export(string) []byte { return nil }

// Figures implements p2p.Content.
func (*liar) Figures() []byte { return nil }

// cutReader breaks off.
type cutReader struct {
	io.ReadSeeker
	left int
}

func (c *cutReader) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.ReadSeeker.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

func (*cutReader) Close() error { return nil }
