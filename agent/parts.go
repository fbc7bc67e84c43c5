// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"weir/agent/admin"
	"weir/agent/redirect"
	"weir/agent/runtimes"
	"weir/agent/service"
	"weir/agent/systemd"
	"weir/agent/trust"
	"weir/bpf"
	"weir/proxy"
	"weir/proxy/registry"
	"weir/proxy/store"
	"weir/proxy/upstream"
)

func (a *Agent) findCgroup() (stop func(), err error) {
	if a.conf.Cgroup == "" {
		a.conf.Cgroup, err = bpf.CgroupRoot()
	}
	return nil, err
}

func (a *Agent) lockRunDir() (stop func(), err error) {
	f, err := service.Lock(a.conf.RunDir)
	if err != nil {
		return nil, err
	}
	return func() {
		os.Remove(f.Name())
		f.Close()
	}, nil
}

func (a *Agent) namePrograms() (stop func(), err error) {
	if err := runtimes.SetPrograms(a.conf.Programs); err != nil {
		return nil, fmt.Errorf("--program %w", err)
	}
	return nil, nil
}

func (a *Agent) loadRegistries() (stop func(), err error) {
	if err := a.regs.Load(a.conf.Registries, a.conf.RegistryFile); err != nil || a.conf.NoLearn {
		return nil, err
	}
	if err := a.regs.OpenLearned(filepath.Join(a.conf.DataDir, service.LearnedFile)); err != nil {
		a.log.Warn("what was learned of registries is lost", "err", err)
	}
	return nil, nil
}

// openTrust opens the CA, and the list of what was installed.
func (a *Agent) openTrust() (stop func(), err error) {
	if err := os.MkdirAll(a.conf.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("making --data-dir: %w", err)
	}
	a.ca, err = trust.OpenCA(filepath.Join(a.conf.DataDir, "ca"), a.regs.Names(), runtimes.Probes)
	if err != nil {
		return nil, fmt.Errorf("opening the node's CA: %w", err)
	}
	if a.ledger, err = trust.OpenLedger(filepath.Join(a.conf.DataDir, service.LedgerFile)); err != nil {
		return nil, err
	}
	return func() { _ = a.ledger.Close() }, nil
}

func (a *Agent) openStore() (stop func(), err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(a.conf.DataDir, &fs); err != nil {
		return nil, fmt.Errorf("looking at the file system of --data-dir: %w", err)
	}
	size := int64(fs.Blocks) * fs.Bsize
	a.store, err = store.Open(filepath.Join(a.conf.DataDir, "store"), store.Options{
		MaxBytes: cmp.Or(a.conf.StoreSize, size/10), MinFree: size / 20, Log: a.log,
		Changed: func(d digest.Digest, kept bool) { a.peers.changed(d, kept) }})
	if err != nil {
		return nil, fmt.Errorf("opening the store: %w", err)
	}
	return func() { _ = a.store.Close() }, nil
}

// listenAdmin takes the address for status and metrics. What connects there is
// answered once the agent serves.
func (a *Agent) listenAdmin() (stop func(), err error) {
	if a.adminL, err = net.Listen("tcp", a.conf.Admin); err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("%s is in use; stop what listens there, or choose another address with --admin", a.conf.Admin)
		}
		return nil, fmt.Errorf("listening on --admin %s: %w", a.conf.Admin, err)
	}
	return func() { a.adminL.Close() }, nil
}

// openProxy makes what serves connections, and the requests in them.
func (a *Agent) openProxy() (stop func(), err error) {
	traces, err := newTraces(a.ctx, a.conf.Version, a.log)
	if err != nil {
		return nil, err
	}
	options := registry.Options{Store: a.store, RightsTTL: a.conf.RightsTTL, StaleIfError: a.conf.StaleIfError, TagTTL: a.conf.TagTTL,
		UpstreamConnections: a.conf.UpstreamConnections, File: filepath.Join(a.conf.DataDir, service.TagsFile), Metrics: a.metrics, Log: a.log}
	if a.peers != nil {
		options.Peers = a.peers
	}
	if traces != nil {
		options.Tracer = traces.Tracer("weir")
	}
	a.registry = registry.New(options)
	a.ups = upstream.Config{Roots: a.regs.Roots}
	a.own = a.ups.NewNodeEgress()
	a.proxy = proxy.New(proxy.Options{Hosts: &a.regs.Hosts, Leaves: a.ca, Registry: a.registry, Node: a.own, Log: a.log})
	return func() {
		a.own.Close()
		a.registry.Close()
		if traces != nil {
			ctx, cancel := context.WithTimeout(context.Background(), flushTime)
			defer cancel()
			_ = traces.Shutdown(ctx)
		}
	}, nil
}

