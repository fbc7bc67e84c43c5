// SPDX-License-Identifier: Apache-2.0

// Package p2p makes many nodes one cache: it finds peers, tells them what this
// node has, has one node fetch a blob for all that want it at the same time,
// and carries blobs from node to node.
//
// Peers are the holders of one swarm key. A libp2p host (TCP, TLS 1.3, in a
// private network of that key) carries the control traffic: a Kademlia DHT in
// which each node provides the digests that it holds, and the leases. Blobs go
// over HTTP and TLS 1.3 with the same identities on the same port, without the
// second encryption of libp2p's private networks.
//
// A blob's stewards are the peers closest to it in the DHT. A node that wants a
// blob asks the closest of them that answers. The first is told to fetch it,
// each later one to read it from a node that has it or is getting it, and is a
// source itself from then on. The node with the fewest readers comes first, so
// the readers of a blob form a chain rather than a bush, in which each node
// receives once and sends once. All that is soft state: a steward that is
// silent is skipped, and a node without a source goes to the upstream.
//
// Nothing that a peer sends is trusted. A blob is good when its digest is,
// sizes and counts are bounded, and credentials never get here.
package p2p

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	leveldb "github.com/ipfs/go-ds-leveldb"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p-kad-dht/records"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/pnet"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/gologshim"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/connmgr"
	libp2pswarm "github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	ma "github.com/multiformats/go-multiaddr"
	"golang.org/x/time/rate"
)

// Options of a node. Content and SwarmKey are required.
type Options struct {
	// Listen is where peers connect to, HOST:PORT; no host means all addresses.
	Listen string
	// Peers are where others are found: HOST:PORT, or HOST for the same port.
	// A name stands for all addresses that it resolves to. When there are
	// none, peers are found on the local network by multicast DNS.
	Peers []string
	// SwarmKey is what makes a peer a peer, see [ReadSwarmKey].
	SwarmKey []byte
	// IdentityFile keeps the node's private key. It is made when it isn't
	// there. Empty means a new identity each time.
	IdentityFile string
	// Content is what the node has.
	Content Content
	// UploadLimit bounds the bytes per second that are sent to peers; 0 means
	// no bound.
	UploadLimit int64
	// Wrap, if it isn't nil, gets each connection before anything is sent on
	// it.
	Wrap func(net.Conn) net.Conn
	Log  *slog.Logger // nil means slog.Default()

	next time.Duration // 0 means nextTime
}

// DefaultPort is the port that peers listen on.
const DefaultPort = "5053"

// Parameters of the DHT. Those of IPFS are for a network of strangers that
// come and go; here the nodes are few, near, and known to each other.
const (
	// bucketSize is so large that up to about a hundred nodes all know each
	// other, and agree on everything without a question.
	bucketSize = 64
	// replicas is how many peers hold a provider record. The stewards, which
	// are asked, are fewer, so that one that comes anew finds most of what it
	// should know with its neighbours.
	replicas = 8
	// reprovide is how often each record is written again. Records are kept
	// in memory, so this is how long a restarted steward may know less.
	reprovide = time.Hour
	stewards  = 3
	// When there are manyConns connections, those that matter least are closed
	// until there are fewConns.
	fewConns, manyConns = 400, 500
)

