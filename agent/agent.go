// SPDX-License-Identifier: Apache-2.0

// Package agent is weir's node agent. It opens a listener in each network namespace
// of the node, finds the container runtimes whose connections come through it,
// establishes which of them trust the node's CA, and has the proxy carry what
// comes.
//
// The order of things is what keeps the promise that nothing breaks. At start
// the kernel side is attached before /proc is searched, so that no runtime is
// missed; a running runtime is only redirected to probe addresses until it has
// proven to trust the CA. At the end the kernel side is detached first, so that
// new connections go direct, and what runs is finished.
package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"golang.org/x/sys/unix"
	"weir/agent/admin"
	"weir/agent/redirect"
	"weir/agent/registries"
	"weir/agent/runtimes"
	"weir/agent/service"
	"weir/agent/trust"
	"weir/bpf"
	"weir/p2p"
	"weir/proxy"
	"weir/proxy/registry"
	"weir/proxy/store"
	"weir/proxy/upstream"
)

// Config of an agent. Empty fields mean what DefaultConfig has.
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
	// MirrorListen is where a mirror endpoint listens, and ProxyListen a
	// forward proxy; empty means nowhere, and no host means on loopback.
	MirrorListen, ProxyListen string
	// MirrorDefault is the registry of requests to the mirror that name none.
	MirrorDefault string
	// StoreSize bounds the blobs' bytes; 0 means a tenth of the file system.
	StoreSize int64
	// RightsTTL is how long a registry's word that a client may read a
	// repository is good.
	RightsTTL time.Duration
	// StaleIfError is for how long a registry's last answer is good while it
	// gives no other; 0 means never.
	StaleIfError time.Duration
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
}

// Defaults of the configuration.
const (
	DefaultDataDir = "/var/lib/weir"
	DefaultRunDir  = "/run/weir"
	DefaultAdmin   = "127.0.0.1:5050"
	DefaultMirror  = "docker.io"
	DefaultPeers   = ":" + p2p.DefaultPort
)

// DefaultPorts are the ports that registries listen on.
var DefaultPorts = []uint16{443, 80, 5000}

// drainTime is how long running transfers may take to end at a stop. systemd
// waits 90 seconds and Kubernetes 30 before they kill.
const drainTime = 25 * time.Second

// cutTime is how long it may take until nobody serves a transfer that was cut.
const cutTime = time.Second

// Agent is a running agent.
type Agent struct {
	conf Config
	log  *slog.Logger

	ctx    context.Context // what runs in the background ends with it
	cancel context.CancelFunc
	wg     sync.WaitGroup // what uses the kernel side until then

	pidFile   *os.File
	ca        *trust.CA
	ledger    *trust.Ledger
	regs      registries.List
	store     *store.Store
	registry  *registry.Handler
	proxy     *proxy.Proxy
	kernel    *bpf.Kernel
	listeners *redirect.Listeners
	runtimes  *runtimes.Runtimes
	admin     *http.Server
	adminL    net.Listener
	state     *admin.Server
	own       *upstream.Egress         // for what is prefetched, and to see what is down
	explicit  []*listener              // the mirror, the forward proxy, and what prefetches
	peers     *peers                   // nil without a swarm key
	traces    *sdktrace.TracerProvider // nil when nobody wants any
}

// Status returns the agent's present state.
func (a *Agent) Status() admin.Status { return a.state.Status() }

