// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"weir/agent/procfs"
	"weir/agent/trust"
)

func TestState(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	s := openState(dir, "cert1", log)
	rt := &Runtime{Process: procfs.Process{PID: 7, Start: 5 * time.Second}, generation: 3}
	if s.installedBefore("/", time.Hour) != 0 || s.savedTrust(rt) != 0 || s.refusedBefore(rt) {
		t.Error("something out of nothing")
	}
	s.installed("/", trust.Result{}, 2)
	s.saveTrust(rt)

	s = openState(dir, "cert1", log)
	if s.installedBefore("/", procfs.SinceBoot()+time.Second) != 2 || s.installedBefore("/", 0) != 0 || s.installedBefore("/other", time.Hour*1e6) != 0 {
		t.Error("when it was installed is lost")
	}
	// The next generation in its place: who started between the two has the first.
	between := procfs.SinceBoot()
	s.installed("/", trust.Result{}, 2)
	s.installed("/", trust.Result{Files: []string{"x"}, Superseded: true}, 3)
	if s.installedBefore("/", between) != 2 || s.installedBefore("/", time.Hour*1e6) != 3 {
		t.Errorf("%+v", s.s.Installed)
	}
	// It was gone, and made anew.
	s.installed("/", trust.Result{Files: []string{"x"}}, 3)
	if s.installedBefore("/", between) != 0 || s.installedBefore("/", time.Hour*1e6) != 3 {
		t.Errorf("%+v", s.s.Installed)
	}
	if s.savedTrust(rt) != 3 || s.refusedBefore(rt) {
		t.Error("a runtime is forgotten")
	}
	if s.savedTrust(&Runtime{Process: procfs.Process{PID: 7, Start: 6 * time.Second}}) != 0 {
		t.Error("a later process with the same pid is taken for the earlier one")
	}
	byDir := &Runtime{Process: procfs.Process{PID: 8, Start: 5 * time.Second}, basis: basis{dir: "/certs.d"}}
	s.saveTrust(byDir)
	s = openState(dir, "cert1", log)
	if s.savedCertsD(byDir) != "/certs.d" || s.savedTrust(byDir) != 0 || s.refusedBefore(byDir) || s.savedCertsD(rt) != "" {
		t.Errorf("%+v", s.s.CertsD)
	}
	if s.forget(8); s.savedCertsD(byDir) != "" {
		t.Error("a process that has ended is remembered")
	}
	s.refused(rt)
	s = openState(dir, "cert1", log)
	if s.savedTrust(rt) != 0 || !s.refusedBefore(rt) {
		t.Error("a refusal is forgotten")
	}
	s.forget(7)
	if openState(dir, "cert1", log).savedTrust(rt) != 0 {
		t.Error("a process that has ended is remembered")
	}
	s.saveTrust(rt)
	if openState(dir, "cert2", log).savedTrust(rt) != 0 {
		t.Error("trust in another certificate counts")
	}
	if err := os.WriteFile(filepath.Join(dir, "state.json"), []byte("{half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if openState(dir, "cert1", log).installedBefore("/", time.Hour*1e6) != 0 {
		t.Error("a damaged file counts")
	}
}

func TestProgramRefusals(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	dir := t.TempDir()
	s := openState(dir, "cert1", log)
	p := programOf(os.Getpid(), "/")
	if p.Path == "" || p.Size == 0 || p != programOf(os.Getpid(), "/") || p == programOf(os.Getpid(), "") || programOf(1<<30, "/") != (program{}) {
		t.Errorf("%+v", p)
	}
	s.programRefuses(program{}, "ghcr.io")
	if s.programRefused(program{}, "ghcr.io") {
		t.Error("a program that couldn't be identified counts for all such")
	}
	for range 2 {
		s.programRefuses(p, "ghcr.io")
	}
	s = openState(dir, "cert1", log)
	other := p
	other.Size++
	if !s.programRefused(p, "ghcr.io") || s.programRefused(p, "quay.io") || s.programRefused(other, "ghcr.io") || len(s.s.Refusals) != 1 {
		t.Errorf("%+v", s.s.Refusals)
	}
	if openState(dir, "cert2", log).programRefused(p, "ghcr.io") {
		t.Error("what was refused was another certificate")
	}
	for i := range maxRefusals {
		s.s.Refusals = append(s.s.Refusals, refusal{p, fmt.Sprint(i)})
	}
	s.programRefuses(p, "new")
	if len(s.s.Refusals) != maxRefusals || s.programRefused(p, "ghcr.io") || !s.programRefused(p, "new") {
		t.Errorf("%d refusals are kept", len(s.s.Refusals))
	}
}

// FuzzState reads a state file that was damaged.
func FuzzState(f *testing.F) {
	dir := f.TempDir()
	fresh := openState(dir, "certificate", slog.New(slog.DiscardHandler))
	fresh.installed("/", trust.Result{Files: []string{"x"}}, 1)
	whole, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Add([]byte(`{"boot":"another","ca":"certificate","installations":{"/":[{"generation":1,"at":1}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, "state.json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		s := openState(dir, "certificate", slog.New(slog.DiscardHandler))
		if s.s.Boot != procfs.BootID() || s.s.CA != "certificate" {
			t.Errorf("taken for this boot's: %q", b)
		}
		s.installed("/new", trust.Result{Files: []string{"x"}}, 1)
		s.forget(1)
	})
}
