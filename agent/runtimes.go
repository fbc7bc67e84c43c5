// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sync/semaphore"
	"weir/agent/procfs"
	"weir/agent/trust"
	"weir/bpf"
	"weir/proxy/registry"
)

// Probe addresses: what runtimes are asked to pull from, to see whether they
// trust the CA. They are in the range for benchmarks (RFC 2544), which nobody
// routes, and only the kernel side makes them lead somewhere: to the listener.
// Nothing is installed for the first one but the system's roots; the second has
// a directory in each certs.d.
var (
	probeSystem = netip.MustParseAddr("198.18.116.1")
	probeCertsD = netip.MustParseAddr("198.18.116.2")
)

// How a runtime's connections are treated.
const (
	ReachStarting    = "starting"    // just found; its trust is being established
	ReachIntercepted = "intercepted" // registries it trusts us for are intercepted
	ReachPassthrough = "passthrough" // nothing is touched
)

// Ways in which a runtime came to trust the CA.
const (
	trustByStart    = "started after the CA was installed"
	trustBySystem   = "proven: its system roots have the CA"
	trustByCertsD   = "proven: it reads the CA from certs.d at each pull"
	trustRemembered = "proven before the agent's own restart"
)

// RuntimeStatus is a runtime as the status shows it.
type RuntimeStatus struct {
	Kind  string `json:"kind"`
	PID   int    `json:"pid"`
	Netns uint64 `json:"netns"` // the namespace's inode
	Reach string `json:"reach"`
	// Trust says how it came to trust the CA.
	Trust string `json:"trust,omitempty"`
	// Except are registries that are passed through although others are
	// intercepted, with the reason.
	Except map[string]string `json:"except,omitempty"`
	// Reason says why it is passed through, and Step what changes that.
	Reason string `json:"reason,omitempty"`
	Step   string `json:"step,omitempty"`
}

// runtimeProc is a process that pulls images.
type runtimeProc struct {
	procfs.Process
	kind   *kind
	execed time.Duration // after boot; 0 if it isn't known
	netns  uint64
	ctx    context.Context // ends with the process
	cancel context.CancelFunc
	// unheard says that its exec is yet to be reported. Guarded by runtimes.mu.
	unheard bool
	// settled is closed when it is first known how to treat it.
	settled chan struct{}
	once    sync.Once

	// files bounds what looks at its files.
	files looks

	mu       sync.Mutex
	reach    string
	how      string
	rests    ground
	program  program // when it is settled
	reason   string
	step     string
	verdicts map[netip.Addr]chan error // of the probes under way
	led      map[string]time.Time      // when a pull of it was last seen to be led to a host without the CA
}

// ground is what a runtime's trust in the CA rests on. The zero value is its
// memory.
type ground struct {
	certsD *trust.CertsD // that alone
	// file is among the roots that it reads when it first verifies a
	// certificate, which may not have been yet.
	file string
	id   trust.FileID
}

// runtimes follows the processes that pull images and establishes which of
// them trust the CA.
type runtimes struct {
	a     *Agent
	state *stateFile

	mu     sync.Mutex
	all    map[int]*runtimeProc
	paused map[string]map[int]struct{} // kind → one-shot processes it pulls for
	wg     sync.WaitGroup
	// establishing bounds those that are being looked at, each of which may hold a
	// thread for as long as a file system gives no answer.
	establishing *semaphore.Weighted
	// looking is the same for those whose files are looked at again.
	looking *semaphore.Weighted
}

func newRuntimes(a *Agent, state *stateFile) *runtimes {
	return &runtimes{a: a, state: state, all: make(map[int]*runtimeProc), paused: make(map[string]map[int]struct{}),
		establishing: semaphore.NewWeighted(maxEstablishing), looking: semaphore.NewWeighted(maxEstablishing)}
}

// maxEstablishing is far above what starts at a time, and far below the threads
// that Go gives a program (10,000).
const maxEstablishing = 256

