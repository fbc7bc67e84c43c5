// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"weir/agent/procfs"
	"weir/agent/trust"
)

// maxInstalled bounds what is remembered of a root file system.
const maxInstalled = 1000

// installation is when a generation of the CA's certificate was put somewhere.
type installation struct {
	Generation uint64        `json:"generation"`
	At         time.Duration `json:"at"` // after boot
}

// stateFile remembers over a restart of the agent what is true for this boot of
// the machine: since when the CA is installed on the host, and which runtimes
// were seen to trust it. Without it an upgrade would have to prove everything
// again, and what can't be asked would be passed through.
type stateFile struct {
	path string
	log  *slog.Logger

	mu sync.Mutex
	s  state
}

type state struct {
	Boot string `json:"boot"` // the boot that the rest is about
	CA   string `json:"ca"`   // which CA it is about
	// Installed is when the CA was put into a lasting root file system where it was
	// not, and then its next generations in the place of the one before.
	Installed map[string][]installation `json:"installations"`
	Runtimes  []trustRecord             `json:"trust"`
	// CertsD are those that trust the CA by a certs.d in all pulls that may run.
	CertsD []certsDRecord `json:"certs_d,omitempty"`
	// Refusals are the last maxRefusals, the oldest first.
	Refusals []refusal `json:"refusals,omitempty"`
}

const maxRefusals = 1000

// refusal is that of a program which doesn't trust the CA for a registry,
// wherever it reads its roots, and won't the next time.
type refusal struct {
	Program program `json:"program"`
	Host    string  `json:"host"`
}

type trustRecord struct {
	PID   int           `json:"pid"`
	Start time.Duration `json:"start"`
	// Generation is what it was seen to trust. 0 says that it did not trust the
	// CA although it should have.
	Generation uint64 `json:"generation"`
	// File has the CA, and it may not have been read yet. It is none once that has.
	File trust.FileID `json:"file,omitzero"`
}

type certsDRecord struct {
	PID   int           `json:"pid"`
	Start time.Duration `json:"start"`
	Dir   string        `json:"dir"`
}

// openState reads the file; what is of another boot or CA is void.
func openState(dir, ca string, log *slog.Logger) *stateFile {
	f := &stateFile{path: filepath.Join(dir, "state.json"), log: log}
	want := state{Boot: procfs.BootID(), CA: ca}
	b, err := os.ReadFile(f.path)
	if err != nil || json.Unmarshal(b, &f.s) != nil || f.s.Boot != want.Boot || f.s.CA != want.CA {
		f.s = want
	}
	return f
}

// installed notes that the CA is in a root file system, where a generation of its
// certificate, or a later one, was to be put.
func (f *stateFile) installed(root string, res trust.Result, generation uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.s.Installed[root]
	switch {
	case len(res.Files) == 0 && len(all) > 0 && all[len(all)-1].Generation >= generation:
		return
	case len(res.Files) > 0 && !res.Superseded:
		all = nil // it had been removed
	}
	if f.s.Installed == nil {
		f.s.Installed = make(map[string][]installation)
	}
	all = append(all, installation{generation, procfs.SinceBoot()})
	f.s.Installed[root] = all[max(0, len(all)-maxInstalled):]
	f.save()
}

// installedBefore returns the generation that was in a root file system before a
// process started, 0 if none was.
func (f *stateFile) installedBefore(root string, start time.Duration) (generation uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, i := range f.s.Installed[root] {
		if i.At < start {
			generation = i.Generation
		}
	}
	return generation
}

// saveTrust notes what a runtime trusts through its roots, which it keeps for life, or
// by a certs.d: that is proven again, but which pulls have read it can't be.
func (f *stateFile) saveTrust(rt *Runtime) {
	rt.mu.Lock()
	generation, rests := rt.generation, rt.basis
	rt.mu.Unlock()
	if generation > 0 {
		f.note(rt, generation, rests.id)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drop(rt.PID)
	f.s.CertsD = append(f.s.CertsD, certsDRecord{rt.PID, rt.Start, rests.dir})
	f.save()
}

// savedCertsD returns the certs.d by which a runtime was seen to trust the CA in all
// pulls that may run, empty for none.
func (f *stateFile) savedCertsD(rt *Runtime) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.s.CertsD {
		if r.PID == rt.PID && r.Start == rt.Start {
			return r.Dir
		}
	}
	return ""
}