// Node is this node among its peers.
type Node struct {
	opts     Options
	log      *slog.Logger
	host     host.Host
	dht      *dht.IpfsDHT
	records  *leveldb.Datastore
	identity *libp2ptls.Identity
	secret   []byte // proves membership on transfer connections
	ledger   *ledger
	client   *http.Client
	server   *http.Server
	incoming *queue
	upload   *rate.Limiter
	serving  *serving
	peers    *reputation
	answers  answers
	provided *provided
	regions  regions
	intake   meter

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// New starts a node and begins to look for peers. Close it.
func New(o Options) (_ *Node, err error) {
	n := &Node{opts: o, log: o.Log, ledger: newLedger(), peers: newReputation(), serving: newServing()}
	if n.log == nil {
		n.log = slog.Default()
	}
	n.opts.next = cmp.Or(o.next, nextTime)
	if o.UploadLimit > 0 {
		n.upload = rate.NewLimiter(rate.Limit(o.UploadLimit), max(int(o.UploadLimit/10), sendSize))
	}
	priv, err := identity(o.IdentityFile)
	if err != nil {
		return nil, err
	}
	if n.identity, err = libp2ptls.NewIdentity(priv); err != nil {
		return nil, fmt.Errorf("making the node's peer certificate: %w", err)
	}
	if n.secret, err = transferSecret(o.SwarmKey); err != nil {
		return nil, err
	}
	addrs, err := listenAddrs(o.Listen)
	if err != nil {
		return nil, err
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.incoming = newQueue(n.ctx)
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	gologshim.SetDefaultHandler(quiet{n.log.With("component", "libp2p").Handler()})
	if err := n.newHost(priv, addrs); err != nil {
		return nil, err
	}
	if err := n.join(); err != nil {
		return nil, err
	}
	n.serveTransfers()
	n.client = n.newClient()
	n.discover()
	return n, nil
}

// newHost makes the node's libp2p host, and listens. It is put together here
// from the parts that weir uses: libp2p.New brings the code of all transports
// along, a fifth of the binary.
func (n *Node) newHost(priv crypto.PrivKey, addrs []ma.Multiaddr) error {
	// Many nodes may stand behind one address.
	manager, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.DefaultLimits.AutoScale()), rcmgr.WithLimitPerSubnet(
		[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: 512}}, []rcmgr.ConnLimitPerSubnet{{PrefixLength: 128, ConnCount: 512}}))
	if err != nil {
		return fmt.Errorf("bounding the resources of peers: %w", err)
	}
	conns, err := connmgr.NewConnManager(fewConns, manyConns)
	if err != nil {
		return err
	}
	id, err := peer.IDFromPrivateKey(priv)
	if err != nil {
		return err
	}
	known, err := pstoremem.NewPeerstore()
	if err != nil {
		return err
	}
	if err := errors.Join(known.AddPrivKey(id, priv), known.AddPubKey(id, priv.GetPublic())); err != nil {
		return err
	}
	events := eventbus.NewBus()
	net, err := libp2pswarm.NewSwarm(id, known, events, libp2pswarm.WithResourceManager(manager))
	if err != nil {
		return err
	}
	// From here on the host has all of it, and closes it.
	h, err := basichost.NewHost(net, &basichost.HostOpts{EventBus: events, ConnManager: conns, UserAgent: "weir"})
	if err != nil {
		return err
	}
	n.host = h
	muxers := []upgrader.StreamMuxer{{ID: yamux.ID, Muxer: yamux.DefaultTransport}}
	secure, err := libp2ptls.New(libp2ptls.ID, priv, muxers)
	if err != nil {
		return err
	}
	up, err := upgrader.New([]sec.SecureTransport{secure}, muxers, n.opts.SwarmKey, manager, nil)
	if err != nil {
		return err
	}
	tcp, err := newTransport(n, up, manager)
	if err != nil {
		return err
	}
	if err := net.AddTransport(tcp); err != nil {
		return err
	}
	if err := net.Listen(addrs...); err != nil {
		return fmt.Errorf("listening for peers on %s: %w; choose another address with --peer-listen", n.opts.Listen, err)
	}
	h.Start()
	return nil
}

// join makes the node's host a member of the DHT and a steward.
func (n *Node) join(more ...dht.Option) (err error) {
	// In memory, and no more of it than a node's records need. Records are written
	// again and again, and each time takes room until the buffer is full.
	n.records, err = leveldb.NewDatastore("", &leveldb.Options{WriteBuffer: 64 << 10, BlockCacheCapacity: 128 << 10})
	if err != nil {
		return err
	}
	if n.dht, err = newDHT(n.host, n.records, more...); err != nil {
		return fmt.Errorf("starting the DHT: %w", err)
	}
	n.provided = newProvided()
	n.wg.Go(n.keepProviding)
	n.host.Network().Notify(&network.NotifyBundle{
		ConnectedF: func(_ network.Network, c network.Conn) { n.peers.up(c.RemotePeer()) },
		DisconnectedF: func(net network.Network, c network.Conn) {
			if net.Connectedness(c.RemotePeer()) != network.Connected {
				n.peers.down(c.RemotePeer())
				n.ledger.lost(c.RemotePeer())
			}
		},
	})
	n.host.SetStreamHandler(leaseProtocol, n.answerLease)
	return nil
}

// quiet keeps libp2p's chatter out of the log. What it warns of are single
// connections that come to nothing, which matter only to those who look for
// something.
type quiet struct{ slog.Handler }

// Enabled implements slog.Handler.
func (h quiet) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelError || l == slog.LevelWarn && h.Handler.Enabled(ctx, slog.LevelDebug)
}

// WithAttrs implements slog.Handler.
func (h quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{h.Handler.WithAttrs(attrs)} }

// WithGroup implements slog.Handler.
func (h quiet) WithGroup(name string) slog.Handler { return quiet{h.Handler.WithGroup(name)} }

func newDHT(h host.Host, store *leveldb.Datastore, more ...dht.Option) (*dht.IpfsDHT, error) {
	return dht.New(h, append(more,
		dht.ProtocolPrefix("/weir"),
		dht.Mode(dht.ModeServer),
		dht.BucketSize(bucketSize),
		dht.DisableValues(),
		dht.ProviderDatastore(store),
		dht.ProviderManagerOpts(records.ProvideValidity(2*reprovide+30*time.Minute), records.CleanupInterval(reprovide/2)))...)
}

// Close leaves the swarm and waits for what runs.
func (n *Node) Close() {
	n.cancel()
	if n.server != nil {
		n.server.Close()
	}
	if n.client != nil {
		n.client.CloseIdleConnections()
	}
	var errs []error
	if n.dht != nil {
		errs = append(errs, n.dht.Close())
	}
	if n.host != nil {
		errs = append(errs, n.host.Close())
	}
	n.wg.Wait()
	if n.records != nil {
		errs = append(errs, n.records.Close())
	}
	if err := errors.Join(errs...); err != nil {
		n.log.Debug("leaving the swarm", "err", err)
	}
}

