// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"weir/p2p"
	"weir/proxy/registry"
	"weir/proxy/store"
)

// origin is a registry that counts the bytes of blobs that leave it.
type origin struct {
	*httptest.Server
	order []digest.Digest
	blobs map[digest.Digest][]byte
	sent  atomic.Int64
}

func newOrigin(t testing.TB, sizes ...int) *origin {
	o := &origin{blobs: make(map[digest.Digest][]byte)}
	for i, n := range sizes {
		b := make([]byte, n)
		_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(b)
		o.order = append(o.order, digest.FromBytes(b))
		o.blobs[o.order[i]] = b
	}
	o.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, ok := o.blobs[digest.Digest(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])]
		if !ok {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(countingWriter{w, &o.sent}, r, "", time.Time{}, bytes.NewReader(b))
	}))
	t.Cleanup(o.Close)
	return o
}

type countingWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.n.Add(int64(n))
	return n, err
}

// link is a node's connection to the world: all that it reads, and all that it
// writes, shares a rate each.
type link struct {
	in, out *rate.Limiter
	bytes   atomic.Int64 // that have come in
}

func newLink(perSecond int) *link {
	l := func() *rate.Limiter { return rate.NewLimiter(rate.Limit(perSecond), 64<<10) }
	return &link{in: l(), out: l()}
}

func (l *link) wrap(c net.Conn) net.Conn {
	if l == nil {
		return c
	}
	return limited{c, l}
}

type limited struct {
	net.Conn
	*link
}

func (c limited) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p[:min(len(p), 4<<10)])
	c.bytes.Add(int64(n))
	_ = c.in.WaitN(context.Background(), n)
	return n, err
}

func (c limited) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		part := p[:min(len(p), 4<<10)]
		_ = c.out.WaitN(context.Background(), len(part))
		var k int
		k, err = c.Conn.Write(part)
		n += k
		p = p[k:]
	}
	return n, err
}

// swarmNode is a node with the real store, registry protocol and peers, without
// kernel and runtimes.
type swarmNode struct {
	peers *peers
	url   string
	stop  func()
}

var swarmTestKey = bytes.Repeat([]byte{3}, 32)

func newSwarmNode(t testing.TB, o *origin, l *link, others ...string) *swarmNode {
	t.Helper()
	return newSwarmNodeWith(t, o, l, store.Options{}, others...)
}

func newSwarmNodeWith(t testing.TB, o *origin, l *link, so store.Options, others ...string) *swarmNode {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("SWARM_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &swarmNode{}
	so.Log, so.Changed = log, func(d digest.Digest, kept bool) { n.peers.changed(d, kept) }
	s, err := store.Open(t.TempDir(), so)
	if err != nil {
		t.Fatal(err)
	}
	if len(others) == 0 {
		others = []string{"127.0.0.1:1"}
	}
	if n.peers, err = newPeers(ctx, s, p2p.Options{Listen: "127.0.0.1:0", Peers: others, SwarmKey: swarmTestKey, Log: log, Wrap: l.wrap}); err != nil {
		t.Fatal(err)
	}
	h := registry.New(registry.Options{Store: s, Peers: n.peers, Log: log})
	n.peers.serve(h, func() []byte { return nil })
	tr := o.Client().Transport.(*http.Transport).Clone()
	tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return l.wrap(c), nil
	}
	host := strings.TrimPrefix(o.URL, "https://")
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Host = host
		h.Serve(w, r, registry.Upstream{Host: host, Transport: tr})
	}))
	n.url = srv.URL
	n.stop = sync.OnceFunc(func() {
		cancel()
		n.peers.close()
		srv.CloseClientConnections()
		srv.Close()
		h.Close()
		s.Close()
		tr.CloseIdleConnections()
	})
	t.Cleanup(n.stop)
	return n
}

func (n *swarmNode) addr() string {
	listen := n.peers.Status().Listen[0]
	return "127.0.0.1:" + listen[strings.LastIndex(listen, "/")+1:]
}

// pull gets all blobs of an origin in their order, some at a time, as runtimes
// do.
func (n *swarmNode) pull(o *origin) error {
	slots := make(chan struct{}, 3)
	errs := make(chan error, len(o.blobs))
	for _, d := range o.order {
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			errs <- n.blob(d, o.blobs[d])
		}()
	}
	for range o.blobs {
		if err := <-errs; err != nil {
			return err
		}
	}
	return nil
}

func (n *swarmNode) blob(d digest.Digest, want []byte) error {
	resp, err := http.Get(n.url + "/v2/a/b/blobs/" + d.String())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || !bytes.Equal(got, want)) {
		err = fmt.Errorf("%s: %d bytes of %d, or wrong ones", resp.Status, len(got), len(want))
	}
	return err
}

