// SPDX-License-Identifier: Apache-2.0

// Package runtimes finds the container runtimes of a node and establishes, for
// each process, whether it trusts the node's CA and for which registries.
//
// A process that starts while the agent is there finds the CA where it reads its
// roots, before it can have verified anything: trust by construction. One that was
// running before proves it, by a pull from a probe address. Until it is known, a
// runtime is passed through; and it is again when it refuses a certificate.
package runtimes

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2/expirable"
	"golang.org/x/sync/semaphore"
	"weir/agent/procfs"
	"weir/agent/trust"
	"weir/bpf"
	"weir/proxy/registry"
)

// Runtime is a process that pulls images.
type Runtime struct {
	procfs.Process
	kind   *kind
	execed time.Duration // after boot; 0 if it isn't known
	netns  uint64
	ctx    context.Context // ends with the process
	cancel context.CancelFunc
	// unreported says that its exec is yet to be reported. Guarded by runtimes.mu.
	unreported bool
	// settled is closed when it is first known how to treat it.
	settled chan struct{}
	once    sync.Once
	// carried says that a connection was carried before that. Guarded by mu.
	carried bool

	// files bounds what looks at its files.
	files fileAccess

	mu     sync.Mutex
	onNode bool // it is root's, in a root file system of the node
	// installed says that the CA is where it reads the system's roots.
	installed bool
	reach     string
	how       string
	basis     basis
	// generation is that of the CA's certificate which it has read among its roots, or
	// will read, or an earlier one; 0 if it trusts the CA by a certs.d.
	generation uint64
	asked      uint64  // the last generation that it was asked to prove it trusts
	program    program // when it is settled
	reason     string
	step       string
	// restartHelps says that it is passed through for nothing but that it has read its
	// roots already.
	restartHelps bool
	restarting   bool                  // it is looked after that it is restarted
	probes       map[netip.Addr]*probe // under way
	misled       map[string]time.Time  // when a pull of it was last seen to be led to a host without the CA
	unsure       map[string]time.Time  // hosts that may be registries, and when it last connected there
	fresh        map[string]bool       // a pull may be running that began before the host's directory in the certs.d was made
	through      int                   // its connections that weir carries
}

// basis is what a runtime's trust in the CA rests on. The zero value is its
// memory.
type basis struct {
	certsD *trust.CertsD // that alone
	dir    string        // where the CA was put for that
	// file is among the roots that it reads when it first verifies a
	// certificate, which may not have been yet.
	file string
	id   trust.FileID
}

// Options of the runtimes of a node.
type Options struct {
	Kernel    Kernel
	Listeners Listeners
	Content   Content
	CA        *trust.CA
	Ledger    *trust.Ledger
	// Lasting are the root file systems that outlive their runtimes.
	Lasting map[trust.RootID]string
	// Registries are the hosts that get a directory in a certs.d, and Recent those
	// that were learned just now: pulls may be running that began before.
	Registries, Recent func() []string
	// Find says whether a host is a known registry, and how it is known.
	Find func(host string) (registry.Known, bool)
	// Ports are those that registries listen on.
	Ports []uint16
	// Restarter restarts runtimes of the node that can't trust the CA before. Nil means
	// that they are left as they are.
	Restarter *Restarter
	// RunDir keeps what is known of runtimes until the next boot.
	RunDir string
	Log    *slog.Logger
}

// Kernel tracks processes; [bpf.Kernel] is one.
type Kernel interface {
	Mode(pid int) (bpf.Mode, bool)
	Track(pid int, m bpf.Mode) (tracked bool, err error)
	Remode(pid int, m bpf.Mode) error
	Forget(pid int) error
	Early(pid int) bool
	SeededGuests(n int) error
}

// Listeners opens redirect listeners in network namespaces.
type Listeners interface {
	Arrived(a bpf.Arrival)
	Enter(pid int) error
}

// Content reads blobs in place where a containerd keeps them.
type Content interface {
	AddForeign(dir string)
	RemoveForeign(dir string)
}

// Wait waits for what is being found out about runtimes.
func (rs *Runtimes) Wait() { rs.wg.Wait() }

// Runtimes follows the processes that pull images and establishes which of
// them trust the CA.
type Runtimes struct {
	o     Options
	ctx   context.Context // what runs in the background ends with it
	state *stateFile

	mu     sync.Mutex
	all    map[int]*Runtime
	guests map[int]struct{} // processes that ran before their exec could be seen, and have others pull for them
	// certsDs are the directories that are tried, and those that were. Few runtimes have one.
	certsDs map[certsDPlace]*sharedDir
	wg      sync.WaitGroup
	// establishing bounds those that are being looked at, each of which may hold a
	// thread for as long as a file system gives no answer.
	establishing *semaphore.Weighted
	// reading is the same for those whose files are looked at again.
	reading *semaphore.Weighted
	// logged are the kinds of programs that end with their pull, with why they are
	// passed through: such programs may be started without end.
	logged *lru.LRU[[2]string, struct{}]
}