// seed takes in what is running already: the runtimes, and for listeners the oldest
// process of each network namespace. What starts meanwhile is the kernel side's
// to report.
func (rs *runtimes) seed(cgroup string) error {
	pids, err := procfs.InCgroup(cgroup)
	if err != nil {
		return fmt.Errorf("listing the processes in %s: %w", cgroup, err)
	}
	oldest := make(map[uint64]procfs.Process) // by network namespace
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
		k := kindOf(p.Comm, p.Exe)
		if k == nil {
			continue
		}
		if _, tracked := rs.a.kernel.Mode(pid); tracked {
			continue // its exec was seen
		}
		if err := rs.a.kernel.SetMode(pid, bpf.ModeProbe); err != nil {
			return fmt.Errorf("tracking process %d: %w", pid, err)
		}
		if now, err := procfs.Read(pid); err != nil || now.Start != p.Start {
			_ = rs.a.kernel.Forget(pid)
			continue
		}
		rs.mu.Lock()
		rs.add(p, k, 0, true)
		rs.mu.Unlock()
	}
	for _, p := range oldest {
		rs.a.listeners.Arrived(bpf.Arrival{PID: p.PID})
	}
	return nil
}

// started takes in a runtime whose exec the kernel side has just seen.
func (rs *runtimes) started(ev bpf.Event) {
	p, err := procfs.Read(ev.PID)
	if err != nil {
		return // gone already
	}
	if k := kindOf(ev.Name, p.Comm, p.Exe); k != nil {
		rs.mu.Lock()
		defer rs.mu.Unlock()
		if rt := rs.all[ev.PID]; rt != nil && rt.unheard && rt.Start == p.Start {
			rt.unheard = false // its connection was faster than this news
			return
		}
		rs.add(p, k, ev.Time, false)
	}
}

// add takes in a process. The caller holds rs.mu.
func (rs *runtimes) add(p procfs.Process, k *kind, execed time.Duration, seeded bool) *runtimeProc {
	rt := &runtimeProc{Process: p, kind: k, execed: execed, reach: ReachStarting,
		settled: make(chan struct{}), verdicts: make(map[netip.Addr]chan error)}
	rt.netns, _ = procfs.Netns(p.PID)
	rt.ctx, rt.cancel = context.WithCancel(rs.a.ctx)
	if old, ok := rs.all[p.PID]; ok {
		old.cancel()
	}
	rs.all[p.PID] = rt
	if k.pullsThrough != "" {
		rs.pause(k.pullsThrough, p.PID)
	}
	rs.wg.Go(func() {
		defer rt.settle()
		if !rs.establishing.TryAcquire(1) {
			rs.passThrough(rt, "too many others are being looked at, or can't be", "see why their files can't be read: NFS, FUSE")
			return
		}
		defer rs.establishing.Release(1)
		rs.establish(rt, seeded)
	})
	if k.contentStore {
		rs.wg.Go(func() { rs.shareContent(rt) })
	}
	return rt
}

// ended forgets a process.
func (rs *runtimes) ended(pid int) {
	rs.mu.Lock()
	rt, ok := rs.all[pid]
	delete(rs.all, pid)
	if ok && rt.kind.pullsThrough != "" {
		rs.resume(rt.kind.pullsThrough, pid)
	}
	if ok {
		rt.cancel() // before anybody else says what it is
	}
	rs.mu.Unlock()
	if !ok {
		return
	}
	rs.state.forget(pid)
}

// Reconcile forgets processes whose end was not heard of, because the kernel
// side's news got lost or came before that of their start.
func (rs *runtimes) reconcile() {
	var gone []int
	rs.mu.Lock()
	for pid := range rs.all {
		if _, tracked := rs.a.kernel.Mode(pid); !tracked {
			gone = append(gone, pid)
		}
	}
	rs.mu.Unlock()
	for _, pid := range gone {
		rs.ended(pid)
	}
}

// find returns the runtime that a connection came from, nil if there is none.
// The connection may be here before the news of its exec.
func (rs *runtimes) find(pid int) *runtimeProc {
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
	if mode, tracked := rs.a.kernel.Mode(pid); k == nil || !tracked || mode != bpf.ModeNew {
		return nil
	}
	rt := rs.add(p, k, 0, false)
	rt.unheard = true
	return rt
}

// pause leaves the runtimes of a kind in peace that trust the CA only by a
// directory which the tool pid doesn't make them read. The caller holds rs.mu.
func (rs *runtimes) pause(kind string, pid int) {
	if rs.paused[kind] == nil {
		rs.paused[kind] = make(map[int]struct{})
	}
	rs.paused[kind][pid] = struct{}{}
	rs.remode(kind)
}

