// SPDX-License-Identifier: Apache-2.0

// Package agent is weir's node agent. It composes the parts, which are packages
// of their own, starts them, and drains and stops them: a redirect listener in
// each network namespace of the node (redirect), the container runtimes whose
// connections come to those (runtimes), the node's CA (trust), the proxy that
// serves the connections, and the state of all that (admin).
//
// The order of things is what keeps the promise that nothing breaks. At start
// the kernel side is attached before /proc is searched, so that no runtime is
// missed; a running runtime is only redirected to probe addresses until it has
// proven to trust the CA. At the end the kernel side is detached first, so that
// new connections go direct, and what is being served is finished.
package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"weir/agent/admin"
	"weir/agent/redirect"
	"weir/agent/registries"
	"weir/agent/runtimes"
	"weir/agent/trust"
	"weir/bpf"
	"weir/p2p"
	"weir/proxy"
	"weir/proxy/registry"
	"weir/proxy/store"
	"weir/proxy/upstream"
)

// Config of an agent. Where it is not said what an empty field means, it has to be set.
type Config struct {
	// DataDir keeps the CA, the store, and the list of what was installed.
	DataDir string
	// RunDir keeps what is true until the next boot.
	RunDir string
	// Cgroup is the cgroup2 directory whose processes are served. Empty means
	// the root of the cgroup2 mount.
	Cgroup string
	// Ports are the destination ports that are redirected.
	Ports []uint16
	// Registries are further registries: HOST or HOST:PORT, or either with
	// =FILE.pem for a CA that the registry's certificate is verified with.
	Registries []string
	// RegistryFile has more of them, one a line. It is read again when it
	// changes.
	RegistryFile string
	// Programs are further executables that pull, each NAME=KIND with the name of a
	// known kind of runtime. They count for the whole process.
	Programs []string
	// RestartRuntimes has runtimes of the node restarted, once and by systemd, that can't
	// trust the CA before.
	RestartRuntimes bool
	// NoLearn has weir learn no registries, and take no notice of those that it has
	// learned.
	NoLearn bool
	// MirrorListen is where a mirror endpoint listens, and ProxyListen a
	// forward proxy; empty means nowhere, and no host means on loopback.
	MirrorListen, ProxyListen string
	// MirrorDefault is the registry of requests to the mirror that name none.
	MirrorDefault string
	// StoreSize bounds the blobs' bytes; 0 means a tenth of the file system.
	StoreSize int64
	// RightsTTL is how long a registry's answer that a client may read a
	// repository is good.
	RightsTTL time.Duration
	// StaleIfError is for how long a registry's last answer is good while it
	// gives no other; 0 means never.
	StaleIfError time.Duration
	// TagTTL is for how long a tag is what it was, without a question to the registry.
	TagTTL registry.TagTTL
	// UpstreamConnections is how many connections to its registry a large blob has at
	// most; 0 means [registry.DefaultUpstreamConnections].
	UpstreamConnections int
	// PeerListen is where peers connect to, HOST:PORT, and Peers are where they
	// are found. Without a SwarmKey, the name of a file, there is no peer
	// traffic at all.
	PeerListen string
	Peers      []string
	SwarmKey   string
	// PeerUpload bounds the bytes per second that are sent to peers; 0 means
	// no bound.
	PeerUpload int64
	// Admin is where status and metrics are served.
	Admin string
	// Version is shown in the status.
	Version string
	Log     *slog.Logger
	// LogLevel is that of Log, to be changed at run time; nil if it can't be.
	LogLevel *slog.LevelVar
}

// Defaults of the configuration.
const (
	DefaultDataDir = "/var/lib/weir"
	DefaultRunDir  = "/run/weir"
	DefaultAdmin   = "127.0.0.1:5050"
	DefaultMirror  = registry.DockerHubName
	DefaultPeers   = ":" + p2p.DefaultPort
)

// DefaultPorts are the ports that registries listen on.
var DefaultPorts = []uint16{443, 80, 5000}

// drainTime is how long running transfers may take to end at a stop. systemd
// waits 90 seconds and Kubernetes 30 before they kill.
const drainTime = 25 * time.Second

// restartWait is how long the agent's end waits for a restart of a runtime.
const restartWait = 20 * time.Second

// cutTime is how long what was cut may take to end.
const cutTime = time.Second

