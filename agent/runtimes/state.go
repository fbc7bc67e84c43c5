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
)

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
	Boot        string `json:"boot"`        // the boot that the rest is about
	Certificate string `json:"certificate"` // fingerprint of the CA's
	// Installed is when, after boot, the CA was last put into a lasting root
	// file system.
	Installed map[string]time.Duration `json:"installed"`
	Runtimes  []rememberedTrust        `json:"runtimes"`
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

type rememberedTrust struct {
	PID   int           `json:"pid"`
	Start time.Duration `json:"start"`
	// Refused says that it did not trust the CA although it should have.
	Refused bool `json:"refused,omitempty"`
}

type remembered int

const (
	rememberedNothing remembered = iota
	rememberedSystem
	rememberedRefusal
)

// openState reads the file; what is of another boot or certificate is void.
func openState(dir, certificate string, log *slog.Logger) *stateFile {
	f := &stateFile{path: filepath.Join(dir, "state.json"), log: log}
	want := state{Boot: procfs.BootID(), Certificate: certificate}
	b, err := os.ReadFile(f.path)
	if err != nil || json.Unmarshal(b, &f.s) != nil || f.s.Boot != want.Boot || f.s.Certificate != want.Certificate {
		f.s = want
	}
	return f
}

// installed notes that the CA is in a root file system, and whether it was put
// there just now.
func (f *stateFile) installed(root string, now bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, known := f.s.Installed[root]; known && !now {
		return
	}
	if f.s.Installed == nil {
		f.s.Installed = make(map[string]time.Duration)
	}
	f.s.Installed[root] = procfs.SinceBoot()
	f.save()
}

// installedBefore says whether the CA was in a root file system before a
// process started.
func (f *stateFile) installedBefore(root string, start time.Duration) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, known := f.s.Installed[root]
	return known && at < start
}

// remember notes that a runtime trusts the CA through its roots, which it keeps
// for life.
func (f *stateFile) remember(rt *Runtime) {
	rt.mu.Lock()
	certsD := rt.basis.certsD != nil
	rt.mu.Unlock()
	if certsD {
		return // proven again, at no cost
	}
	f.note(rt, false)
}

// refused notes that a runtime must not be tried again.
func (f *stateFile) refused(rt *Runtime) { f.note(rt, true) }

func (f *stateFile) note(rt *Runtime, refused bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drop(rt.PID)
	f.s.Runtimes = append(f.s.Runtimes, rememberedTrust{rt.PID, rt.Start, refused})
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
	for i, r := range f.s.Runtimes {
		if r.PID == pid {
			f.s.Runtimes = append(f.s.Runtimes[:i:i], f.s.Runtimes[i+1:]...)
			return true
		}
	}
	return false
}

func (f *stateFile) remembers(rt *Runtime) remembered {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.s.Runtimes {
		if r.PID == rt.PID && r.Start == rt.Start {
			if r.Refused {
				return rememberedRefusal
			}
			return rememberedSystem
		}
	}
	return rememberedNothing
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