func (rs *runtimes) resume(kind string, pid int) {
	delete(rs.paused[kind], pid)
	rs.remode(kind)
}

// remode tells the kernel side again how to treat the runtimes of a kind. The
// caller holds rs.mu.
func (rs *runtimes) remode(kind string) {
	for _, rt := range rs.all {
		if rt.kind.name == kind {
			rs.setMode(rt)
		}
	}
}

// setMode tells the kernel side how to treat a runtime. The caller holds rs.mu.
func (rs *runtimes) setMode(rt *runtimeProc) {
	rt.mu.Lock()
	mode := bpf.ModeProbe
	if rt.reach == ReachIntercepted && (rt.rests.certsD == nil || len(rs.paused[rt.kind.name]) == 0) {
		mode = bpf.ModeRedirect
	}
	rt.mu.Unlock()
	if rt.ctx.Err() != nil {
		return
	}
	if err := rs.a.kernel.Remode(rt.PID, mode); err != nil {
		rs.a.log.Error("telling the kernel side about a process", "pid", rt.PID, "err", err)
	}
}

func (rt *runtimeProc) settle() { rt.once.Do(func() { close(rt.settled) }) }

// intercept makes a runtime one whose connections are intercepted.
func (rs *runtimes) intercept(rt *runtimeProc, how string, rests ground) {
	rt.mu.Lock()
	rt.reach, rt.how, rt.reason, rt.step = ReachIntercepted, how, "", ""
	rt.rests = rests
	rt.mu.Unlock()
	rs.mu.Lock()
	rs.setMode(rt)
	lives := rt.ctx.Err() == nil
	if lives && !rt.kind.oneShot {
		rs.state.remember(rt)
	}
	rs.mu.Unlock()
	if lives && !rt.kind.oneShot {
		rs.a.log.Info("a runtime's registries are intercepted", "runtime", rt.kind.name, "pid", rt.PID, "because", how)
	}
	rt.settle()
}

// passThrough leaves a runtime alone.
func (rs *runtimes) passThrough(rt *runtimeProc, reason, step string) {
	rt.mu.Lock()
	rt.reach, rt.how, rt.reason, rt.step = ReachPassthrough, "", reason, step
	rt.mu.Unlock()
	rs.mu.Lock()
	rs.setMode(rt)
	rs.mu.Unlock()
	rs.state.forget(rt.PID)
	if rt.ctx.Err() == nil {
		rs.a.log.Info("a runtime is passed through", "runtime", rt.kind.name, "pid", rt.PID, "because", reason, "step", step)
	}
	rt.settle()
}

// restartStep is what makes a runtime trust the CA when nothing else does.
func (rt *runtimeProc) restartStep() string {
	if rt.kind.oneShot {
		return "nothing to do: its next start will be intercepted"
	}
	return "restart " + rt.kind.name + " (process " + fmt.Sprint(rt.PID) + ") when it suits you; it will then trust the CA from its start"
}

