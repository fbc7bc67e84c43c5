// SPDX-License-Identifier: Apache-2.0

// Package redirect has the listeners that redirected connections come to. A pod
// has its own loopback interface, so there is one in each network namespace: the
// agent enters it on a locked thread, listens there, and returns. It needs no
// route, no NAT and no CNI's consent, and knows which workload a connection comes
// from.
package redirect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/time/rate"
	"weir/agent/procfs"
	"weir/bpf"
	"weir/proxy/upstream"
)

// Listeners are the redirect listeners of a node: one in each network namespace
// that has a process, so that it is there before a runtime is. One is opened when
// the namespace's first process appears, and closed with the last of the processes
// that it was opened for, since it would keep the namespace from going. If other
// processes are left there, the next program that one of them starts has it opened
// again.
type Listeners struct {
	kernel *bpf.Kernel
	ups    upstream.Config
	serve  func(rl *Listener, c *net.TCPConn, t Admission)
	log    *slog.Logger
	boot   string
	load   load

	mu      sync.Mutex
	open    map[uint64]*Listener // by the namespace's inode
	at      map[int]*Listener    // by the processes that they are open for
	stopped bool                 // no more are opened
	wg      sync.WaitGroup
}

// New makes the listeners of a kernel side. serve is called with each connection
// that is accepted.
func New(k *bpf.Kernel, ups upstream.Config, serve func(*Listener, *net.TCPConn, Admission), log *slog.Logger) *Listeners {
	return &Listeners{kernel: k, ups: ups, serve: serve, log: log, boot: procfs.BootID(), load: load{busy: make(map[*Listener]struct{})},
		open: make(map[uint64]*Listener), at: make(map[int]*Listener)}
}

// Listener is where the connections of one network namespace are redirected to:
// a TCP listener on 127.0.0.1 and one on ::1.
type Listener struct {
	ns        *netns
	cookie    uint64
	l4, l6    *net.TCPListener // l6 is nil where there is no IPv6
	Egress    *upstream.Egress
	NetworkID string // see proxy.Flow
	pids      int    // how many of Listeners.at are its own

	accepted atomic.Int64
	// The egress and the namespace outlive the listener until the last
	// connection is done with them.
	users     sync.WaitGroup
	accepting sync.WaitGroup // goroutines that may add users

	// Guarded by load.mu.
	active  int  // connections that are served, until they are closed
	limited bool // there are too many
}

// load is the number of connections of all listeners together.
type load struct {
	mu         sync.Mutex
	busy       map[*Listener]struct{} // those with active connections
	all        int                    // active connections
	overloaded bool                   // there are too many of them
}

// Admission is how an accepted connection is to be served.
type Admission struct {
	// Direct says that there are too many: it is passed through unseen.
	Direct bool
	// Closed is to be called once the connection is closed.
	Closed func()
}

const (
	// maxActive is how many connections of one network namespace are served at
	// a time, and maxAll how many of all together. What is beyond goes direct,
	// so that no pod can take the agent's memory from the others: a connection
	// costs some 90 KiB while an answer comes, and Go's heap may be twice what
	// lives. A runtime has some tens.
	maxActive = 512
	maxAll    = 768
	// minActive is what a network namespace is served in any case while there
	// are maxAll, and leastActive when there are half as many more.
	minActive, leastActive = 64, 8
	// maxOpen is how many listeners there are when none is opened any more where
	// no runtime is.
	maxOpen = 1000
	// openRate, a second, and aheadBurst bound how often listeners are opened
	// where no runtime is, so that sandboxes which come and go by the thousand
	// cost little: one takes some 200 µs of processor time. The burst lets a
	// node's pods start all at once.
	openRate, openBurst = 50, 250
)

var errStopping = errors.New("the agent is stopping")

// Follow opens listeners where processes appear, until the kernel side is closed.
func (ls *Listeners) Follow(ctx context.Context) {
	limit := rate.NewLimiter(openRate, openBurst)
	for {
		n, err := ls.kernel.NextArrival()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, os.ErrClosed) {
				ls.log.Error("events of network namespaces can't be read any more; restart the agent", "err", err)
			}
			return
		}
		// What is gone already costs no more than this look.
		if _, err := procfs.Netns(n.PID); err == nil && limit.Wait(ctx) != nil {
			return
		}
		ls.Arrived(n)
	}
}

// Arrived opens the listener that an arrival asks for.
func (ls *Listeners) Arrived(n bpf.Arrival) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.stopped {
		return // the kernel side may be closed by now
	}
	there := false
	for _, pid := range []int{n.PID, n.Parent} {
		if pid == 0 || len(ls.open) >= maxOpen {
			continue
		}
		rl, err := ls.enter(pid)
		if err == nil {
			there = there || rl.cookie == n.Netns
		} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errStopping) {
			ls.log.Warn("opening a redirect listener where a process has appeared", "pid", pid, "err", err)
		}
	}
	if !there { // the processes are gone, or elsewhere
		for _, rl := range ls.open {
			there = there || rl.cookie == n.Netns
		}
	}
	if !there {
		if err := ls.kernel.CloseListener(n.Netns); err != nil {
			ls.log.Warn("forgetting a network namespace", "err", err)
		}
	}
}