// New makes a set without a runtime. What it starts in the background
// ends with ctx.
func New(ctx context.Context, o Options) *Runtimes {
	return &Runtimes{o: o, ctx: ctx, state: openState(o.RunDir, o.CA.ID(), o.Log),
		all: make(map[int]*Runtime), guests: make(map[int]struct{}), certsDs: make(map[certsDPlace]*sharedDir),
		establishing: semaphore.NewWeighted(maxEstablishing), reading: semaphore.NewWeighted(maxEstablishing),
		logged: lru.NewLRU[[2]string, struct{}](256, nil, time.Hour)}
}

// maxEstablishing is far above what starts at a time, and far below the threads
// that Go gives a program (10,000).
const maxEstablishing = 256

// Seed finds what is running already: the runtimes, and for listeners the oldest
// process of each network namespace. What starts meanwhile is the kernel side's
// to report.
func (rs *Runtimes) Seed(cgroup string) error {
	pids, err := procfs.InCgroup(cgroup)
	if err != nil {
		return fmt.Errorf("listing the processes in %s: %w", cgroup, err)
	}
	oldest := make(map[uint64]procfs.Process) // by network namespace
	var found []procfs.Process
	for _, pid := range pids {
		p, err := procfs.Read(pid)
		if err != nil {
			continue
		}
		if ino, err := procfs.Netns(pid); err == nil {
			if o, ok := oldest[ino]; !ok || p.Start < o.Start {
				oldest[ino] = p
			}
		}
		if kindOf(p.Comm, p.Exe) == nil {
			continue
		}
		if seen, err := rs.o.Kernel.Track(pid, bpf.ModeProbe); err != nil {
			return err
		} else if seen {
			continue // as it was when its exec was seen
		}
		if now, err := procfs.Read(pid); err != nil || now.Start != p.Start {
			_ = rs.o.Kernel.Forget(pid)
			continue
		}
		found = append(found, p)
	}
	if err := rs.seed(found); err != nil {
		return err
	}
	for _, p := range oldest {
		rs.o.Listeners.Arrived(bpf.Arrival{PID: p.PID})
	}
	return nil
}

// seed adds processes that were running already. The guests are all counted before it is
// found out about any other that it trusts the CA.
func (rs *Runtimes) seed(found []procfs.Process) error {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	found = slices.DeleteFunc(found, func(p procfs.Process) bool {
		mode, _ := rs.o.Kernel.Mode(p.PID)
		return mode != bpf.ModeProbe || rs.all[p.PID] != nil // it has ended, or started another program
	})
	for _, p := range found {
		if kindOf(p.Comm, p.Exe).guest {
			rs.guests[p.PID] = struct{}{}
		}
	}
	if err := rs.o.Kernel.SeededGuests(len(rs.guests)); err != nil {
		return err
	}
	for _, p := range found {
		rs.add(p, kindOf(p.Comm, p.Exe), 0, true)
	}
	return nil
}

// Started adds a runtime whose exec the kernel side has just seen.
func (rs *Runtimes) Started(ev bpf.Event) {
	p, err := procfs.Read(ev.PID)
	if err != nil {
		return // gone already
	}
	if k := kindOf(ev.Name, p.Comm, p.Exe); k != nil {
		rs.mu.Lock()
		defer rs.mu.Unlock()
		if rt := rs.all[ev.PID]; rt != nil && rt.unreported && rt.Start == p.Start {
			rt.unreported = false // its connection was faster than this event
			return
		}
		rs.add(p, k, ev.Time, false)
	}
}

// add adds a process. The caller holds rs.mu.
func (rs *Runtimes) add(p procfs.Process, k *kind, execed time.Duration, seeded bool) *Runtime {
	rt := &Runtime{Process: p, kind: k, execed: execed, reach: ReachStarting,
		settled: make(chan struct{}), probes: make(map[netip.Addr]*probe), fresh: make(map[string]bool)}
	rt.netns, _ = procfs.Netns(p.PID)
	rt.ctx, rt.cancel = context.WithCancel(rs.ctx)
	if old, ok := rs.all[p.PID]; ok {
		old.cancel()
	}
	rs.all[p.PID] = rt
	rs.wg.Go(func() {
		defer rt.settle()
		if !rs.establishing.TryAcquire(1) {
			rs.passThrough(rt, "too many others are being looked at, or can't be", "see why their files can't be read: NFS, FUSE")
			return
		}
		defer rs.establishing.Release(1)
		began := rs.o.CA.Generation()
		rs.establish(rt, seeded)
		if rs.o.CA.Generation() != began {
			rs.refresh(rt)
		}
	})
	if k.contentStore {
		rs.wg.Go(func() { rs.shareContent(rt) })
	}
	return rt
}

// Ended forgets a process.
func (rs *Runtimes) Ended(pid int) {
	rs.mu.Lock()
	rt, ok := rs.all[pid]
	delete(rs.all, pid)
	if _, guest := rs.guests[pid]; guest {
		delete(rs.guests, pid)
		if err := rs.o.Kernel.SeededGuests(len(rs.guests)); err != nil {
			rs.o.Log.Error("a runtime stays passed through", "err", err)
		}
	}
	if ok {
		rt.cancel() // before another goroutine changes its mode
	}
	rs.mu.Unlock()
	if !ok {
		return
	}
	rs.state.forget(pid)
}