// establish opens a listener for a runtime, puts the CA where it reads
// certificates, and finds out whether it trusts it.
func (rs *runtimes) establish(rt *runtimeProc, seeded bool) {
	// The listener first, if it isn't there: until then a new process goes direct,
	// and the kernel side notes that it may have read its roots.
	if err := rs.a.listeners.Enter(rt.PID); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			rs.passThrough(rt, "no listener could be opened for it: "+err.Error(), "see the agent's log")
		}
		return
	}
	root, err := trust.OpenRoot(rt.PID)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			rs.passThrough(rt, "its root file system can't be opened: "+err.Error(), "see the agent's log")
		}
		return
	}
	defer root.Close()

	host := rs.a.lasting[root.ID()]
	rt.mu.Lock()
	rt.program = programOf(rt.PID, host)
	rt.mu.Unlock()
	if flag := ownRoots(rt.kind, procfs.Strings(rt.PID, "cmdline")); flag != "" {
		rs.passThrough(rt, flag+" on its command line names all the roots that it trusts", "nothing to do: without "+flag+" it is intercepted")
		return
	}
	if host == "" && inImage(rt, root) {
		rs.passThrough(rt, "its root file system is an image's that is being made: the CA would come to be in that", "nothing to do")
		return
	}
	res := rs.install(rt, root)
	rs.record(host, res)
	system, finds := res.System, ground{file: res.File}
	if system == nil {
		finds.id, system = rs.a.ca.Holds(root, res.File)
	}
	if system == nil && host != "" {
		rs.state.installed(host, len(res.Files) > 0)
	}

	why := "it was running before the CA was installed, and has read its roots"
	if system == nil {
		switch {
		case seeded && rs.state.remembers(rt) == rememberedRefusal:
			rs.passThrough(rt, "it refused weir's certificate before the agent's own restart", rt.restartStep())
			return
		case !seeded && rs.a.kernel.Early(rt.PID):
			why = "it connected somewhere before the CA was installed"
		case !seeded && mayHaveRead(rt, root, res.Since):
			why = "it may have read its roots as it started, just before the CA was installed"
		case !seeded:
			// No connection of its has left unseen, so it can't have
			// verified anything yet, and will find the CA when it does.
			rs.intercept(rt, trustByStart, finds)
			if !rs.a.kernel.Early(rt.PID) { // between the question and the answer
				return
			}
			why = "it connected somewhere before the CA was installed"
		case seeded && host != "" && rs.state.installedBefore(host, rt.Start):
			rs.intercept(rt, trustByStart, finds)
			return
		case seeded && rs.state.remembers(rt) == rememberedSystem:
			rs.intercept(rt, trustRemembered, ground{})
			return
		}
	}
	rs.prove(rt, root, host, system, why)
}

// earliestRead is how soon after its exec an eager program can read its roots.
// kaniko doesn't within 12 ms, nor a Go program of no other purpose within 0.5.
const earliestRead = 2 * time.Millisecond

// mayHaveRead says whether a process that has just started can have read its
// roots before the CA was there: it is one of the eager ones, or has settings in
// a certs.d, which are added to the roots before it connects.
func mayHaveRead(rt *runtimeProc, root *trust.Root, since time.Time) bool {
	eager := rt.kind.eager
	for _, dir := range slices.Concat(rt.userSettings(), rt.kind.settings, rt.kind.certsD) {
		names, err := root.ReadDir(dir)
		eager = eager || len(names) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist)
	}
	if !eager {
		return false
	}
	execed := time.Now().Add(rt.execed - procfs.SinceBoot())
	return rt.execed == 0 || since.After(execed.Add(earliestRead))
}

// install puts the CA where a runtime reads the system's roots.
func (rs *runtimes) install(rt *runtimeProc, root *trust.Root) trust.Result {
	places, err := placesOf(rt.PID)
	if err != nil {
		return trust.Result{System: err}
	}
	res := rs.a.ca.Install(root, places, nil)
	if !errors.Is(res.System, trust.ErrOthers) {
		return res
	}
	// Maybe it is the node's own directory, as an ordinary user sees it: that
	// one gets the CA, though not on this user's account.
	usual, _ := trust.SystemPlaces(nil)
	for _, name := range rs.a.lasting {
		r, err := trust.OpenRootDir(name)
		if err != nil {
			continue
		}
		if slices.ContainsFunc(usual.System, func(dir string) bool { return r.Same(root, dir) }) {
			node := rs.a.ca.Install(r, usual, nil)
			rs.record(name, node)
			if node.System == nil {
				rs.state.installed(name, len(node.Files) > 0)
			}
		}
		r.Close()
	}
	return rs.a.ca.Install(root, places, nil)
}

// record notes what was installed in a root file system that outlives its
// runtimes. What is in a container's goes with it.
func (rs *runtimes) record(host string, res trust.Result) {
	if host == "" {
		return
	}
	if err := rs.a.ledger.Record(host, res); err != nil {
		rs.a.log.Error("recording what was installed", "err", err)
	}
}

