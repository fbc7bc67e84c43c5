// SPDX-License-Identifier: Apache-2.0

package agent

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

// doors are the listeners that redirected connections come to: one pair in each
// network namespace that has a process, so that it is there before a runtime
// is. One is opened when the namespace's first process appears, and closed with
// the last of the processes that it was opened for, since it would keep the
// namespace from going. If others are left there, the next program that one of
// them starts has it opened again.
type doors struct {
	kernel *bpf.Kernel
	ups    upstream.Config
	serve  func(d *door, c *net.TCPConn, t turn)
	log    *slog.Logger
	boot   string
	flow   flow

	mu   sync.Mutex
	open map[uint64]*door // by the namespace's inode
	at   map[int]*door    // by the processes that they are open for
	over bool             // none is opened any more
	wg   sync.WaitGroup
}

func newDoors(k *bpf.Kernel, ups upstream.Config, serve func(*door, *net.TCPConn, turn), log *slog.Logger) *doors {
	return &doors{kernel: k, ups: ups, serve: serve, log: log, boot: procfs.BootID(), flow: flow{busy: make(map[*door]struct{})},
		open: make(map[uint64]*door), at: make(map[int]*door)}
}

// door is where the runtimes of one network namespace are redirected to.
type door struct {
	ns     *netns
	cookie uint64
	l4, l6 *net.TCPListener // l6 is nil where there is no IPv6
	egress *upstream.Egress
	place  string // see proxy.Flow
	pids   int    // how many of doors.at are its own

	accepted atomic.Int64
	// The egress and the namespace outlive the door until the last
	// connection is done with them.
	users     sync.WaitGroup
	accepting sync.WaitGroup // those who may make more users

	// Guarded by flow.mu.
	active int  // connections that are served, until they are closed
	shut   bool // there are too many
}

// flow is what all doors' connections come to.
type flow struct {
	mu      sync.Mutex
	busy    map[*door]struct{} // those with active connections
	all     int                // active connections
	crowded bool               // there are too many of them
}

// turn is how a connection is to be served.
type turn struct {
	// direct says that there are too many: it is passed through unseen.
	direct bool
	// closed is to be called once the connection is closed.
	closed func()
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
	// maxAhead is how many doors there are when none is opened any more where
	// no runtime is.
	maxAhead = 1000
	// aheadRate, a second, and aheadBurst bound how often doors are opened
	// where no runtime is, so that sandboxes which come and go by the thousand
	// cost little: one takes some 200 µs of processor time. The burst lets a
	// node's pods start all at once.
	aheadRate, aheadBurst = 50, 250
)

var errStopping = errors.New("the agent is stopping")

// ahead opens doors where processes appear, until the kernel side is closed.
func (ds *doors) ahead(ctx context.Context) {
	limit := rate.NewLimiter(aheadRate, aheadBurst)
	for {
		n, err := ds.kernel.NextArrival()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, os.ErrClosed) {
				ds.log.Error("no more news of network namespaces; restart the agent", "err", err)
			}
			return
		}
		// What is gone already costs no more than this look.
		if _, err := procfs.Netns(n.PID); err == nil && limit.Wait(ctx) != nil {
			return
		}
		ds.arrived(n)
	}
}

// arrived opens the door that an arrival asks for.
func (ds *doors) arrived(n bpf.Arrival) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if ds.over {
		return // the kernel side may be closed by now
	}
	there := false
	for _, pid := range []int{n.PID, n.Parent} {
		if pid == 0 || len(ds.open) >= maxAhead {
			continue
		}
		d, err := ds.enterLocked(pid)
		if err == nil {
			there = there || d.cookie == n.Netns
		} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errStopping) {
			ds.log.Warn("opening a door where a process has appeared", "pid", pid, "err", err)
		}
	}
	if !there { // the processes are gone, or elsewhere
		for _, d := range ds.open {
			there = there || d.cookie == n.Netns
		}
	}
	if !there {
		if err := ds.kernel.CloseDoor(n.Netns); err != nil {
			ds.log.Warn("forgetting a network namespace", "err", err)
		}
	}
}

