// SPDX-License-Identifier: Apache-2.0

// Package systemd has systemd, where it runs the node, do what weir wants of it. In a
// container it is the node's, through the root file system of the node's first
// process.
package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Service is a service as systemd runs it.
type Service struct {
	Name string
	// Along are units that would be restarted or stopped with it.
	Along []string
	// KeepsOthers says that only its main process is ended when it is restarted, and
	// what that has started goes on.
	KeepsOthers bool
}

// Manager is the systemd of a node.
type Manager struct {
	root string // where its files are; empty for where this process has its own
}

// booted says whether systemd runs the machine that has its files in root: sd_booted(3).
func booted(root string) bool {
	st, err := os.Lstat(root + "/run/systemd/system")
	return err == nil && st.IsDir()
}

// Own returns the systemd that this process sees. The error says that there is none.
func Own() (Manager, error) {
	if !booted("") {
		return Manager{}, errors.New("this machine isn't run by systemd")
	}
	return Manager{}, nil
}

// OfNode returns the systemd of the node, which may not be the one of the container
// that this process is in. The error says that there is none.
func OfNode() (Manager, error) {
	const first = "/proc/1/root"
	if m, err := Own(); err == nil || !booted(first) {
		return m, err
	}
	return Manager{first}, nil
}

// Run runs systemctl.
func (m Manager) Run(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "systemctl", args...)
	if m.root != "" {
		cmd = exec.CommandContext(ctx, "/usr/bin/systemctl", args...)
		cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: m.root}
		cmd.Env = []string{"PATH=/usr/bin:/bin"}
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(said.Bytes()))
	}
	return out, nil
}

// Find returns the service that a process is the main process of.
func (m Manager) Find(ctx context.Context, pid int) (Service, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return Service{}, err
	}
	name := unitOf(string(b))
	if name == "" {
		return Service{}, errors.New("systemd doesn't run it as a service")
	}
	out, err := m.Run(ctx, "show", "--property=MainPID,KillMode,RequiredBy,RequisiteOf,BoundBy,ConsistsOf,LoadState", "--", name)
	if err != nil {
		return Service{}, err
	}
	s, main := parseUnit(name, string(out))
	if main != pid {
		return Service{}, fmt.Errorf("it is a part of %s, and not its main process", name)
	}
	return s, nil
}

// unitOf returns the service that /proc/PID/cgroup has a process in, cgroups(7);
// empty if it is in none.
func unitOf(cgroups string) string {
	for line := range strings.Lines(cgroups) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 || fields[0] != "0" && fields[1] != "name=systemd" {
			continue
		}
		if name := path.Base(fields[2]); strings.HasSuffix(name, ".service") {
			return name
		}
	}
	return ""
}

// parseUnit reads what systemctl shows of a unit.
func parseUnit(name, shown string) (s Service, main int) {
	s.Name = name
	for line := range strings.Lines(shown) {
		property, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch property {
		case "MainPID":
			main, _ = strconv.Atoi(value)
		case "KillMode":
			s.KeepsOthers = value == "process"
		case "RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf":
			s.Along = append(s.Along, strings.Fields(value)...)
		}
	}
	slices.Sort(s.Along)
	s.Along = slices.Compact(s.Along)
	return s, main
}

// Restart restarts a service, and returns when it is running again.
func (m Manager) Restart(ctx context.Context, name string) error {
	if _, err := m.Run(ctx, "restart", "--", name); err != nil {
		return err
	}
	_, err := m.Run(ctx, "is-active", "--", name)
	return err
}