// prove finds out whether a running runtime trusts the CA, by having it pull
// from a probe address. why is what speaks against it.
func (rs *runtimes) prove(rt *runtimeProc, root *trust.Root, host string, system error, why string) {
	step := rt.restartStep()
	if system != nil {
		why = "the CA can't be installed: " + system.Error()
		step = "see to that; its next start is then intercepted"
	}
	if rt.kind.ask == nil {
		rs.passThrough(rt, why+"; it can't be asked to prove otherwise", step)
		return
	}
	rs.passThrough(rt, "it is being asked whether it trusts the CA", "wait a moment")
	var perr error
	if system == nil {
		if perr = rs.probe(rt, probeSystem); perr == nil {
			rs.intercept(rt, trustBySystem, ground{})
			return
		}
	}
	if len(rt.kind.certsD) > 0 && rt.ctx.Err() == nil {
		if certsD, fresh, err := rs.proveCertsD(rt, root, host); err == nil {
			if !fresh || rs.quiet(rt) {
				rs.intercept(rt, trustByCertsD, ground{certsD: certsD})
			}
			return
		} else if perr == nil || !errors.Is(err, errDistrusts) {
			perr = err
		}
	}
	if rt.ctx.Err() != nil {
		return
	}
	if errors.Is(perr, errDistrusts) || perr == nil {
		rs.passThrough(rt, why, step)
		return
	}
	rs.passThrough(rt, why+"; asked to prove otherwise: "+perr.Error(), step)
}

// proveCertsD tries the directories that the runtime reads at each pull, one
// after the other, and leaves the CA only in the one that it does read. fresh
// says that it wasn't there before.
func (rs *runtimes) proveCertsD(rt *runtimeProc, root *trust.Root, host string) (certsD *trust.CertsD, fresh bool, err error) {
	// Its configuration says where: only root's may say where root writes.
	if uid, err := procfs.User(rt.PID); err != nil || uid != 0 {
		return nil, false, errors.Join(errors.New("its certs.d is not root's"), err)
	}
	var last error
	dirs := certsDOf(rt, root)
	for _, dir := range dirs {
		place := trust.Places{CertsD: []string{dir}}
		res := rs.a.ca.Install(root, place, rs.a.regs.Names())
		rs.record(host, res)
		coverage := res.CertsD[dir]
		if !coverage.Covers(probeCertsD.String()) {
			last = fmt.Errorf("%s: %w", dir, coverage[probeCertsD.String()])
			continue
		}
		err := rs.probe(rt, probeCertsD)
		if err == nil {
			return rt.lookup(root, dir, dirs), len(res.Files) > 0, nil
		}
		last = err
		made := slices.DeleteFunc(rs.a.ledger.Made(host), func(m trust.Made) bool { return m.Path != dir && !strings.HasPrefix(m.Path, dir+"/") })
		if _, err := trust.Uninstall(root, place, made); err != nil {
			rs.a.log.Warn("taking the CA out again", "dir", dir, "err", err)
		}
	}
	return nil, false, last
}

// quietTime is how long a runtime has to have no connection to a registry before
// no pull is taken to be running: between two requests of one there are
// milliseconds.
const quietTime = 5 * time.Second

// quiet waits until no pull runs that began before the CA was there for it: a
// pull reads certs.d when it begins, and makes connections until it ends. It
// returns false when the runtime has ended.
func (rs *runtimes) quiet(rt *runtimeProc) bool {
	rs.passThrough(rt, "it trusts the CA in the pulls that begin now; the others are waited for", "wait until it has no connection to a registry for a moment, or "+rt.restartStep())
	t := time.NewTicker(quietTime / 10)
	defer t.Stop()
	for since := time.Now(); time.Since(since) < quietTime; {
		select {
		case <-rt.ctx.Done():
			return false
		case <-t.C:
		}
		if n, err := procfs.Connections(rt.PID, rs.a.conf.Ports); n > 0 || err != nil {
			since = time.Now()
		}
	}
	return true
}

// configPathRE finds the directories that a containerd's configuration names.
// Whether it really reads them is for the probe to say.
var configPathRE = regexp.MustCompile(`(?m)^\s*config_path\s*=\s*["']([^"'\n]+)["']`)

// certsDOf returns the certs.d directories that a runtime may read.
func certsDOf(rt *runtimeProc, root *trust.Root) []string {
	dirs := slices.Clone(rt.kind.certsD)
	for _, dir := range configPaths(rt, root) {
		if filepath.IsAbs(dir) && filepath.Clean(dir) == dir && !slices.Contains(dirs, dir) {
			dirs = append([]string{dir}, dirs...)
		}
	}
	return dirs
}