// Find returns the listener of a network namespace by its cookie, nil if there is none.
func (ls *Listeners) Find(cookie uint64) *Listener {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for _, rl := range ls.open {
		if rl.cookie == cookie {
			return rl
		}
	}
	return nil
}

// Enter opens the listener of the namespace that a process is in, if it isn't open,
// and keeps it open until the process ends. The error is fs.ErrNotExist if it
// has.
func (ls *Listeners) Enter(pid int) error {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	_, err := ls.enter(pid)
	return err
}

func (ls *Listeners) enter(pid int) (*Listener, error) {
	if ls.stopped {
		return nil, errStopping
	}
	// Its end is watched before it is found alive; and as the caller holds
	// ls.mu, that isn't handled before it is among ls.at.
	if err := ls.kernel.Watch(pid); err != nil {
		return nil, err
	}
	rl, err := ls.find(pid)
	if err != nil {
		ls.gone(pid)
		ls.kernel.Unwatch(pid)
		return nil, err
	}
	if ls.at[pid] != rl {
		ls.gone(pid) // it was in another namespace
		ls.at[pid] = rl
		rl.pids++
	}
	return rl, nil
}

// find returns the listener of the namespace that a process is in, and opens it if
// it isn't open. The caller holds ls.mu.
func (ls *Listeners) find(pid int) (*Listener, error) {
	ns, err := openNetns(pid)
	if err != nil {
		return nil, err
	}
	if rl, ok := ls.open[ns.ino]; ok {
		ns.Close()
		return rl, nil
	}
	rl, err := ls.make(ns)
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("opening a redirect listener: %w", err)
	}
	ls.open[ns.ino] = rl
	return rl, nil
}

func (ls *Listeners) make(ns *netns) (*Listener, error) {
	l4, l6, err := ns.listen()
	if err != nil {
		return nil, err
	}
	rl := &Listener{ns: ns, l4: l4, l6: l6, Egress: ls.ups.NewEgress(ns.dial)}
	if rl.cookie, err = ls.kernel.OpenListener(l4, l6); err != nil {
		l4.Close()
		if l6 != nil {
			l6.Close()
		}
		return nil, err
	}
	if !ns.own {
		// The number is used once, from each boot on.
		rl.NetworkID = fmt.Sprintf("%d.%.8s", rl.cookie, ls.boot)
	}
	for _, l := range []*net.TCPListener{l4, l6} {
		if l != nil {
			rl.accepting.Go(func() { ls.accept(rl, l) })
		}
	}
	ls.log.Debug("redirect listener opened", "netns", ns.ino, "addr", l4.Addr())
	return rl, nil
}

// accept accepts connections until the listener's deadline, and then those that
// are waiting.
func (ls *Listeners) accept(rl *Listener, l *net.TCPListener) {
	rounds := 0
	for waiting := true; ; {
		c, err := l.AcceptTCP()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			// A client may connect there again and again, to keep it open.
			if rounds++; !waiting || rounds > lastRounds {
				l.Close()
				return
			}
			waiting = false
			_ = l.SetDeadline(time.Now().Add(lastTime)) // or none would be accepted
			continue
		}
		if err != nil {
			// Out of descriptors, most likely. Connections wait or, when
			// the heartbeat is withheld, go direct.
			ls.log.Error("accepting a redirected connection", "err", err)
			time.Sleep(50 * time.Millisecond)
			continue
		}
		waiting = true
		rl.accepted.Add(1)
		rl.users.Add(1)
		ls.wg.Add(1)
		served := ls.count(rl, 1)
		go ls.serve(rl, c, Admission{!served, sync.OnceFunc(func() {
			if served {
				ls.count(rl, -1)
			}
			rl.users.Done()
			ls.wg.Done()
		})})
	}
}

// count counts a listener's connections, and has no more of them sent to it while
// there are too many. It returns false, and counts none, for one that came to a
// listener that is limited: it was on its way.
func (ls *Listeners) count(rl *Listener, n int) bool {
	f := &ls.load
	f.mu.Lock()
	defer f.mu.Unlock()
	if n > 0 && rl.limited {
		return false
	}
	rl.active += n
	f.all += n
	if rl.active > 0 {
		f.busy[rl] = struct{}{}
	} else {
		delete(f.busy, rl)
	}
	if crowded := f.all >= maxAll || f.overloaded && f.all > maxAll*3/4; crowded != f.overloaded {
		f.overloaded = crowded
		for other := range f.busy {
			ls.limit(other)
		}
	}
	ls.limit(rl)
	return true
}