// Reconcile forgets processes whose end was not reported, because the kernel
// side's event got lost or came before that of their start.
func (rs *Runtimes) Reconcile() {
	var gone []int
	rs.mu.Lock()
	for pid := range rs.all {
		if _, tracked := rs.o.Kernel.Mode(pid); !tracked {
			gone = append(gone, pid)
		}
	}
	rs.mu.Unlock()
	for _, pid := range gone {
		rs.Ended(pid)
	}
}

// Find returns the runtime that a connection came from, nil if there is none.
// The connection may be here before the event of its exec.
func (rs *Runtimes) Find(pid int) *Runtime {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rt := rs.all[pid]; rt != nil {
		return rt
	}
	p, err := procfs.Read(pid)
	if err != nil {
		return nil
	}
	k := kindOf(p.Comm, p.Exe)
	if mode, tracked := rs.o.Kernel.Mode(pid); k == nil || !tracked || mode != bpf.ModeNew {
		return nil
	}
	rt := rs.add(p, k, 0, false)
	rt.unreported = true
	return rt
}

// setMode sets the kernel side's mode of a runtime. The caller holds rs.mu.
func (rs *Runtimes) setMode(rt *Runtime) {
	rt.mu.Lock()
	mode := bpf.ModeProbe
	if rt.reach == ReachIntercepted {
		mode = bpf.ModeRedirect
		if rt.basis.certsD != nil {
			mode = bpf.ModeLent
		}
	}
	rt.mu.Unlock()
	if rt.ctx.Err() != nil {
		return
	}
	if err := rs.o.Kernel.Remode(rt.PID, mode); err != nil {
		rs.o.Log.Error("setting the mode of a process", "pid", rt.PID, "err", err)
	}
}

// Name is the name of the runtime's kind.
func (rt *Runtime) Name() string { return rt.kind.name }

func (rt *Runtime) String() string { return fmt.Sprintf("%s (pid %d)", rt.kind.name, rt.PID) }

func (rt *Runtime) settle() { rt.once.Do(func() { close(rt.settled) }) }

// OnNode says whether a runtime is root's and has a root file system of the node:
// what it trusts is what the node's operator trusts.
func (rt *Runtime) OnNode() bool {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	return rt.onNode
}

// intercept makes a runtime one whose connections are intercepted. It trusts the CA
// for the names of a generation, or by a certs.d.
func (rs *Runtimes) intercept(rt *Runtime, how string, rests basis, generation uint64) {
	rt.mu.Lock()
	rt.reach, rt.how, rt.reason, rt.step = ReachIntercepted, how, "", ""
	rt.basis, rt.generation = rests, generation
	rt.mu.Unlock()
	rs.mu.Lock()
	rs.setMode(rt)
	lives := rt.ctx.Err() == nil
	if lives && !rt.kind.oneShot {
		rs.state.saveTrust(rt)
	}
	rs.mu.Unlock()
	if lives && !rt.kind.oneShot {
		rs.o.Log.Info("a runtime's registries are intercepted", "runtime", rt.kind.name, "pid", rt.PID, "because", how)
	}
	rt.settle()
}

// passThrough has a runtime's connections passed through.
func (rs *Runtimes) passThrough(rt *Runtime, reason, step string) {
	rt.mu.Lock()
	rt.reach, rt.how, rt.reason, rt.step = ReachPassthrough, "", reason, step
	rt.mu.Unlock()
	rs.mu.Lock()
	rs.setMode(rt)
	rs.mu.Unlock()
	rs.state.forget(rt.PID)
	if rt.ctx.Err() == nil {
		level, why := slog.LevelInfo, [2]string{rt.kind.name, reason}
		if rs.logged.Contains(why) {
			level = slog.LevelDebug
		} else if rt.kind.oneShot {
			rs.logged.Add(why, struct{}{})
		}
		rs.o.Log.Log(rt.ctx, level, "a runtime is passed through", "runtime", rt.kind.name, "pid", rt.PID, "because", reason, "step", step)
	}
	rt.settle()
}

// restartStep is what makes a runtime trust the CA when nothing else does.
func (rt *Runtime) restartStep() string {
	if rt.kind.oneShot {
		return "nothing to do: its next start will be intercepted"
	}
	return "restart " + rt.kind.name + " (process " + fmt.Sprint(rt.PID) + ") when it suits you; it will then trust the CA from its start"
}

// Running are the runtimes whose processes are in a cgroup2 directory and below.
func Running(cgroup string) (all []*Runtime, err error) {
	pids, err := procfs.InCgroup(cgroup)
	for _, pid := range pids {
		if p, err := procfs.Read(pid); err == nil {
			if k := kindOf(p.Comm, p.Exe); k != nil {
				all = append(all, &Runtime{Process: p, kind: k})
			}
		}
	}
	return all, err
}