// configPaths returns what a containerd's configuration has for config_path.
func configPaths(rt *runtimeProc, root *trust.Root) (paths []string) {
	config := "/etc/containerd/config.toml"
	args := procfs.Strings(rt.PID, "cmdline")
	for i, arg := range args {
		if v, ok := strings.CutPrefix(arg, "--config="); ok {
			config = v
		} else if (arg == "-c" || arg == "--config") && i+1 < len(args) {
			config = args[i+1]
		}
	}
	b, err := root.ReadFile(config, 1<<20)
	if err != nil {
		return nil
	}
	for _, m := range configPathRE.FindAllSubmatch(b, 8) {
		paths = append(paths, string(m[1]))
	}
	return paths
}

// lookup returns how a runtime that has been seen to read dir, one of dirs, finds
// the settings of a registry.
func (rt *runtimeProc) lookup(root *trust.Root, dir string, dirs []string) *trust.CertsD {
	if !rt.kind.contentStore { // containers/image
		users := rt.userSettings()
		if len(users) == 0 { // a service without a HOME looks it up; it is root's
			users = []string{"/root/.config/" + trust.UserContainersCertsD}
		}
		return &trust.CertsD{Dirs: slices.Concat(users, rt.kind.settings)}
	}
	c := &trust.CertsD{HostsFiles: true, Also: append(slices.Clone(dirs), trust.DockerCertsD)}
	// A pull by containerd's own client, and not by its transfer service, takes
	// a config_path for a list.
	for _, list := range append(configPaths(rt, root), trust.ContainerdPairCertsD) {
		paths := filepath.SplitList(list)
		c.Also = append(c.Also, paths...)
		if i := slices.Index(paths, dir); i > 0 {
			c.Dirs = append(c.Dirs, paths[:i]...)
		}
	}
	c.Dirs = append(c.Dirs, dir)
	return c
}

var (
	errDistrusts = errors.New("it does not trust the CA")
	errNoProbe   = errors.New("it did not come to the probe address")
)

// probe makes a runtime pull from a probe address. It returns nil when the
// runtime trusted the certificate that it was shown there, [errDistrusts] when
// it did not, and another error when it could not be found out.
func (rs *runtimes) probe(rt *runtimeProc, addr netip.Addr) error {
	verdict := make(chan error, 1)
	rt.mu.Lock()
	rt.verdicts[addr] = verdict
	rt.mu.Unlock()
	defer func() {
		rt.mu.Lock()
		delete(rt.verdicts, addr)
		rt.mu.Unlock()
	}()
	image := addr.String() + "/weir/probe:" + strings.ToLower(rand.Text()[:12])
	// A runtime that is just starting doesn't answer at once.
	ctx, cancel := context.WithTimeout(rt.ctx, 30*time.Second)
	defer cancel()
	for delay := 50 * time.Millisecond; ; delay = min(2*delay, 2*time.Second) {
		asked := make(chan error, 1)
		go func() { asked <- rt.kind.ask(ctx, rt, image) }()
		select {
		case err := <-verdict:
			return err
		case err := <-asked:
			select {
			case err := <-verdict: // the answer's cause
				return err
			case <-time.After(200 * time.Millisecond):
			}
			select {
			case err := <-verdict:
				return err
			case <-ctx.Done():
				if err == nil {
					err = errNoProbe
				}
				return fmt.Errorf("%w: %w", errNoProbe, err)
			case <-time.After(delay):
			}
		case <-ctx.Done():
			return errNoProbe
		}
	}
}