// Agent is a running agent.
type Agent struct {
	conf Config
	log  *slog.Logger

	ctx    context.Context // what runs in the background ends with it
	cancel context.CancelFunc
	wg     sync.WaitGroup // what uses the kernel side until then

	stops []func() // of the parts that have started, in their order

	ca        *trust.CA
	ledger    *trust.Ledger
	regs      registries.List
	adopting  sync.Mutex // the CA is made for other names
	store     *store.Store
	peers     *peers // nil without a swarm key
	ups       upstream.Config
	own       *upstream.Egress // for what is prefetched, and to see what is down
	registry  *registry.Handler
	proxy     *proxy.Proxy
	explicit  []*listener // the mirror, the forward proxy, and what prefetches
	kernel    *bpf.Kernel
	listeners *redirect.Listeners
	runtimes  *runtimes.Runtimes
	others    runtimes.Others
	restarter *runtimes.Restarter // nil if none is to be restarted
	stuck     bool                // what is found out about a runtime doesn't end
	adminL    net.Listener
	metrics   *prometheus.Registry
	admin     *admin.Server
}

// Status returns the agent's present state.
func (a *Agent) Status() admin.Status { return a.admin.Status() }

// Run runs an agent until ctx is done, and then drains and stops it. ready is
// called when it serves. The error is one line that says what to do.
func Run(ctx context.Context, conf Config, ready func(*Agent)) error {
	a := &Agent{conf: conf, log: conf.Log, metrics: prometheus.NewRegistry()}
	if a.log == nil {
		a.log = slog.Default()
	}
	limitMemory(a.log)
	a.ctx, a.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer a.cancel()
	defer a.close()
	if err := a.start(); err != nil {
		return err
	}
	if ready != nil {
		ready(a)
	}
	<-ctx.Done()
	return a.drain()
}

// part starts a part of the agent, and returns what stops it, if there is
// something to stop. It may return that with an error, too.
type part func() (stop func(), err error)