func (a *Agent) loadKernel() (stop func(), err error) {
	names, guests := runtimes.Programs()
	a.kernel, err = bpf.Load(bpf.Options{
		Cgroup: a.conf.Cgroup,
		Ports:  slices.Concat(a.conf.Ports, a.regs.Ports()),
		Probes: runtimes.Probes,
		Names:  names,
		Guests: guests,
	})
	if err != nil {
		return nil, fmt.Errorf("%w; `weir doctor` says more", err)
	}
	return func() {
		if a.stuck {
			a.log.Warn("a runtime's files can't be read; the agent ends without waiting for them")
			return
		}
		_ = a.kernel.Close()
	}, nil
}

func (a *Agent) openListeners() (stop func(), err error) {
	a.listeners = redirect.New(a.kernel, a.ups, a.serve, a.log)
	return func() { waitFor(cutTime, a.listeners.Wait) }, nil
}

func (a *Agent) openRuntimes() (stop func(), err error) {
	if a.conf.RestartRuntimes {
		if manager, err := systemd.OfNode(); err != nil {
			a.log.Warn("no runtime will be restarted", "because", err)
		} else {
			a.restarter = runtimes.NewRestarter(manager, filepath.Join(a.conf.DataDir, service.RestartsFile), a.log)
		}
	}
	a.runtimes = runtimes.New(a.ctx, runtimes.Options{Kernel: a.kernel, Listeners: a.listeners, Content: a.store, CA: a.ca, Ledger: a.ledger,
		Lasting: trust.LastingRoots(), Registries: a.regs.Directories, Recent: a.regs.Recent, Find: a.regs.Hosts.Find, Ports: a.conf.Ports, Restarter: a.restarter, RunDir: a.conf.RunDir, Log: a.log})
	// What reads a runtime's files waits as long as they do (NFS, FUSE).
	return func() {
		if a.restarter != nil && !waitFor(restartWait, a.restarter.Wait) {
			a.log.Warn("the agent ends while a runtime is restarted: weir will restart none again", "see", service.RestartsFile)
		}
		a.stuck = !waitFor(cutTime, a.runtimes.Wait)
	}, nil
}

// watch starts what runs in the background.
func (a *Agent) watch() (stop func(), err error) {
	shown := admin.Options{Metrics: a.metrics, Version: a.conf.Version, Cgroup: a.conf.Cgroup, DataDir: a.conf.DataDir, Kernel: a.kernel, Runtimes: a.runtimes,
		Listeners: a.listeners, Registry: a.registry, Registries: &a.regs, Proxy: a.proxy, Others: &a.others, Store: a.store, Log: a.log, Level: a.conf.LogLevel}
	if a.peers != nil {
		shown.Peers = a.peers
	}
	if a.restarter != nil {
		shown.Restarts = a.restarter
	}
	a.admin = admin.New(a.ctx, shown)
	stop = func() {
		a.listeners.CloseAll()
		_ = a.kernel.StopEvents()
		a.wg.Wait()
	}
	if err := a.beats(); err != nil {
		return stop, err
	}
	a.wg.Go(a.maintain)
	a.wg.Go(func() {
		a.regs.Watch(a.ctx, func(added ...string) {
			if err := a.adopt(added...); err != nil {
				a.log.Error("the CA can't be made for the registries that were added; they are passed through", "err", err)
			}
		}, a.log)
	})
	a.wg.Go(a.follow)
	a.wg.Go(a.look)
	a.wg.Go(func() { a.listeners.Follow(a.ctx) })
	return stop, nil
}

// redirect finds the processes that are running already, and has the runtimes
// among them redirected once they are known to trust the CA.
func (a *Agent) redirect() (stop func(), err error) {
	if err := a.listeners.Enter(os.Getpid()); err != nil {
		return nil, err
	}
	return nil, a.runtimes.Seed(a.conf.Cgroup)
}

func (a *Agent) serveExplicit() (stop func(), err error) {
	for _, l := range a.explicit {
		go func() { _ = l.server.Serve(l.l) }()
	}
	a.peers.serve(a.registry, a.admin.Figures)
	return nil, nil
}

func (a *Agent) serveAdmin() (stop func(), err error) {
	s := &http.Server{Handler: a.admin.Handler(), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = s.Serve(a.adminL) }()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), cutTime)
		defer cancel()
		if s.Shutdown(ctx) != nil {
			s.Close()
		}
	}, nil
}