// Run runs an agent until ctx is done, and then drains and stops it. ready is
// called when it serves. The error is one line that says what to do.
func Run(ctx context.Context, conf Config, ready func(*Agent)) error {
	a := &Agent{conf: conf, log: conf.Log}
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

func (a *Agent) start() (err error) {
	if os.Geteuid() != 0 {
		return errors.New("weir's agent must run as root: it attaches eBPF programs and enters network namespaces; use sudo, or a privileged container")
	}
	// The first who needs the roots would wait for some 150 files to be read.
	go func() { _, _ = x509.SystemCertPool() }()
	if a.conf.Cgroup == "" {
		if a.conf.Cgroup, err = bpf.CgroupRoot(); err != nil {
			return err
		}
	}
	if a.pidFile, err = service.Lock(a.conf.RunDir); err != nil {
		return err
	}
	if err := a.regs.Load(a.conf.Registries, a.conf.RegistryFile); err != nil {
		return err
	}
	if err := a.openData(); err != nil {
		return err
	}
	if a.adminL, err = net.Listen("tcp", a.conf.Admin); err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			return fmt.Errorf("%s is in use; stop what listens there, or choose another address with --admin", a.conf.Admin)
		}
		return fmt.Errorf("listening on --admin %s: %w", a.conf.Admin, err)
	}

	options := registry.Options{Store: a.store, RightsTTL: a.conf.RightsTTL, StaleIfError: a.conf.StaleIfError,
		File: filepath.Join(a.conf.DataDir, service.TagsFile), Log: a.log}
	if err := a.joinPeers(); err != nil {
		return err
	}
	if a.peers != nil {
		options.Peers = a.peers
	}
	if a.traces, err = newTraces(a.ctx, a.conf.Version, a.log); err != nil {
		return err
	}
	if a.traces != nil {
		options.Tracer = a.traces.Tracer("weir")
	}
	a.registry = registry.New(options)
	ups := upstream.Config{Roots: a.regs.Roots}
	a.own = ups.NewNodeEgress()
	a.proxy = proxy.New(proxy.Options{Hosts: &a.regs.Hosts, Leaves: a.ca, Registry: a.registry, Node: a.own, Log: a.log})
	if err := a.listenExplicit(ups); err != nil {
		return err
	}
	a.listenPrefetch()
	a.kernel, err = bpf.Load(bpf.Options{
		Cgroup: a.conf.Cgroup,
		Ports:  a.conf.Ports,
		Probes: runtimes.Probes,
		Names:  runtimes.Programs(),
	})
	if err != nil {
		return fmt.Errorf("%w; `weir doctor` tells more", err)
	}
	a.listeners = redirect.New(a.kernel, ups, a.serve, a.log)
	a.runtimes = runtimes.New(a.ctx, runtimes.Options{Kernel: a.kernel, Listeners: a.listeners, Content: a.store, CA: a.ca, Ledger: a.ledger,
		Lasting: trust.LastingRoots(), Registries: a.regs.Names, Ports: a.conf.Ports, RunDir: a.conf.RunDir, Log: a.log})
	shown := admin.Options{Version: a.conf.Version, Cgroup: a.conf.Cgroup, DataDir: a.conf.DataDir, Kernel: a.kernel, Runtimes: a.runtimes,
		Listeners: a.listeners, Registry: a.registry, Registries: &a.regs, Proxy: a.proxy, Store: a.store, Log: a.log}
	if a.peers != nil {
		shown.Peers = a.peers
	}
	a.state = admin.New(a.ctx, shown)
	if err := a.beats(); err != nil {
		return err
	}
	a.wg.Go(a.maintain)
	a.wg.Go(func() { a.regs.Watch(a.ctx, a.ca.Permits, a.log) })
	a.wg.Go(a.follow)
	a.wg.Go(func() { a.listeners.Follow(a.ctx) })
	if err := a.listeners.Enter(os.Getpid()); err != nil {
		return err
	}
	if err := a.runtimes.Seed(a.conf.Cgroup); err != nil {
		return err
	}
	for _, l := range a.explicit {
		go func() { _ = l.server.Serve(l.l) }()
	}
	a.peers.serve(a.registry, a.state.Figures)
	a.admin = &http.Server{Handler: a.state.Handler(), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = a.admin.Serve(a.adminL) }()
	return nil
}

// openData opens what the agent keeps.
func (a *Agent) openData() error {
	if err := os.MkdirAll(a.conf.DataDir, 0o700); err != nil {
		return fmt.Errorf("making --data-dir: %w", err)
	}
	var err error
	a.ca, err = trust.OpenCA(filepath.Join(a.conf.DataDir, "ca"), a.regs.Names(), runtimes.Probes)
	if err != nil {
		return fmt.Errorf("opening the node's CA: %w", err)
	}
	if a.ledger, err = trust.OpenLedger(filepath.Join(a.conf.DataDir, service.LedgerFile)); err != nil {
		return err
	}

	var fs unix.Statfs_t
	if err := unix.Statfs(a.conf.DataDir, &fs); err != nil {
		return fmt.Errorf("looking at the file system of --data-dir: %w", err)
	}
	size := int64(fs.Blocks) * fs.Bsize
	if a.conf.StoreSize == 0 {
		a.conf.StoreSize = size / 10
	}
	a.store, err = store.Open(filepath.Join(a.conf.DataDir, "store"), store.Options{MaxBytes: a.conf.StoreSize, MinFree: size / 20, Log: a.log,
		Changed: func(d digest.Digest, kept bool) { a.peers.changed(d, kept) }})
	if err != nil {
		return fmt.Errorf("opening the store: %w", err)
	}
	return nil
}

