// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/opencontainers/go-digest"
	"weir/p2p"
)

const peersTitle = "A blob from a peer"

// BenchmarkPeer reads a blob from another node's weir, as weir does, from nginx
// on that node, and from a stream of libp2p.
func BenchmarkPeer(b *testing.B) {
	c := newContent(b, 1000)
	size := part(256 << 20)
	d := c.add(b, random(size, 3))
	w := newWorld(b, c)
	key := swarmKey(b)
	other := w.Node()
	agent := w.agent(b, 0, "--swarm-key", key)
	w.fetch(b, w.crane, 1, "https://"+known, blobPath(d), 1, "cold") // into its store
	// The other node connects to nginx at the first one's address.
	addr := w.node.Addr().String()
	nginx := w.node.Spawn("nginx", nginxCommand(0, c.nginx(b, w.CertificateFiles, 1, "0", map[string][]string{"nginx.test": {addr + ":" + nearPort}}))...)
	w.answers(b, "https://"+addr+":"+nearPort)
	hosts, err := other.File("/etc/hosts")
	if err != nil {
		b.Fatal(err)
	}
	other.WriteFile("/etc/hosts", string(hosts)+addr+" nginx.test\n")
	streams := w.node.Spawn("streams", pinned(0, program(b, w.node, "streams"), "client", "peer-server", key, addr, filepath.Join(c.dir, d.String()))...)
	at := waitFor(b, streams, "ready")
	client := program(b, other, "someprogram")
	reads := rounds(4)
	count := strconv.Itoa(reads)
	// before is how often the blob is read before it is measured.
	from := func(pid, before int, args ...string) func() sample {
		return func() sample {
			used := cpuTime(b, pid)
			r := run(b, other, client, 1, args...)
			used = (cpuTime(b, pid) - used) * float64(reads) / float64(reads+before)
			return sample{seconds: r.Seconds, bytes: r.Bytes, first: r.First, cpu: used + r.CPU}
		}
	}
	r := turns(rounds(7),
		from(agent.PID(), 1, "peer", key, "weir", addr, d.String(), count),
		from(nginx.PID(), 0, "fetch", "https://nginx.test:"+nearPort, blobPath(d), count, "warm"),
		from(streams.PID(), 1, "peer", key, "stream", at, d.String(), count))
	s := section{title: peersTitle, text: fmt.Sprintf(`A blob of %s from one network namespace to another, the sender on one processor and the receiver on the other. CPU is
that of both sides.`, sizeText(int64(size))),
		head: []string{"from", "MiB/s", "CPU-s/GiB", "first byte p50, ms", "weir's throughput to it", "weir's CPU to it"}}
	for i, name := range []string{"weir", "nginx over TLS", "a libp2p stream (private network, TLS)"} {
		to, cpu := "", ""
		if i > 0 {
			to, cpu = compare(r[0], r[i], throughput).String(), compare(r[0], r[i], cpuPerGiB).String()
		}
		s.row(name, f0(median(r[i], throughput)), f2(median(r[i], cpuPerGiB)), ms(first(r[i])), to, cpu)
	}
	s.report(b)
}

// swarmKey writes a key for peers.
func swarmKey(b *testing.B) (file string) {
	b.Helper()
	file = filepath.Join(b.TempDir(), "swarm.key")
	if err := os.WriteFile(file, []byte("/key/swarm/psk/1.0.0/\n/base16/\n"+strings.Repeat("5a", 32)+"\n"), 0o600); err != nil {
		b.Fatal(err)
	}
	return file
}

// nothing is the content of a node that has none.
type nothing struct{}

// Open implements p2p.Content.
func (nothing) Open(context.Context, digest.Digest) (*p2p.Blob, error) { return nil, p2p.ErrNotHere }

// Progress implements p2p.Content.
func (nothing) Progress(digest.Digest) (int64, int64, bool, error) {
	return 0, 0, false, p2p.ErrNotHere
}

// Export implements p2p.Content.
func (nothing) Export(string) []byte { return nil }

// Figures implements p2p.Content.
func (nothing) Figures() []byte { return nil }