// ID is the node's name among its peers.
func (n *Node) ID() string { return n.host.ID().String() }

// ReadSwarmKey reads a key in the format of libp2p's private networks: the
// lines /key/swarm/psk/1.0.0/, /base16/ and 64 hexadecimal digits.
func ReadSwarmKey(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the swarm key: %w", err)
	}
	key, err := pnet.DecodeV1PSK(bytes.NewReader(b))
	if err != nil || len(key) != 32 {
		// The library's error may show what is in the file.
		return nil, fmt.Errorf("%s is no swarm key: it takes three lines, /key/swarm/psk/1.0.0/, /base16/ and 64 hexadecimal digits, such as `openssl rand -hex 32` prints", file)
	}
	return key, nil
}

// identity reads the node's private key, or makes it.
func identity(file string) (crypto.PrivKey, error) {
	if file != "" {
		b, err := os.ReadFile(file)
		if err == nil {
			if key, err := crypto.UnmarshalPrivateKey(b); err == nil {
				return key, nil
			}
			return nil, fmt.Errorf("%s is not a peer's identity; remove it to get a new one", file)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("reading the node's peer identity: %w", err)
		}
	}
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil || file == "" {
		return key, err
	}
	b, err := crypto.MarshalPrivateKey(key)
	if err != nil {
		return nil, err
	}
	if err := renameio.WriteFile(file, b, 0o600, renameio.WithTempDir(filepath.Dir(file))); err != nil {
		return nil, fmt.Errorf("keeping the node's peer identity: %w", err)
	}
	return key, nil
}

// listenAddrs turns HOST:PORT into what libp2p listens on.
func listenAddrs(listen string) ([]ma.Multiaddr, error) {
	hostname, port, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, fmt.Errorf("--peer-listen %s: %w; write HOST:PORT", listen, err)
	}
	if p, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, fmt.Errorf("--peer-listen %s: %q is not a port: %w", listen, port, err)
	} else {
		port = strconv.FormatUint(p, 10)
	}
	var addrs []ma.Multiaddr
	for _, ip := range map[bool][]string{true: {"0.0.0.0", "::"}, false: {hostname}}[hostname == ""] {
		proto := "ip4"
		if strings.Contains(ip, ":") {
			proto = "ip6"
		}
		a, err := ma.NewMultiaddr("/" + proto + "/" + ip + "/tcp/" + port)
		if err != nil {
			return nil, fmt.Errorf("--peer-listen %s: %w; write an address, not a name", listen, err)
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

// Status is what there is to say about a node and its peers.
type Status struct {
	ID     string   `json:"id"`
	Listen []string `json:"listen"`
	Peers  []Peer   `json:"peers"`
	// Known are the peers in the routing table of the DHT.
	Known int `json:"known"`
	// Sent are the bytes of blobs sent to peers, Sending the blobs that are
	// being sent just now.
	Sent    int64 `json:"sent_bytes"`
	Sending int   `json:"sending"`
	// Refused are requests for blobs that came above the bounds.
	Refused int64 `json:"refused"`
	// Unauthenticated are connections of those without the swarm key.
	Unauthenticated int64 `json:"unauthenticated"`
}

// Peer is a connected peer.
type Peer struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	// Received are the bytes of blobs that came from it.
	Received int64 `json:"received_bytes"`
	// Believed says that its bytes are passed on before all are verified, and Shunned
	// that nothing is read from it.
	Believed bool `json:"believed,omitempty"`
	Shunned  bool `json:"shunned,omitempty"`
}

// Status returns the node's present state.
func (n *Node) Status() Status {
	s := Status{ID: n.ID(), Peers: []Peer{}, Known: n.dht.RoutingTable().Size(), Sent: n.serving.sent.Load(), Sending: n.serving.running(), Refused: n.serving.refused.Load(), Unauthenticated: n.serving.unauthenticated.Load()}
	for _, a := range n.host.Network().ListenAddresses() {
		s.Listen = append(s.Listen, a.String())
	}
	for _, p := range n.host.Network().Peers() {
		conns := n.host.Network().ConnsToPeer(p)
		if len(conns) == 0 {
			continue
		}
		s.Peers = append(s.Peers, Peer{p.String(), hostPort(conns[0].RemoteMultiaddr()), n.peers.received(p), n.peers.believed(p), n.peers.shunned(p)})
	}
	return s
}

// Ready says whether there is any peer to ask.
func (n *Node) Ready() bool { return n.dht.RoutingTable().Size() > 0 }

// addrsOf are the TCP addresses at which a peer may be reached.
func (n *Node) addrsOf(p peer.ID) []string {
	var all []string
	for _, a := range n.host.Peerstore().Addrs(p) {
		if hp := hostPort(a); hp != "" {
			all = append(all, hp)
		}
	}
	return all
}