// beats starts telling the kernel side that the agent is alive. When that stops,
// or it is out of descriptors, connections go direct.
//
// It is what an idle agent does most of the time. Each of a time.Ticker's ticks
// wakes three threads; timerfd_create(2) needs one.
func (a *Agent) beats() error {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("making the heartbeat's timer: %w", err)
	}
	t := os.NewFile(uintptr(fd), "heartbeat")
	every := unix.NsecToTimespec(bpf.BeatInterval.Nanoseconds())
	if err := unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: every, Value: every}, nil); err != nil {
		t.Close()
		return fmt.Errorf("setting the heartbeat's timer: %w", err)
	}
	a.kernel.Beat()
	context.AfterFunc(a.ctx, func() { t.Close() })
	a.wg.Go(func() { a.beat(t) })
	return nil
}

// beat beats each time that something can be read, until it is closed.
func (a *Agent) beat(timer io.Reader) {
	full, expirations := false, make([]byte, 8)
	for i := 0; ; i++ {
		if _, err := timer.Read(expirations); err != nil {
			return
		}
		if i%2 == 0 && crowded() != full {
			if full = !full; full {
				a.log.Warn("few descriptors are left: new connections go direct until there are more; LimitNOFILE of the unit (ulimit -n) is their bound")
			} else {
				a.log.Info("there are descriptors again: connections are redirected")
			}
		}
		if !full {
			a.kernel.Beat()
		}
	}
}

// maintain does periodic maintenance: it notices what no event told of.
func (a *Agent) maintain() {
	tidy := time.NewTicker(30 * time.Second)
	defer tidy.Stop()
	for {
		select {
		case <-tidy.C:
			a.runtimes.Reconcile()
			a.listeners.Reconcile()
			a.state.Sample()
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
				a.log.Error("no more news of processes; restart the agent", "err", err)
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

// serve carries a connection that came through a listener.
func (a *Agent) serve(d *redirect.Listener, c *net.TCPConn, t redirect.Admission) {
	origin, err := a.kernel.Origin(c)
	if err != nil {
		// Somebody has connected to the listener's port by itself.
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
	f := proxy.Flow{Dst: origin.Dst, Place: d.NetworkID, Egress: d.Egress, Client: fmt.Sprintf("pid %d", origin.PID), Direct: t.Direct, Closed: t.Closed}
	if rt := a.runtimes.Find(origin.PID); rt != nil {
		f.Client = rt.String()
		f.Trusts = func(_ registry.Known, name string) bool { return a.runtimes.Trusts(rt, name) }
		f.Settings = func(known registry.Known, host string) (upstream.Settings, error) {
			return a.runtimes.Settings(rt, known, host)
		}
		f.Accepted = func() { a.runtimes.Accepted(rt) }
		f.Rejected = func(host string, err error) { a.runtimes.Rejected(rt, host, err) }
	}
	a.proxy.Serve(a.ctx, c, f)
}

// drain stops the agent in the order that harms nobody.
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
	waitFor(ctx, a.listeners.Wait)
	return err
}

// waitFor returns true when wait has returned, and false when ctx is done
// before.
func waitFor(ctx context.Context, wait func()) bool {
	done := make(chan struct{})
	go func() { wait(); close(done) }()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// close gives everything up that was opened, whatever it was.
func (a *Agent) close() {
	if a.kernel != nil {
		_ = a.kernel.Detach()
	}
	a.cancel()
	if a.listeners != nil {
		a.listeners.CloseAll()
	}
	if a.kernel != nil {
		_ = a.kernel.StopNews()
	}
	a.wg.Wait()
	// What looks at a runtime's files waits as long as they do (NFS, FUSE).
	ctx, cancel := context.WithTimeout(context.Background(), cutTime)
	idle := a.runtimes == nil || waitFor(ctx, a.runtimes.Wait)
	cancel()
	ctx, cancel = context.WithTimeout(context.Background(), cutTime)
	defer cancel()
	if a.admin != nil && a.admin.Shutdown(ctx) != nil {
		a.admin.Close()
	}
	if a.adminL != nil {
		a.adminL.Close()
	}
	if a.listeners != nil {
		waitFor(ctx, a.listeners.Wait)
	}
	switch {
	case !idle:
		a.log.Warn("a runtime's files can't be looked at to an end; the agent ends without")
	case a.kernel != nil:
		_ = a.kernel.Close()
	}
	if a.own != nil {
		a.own.Close()
	}
	for _, l := range a.explicit {
		l.close()
	}
	if a.registry != nil {
		a.registry.Close()
	}
	if a.traces != nil {
		ctx, cancel := context.WithTimeout(context.Background(), flushTime)
		_ = a.traces.Shutdown(ctx)
		cancel()
	}
	a.peers.close()
	if a.store != nil {
		_ = a.store.Close()
	}
	if a.ledger != nil {
		_ = a.ledger.Close()
	}
	if a.pidFile != nil {
		os.Remove(a.pidFile.Name())
		a.pidFile.Close()
	}
}