// refused notes that a runtime must not be tried again.
func (f *stateFile) refused(rt *Runtime) { f.note(rt, 0, trust.FileID{}) }

func (f *stateFile) note(rt *Runtime, generation uint64, file trust.FileID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drop(rt.PID)
	f.s.Runtimes = append(f.s.Runtimes, trustRecord{rt.PID, rt.Start, generation, file})
	f.save()
}

func (f *stateFile) forget(pid int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.drop(pid) {
		f.save()
	}
}

func (f *stateFile) drop(pid int) bool {
	before := len(f.s.Runtimes) + len(f.s.CertsD)
	f.s.Runtimes = slices.DeleteFunc(f.s.Runtimes, func(r trustRecord) bool { return r.PID == pid })
	f.s.CertsD = slices.DeleteFunc(f.s.CertsD, func(r certsDRecord) bool { return r.PID == pid })
	return len(f.s.Runtimes)+len(f.s.CertsD) < before
}

// savedTrust returns the generation that a runtime was seen to trust, 0 for none.
func (f *stateFile) savedTrust(rt *Runtime) uint64 {
	r, _ := f.record(rt)
	return r.Generation
}

// savedFile returns the file that a runtime had yet to read the CA from.
func (f *stateFile) savedFile(rt *Runtime) trust.FileID {
	r, _ := f.record(rt)
	return r.File
}

// refusedBefore says whether a runtime must not be tried again.
func (f *stateFile) refusedBefore(rt *Runtime) bool {
	r, ok := f.record(rt)
	return ok && r.Generation == 0
}

func (f *stateFile) record(rt *Runtime) (trustRecord, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.s.Runtimes {
		if r.PID == rt.PID && r.Start == rt.Start {
			return r, true
		}
	}
	return trustRecord{}, false
}

// save writes the file. The caller holds f.mu.
func (f *stateFile) save() {
	b, err := json.Marshal(f.s)
	if err == nil {
		err = errors.Join(os.WriteFile(f.path+".new", b, 0o600), os.Rename(f.path+".new", f.path))
	}
	if err != nil {
		f.log.Warn("the state can't be kept; runtimes will be proven again after a restart", "err", err)
	}
}

// programRefuses notes that a program must not be tried again with a registry.
func (f *stateFile) programRefuses(p program, host string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := (refusal{p, host}); p != (program{}) && !slices.Contains(f.s.Refusals, r) {
		f.s.Refusals = append(f.s.Refusals, r)
		f.s.Refusals = f.s.Refusals[max(0, len(f.s.Refusals)-maxRefusals):]
		f.save()
	}
}

// programRefused says whether a program must not be tried with a registry.
func (f *stateFile) programRefused(p program, host string) bool {
	return slices.Contains(f.refusedBy(p), host)
}

// refusedBy returns the registries that a program must not be tried with.
func (f *stateFile) refusedBy(p program) (hosts []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.s.Refusals {
		if r.Program == p && p != (program{}) {
			hosts = append(hosts, r.Host)
		}
	}
	return hosts
}

// program identifies a program, over the processes that run it, by
// what its file has: in containers of one image, each of which has a root file
// system of its own, that is the same.
type program struct {
	Root     string `json:"root"` // as the ledger names it; empty for a container's
	Path     string `json:"path"`
	Size     int64  `json:"size"`
	Modified int64  `json:"modified"` // Unix, in nanoseconds
	User     uint32 `json:"user"`
}

// programOf returns what a process runs, nothing if that isn't known.
func programOf(pid int, root string) program {
	exe := "/proc/" + strconv.Itoa(pid) + "/exe"
	path, err := os.Readlink(exe)
	if err != nil {
		return program{}
	}
	st, err := os.Stat(exe)
	if err != nil {
		return program{}
	}
	uid, err := procfs.User(pid)
	if err != nil {
		return program{}
	}
	return program{root, path, st.Size(), st.ModTime().UnixNano(), uid}
}
