// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"weir/agent/procfs"
	"weir/agent/trust"
)

// establish opens a listener for a runtime, puts the CA where it reads
// certificates, and finds out whether it trusts it.
func (rs *Runtimes) establish(rt *Runtime, seeded bool) {
	// The listener first, if it isn't there: until then a new process goes direct,
	// and the kernel side notes that it may have read its roots.
	if err := rs.o.Listeners.Enter(rt.PID); err != nil {
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

	host := rs.o.Lasting[root.ID()]
	uid, uerr := procfs.User(rt.PID)
	rt.mu.Lock()
	rt.program = programOf(rt.PID, host)
	rt.onNode = host != "" && uerr == nil && uid == 0
	rt.mu.Unlock()
	if flag := ownRoots(rt.kind, procfs.Strings(rt.PID, "cmdline")); flag != "" {
		rs.passThrough(rt, flag+" on its command line names all the roots that it trusts", "nothing to do: without "+flag+" it is intercepted")
		return
	}
	if host == "" && inImage(rt, root) {
		rs.passThrough(rt, "its root file system is an image's that is being made: the CA would come to be in that", "nothing to do")
		return
	}
	generation := rs.o.CA.Generation() // or a later one
	res := rs.install(rt, root)
	rs.record(host, res)
	system, finds := res.System, basis{file: res.File}
	if system == nil {
		finds.id, system = rs.o.CA.Holds(root, res.File)
	}
	rt.mu.Lock()
	rt.installed = system == nil
	rt.mu.Unlock()
	if system == nil && host != "" {
		rs.state.installed(host, res, generation)
	}

	why := "it was running before the CA was installed, and has read its roots"
	if system == nil {
		switch {
		case seeded && rs.state.refusedBefore(rt):
			rs.passThrough(rt, "it refused weir's certificate before the agent's own restart", rt.restartStep())
			return
		case !seeded && (rs.o.Kernel.Early(rt.PID) || rt.wasCarried()):
			why = "it connected somewhere before the CA was installed"
		case !seeded && mayHaveRead(rt, root, res.Since):
			why = "it may have read its roots as it started, just before the CA was installed"
		case !seeded:
			// No connection of its has left unseen, so it can't have
			// verified anything yet, and will find the CA when it does.
			rs.intercept(rt, trustByStart, finds, generation)
			if !rs.o.Kernel.Early(rt.PID) { // between the question and the answer
				return
			}
			why = "it connected somewhere before the CA was installed"
		case seeded && rs.wentMeanwhile(rt, finds):
			why = "it may have read its roots while the CA was gone and the agent was not there"
		case seeded:
			if before := rs.state.installedBefore(host, rt.Start); before > 0 {
				rs.intercept(rt, trustByStart, finds, before)
				return
			}
			if known := rs.state.savedTrust(rt); known > 0 {
				if rs.state.savedFile(rt) == (trust.FileID{}) {
					finds = basis{} // it has read it
				}
				rs.intercept(rt, trustRemembered, finds, known)
				return
			}
		}
	}
	rs.prove(rt, root, host, system, why)
}

// wentMeanwhile says whether the file that a runtime had yet to read the CA from is
// another one now.
func (rs *Runtimes) wentMeanwhile(rt *Runtime, finds basis) bool {
	file := rs.state.savedFile(rt)
	return file != (trust.FileID{}) && !rs.o.CA.Follows(finds.id, file)
}

// earliestRead is how soon after its exec an eager program can read its roots.
// kaniko doesn't within 12 ms, nor a Go program of no other purpose within 0.5.
const earliestRead = 2 * time.Millisecond

// mayHaveRead says whether a process that has just started can have read its
// roots before the CA was there: it is one of the eager ones, or has settings in
// a certs.d, which are added to the roots before it connects.
func mayHaveRead(rt *Runtime, root *trust.Root, since time.Time) bool {
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
func (rs *Runtimes) install(rt *Runtime, root *trust.Root) trust.Result {
	places, err := placesOf(rt.PID)
	if err != nil {
		return trust.Result{System: err}
	}
	res := rs.o.CA.Install(root, places, nil)
	if !errors.Is(res.System, trust.ErrOthers) {
		return res
	}
	// Maybe it is the node's own directory, as an ordinary user sees it: that
	// one gets the CA, though not on this user's account.
	usual, _ := trust.SystemPlaces(nil)
	generation := rs.o.CA.Generation()
	for _, name := range rs.o.Lasting {
		r, err := trust.OpenRootDir(name)
		if err != nil {
			continue
		}
		if slices.ContainsFunc(usual.System, func(dir string) bool { return r.Same(root, dir) }) {
			node := rs.o.CA.Install(r, usual, nil)
			rs.record(name, node)
			if node.System == nil {
				rs.state.installed(name, node, generation)
			}
		}
		r.Close()
	}
	return rs.o.CA.Install(root, places, nil)
}

// record notes what was installed in a root file system that outlives its
// runtimes. What is in a container's goes with it.
func (rs *Runtimes) record(host string, res trust.Result) {
	if host == "" {
		return
	}
	if err := rs.o.Ledger.Record(host, res); err != nil {
		rs.o.Log.Error("recording what was installed", "err", err)
	}
}

// prove finds out whether a running runtime trusts the CA, by having it pull
// from a probe address. why is what speaks against it.
func (rs *Runtimes) prove(rt *Runtime, root *trust.Root, host string, system error, why string) {
	step := rt.restartStep()
	if system != nil {
		why = "the CA can't be installed: " + system.Error()
		step = "see to that; its next start is then intercepted"
	}
	if rt.kind.ask == nil {
		rs.passThrough(rt, why+"; it can't be asked to prove otherwise", step)
		if system == nil {
			rs.restartLater(rt, why)
		}
		return
	}
	before := rs.state.savedCertsD(rt) // it is forgotten with that
	rs.passThrough(rt, "it is being asked whether it trusts the CA", "wait a moment")
	var perr error
	if system == nil {
		present, oldest := rs.o.CA.Generation(), rs.o.CA.Oldest()
		for _, generation := range slices.Compact([]uint64{present, oldest}) {
			if perr = rs.probe(rt, probeSystem, 0, generation); perr == nil {
				rs.intercept(rt, trustBySystem, basis{}, generation)
				return
			}
			if !errors.Is(perr, errDistrusts) {
				break
			}
		}
	}
	if len(rt.kind.certsD) > 0 && rt.ctx.Err() == nil {
		if certsD, dir, made, err := rs.proveCertsD(rt, root, host); err == nil {
			// What was there may have been put there by an agent that has ended before
			// the pulls that began without it, or for another runtime just now.
			fresh := made || dir != before
			if fresh {
				rs.passThrough(rt, "it trusts the CA in the pulls that begin now; the others are waited for", "wait until it has no connection to a registry for a moment, or "+rt.restartStep())
			}
			for _, host := range rs.o.Recent() {
				rs.freshen(rt, host)
			}
			if !fresh || rs.quiet(rt, rs.o.Ports) {
				rs.intercept(rt, trustByCertsD, basis{certsD: certsD, dir: dir}, 0)
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
	} else {
		rs.passThrough(rt, why+"; asked to prove otherwise: "+perr.Error(), step)
	}
	if system == nil {
		rs.restartLater(rt, why)
	}
}

// proveCertsD tries the directories that the runtime reads at each pull, one
// after the other, and leaves the CA only in the one that it does read, and where
// another runtime may. Each registry gets a directory in the one that it reads, once that is
// known: what is taken away again may be read just then, by a pull that fails. made says that
// one wasn't there before.
func (rs *Runtimes) proveCertsD(rt *Runtime, root *trust.Root, host string) (certsD *trust.CertsD, read string, made bool, err error) {
	// Its configuration says where: only root's may say where root writes.
	if uid, err := procfs.User(rt.PID); err != nil || uid != 0 {
		return nil, "", false, errors.Join(errors.New("its certs.d is not root's"), err)
	}
	var last error
	dirs := certsDOf(rt, root)
	for _, dir := range dirs {
		place := trust.Places{CertsD: []string{dir}}
		shared := rs.sharedDir(root, dir)
		res := shared.join(rt, func() trust.Result { return rs.o.CA.Install(root, place, nil) }) // for the probe alone
		rs.record(host, res)
		if coverage := res.CertsD[dir]; !coverage.Covers(probeCertsD.String()) {
			last = fmt.Errorf("%s: %w", dir, coverage[probeCertsD.String()])
		} else if last = rs.probe(rt, probeCertsD, 0, 0); last == nil {
			all := rs.o.CA.Install(root, place, rs.o.Registries())
			rs.record(host, all)
			return rt.lookup(root, dir, dirs), dir, len(res.Files)+len(all.Files) > 0, nil
		}
		if err := shared.leave(rt, root); err != nil {
			rs.o.Log.Warn("taking the CA out again", "dir", dir, "err", err)
		}
	}
	return nil, "", false, last
}

// certsDPlace is a certs.d in a root file system.
type certsDPlace struct {
	root trust.RootID
	dir  string
}

// sharedDir has the runtimes that trust the CA by a certs.d, or may, and what was made for
// the probe there.
type sharedDir struct {
	mu    sync.Mutex // held while the CA is put there, or taken out
	users []*Runtime
	made  trust.Result
}

// join adds a runtime, for which install puts the CA there.
func (s *sharedDir) join(rt *Runtime, install func() trust.Result) trust.Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users = append(s.users, rt)
	res := install()
	s.made.Files = append(s.made.Files, res.Files...)
	s.made.Dirs = append(s.made.Dirs, res.Dirs...)
	return res
}

// leave removes a runtime that doesn't trust the CA by it, and with the last one what was made there.
func (s *sharedDir) leave(rt *Runtime, root *trust.Root) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users = slices.DeleteFunc(s.users, func(u *Runtime) bool { return u == rt || u.ctx.Err() != nil })
	if len(s.users) == 0 {
		err = s.made.Undo(root)
		s.made = trust.Result{}
	}
	return err
}

// sharedDir returns who else may trust the CA by a certs.d.
func (rs *Runtimes) sharedDir(root *trust.Root, dir string) *sharedDir {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	at := certsDPlace{root.ID(), dir}
	if rs.certsDs[at] == nil {
		rs.certsDs[at] = new(sharedDir)
	}
	return rs.certsDs[at]
}

// quietTime is how long a runtime has to have no connection to a registry before
// no pull is taken to be running: between two requests of one there are
// milliseconds.
const quietTime = 5 * time.Second

// quiet waits until no pull runs that began before the CA was there for it: a
// pull reads certs.d when it begins, and makes connections until it ends. It
// returns false when the runtime has ended.
func (rs *Runtimes) quiet(rt *Runtime, ports []uint16) bool {
	ports = append(slices.Clone(ports), proxyPorts(rt)...)
	t := time.NewTicker(quietTime / 10)
	defer t.Stop()
	for since := time.Now(); time.Since(since) < quietTime; {
		select {
		case <-rt.ctx.Done():
			return false
		case <-t.C:
		}
		if pulls, err := rt.pulls(ports); pulls || err != nil {
			since = time.Now()
		}
	}
	return true
}

// configPathRE finds the directories that a containerd's configuration names.
// Whether it really reads them is for the probe to say.
var configPathRE = regexp.MustCompile(`(?m)^\s*config_path\s*=\s*["']([^"'\n]+)["']`)

// certsDOf returns the certs.d directories that a runtime may read.
func certsDOf(rt *Runtime, root *trust.Root) []string {
	dirs := slices.Clone(rt.kind.certsD)
	for _, dir := range configPaths(rt, root) {
		if filepath.IsAbs(dir) && filepath.Clean(dir) == dir && !slices.Contains(dirs, dir) {
			dirs = append([]string{dir}, dirs...)
		}
	}
	return dirs
}

// configPaths returns what a containerd's configuration has for config_path.
func configPaths(rt *Runtime, root *trust.Root) (paths []string) {
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
func (rt *Runtime) lookup(root *trust.Root, dir string, dirs []string) *trust.CertsD {
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
