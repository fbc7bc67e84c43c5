// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"weir/bpf"
	"weir/proxy"
)

// doors are the listeners that redirected connections come to: one pair in
// each network namespace that has a runtime.
type doors struct {
	kernel *bpf.Kernel
	ups    proxy.Upstreams
	serve  func(*door, *net.TCPConn)
	log    *slog.Logger

	mu   sync.Mutex
	open map[uint64]*door // by the namespace's inode
	wg   sync.WaitGroup
}

// door is where the runtimes of one network namespace are redirected to.
type door struct {
	ns     *netns
	cookie uint64
	l4, l6 *net.TCPListener // l6 is nil where there is no ::1
	egress *proxy.Egress
	pids   map[int]struct{} // guarded by doors.mu

	accepted atomic.Int64
	// The egress and the namespace outlive the door until the last
	// connection is done with them.
	users sync.WaitGroup
}

// errNoLoopback says that a namespace's loopback interface is down.
var errNoLoopback = errors.New("the loopback interface of its network namespace is down")

// enter opens the door of the namespace that a runtime is in, if it isn't open,
// and keeps it open until leave.
func (ds *doors) enter(pid int) (*door, error) {
	ns, err := openNetns(pid)
	if err != nil {
		return nil, err
	}
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if d, ok := ds.open[ns.ino]; ok {
		ns.Close()
		d.pids[pid] = struct{}{}
		return d, nil
	}
	d, err := ds.make(ns)
	if err != nil {
		ns.Close()
		return nil, err
	}
	d.pids[pid] = struct{}{}
	ds.open[ns.ino] = d
	return d, nil
}

func (ds *doors) make(ns *netns) (*door, error) {
	if up, err := ns.loopbackUp(); err != nil {
		return nil, fmt.Errorf("looking at the loopback interface: %w", err)
	} else if !up {
		return nil, errNoLoopback
	}
	l4, err := ns.listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("opening a door: %w", err)
	}
	l6, err := ns.listen("tcp6", "[::1]:0")
	if err != nil {
		l6 = nil // no IPv6 here
	}
	d := &door{ns: ns, l4: l4, l6: l6, pids: make(map[int]struct{}), egress: ds.ups.NewEgress(ns.dial)}
	if d.cookie, err = ds.kernel.OpenDoor(l4, l6); err != nil {
		l4.Close()
		if l6 != nil {
			l6.Close()
		}
		return nil, fmt.Errorf("opening a door: %w", err)
	}
	for _, l := range []*net.TCPListener{l4, l6} {
		if l != nil {
			ds.wg.Go(func() { ds.accept(d, l) })
		}
	}
	ds.log.Debug("door opened", "netns", ns.ino, "addr", l4.Addr())
	return d, nil
}

func (ds *doors) accept(d *door, l *net.TCPListener) {
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors, most likely. Connections wait or, when
			// the heartbeat is withheld, go direct.
			ds.log.Error("accepting a redirected connection", "err", err)
			time.Sleep(50 * time.Millisecond)
			continue
		}
		d.accepted.Add(1)
		d.users.Add(1)
		ds.wg.Go(func() {
			defer d.users.Done()
			ds.serve(d, c)
		})
	}
}

// leave says that a process is gone; the door of its namespace closes with the
// last one.
func (ds *doors) leave(pid int) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for ino, d := range ds.open {
		if _, in := d.pids[pid]; !in {
			continue
		}
		delete(d.pids, pid)
		if len(d.pids) == 0 {
			ds.close(ino, d)
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
	d.l4.Close()
	if d.l6 != nil {
		d.l6.Close()
	}
	ds.wg.Go(func() {
		d.users.Wait()
		d.egress.Close()
		d.ns.Close()
	})
	ds.log.Debug("door closed", "netns", ino)
}

// closeAll closes all doors; connections that came through them go on.
func (ds *doors) closeAll() {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for ino, d := range ds.open {
		ds.close(ino, d)
	}
}

// wait waits until no connection is being served, or ctx is done.
func (ds *doors) wait(ctx context.Context) {
	done := make(chan struct{})
	go func() { ds.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// DoorStatus is a door as the status shows it.
type DoorStatus struct {
	Netns    uint64   `json:"netns"` // the namespace's inode
	Addrs    []string `json:"addrs"`
	PIDs     []int    `json:"pids"`
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
		for pid := range d.pids {
			s.PIDs = append(s.PIDs, pid)
		}
		slices.Sort(s.PIDs)
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b DoorStatus) int { return int(a.Netns) - int(b.Netns) })
	return all
}