// start starts the parts in their order. close stops them in the reverse order.
func (a *Agent) start() error {
	if os.Geteuid() != 0 {
		return errors.New("weir's agent must run as root: it attaches eBPF programs and enters network namespaces; use sudo, or a privileged container")
	}
	// The first connection that needs the roots would wait for some 150 files to
	// be read.
	go func() { _, _ = x509.SystemCertPool() }()
	for _, p := range []part{
		a.findCgroup,
		a.lockRunDir,
		a.namePrograms,
		a.loadRegistries,
		a.openTrust,
		a.openStore,
		a.listenAdmin,
		a.joinPeers,
		a.openProxy,
		a.listenExplicit,
		a.loadKernel,
		a.openListeners,
		a.openRuntimes,
		a.watch,
		a.redirect,
		a.serveExplicit,
		a.serveAdmin,
	} {
		stop, err := p()
		if stop != nil {
			a.stops = append(a.stops, stop)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// maintain does periodic maintenance: it notices what no event reported.
func (a *Agent) maintain() {
	tidy := time.NewTicker(30 * time.Second)
	defer tidy.Stop()
	for {
		select {
		case <-tidy.C:
			a.runtimes.Reconcile()
			a.listeners.Reconcile()
			a.admin.Sample()
		case <-a.ctx.Done():
			return
		}
	}
}

// follow handles the kernel side's events about processes.
func (a *Agent) follow() {
	for {
		ev, err := a.kernel.Next()
		if err != nil {
			if a.ctx.Err() == nil && !errors.Is(err, os.ErrClosed) {
				a.log.Error("events of processes can't be read any more; restart the agent", "err", err)
			}
			return
		}
		switch ev.Kind {
		case bpf.Exec:
			a.runtimes.Started(ev)
		case bpf.Exit:
			a.runtimes.Ended(ev.PID)
		case bpf.Gone:
			a.listeners.Gone(ev.PID)
		}
	}
}

// serve serves a connection that a redirect listener has accepted.
func (a *Agent) serve(l *redirect.Listener, c *net.TCPConn, t redirect.Admission) {
	origin, err := a.kernel.Origin(c)
	if err != nil {
		// It wasn't redirected: a program has connected to the listener's port.
		_ = c.SetLinger(0)
		c.Close()
		t.Closed()
		return
	}
	if addr := origin.Dst.Addr(); slices.Contains(runtimes.Probes, addr) {
		a.runtimes.AnswerProbe(c, origin.PID, addr)
		t.Closed()
		return
	}
	f := a.flow(l, origin.PID, origin.Netns, origin.Dst)
	f.Direct, f.Closed = t.Direct, t.Closed
	if rt := a.runtimes.Find(origin.PID); rt != nil {
		done := a.runtimes.Carry(rt)
		f.Closed = func() { done(); t.Closed() }
		a.runtimes.Settle(rt)
	}
	a.proxy.Serve(a.ctx, c, f)
}

// flow is what is known of a process's connection.
func (a *Agent) flow(l *redirect.Listener, pid int, netns uint64, dst netip.AddrPort) proxy.Flow {
	f := proxy.Flow{Dst: dst, NetworkID: l.NetworkID, Egress: l.Egress, Client: fmt.Sprintf("pid %d", pid)}
	f.Leave = func(long time.Duration) { a.remark(a.kernel.Leave(netns, dst, long)) }
	f.Want = func() { a.remark(a.kernel.Want(netns, dst)) }
	if rt := a.runtimes.Find(pid); rt != nil {
		f.Client = rt.String()
		f.Trusts = func(_ registry.Known, name string) bool { return a.runtimes.Trusts(rt, name) }
		f.Settings = func(known registry.Known, host string) (upstream.Settings, error) {
			return a.runtimes.Settings(rt, known, host)
		}
		if !a.conf.NoLearn {
			f.Learn = func(host string, ownRoots bool) error {
				defer func() { a.remark(a.kernel.Unleave(netns, dst)) }()
				return a.learn(rt, host, ownRoots)
			}
		}
		f.Unsure = func(host string, unsure bool) { a.runtimes.Unsure(rt, host, unsure) }
		f.Accepted = func() { a.runtimes.Accepted(rt) }
		f.Rejected = func(host string, err error) { a.runtimes.Rejected(rt, host, err) }
	}
	return f
}

// remark logs that the kernel side was not told something. It does without.
func (a *Agent) remark(err error) {
	if err != nil && a.ctx.Err() == nil {
		a.log.Warn("the kernel side does not know a destination", "err", err)
	}
}

// look handles what the kernel side has seen said to ports that aren't redirected,
// and by programs that aren't. A runtime that is passed through teaches registries too:
// once it trusts the CA, it does for those.
func (a *Agent) look() {
	for {
		said, err := a.kernel.NextSaid()
		if err != nil {
			if a.ctx.Err() == nil && !errors.Is(err, os.ErrClosed) {
				a.log.Error("it can't be seen any more which ports registries are at; restart the agent", "err", err)
			}
			return
		}
		if said.Direct && a.runtimes.Find(said.PID) == nil {
			if host, known := a.proxy.Registry(said.Dst, said.Data); known {
				a.others.See(said.PID, said.Comm, host)
			}
			continue
		}
		if l := a.listeners.Find(said.Netns); l != nil {
			a.proxy.Look(a.ctx, a.flow(l, said.PID, said.Netns, said.Dst), said.Data)
		}
	}
}

// drain lets what is served end: new connections go direct from its start.
func (a *Agent) drain() error {
	a.log.Info("stopping: new connections go direct", "finishing", a.proxy.Stats())
	err := a.kernel.Detach()
	a.listeners.CloseAll()
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	for _, l := range a.explicit {
		_ = l.server.Shutdown(ctx)
	}
	if a.proxy.Shutdown(ctx) != nil {
		a.log.Warn("some transfers were cut; runtimes resume them directly", "after", drainTime)
	}
	deadline, _ := ctx.Deadline()
	waitFor(time.Until(deadline), a.listeners.Wait)
	return err
}

// waitFor returns true when wait has returned, and false when that takes longer.
func waitFor(long time.Duration, wait func()) bool {
	done := make(chan struct{})
	go func() { wait(); close(done) }()
	select {
	case <-done:
		return true
	case <-time.After(long):
		return false
	}
}

// close stops the parts that have started, the last one first.
func (a *Agent) close() {
	// Before anything ends that connections are served with.
	if a.kernel != nil {
		_ = a.kernel.Detach()
	}
	a.cancel()
	for _, stop := range slices.Backward(a.stops) {
		stop()
	}
}