// enter opens the door of the namespace that a process is in, if it isn't open,
// and keeps it open until the process ends. The error is fs.ErrNotExist if it
// has.
func (ds *doors) enter(pid int) error {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	_, err := ds.enterLocked(pid)
	return err
}

func (ds *doors) enterLocked(pid int) (*door, error) {
	if ds.over {
		return nil, errStopping
	}
	// Its end is watched before it is found alive; and as the caller holds
	// ds.mu, that isn't taken in before it is among ds.at.
	if err := ds.kernel.Watch(pid); err != nil {
		return nil, err
	}
	d, err := ds.find(pid)
	if err != nil {
		ds.goneLocked(pid)
		ds.kernel.Unwatch(pid)
		return nil, err
	}
	if ds.at[pid] != d {
		ds.goneLocked(pid) // it was in another namespace
		ds.at[pid] = d
		d.pids++
	}
	return d, nil
}

// find returns the door of the namespace that a process is in, and opens it if
// it isn't open. The caller holds ds.mu.
func (ds *doors) find(pid int) (*door, error) {
	ns, err := openNetns(pid)
	if err != nil {
		return nil, err
	}
	if d, ok := ds.open[ns.ino]; ok {
		ns.Close()
		return d, nil
	}
	d, err := ds.make(ns)
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("opening a door: %w", err)
	}
	ds.open[ns.ino] = d
	return d, nil
}

func (ds *doors) make(ns *netns) (*door, error) {
	l4, l6, err := ns.listen()
	if err != nil {
		return nil, err
	}
	d := &door{ns: ns, l4: l4, l6: l6, egress: ds.ups.NewEgress(ns.dial)}
	if d.cookie, err = ds.kernel.OpenDoor(l4, l6); err != nil {
		l4.Close()
		if l6 != nil {
			l6.Close()
		}
		return nil, err
	}
	if !ns.own {
		// The number is used once, from each boot on.
		d.place = fmt.Sprintf("%d.%.8s", d.cookie, ds.boot)
	}
	for _, l := range []*net.TCPListener{l4, l6} {
		if l != nil {
			d.accepting.Go(func() { ds.accept(d, l) })
		}
	}
	ds.log.Debug("door opened", "netns", ns.ino, "addr", l4.Addr())
	return d, nil
}

// accept accepts connections until the listener's deadline, and then those that
// are waiting.
func (ds *doors) accept(d *door, l *net.TCPListener) {
	rounds := 0
	for waiting := true; ; {
		c, err := l.AcceptTCP()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			// Somebody may connect there again and again, to keep it open.
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
			ds.log.Error("accepting a redirected connection", "err", err)
			time.Sleep(50 * time.Millisecond)
			continue
		}
		waiting = true
		d.accepted.Add(1)
		d.users.Add(1)
		ds.wg.Add(1)
		served := ds.count(d, 1)
		go ds.serve(d, c, turn{!served, sync.OnceFunc(func() {
			if served {
				ds.count(d, -1)
			}
			d.users.Done()
			ds.wg.Done()
		})})
	}
}

// count counts a door's connections, and has no more of them sent to it while
// there are too many. It returns false, and counts none, for one that came to a
// door that is shut: it was on its way.
func (ds *doors) count(d *door, n int) bool {
	f := &ds.flow
	f.mu.Lock()
	defer f.mu.Unlock()
	if n > 0 && d.shut {
		return false
	}
	d.active += n
	f.all += n
	if d.active > 0 {
		f.busy[d] = struct{}{}
	} else {
		delete(f.busy, d)
	}
	if crowded := f.all >= maxAll || f.crowded && f.all > maxAll*3/4; crowded != f.crowded {
		f.crowded = crowded
		for other := range f.busy {
			ds.bound(other)
		}
	}
	ds.bound(d)
	return true
}

// share is how many connections each door may have.
func (f *flow) share() int {
	switch {
	case !f.crowded:
		return maxActive
	case f.all < maxAll*3/2:
		return min(max(maxAll/len(f.busy), minActive), maxActive)
	}
	return leastActive
}

