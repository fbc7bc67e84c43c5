// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"errors"
	"fmt"
	"time"

	"weir/agent/trust"
	"weir/proxy/registry"
)

// settleTime is how long a connection waits until it is known how its runtime is
// treated.
const settleTime = 2 * time.Second

// Settle waits until it is known how a runtime is treated. By then the CA is where it
// reads its roots, which a program does when it verifies the first certificate,
// whoever sends that: so no connection of a runtime may be carried before. It returns
// false when that took too long, for this connection or one before, and the runtime may
// have read them.
func (rs *Runtimes) Settle(rt *Runtime) bool {
	long := settleTime
	if rt.wasCarried() {
		long = 0
	}
	select {
	case <-rt.settled:
		return true
	case <-time.After(long):
	}
	rt.mu.Lock()
	rt.carried = true
	rt.mu.Unlock()
	return false
}

func (rt *Runtime) wasCarried() bool {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	return rt.carried
}

// Trusts says whether a runtime trusts the CA for a registry, once that is known.
func (rs *Runtimes) Trusts(rt *Runtime, name string) bool {
	if !rs.Settle(rt) {
		return false
	}
	host := registry.Canonical(name)
	if name != host {
		// An image reference with upper-case letters: in a certs.d that is another
		// registry, without weir's CA, also where its server sends the client
		// for a token.
		rt.misleads(host)
	}
	if err := rs.except(rt, host)[host]; err != nil {
		if errors.Is(err, errLater) {
			rs.proveLater(rt)
		}
		rs.o.Log.Debug("a runtime doesn't trust the CA for a registry; passed through", "runtime", rt.kind.name, "pid", rt.PID, "registry", host, "err", err)
		return false
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	return rt.reach == ReachIntercepted
}

// except says for which of hosts a runtime that is intercepted for others is
// passed through, and why. It looks at the files that the runtime reads.
func (rs *Runtimes) except(rt *Runtime, hosts ...string) map[string]error {
	rt.mu.Lock()
	reach, rests, generation, program := rt.reach, rt.basis, rt.generation, rt.program
	rt.mu.Unlock()
	found := make(map[string]error, len(hosts))
	if reach != ReachIntercepted {
		return found
	}
	if rests != (basis{}) {
		now, err := bounded(rs, rt, func() (trust.Coverage, error) { return rs.holds(rt, rests, hosts) })
		for _, host := range hosts {
			if found[host] = err; err == nil {
				found[host] = rs.lingers(rt, host, now[host])
			}
		}
		if errors.Is(err, errGone) {
			rs.passThrough(rt, err.Error(), rt.restartStep())
		}
	}
	for _, host := range hosts {
		since, ok := rs.o.CA.Since(host)
		switch {
		case found[host] != nil:
		case rests.certsD == nil && ok && since > generation:
			found[host] = fmt.Errorf("%w: %s", errLater, rt.restartStep())
		case rs.state.programRefused(program, host):
			found[host] = errProgramRefused
		}
	}
	return found
}

// errLater says that a runtime may have read the CA's certificate before it was made
// for a host too.
var errLater = errors.New("it may have read its roots before weir knew this registry")

// errGone says that a runtime may have read its roots without the CA.
var errGone = errors.New("it may have read its roots while that was so")

// holds says for which of hosts what a runtime's trust rests on is still there.
func (rs *Runtimes) holds(rt *Runtime, rests basis, hosts []string) (trust.Coverage, error) {
	root, err := trust.OpenRoot(rt.PID)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if rests.certsD != nil {
		return rs.o.CA.Coverage(root, *rests.certsD, hosts), nil
	}
	id, err := rs.o.CA.Holds(root, rests.file)
	if err == nil && !rs.o.CA.Follows(id, rests.id) {
		err = fmt.Errorf("weir's CA was removed and made anew: %s", rests.file)
	}
	if err != nil {
		return nil, fmt.Errorf("%w; %w", err, errGone)
	}
	return nil, nil
}

// Accepted records that a runtime has verified a certificate of weir's: it has
// its roots in its memory now.
func (rs *Runtimes) Accepted(rt *Runtime) {
	rt.mu.Lock()
	first := rt.basis.file != ""
	if first {
		rt.basis = basis{}
	}
	rt.mu.Unlock()
	if first {
		rs.keep(rt)
	}
}

var errProgramRefused = errors.New("this program has refused weir's certificate for it; it is tried again when the program changes, and after the next boot")

// lingerTime is how long a runtime is still passed through to a registry when
// nothing leads there any more: a pull that is running was led there before.
const lingerTime = 10 * time.Minute

// lingers returns err, or that a pull may still be on its way to host without
// the CA.
func (rs *Runtimes) lingers(rt *Runtime, host string, err error) error {
	if errors.Is(err, trust.ErrLeads) {
		rt.misleads(host)
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if err == nil && rt.basis.certsD != nil && rs.maybeLed(rt, host) {
		return errors.New("a pull from a registry that weir doesn't know yet may be led here, without weir's CA: it is intercepted " + lingerTime.String() + " after the last of these")
	}
	if rt.fresh[host] && err == nil && rt.basis.certsD != nil {
		return errors.New("weir has just learned it, and a pull may be running that began before: it is intercepted once it has no connection to a registry for a moment")
	}
	if since, ok := rt.misled[host]; ok && err == nil && rt.basis.certsD != nil && time.Since(since) < lingerTime {
		return fmt.Errorf("%w, or did until just now, without weir's CA; a pull may be running: it is intercepted %s after that", trust.ErrLeads, lingerTime)
	}
	return err
}

// Unsure records that a runtime has connected to a host that may be a registry which
// isn't known, or that it is none.
func (rs *Runtimes) Unsure(rt *Runtime, host string, unsure bool) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if !unsure {
		delete(rt.unsure, host)
		return
	}
	if rt.unsure == nil || len(rt.unsure) >= maxMisled {
		rt.unsure = make(map[string]time.Time)
	}
	rt.unsure[host] = time.Now()
}

// maybeLed says whether a pull from a registry that isn't known may be led to host, by
// its token server or a redirect. It reads the settings of the registry that it began
// at, which don't have the CA. A company has several registries, and one of them may
// be where the others' tokens are from; those that are known by themselves aren't.
// The caller holds rt.mu.
func (rs *Runtimes) maybeLed(rt *Runtime, host string) bool {
	if k, ok := rs.o.Find(host); !ok || !k.Learned {
		return false
	}
	for other, at := range rt.unsure {
		if _, known := rs.o.Find(other); !known && time.Since(at) < lingerTime {
			return true
		}
	}
	return false
}

// misleads records that a pull of a runtime may be led to a host without the CA.
func (rt *Runtime) misleads(host string) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if rt.misled == nil || len(rt.misled) >= maxMisled {
		rt.misled = make(map[string]time.Time)
	}
	rt.misled[host] = time.Now()
}

// maxMisled bounds what is remembered of one runtime. Few registries are known.
const maxMisled = 1024

// Rejected records that a runtime did not trust a certificate after all. It is
// passed through from then on, and so is, for this registry, every run of the
// program if that is what the CA was put in place for: a restart would not
// change it.
func (rs *Runtimes) Rejected(rt *Runtime, host string, err error) {
	rs.o.Log.Error("a runtime refused weir's certificate; it is passed through from now on", "runtime", rt.kind.name, "pid", rt.PID, "registry", host, "err", err)
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