// share is how many connections each listener may have.
func (f *load) share() int {
	switch {
	case !f.overloaded:
		return maxActive
	case f.all < maxAll*3/2:
		return min(max(maxAll/len(f.busy), minActive), maxActive)
	}
	return leastActive
}

// limit has no more connections sent to a listener that has too many, until it
// has fewer again. The caller holds load.mu.
func (ls *Listeners) limit(rl *Listener) {
	share := ls.load.share()
	limited := rl.active >= share || rl.limited && rl.active > share*3/4
	if limited == rl.limited {
		return
	}
	rl.limited = limited
	if err := ls.kernel.SuspendListener(rl.cookie, limited); err != nil {
		if !errors.Is(err, ebpf.ErrKeyNotExist) { // it has been closed
			ls.log.Error("bounding a network namespace's connections", "netns", rl.ns.ino, "err", err)
		}
		return
	}
	if limited {
		ls.log.Warn("a network namespace has too many connections; further ones go direct", "netns", rl.ns.ino, "served", rl.active, "of_all", ls.load.all)
	} else {
		ls.log.Info("a network namespace's connections are served again", "netns", rl.ns.ino, "served", rl.active, "of_all", ls.load.all)
	}
}

// Gone says that a process has ended; the listener of its namespace closes with the
// last one.
func (ls *Listeners) Gone(pid int) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	ls.gone(pid)
}

func (ls *Listeners) gone(pid int) {
	rl, ok := ls.at[pid]
	if !ok {
		return
	}
	delete(ls.at, pid)
	if rl.pids--; rl.pids == 0 {
		ls.close(rl.ns.ino, rl)
	}
}

// Reconcile notices processes that have ended, or have entered another network
// namespace, without an event.
func (ls *Listeners) Reconcile() {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for pid, rl := range ls.at {
		if ino, err := procfs.Netns(pid); err != nil || ino != rl.ns.ino {
			ls.gone(pid)
			ls.kernel.Unwatch(pid)
		}
	}
}

// close closes a listener. The caller holds ls.mu.
func (ls *Listeners) close(ino uint64, rl *Listener) {
	delete(ls.open, ino)
	// First the kernel side forgets it, so that no connection is redirected to a
	// listener that is about to close.
	if err := ls.kernel.CloseListener(rl.cookie); err != nil {
		ls.log.Warn("closing a redirect listener", "netns", ino, "err", err)
	}
	// Those that were sent there have connected, or are about to.
	_ = rl.l4.SetDeadline(time.Now().Add(lastTime))
	if rl.l6 != nil {
		_ = rl.l6.SetDeadline(time.Now().Add(lastTime))
	}
	ls.wg.Go(func() {
		rl.accepting.Wait()
		rl.users.Wait()
		rl.Egress.Close()
		rl.ns.Close()
	})
	ls.log.Debug("redirect listener closed", "netns", ino)
}

// lastTime is how long a listener still accepts when no connection is redirected to
// it any more.
const (
	lastTime   = 100 * time.Millisecond
	lastRounds = 5 // of that time, while connections are waiting
)

// CloseAll closes all listeners for good; connections that came through them go on.
// No more are accepted when it returns.
func (ls *Listeners) CloseAll() {
	ls.mu.Lock()
	var closed []*Listener
	for ino, rl := range ls.open {
		closed = append(closed, rl)
		ls.close(ino, rl)
	}
	clear(ls.at)
	ls.stopped = true
	ls.mu.Unlock()
	for _, rl := range closed {
		rl.accepting.Wait()
	}
}

// Wait waits for the connections that came through all listeners.
func (ls *Listeners) Wait() { ls.wg.Wait() }

// Status is a listener as the agent's status shows it.
type Status struct {
	Netns    uint64   `json:"netns"` // the namespace's inode
	Addrs    []string `json:"addrs"`
	PIDs     []int    `json:"pids"`     // of the processes that it is open for
	Accepted int64    `json:"accepted"` // connections since it was opened
}

func (ls *Listeners) Status() []Status {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	all := make([]Status, 0, len(ls.open))
	for ino, rl := range ls.open {
		s := Status{Netns: ino, Addrs: []string{rl.l4.Addr().String()}, Accepted: rl.accepted.Load()}
		if rl.l6 != nil {
			s.Addrs = append(s.Addrs, rl.l6.Addr().String())
		}
		for pid, at := range ls.at {
			if at == rl {
				s.PIDs = append(s.PIDs, pid)
			}
		}
		slices.Sort(s.PIDs)
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Status) int { return int(a.Netns) - int(b.Netns) })
	return all
}