// probed takes in what became of a connection to a probe address.
func (rs *runtimes) probed(pid int, addr netip.Addr, err error) {
	rt := rs.find(pid)
	if rt == nil {
		return
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if ch, ok := rt.verdicts[addr]; ok {
		select {
		case ch <- err:
		default:
		}
	}
}

// trusts says whether a runtime trusts the CA for a registry. It waits until
// that is known, so that a client gets its certificate only after the CA is in
// place.
func (rs *runtimes) trusts(rt *runtimeProc, name string) bool {
	select {
	case <-rt.settled:
	case <-time.After(2 * time.Second):
		return false
	}
	host := registry.Canonical(name)
	if name != host {
		// An image reference with upper-case letters: in a certs.d that is another
		// registry, without weir's CA, also where its server sends the client
		// for a token.
		rt.leads(host)
	}
	if err := rs.except(rt, host)[host]; err != nil {
		rs.a.log.Debug("a runtime doesn't trust the CA for a registry; passed through", "runtime", rt.kind.name, "pid", rt.PID, "registry", host, "err", err)
		return false
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	return rt.reach == ReachIntercepted
}

// except says for which of hosts a runtime that is intercepted for others is
// passed through, and why. It looks at the files that the runtime reads.
func (rs *runtimes) except(rt *runtimeProc, hosts ...string) map[string]error {
	rt.mu.Lock()
	reach, rests, program := rt.reach, rt.rests, rt.program
	rt.mu.Unlock()
	found := make(map[string]error, len(hosts))
	if reach != ReachIntercepted {
		return found
	}
	if rests != (ground{}) {
		now, err := bounded(rs, rt, func() (trust.Coverage, error) { return rs.holds(rt, rests, hosts) })
		for _, host := range hosts {
			if found[host] = err; err == nil {
				found[host] = rt.lingers(host, now[host])
			}
		}
		if errors.Is(err, errGone) {
			rs.passThrough(rt, err.Error(), rt.restartStep())
		}
	}
	for _, host := range hosts {
		if found[host] == nil && rs.state.programRefused(program, host) {
			found[host] = errProgramRefused
		}
	}
	return found
}

// errGone says that a runtime may have read its roots without the CA.
var errGone = errors.New("it may have read its roots while that was so")

// holds says for which of hosts what a runtime's trust rests on is still there.
func (rs *runtimes) holds(rt *runtimeProc, rests ground, hosts []string) (trust.Coverage, error) {
	root, err := trust.OpenRoot(rt.PID)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if rests.certsD != nil {
		return rs.a.ca.Coverage(root, *rests.certsD, hosts), nil
	}
	id, err := rs.a.ca.Holds(root, rests.file)
	if err == nil && id != rests.id {
		err = fmt.Errorf("weir's CA was removed and made anew: %s", rests.file)
	}
	if err != nil {
		return nil, fmt.Errorf("%w; %w", err, errGone)
	}
	return nil, nil
}

// accepted takes in that a runtime has verified a certificate of weir's: it has
// its roots in its memory now.
func (rs *runtimes) accepted(rt *runtimeProc) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if rt.rests.certsD == nil {
		rt.rests = ground{}
	}
}

var errProgramRefused = errors.New("this program has refused weir's certificate for it; it is tried again when the program changes, and after the next boot")

// lingerTime is how long a runtime is still passed through to a registry when
// nothing leads there any more: a pull that is running was led there before.
const lingerTime = 10 * time.Minute

// lingers returns err, or that a pull may still be on its way to host without
// the CA.
func (rt *runtimeProc) lingers(host string, err error) error {
	if errors.Is(err, trust.ErrLeads) {
		rt.leads(host)
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if since, ok := rt.led[host]; ok && err == nil && rt.rests.certsD != nil && time.Since(since) < lingerTime {
		return fmt.Errorf("%w, or did until just now, without weir's CA; a pull may be running: it is intercepted %s after that", trust.ErrLeads, lingerTime)
	}
	return err
}

// leads takes in that a pull of a runtime may be led to a host without the CA.
func (rt *runtimeProc) leads(host string) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if rt.led == nil || len(rt.led) >= maxLed {
		rt.led = make(map[string]time.Time)
	}
	rt.led[host] = time.Now()
}

// maxLed bounds what is remembered of one runtime. Few registries are known.
const maxLed = 1024

// rejected takes in that a runtime did not trust a certificate after all. It is
// left alone from then on, and so is, for this registry, every run of the
// program if that is what the CA was put in place for: a restart would not
// change it.
func (rs *runtimes) rejected(rt *runtimeProc, host string, err error) {
	rs.a.log.Error("a runtime refused weir's certificate; it is passed through from now on", "runtime", rt.kind.name, "pid", rt.PID, "registry", host, "err", err)
	rt.mu.Lock()
	byStart, program := rt.how == trustByStart, rt.program
	rt.mu.Unlock()
	if byStart {
		rs.state.programRefuses(program, host)
	}
	step := rt.restartStep()
	if rs.state.programRefused(program, host) { // by one of several connections
		step = "nothing to do: its next starts are passed through to " + host + " too, until the program changes or the next boot"
	}
	rs.passThrough(rt, "it refused weir's certificate for "+host, step)
	rs.state.refused(rt)
}

// isNodes says whether a process is root's, in a root file system that outlives
// it: the node's, and not a container's.
func isNodes(pid int, lasting map[trust.RootID]string) bool {
	root, err := trust.OpenRoot(pid)
	if err != nil {
		return false
	}
	defer root.Close()
	uid, err := procfs.User(pid)
	return err == nil && uid == 0 && lasting[root.ID()] != ""
}

// shareContent lets the store read the blobs that the node's containerd has, in
// place. That of a pod, or of an ordinary user, is anybody's program of that
// name. Whoever owns the files can change them after they were verified, so that
// no checksum tells (in memory that is mapped, or on a file system of his own),
// can have each look there wait forever, and can lead it elsewhere by links.
func (rs *runtimes) shareContent(rt *runtimeProc) {
	if !isNodes(rt.PID, rs.a.lasting) {
		return
	}
	for delay := 200 * time.Millisecond; rt.ctx.Err() == nil; delay = min(2*delay, 10*time.Second) {
		dir, err := contentDir(rt)
		if err == nil {
			dir = filepath.Join("/proc", fmt.Sprint(rt.PID), "root", dir, "blobs")
			rs.a.store.AddForeign(dir)
			rs.a.log.Debug("reading a containerd's content store", "pid", rt.PID, "dir", dir)
			<-rt.ctx.Done()
			rs.a.store.RemoveForeign(dir)
			return
		}
		select {
		case <-rt.ctx.Done():
		case <-time.After(delay):
		}
	}
}

// contentDir asks a containerd where its content store is.
func contentDir(rt *runtimeProc) (string, error) {
	conn, err := dialGRPC(rt)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(rt.ctx, 10*time.Second)
	defer cancel()
	c, err := containerd.NewWithConn(conn)
	if err != nil {
		return "", err
	}
	resp, err := c.IntrospectionService().Plugins(ctx, "type==io.containerd.content.v1,id==content")
	if err != nil {
		return "", fmt.Errorf("asking containerd (process %d) for its plugins: %w", rt.PID, err)
	}
	for _, p := range resp.Plugins {
		if dir := p.Exports["root"]; strings.HasPrefix(dir, "/") && filepath.Clean(dir) == dir {
			return dir, nil
		}
	}
	return "", fmt.Errorf("containerd (process %d) doesn't say where its content is", rt.PID)
}

func (rs *runtimes) status() []RuntimeStatus {
	rs.mu.Lock()
	all := slices.Collect(maps.Values(rs.all))
	rs.mu.Unlock()
	slices.SortFunc(all, func(a, b *runtimeProc) int { return a.PID - b.PID })
	hosts := rs.a.regs.Names()
	found := make([]RuntimeStatus, 0, len(all))
	for _, rt := range all {
		rt.mu.Lock()
		refused := rs.state.refusedBy(rt.program)
		rt.mu.Unlock()
		except := exceptions(rs.except(rt, slices.Compact(slices.Sorted(slices.Values(slices.Concat(hosts, refused))))...))
		rt.mu.Lock()
		s := RuntimeStatus{Kind: rt.kind.name, PID: rt.PID, Netns: rt.netns, Reach: rt.reach, Trust: rt.how, Reason: rt.reason, Step: rt.step}
		if rt.reach == ReachIntercepted {
			s.Except = except
		}
		rt.mu.Unlock()
		found = append(found, s)
	}
	return found
}

// exceptions puts exceptions into words, what is the same for all registries
// once.
func exceptions(all map[string]error) (said map[string]string) {
	texts := make(map[string]bool)
	for host, err := range all {
		if err == nil {
			texts[""] = true
			continue
		}
		if said == nil {
			said = make(map[string]string)
		}
		said[host] = err.Error()
		texts[err.Error()] = true
	}
	if len(all) > 1 && len(texts) == 1 && !texts[""] {
		return map[string]string{"any registry": slices.Collect(maps.Keys(texts))[0]}
	}
	return said
}