// peerClient reads a blob a number of times, as weir does from a peer or from
// a stream of libp2p.
func peerClient(args []string) (r fetched, err error) {
	key, err := p2p.ReadSwarmKey(args[0])
	if err != nil {
		return r, err
	}
	count, err := strconv.Atoi(args[4])
	if err != nil {
		return r, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var open func() (io.ReadCloser, error)
	if args[1] == "weir" {
		n, err := p2p.New(p2p.Options{Listen: "127.0.0.1:0", Peers: []string{args[2]}, SwarmKey: key, Content: nothing{}})
		if err != nil {
			return r, err
		}
		defer n.Close()
		open = func() (io.ReadCloser, error) {
			share := n.Want(ctx, digest.Digest(args[3]), 0)
			if share == nil {
				return nil, errors.New("there is no peer to ask")
			}
			if share.Mine() {
				share.Close(false)
				return nil, errors.New("no peer has it")
			}
			body, _, err := share.Open(ctx, 0, -1)
			if err != nil {
				return nil, err
			}
			return &shareBody{body, share}, nil
		}
	} else {
		h, err := streamHost(key)
		if err != nil {
			return r, err
		}
		defer h.Close()
		at, err := peer.AddrInfoFromString(args[2])
		if err != nil {
			return r, err
		}
		if err := h.Connect(ctx, *at); err != nil {
			return r, err
		}
		open = func() (io.ReadCloser, error) { return h.NewStream(ctx, at.ID, "/bench") }
	}
	read := func() (n int64, first time.Time, err error) {
		body, err := open()
		if err != nil {
			return 0, first, err
		}
		defer body.Close()
		var one [1]byte
		if _, err := io.ReadFull(body, one[:]); err != nil {
			return 0, first, err
		}
		first = time.Now()
		n, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, body, make([]byte, 64<<10))
		return n + 1, first, err
	}
	for { // until the peer is known, and the connection there
		if _, _, err = read(); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return r, err
		case <-time.After(50 * time.Millisecond):
		}
	}
	used, start := ownCPU(), time.Now()
	for range count {
		asked := time.Now()
		n, first, err := read()
		if err != nil {
			return r, err
		}
		r.Bytes += n
		r.First = append(r.First, first.Sub(asked).Seconds())
	}
	r.Seconds, r.CPU = time.Since(start).Seconds(), ownCPU()-used
	return r, nil
}

// shareBody is what a share gives, and the share.
type shareBody struct {
	io.ReadCloser
	share *p2p.Share
}

// Close implements io.Closer.
func (s *shareBody) Close() error {
	defer s.share.Close(false)
	return s.ReadCloser.Close()
}

// streamHost makes a host of libp2p as weir does, but with libp2p's own TCP
// transport.
func streamHost(key []byte) (host.Host, error) {
	priv, public, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, err
	}
	id, err := peer.IDFromPublicKey(public)
	if err != nil {
		return nil, err
	}
	known, err := pstoremem.NewPeerstore()
	if err == nil {
		err = errors.Join(known.AddPrivKey(id, priv), known.AddPubKey(id, public))
	}
	if err != nil {
		return nil, err
	}
	events := eventbus.NewBus()
	net, err := swarm.NewSwarm(id, known, events)
	if err != nil {
		return nil, err
	}
	h, err := basichost.NewHost(net, &basichost.HostOpts{EventBus: events})
	if err != nil {
		return nil, err
	}
	muxers := []upgrader.StreamMuxer{{ID: yamux.ID, Muxer: yamux.DefaultTransport}}
	secure, err := libp2ptls.New(libp2ptls.ID, priv, muxers)
	if err != nil {
		return nil, err
	}
	up, err := upgrader.New([]sec.SecureTransport{secure}, muxers, key, &network.NullResourceManager{}, nil)
	if err != nil {
		return nil, err
	}
	transport, err := tcp.NewTCPTransport(up, &network.NullResourceManager{}, nil)
	if err == nil {
		err = net.AddTransport(transport)
	}
	if err != nil {
		return nil, err
	}
	h.Start()
	return h, nil
}

// peerServer sends a file by streams of libp2p.
func peerServer(args []string) error {
	key, err := p2p.ReadSwarmKey(args[0])
	if err != nil {
		return err
	}
	h, err := streamHost(key)
	if err != nil {
		return err
	}
	at, err := ma.NewMultiaddr("/ip4/" + args[1] + "/tcp/5054")
	if err == nil {
		err = h.Network().Listen(at)
	}
	if err != nil {
		return err
	}
	h.SetStreamHandler("/bench", func(s network.Stream) {
		defer s.Close()
		f, err := os.Open(args[2])
		if err != nil {
			_ = s.Reset()
			return
		}
		defer f.Close()
		_, _ = io.CopyBuffer(struct{ io.Writer }{s}, struct{ io.Reader }{f}, make([]byte, 256<<10))
	})
	fmt.Printf("%s/p2p/%s\nready\n", at, h.ID())
	select {}
}
