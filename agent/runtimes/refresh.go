// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"

	"weir/agent/procfs"
	"weir/agent/trust"
)

// Refresh puts the present generation of the CA's certificate wherever the CA is,
// and makes the directories of added registries for the runtimes that trust it by
// a certs.d. It returns when that is done, but for where files can't be read.
func (rs *Runtimes) Refresh(added ...string) {
	for _, name := range rs.o.Lasting {
		if len(rs.o.Ledger.Made(name)) == 0 {
			continue
		}
		if r, err := trust.OpenRootDir(name); err == nil {
			usual, _ := trust.SystemPlaces(nil)
			generation := rs.o.CA.Generation()
			res := rs.o.CA.Install(r, usual, nil)
			r.Close()
			rs.record(name, res)
			if res.System == nil {
				rs.state.installed(name, res, generation)
			}
		}
	}
	all := rs.running()
	for _, rt := range all { // before there is a directory, which several may read
		for _, host := range added {
			rs.freshen(rt, host)
		}
	}
	for _, rt := range all {
		rs.refresh(rt)
	}
}

// running are the runtimes of which it is known how they are treated. The others
// are refreshed when it is.
func (rs *Runtimes) running() (all []*Runtime) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for rt := range maps.Values(rs.all) {
		select {
		case <-rt.settled:
			all = append(all, rt)
		default:
		}
	}
	return all
}

// refresh is Refresh for one runtime.
func (rs *Runtimes) refresh(rt *Runtime) {
	rt.mu.Lock()
	rests, installed := rt.basis, rt.installed
	rt.mu.Unlock()
	if !installed && rests.certsD == nil {
		return
	}
	err := inRoot(rs, rt, func(root *trust.Root) error {
		host := rs.o.Lasting[root.ID()]
		generation := rs.o.CA.Generation()
		if installed {
			res := rs.install(rt, root)
			rs.record(host, res)
			if res.System == nil && host != "" {
				rs.state.installed(host, res, generation)
			}
			rs.follow(rt, root)
		}
		if rests.certsD != nil {
			rs.record(host, rs.o.CA.Install(root, trust.Places{CertsD: []string{rests.dir}}, rs.o.Registries()))
		}
		return nil
	})
	if err != nil {
		rs.o.Log.Warn("a runtime does not get the CA's new certificate", "runtime", rt.kind.name, "pid", rt.PID, "err", err)
	}
}

// follow notes which file has the CA that a runtime has yet to read, once it is the next
// generation's.
func (rs *Runtimes) follow(rt *Runtime, root *trust.Root) {
	rt.mu.Lock()
	rests := rt.basis
	rt.mu.Unlock()
	if rests.file == "" {
		return
	}
	id, err := rs.o.CA.Holds(root, rests.file)
	if err != nil || id == rests.id || !rs.o.CA.Follows(id, rests.id) {
		return
	}
	rt.mu.Lock()
	if rt.basis == rests {
		rt.basis.id = id
	}
	rt.mu.Unlock()
	rs.keep(rt)
}

// keep has it remembered what a runtime's trust rests on, as long as it is intercepted.
func (rs *Runtimes) keep(rt *Runtime) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rt.mu.Lock()
	intercepted := rt.reach == ReachIntercepted
	rt.mu.Unlock()
	if intercepted && rt.ctx.Err() == nil && !rt.kind.oneShot {
		rs.state.saveTrust(rt)
	}
}

// freshen has a registry passed through, for a runtime that trusts the CA by a
// certs.d, until no pull can be running that began before it had a directory there.
func (rs *Runtimes) freshen(rt *Runtime, host string) {
	rt.mu.Lock()
	was := rt.fresh[host]
	if len(rt.kind.certsD) > 0 {
		rt.fresh[host] = true
	}
	is := rt.fresh[host]
	rt.mu.Unlock()
	if was || !is {
		return
	}
	rs.wg.Go(func() {
		if rs.quiet(rt, rs.portsOf(host)) {
			rt.mu.Lock()
			delete(rt.fresh, host)
			rt.mu.Unlock()
		}
	})
}

// Carry counts a connection of a runtime that comes through a listener, until what it
// returns is called: among the runtime's sockets it is to the listener's port. One that
// is intercepted may be of a pull that has read an earlier generation of the CA.
func (rs *Runtimes) Carry(rt *Runtime) (done func()) {
	count := func(n int) {
		rt.mu.Lock()
		defer rt.mu.Unlock()
		rt.through += n
	}
	count(1)
	return sync.OnceFunc(func() { count(-1) })
}

// pulls says whether a runtime has a connection to one of the given ports, or through a
// listener.
func (rt *Runtime) pulls(ports []uint16) (bool, error) {
	rt.mu.Lock()
	through := rt.through
	rt.mu.Unlock()
	if through > 0 {
		return true, nil
	}
	n, err := procfs.Connections(rt.PID, ports)
	return n > 0, err
}

// Withdraw removes the directories of a registry from the certs.d of runtimes.
func (rs *Runtimes) Withdraw(host string) {
	for _, rt := range rs.running() {
		rt.mu.Lock()
		dir := rt.basis.dir
		rt.mu.Unlock()
		if dir == "" {
			continue
		}
		err := inRoot(rs, rt, func(root *trust.Root) error {
			var made []trust.Made
			if lasting := rs.o.Lasting[root.ID()]; lasting != "" {
				made = rs.o.Ledger.Made(lasting)
			}
			return trust.Withdraw(root, dir, host, made)
		})
		if err != nil {
			rs.o.Log.Warn("a registry's directory can't be removed", "runtime", rt.kind.name, "pid", rt.PID, "registry", host, "err", err)
		}
	}
}

// proveLater finds out whether a runtime that has connected to a registry which
// became one of the CA's names later has read its roots since.
func (rs *Runtimes) proveLater(rt *Runtime) {
	present := rs.o.CA.Generation()
	rt.mu.Lock()
	known := rt.generation
	due := rt.kind.ask != nil && rt.asked < present && rt.reach == ReachIntercepted
	if due {
		rt.asked = present
	}
	rt.mu.Unlock()
	if !due {
		return
	}
	rs.wg.Go(func() {
		err := rs.probe(rt, probeSystem, known, present)
		if err != nil {
			rs.o.Log.Debug("a runtime doesn't trust the CA's new certificate", "runtime", rt.kind.name, "pid", rt.PID, "err", err)
			return
		}
		rt.mu.Lock()
		rt.generation = max(rt.generation, present)
		rt.mu.Unlock()
		rs.keep(rt)
	})
}

// portsOf are the ports that registries listen on, and those that hosts name.
func (rs *Runtimes) portsOf(hosts ...string) []uint16 {
	ports := slices.Clone(rs.o.Ports)
	for _, host := range hosts {
		if _, port, err := net.SplitHostPort(host); err == nil {
			if n, err := strconv.ParseUint(port, 10, 16); err == nil && !slices.Contains(ports, uint16(n)) {
				ports = append(ports, uint16(n))
			}
		}
	}
	return ports
}