// newSwarm makes nodes that know each other and have nothing more to say.
func newSwarm(t testing.TB, count, perSecond int, o *origin) (all []*swarmNode) {
	t.Helper()
	var links []*link
	for i := range count {
		l := newLink(perSecond)
		links = append(links, l)
		if i == 0 {
			all = append(all, newSwarmNode(t, o, l))
		} else {
			all = append(all, newSwarmNode(t, o, l, all[0].addr()))
		}
	}
	for _, n := range all {
		for end := time.Now().Add(time.Minute); n.peers.Status().Known < count-1; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("a node knows %d others", n.peers.Status().Known)
			}
		}
	}
	for last, quiet := int64(0), 0; quiet < 10; time.Sleep(50 * time.Millisecond) {
		var now int64
		for _, l := range links {
			now += l.bytes.Load()
		}
		if quiet++; now-last > int64(count)<<8 {
			quiet = 0
		}
		last = now
	}
	return all
}

// burst has many nodes want the same image at the same time. It returns how
// often the image left the registry, and how much of what its link gives the
// last node got.
func burst(t testing.TB, count, scale, perSecond int) (sent, got float64) {
	o := newOrigin(t, scale*(1<<20), scale*(512<<10), scale*(300<<10), scale*(100<<10), scale*(40<<10))
	var size int
	for _, b := range o.blobs {
		size += len(b)
	}
	all := newSwarm(t, count, perSecond, o)
	start := time.Now()
	var wg sync.WaitGroup
	for _, n := range all {
		wg.Go(func() {
			if err := n.pull(o); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got = float64(size) / float64(perSecond) / time.Since(start).Seconds()
	for _, n := range all {
		n.stop()
	}
	return float64(o.sent.Load()) / float64(size), got
}

// Many nodes want the same at the same time: the registry sends it once.
func TestSwarm(t *testing.T) {
	if sent, _ := burst(t, 16, 2, 2<<20); sent > 1.1 {
		t.Errorf("the registry sent %.3f of the image", sent)
	}
}

// BenchmarkSwarm has many nodes get an image over links of 1 MiB/s at the same
// time. SWARM_NODES and SWARM_SCALE make it other numbers of nodes, and other
// sizes: 2 MiB times the scale.
func BenchmarkSwarm(b *testing.B) {
	for b.Loop() {
		sent, got := burst(b, fromEnv(b, "SWARM_NODES", 64), fromEnv(b, "SWARM_SCALE", 8), 1<<20)
		b.ReportMetric(sent, "images-from-upstream")
		b.ReportMetric(100*got, "%-of-the-link")
		if sent > 1.1 || got < 0.8 {
			b.Errorf("the registry sent %.3f of the image; the last node got %.0f %% of what its link gives", sent, 100*got)
		}
	}
}

func fromEnv(t testing.TB, name string, n int) int {
	t.Helper()
	if s := os.Getenv(name); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return n
}

// turncoat is what a member has that gives right blobs, until it turns.
type turncoat struct {
	blobs  map[digest.Digest][]byte
	turned atomic.Bool
	reads  atomic.Int64
}

// Open implements p2p.Content.
func (c *turncoat) Open(_ context.Context, d digest.Digest) (*p2p.Blob, error) {
	b, ok := c.blobs[d]
	if !ok {
		return nil, p2p.ErrNotHere
	}
	c.reads.Add(1)
	if c.turned.Load() {
		b = bytes.Clone(b)
		b[len(b)/2] ^= 1
	}
	return &p2p.Blob{ReadSeekCloser: openBlob{bytes.NewReader(b), io.NopCloser(nil)}, Size: int64(len(b)), Kept: true}, nil
}

// Progress implements p2p.Content.
func (c *turncoat) Progress(d digest.Digest) (arrived, size int64, kept bool, err error) {
	b, ok := c.blobs[d]
	if !ok {
		return 0, 0, false, p2p.ErrNotHere
	}
	return int64(len(b)), int64(len(b)), true, nil
}

// Export implements p2p.Content.
func (*turncoat) Export(string) []byte { return nil }

// Figures implements p2p.Content.
func (*turncoat) Figures() []byte { return nil }

// A member gives each of the others ten good blobs, and is believed. Then it sends wrong
// bytes: one pull breaks off and nothing of it is stored, the others hear of it and have
// theirs, and nothing is read from it any more.
func TestTurncoat(t *testing.T) {
	// Where a machine is busy, a member may take the peer for silent, and read from the registry.
	const members, good, bad, more = 3, 10, 3, 5
	var sizes []int
	for range members * (good + more + bad + more) {
		sizes = append(sizes, 7<<19)
	}
	o := newOrigin(t, sizes...)
	c := &turncoat{blobs: o.blobs}
	all := newSwarm(t, members, 1<<30, o)
	n, err := p2p.New(p2p.Options{Listen: "127.0.0.1:0", Peers: []string{all[0].addr()}, SwarmKey: swarmTestKey, Content: c, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	until := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not yet: %s", what)
			}
		}
	}
	about := func(m *swarmNode) (p p2p.Peer) {
		for _, p = range m.peers.Status().Peers {
			if p.ID == n.ID() {
				return p
			}
		}
		return p2p.Peer{}
	}
	for _, m := range all {
		until("the turncoat is known", func() bool { return m.peers.Status().Known == members })
	}
	until("it knows all", func() bool { return n.Status().Known == members })
	n.ProvideAll(o.order)
	for _, d := range o.order {
		until("its blobs are known", func() bool {
			before := c.reads.Load()
			_, _ = all[0].peers.Get(t.Context(), d, 1) // which is too large for that
			return c.reads.Load() > before
		})
	}
	c.reads.Store(0)
	next := 0
	pull := func(m *swarmNode) error { next++; return m.blob(o.order[next-1], o.blobs[o.order[next-1]]) }
	for _, m := range all {
		for i := 0; i < good || i < good+more && !about(m).Believed; i++ {
			if err := pull(m); err != nil {
				t.Fatal(err)
			}
		}
		if !about(m).Believed {
			t.Fatalf("it isn't believed: %+v", about(m))
		}
	}
	c.turned.Store(true)
	tries := 0
	for pull(all[0]) == nil {
		if tries++; tries > more {
			t.Fatal("the pull of who believed it didn't break off: the test is about nothing")
		}
	}
	next--
	if _, err := all[0].peers.openKept(o.order[next]); err == nil {
		t.Error("wrong bytes are stored")
	}
	if !about(all[0]).Shunned {
		t.Errorf("it isn't shunned: %+v", about(all[0]))
	}
	if err := pull(all[0]); err != nil {
		t.Errorf("the next try: %v", err)
	}
	for _, m := range all[1:] {
		until("the others have heard of it", func() bool { return !about(m).Believed })
		for i := 0; i < more && !about(m).Shunned; i++ {
			if err := pull(m); err != nil {
				t.Errorf("another's pull: %v", err)
			}
		}
		if !about(m).Shunned {
			t.Errorf("one doesn't shun it: %+v", about(m))
		}
	}
	reads := c.reads.Load()
	for _, m := range all {
		for range bad - 1 {
			if err := pull(m); err != nil {
				t.Error(err)
			}
		}
	}
	if now := c.reads.Load(); now != reads {
		t.Errorf("it was read from %d times more", now-reads)
	}
}

// BenchmarkFromPeer has a client of one node get a blob of 256 MiB that another node has,
// which is believed. Throughput and CPU are of all three in one process, and of a client
// without TLS.
func BenchmarkFromPeer(b *testing.B) {
	const size = 256 << 20
	o := newOrigin(b, size, size+1)
	from := newSwarmNode(b, o, nil)
	to := newSwarmNodeWith(b, o, nil, store.Options{MaxBytes: size + 100<<20}, from.addr()) // one of them
	for to.peers.Status().Known == 0 || from.peers.Status().Known == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	for _, d := range o.order {
		if err := from.blob(d, o.blobs[d]); err != nil || !from.peers.store.Has(d) {
			b.Fatalf("it isn't kept: %v", err)
		}
	}
	var first []time.Duration
	next := 0
	get := func() {
		d := o.order[next%2]
		next++
		start := time.Now()
		resp, err := http.Get(to.url + "/v2/a/b/blobs/" + d.String())
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		first = append(first, time.Since(start))
		if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, make([]byte, 256<<10)); err != nil || n+1 != int64(len(o.blobs[d])) {
			b.Fatal(n, err)
		}
	}
	believed := func() bool { p := to.peers.Status().Peers; return len(p) == 1 && p[0].Believed }
	for next < 2 || !believed() {
		get()
	}
	o.sent.Store(0)
	first = nil
	b.SetBytes(size)
	cpu := ownCPU(b)
	for b.Loop() {
		get()
	}
	b.ReportMetric((ownCPU(b)-cpu)/(float64(b.N)*size/(1<<30)), "CPU-s/GiB")
	slices.Sort(first)
	b.ReportMetric(float64(first[len(first)/2])/1e6, "ms-to-first-byte")
	b.ReportMetric(float64(o.sent.Load())/(float64(b.N)*size), "from-upstream")
}

func ownCPU(b *testing.B) (seconds float64) {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