// bound shuts a door that has too many connections, and opens it when it has
// fewer again. The caller holds flow.mu.
func (ds *doors) bound(d *door) {
	share := ds.flow.share()
	shut := d.active >= share || d.shut && d.active > share*3/4
	if shut == d.shut {
		return
	}
	d.shut = shut
	if err := ds.kernel.ShutDoor(d.cookie, shut); err != nil {
		if !errors.Is(err, ebpf.ErrKeyNotExist) { // it has been closed
			ds.log.Error("bounding a network namespace's connections", "netns", d.ns.ino, "err", err)
		}
		return
	}
	if shut {
		ds.log.Warn("a network namespace has too many connections; further ones go direct", "netns", d.ns.ino, "served", d.active, "of_all", ds.flow.all)
	} else {
		ds.log.Info("a network namespace's connections are served again", "netns", d.ns.ino, "served", d.active, "of_all", ds.flow.all)
	}
}

// gone says that a process has ended; the door of its namespace closes with the
// last one.
func (ds *doors) gone(pid int) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.goneLocked(pid)
}

func (ds *doors) goneLocked(pid int) {
	d, ok := ds.at[pid]
	if !ok {
		return
	}
	delete(ds.at, pid)
	if d.pids--; d.pids == 0 {
		ds.close(d.ns.ino, d)
	}
}

// reconcile notices processes that have ended, or have gone elsewhere, without a
// word.
func (ds *doors) reconcile() {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for pid, d := range ds.at {
		if ino, err := procfs.Netns(pid); err != nil || ino != d.ns.ino {
			ds.goneLocked(pid)
			ds.kernel.Unwatch(pid)
		}
	}
}

// close closes a door. The caller holds ds.mu.
func (ds *doors) close(ino uint64, d *door) {
	delete(ds.open, ino)
	// First the kernel side forgets it, so that nobody is sent to a listener
	// that is about to go.
	if err := ds.kernel.CloseDoor(d.cookie); err != nil {
		ds.log.Warn("closing a door", "netns", ino, "err", err)
	}
	// Those that were sent there have connected, or are about to.
	_ = d.l4.SetDeadline(time.Now().Add(lastTime))
	if d.l6 != nil {
		_ = d.l6.SetDeadline(time.Now().Add(lastTime))
	}
	ds.wg.Go(func() {
		d.accepting.Wait()
		d.users.Wait()
		d.egress.Close()
		d.ns.Close()
	})
	ds.log.Debug("door closed", "netns", ino)
}

// lastTime is how long a door is still answered when nobody is sent there any
// more.
const (
	lastTime   = 100 * time.Millisecond
	lastRounds = 5 // of that time, while there are some who wait
)

// closeAll closes all doors for good; connections that came through them go on.
// None comes any more when it returns.
func (ds *doors) closeAll() {
	ds.mu.Lock()
	var closed []*door
	for ino, d := range ds.open {
		closed = append(closed, d)
		ds.close(ino, d)
	}
	clear(ds.at)
	ds.over = true
	ds.mu.Unlock()
	for _, d := range closed {
		d.accepting.Wait()
	}
}

// DoorStatus is a door as the status shows it.
type DoorStatus struct {
	Netns    uint64   `json:"netns"` // the namespace's inode
	Addrs    []string `json:"addrs"`
	PIDs     []int    `json:"pids"`     // of the processes that it is open for
	Accepted int64    `json:"accepted"` // connections since it was opened
}

func (ds *doors) status() []DoorStatus {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	all := make([]DoorStatus, 0, len(ds.open))
	for ino, d := range ds.open {
		s := DoorStatus{Netns: ino, Addrs: []string{d.l4.Addr().String()}, Accepted: d.accepted.Load()}
		if d.l6 != nil {
			s.Addrs = append(s.Addrs, d.l6.Addr().String())
		}
		for pid, at := range ds.at {
			if at == d {
				s.PIDs = append(s.PIDs, pid)
			}
		}
		slices.Sort(s.PIDs)
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b DoorStatus) int { return int(a.Netns) - int(b.Netns) })
	return all
}
