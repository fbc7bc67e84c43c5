// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/moby/moby/client"
	"weir/agent/procfs"
	"weir/agent/systemd"
)

// Services are the services of the node. [systemd.Manager] is some.
type Services interface {
	// Find returns the service that a process is the main process of.
	Find(ctx context.Context, pid int) (systemd.Service, error)
	// Restart restarts a service, and returns when it is running again.
	Restart(ctx context.Context, name string) error
}

// Restart is one that weir has done, or has begun.
type Restart struct {
	Service string    `json:"service"`
	Runtime string    `json:"runtime"`
	Reason  string    `json:"reason"`
	Boot    string    `json:"boot"` // the boot in which it was
	At      time.Time `json:"at"`
	// Done says that the service was running again, and Failed why it was not.
	Done   bool   `json:"done"`
	Failed string `json:"failed,omitempty"`
}

const (
	// restartTime bounds a restart. systemd gives a service 90 seconds to start.
	restartTime = 3 * time.Minute
	// planAgain is when it is looked again whether a runtime can be restarted.
	planAgain = time.Minute
	// maxRestarts bounds what is remembered, maxRestartsFile what is read of it.
	maxRestarts, maxRestartsFile = 64, 1 << 20
)

// Restarter restarts runtimes: each once in a boot, and none any more after a restart
// that has failed.
type Restarter struct {
	services Services
	file     string
	log      *slog.Logger
	boot     string
	// keeps says whether a runtime's containers outlive its restart.
	keeps func(context.Context, *Runtime, systemd.Service) error

	one sync.Mutex // held while one is restarted, or it is found out whether it can be
	err error      // of reading the file: nothing is known of earlier ones

	mu  sync.Mutex
	all []Restart // only who holds one changes it
}

// NewRestarter makes a restarter that keeps in a file what it has done.
func NewRestarter(services Services, file string, log *slog.Logger) *Restarter {
	r := &Restarter{services: services, file: file, log: log, boot: procfs.BootID(), keeps: keepsContainers}
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		r.err = err
	case len(b) > maxRestartsFile:
		r.err = errors.New("it is too long")
	default:
		r.err = json.Unmarshal(b, &r.all)
	}
	return r
}

// Wait waits until none is being restarted.
func (r *Restarter) Wait() {
	r.one.Lock()
	defer r.one.Unlock()
}

// All returns what was restarted, the latest last.
func (r *Restarter) All() []Restart {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

// Plan returns the service that would be restarted for a runtime. The error says why
// none is.
func (r *Restarter) Plan(ctx context.Context, rt *Runtime) (systemd.Service, error) {
	r.one.Lock()
	defer r.one.Unlock()
	return r.plan(ctx, rt)
}

// plan is Plan. The caller holds r.one.

func (r *Restarter) plan(ctx context.Context, rt *Runtime) (systemd.Service, error) {
	if !rt.kind.restarts {
		return systemd.Service{}, fmt.Errorf("weir restarts no %s", rt.kind.name)
	}
	if r.err != nil {
		return systemd.Service{}, fmt.Errorf("it isn't known what was restarted before: reading %s: %w", r.file, r.err)
	}
	if n := len(r.all); n > 0 && !r.all[n-1].Done {
		last := r.all[n-1]
		failed := last.Failed
		if failed == "" {
			failed = "the agent ended meanwhile"
		}
		return systemd.Service{}, fmt.Errorf("the last restart, of %s at %s, has failed: %s; remove %s to have weir restart runtimes again",
			last.Service, last.At.Format(time.RFC3339), failed, r.file)
	}
	s, err := r.services.Find(ctx, rt.PID)
	switch {
	case err != nil:
		return s, err
	case slices.ContainsFunc(r.all, func(d Restart) bool { return d.Service == s.Name && d.Boot == r.boot }):
		return s, fmt.Errorf("weir has restarted %s since the machine was booted", s.Name)
	case len(s.Along) > 0:
		return s, fmt.Errorf("%s would be restarted with %s", strings.Join(s.Along, ", "), s.Name)
	}
	return s, r.keeps(ctx, rt, s)
}

// restart restarts a runtime. It returns false, and why, when it has not.
func (r *Restarter) restart(ctx context.Context, rt *Runtime, reason string) (bool, error) {
	r.one.Lock()
	defer r.one.Unlock()
	s, err := r.plan(ctx, rt) // a container may have been started meanwhile
	if err != nil {
		return false, err
	}
	// Written first: what is not known to have ended well has not.
	was := r.all
	this := Restart{Service: s.Name, Runtime: rt.kind.name, Reason: reason, Boot: r.boot, At: time.Now()}
	if err := r.save(append(slices.Clone(was), this)); err != nil {
		r.set(was)
		return false, fmt.Errorf("noting that it is restarted: %w", err)
	}
	r.log.Warn("a runtime is restarted, as --restart-runtimes has it", "service", s.Name, "runtime", rt.kind.name, "pid", rt.PID, "because", reason)
	// It ends, and with it the context of what is done for it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restartTime)
	defer cancel()
	err = r.services.Restart(ctx, s.Name)
	if this.Done = err == nil; err != nil {
		this.Failed = err.Error()
		r.log.Error("a restart has failed; weir restarts nothing any more", "service", s.Name, "err", err, "step", "see what keeps it from starting; then remove "+r.file)
	} else {
		r.log.Info("a runtime was restarted", "service", s.Name, "runtime", rt.kind.name, "in", time.Since(this.At).Round(time.Millisecond))
	}
	if serr := r.save(append(slices.Clone(was), this)); serr != nil {
		r.log.Error("noting how a restart has ended", "err", serr)
	}
	return err == nil, err
}

func (r *Restarter) set(all []Restart) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = all
}

// save keeps what is known now, here and in the file. The caller holds r.one.
func (r *Restarter) save(all []Restart) error {
	all = all[max(0, len(all)-maxRestarts):]
	r.set(all)
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	return renameio.WriteFile(r.file, b, 0o600)
}

// keepsContainers says why a runtime's containers, or its builds, would not outlive
// its restart. Those of containerd and CRI-O have processes of their own that look
// after them.
func keepsContainers(ctx context.Context, rt *Runtime, s systemd.Service) error {
	switch rt.kind.name {
	case "containerd":
		if !s.KeepsOthers {
			return fmt.Errorf("its containers would end with %s, whose KillMode is not process", s.Name)
		}
	case "dockerd":
		children, err := procfs.Children(rt.PID)
		if err != nil {
			return err
		}
		for _, p := range children {
			if p.Comm != "containerd" && p.Comm != "docker-proxy" {
				return fmt.Errorf("it runs a build, or something else: %s (process %d)", p.Comm, p.PID)
			}
		}
		live, containers, err := askContainers(ctx, rt)
		switch {
		case err != nil:
			return fmt.Errorf("asking it for its containers: %w", err)
		case containers > 0 && !live:
			return fmt.Errorf("it runs %d containers, and has no live-restore", containers)
		case containers > 0 && !s.KeepsOthers:
			return fmt.Errorf("its containers would end with %s, whose KillMode is not process", s.Name)
		}
	}
	return nil
}

// askContainers asks a dockerd how many containers it runs, and whether they outlive
// it.
func askContainers(ctx context.Context, rt *Runtime) (live bool, containers int, err error) {
	c, err := newDockerClient(rt)
	if err != nil {
		return false, 0, err
	}
	defer c.Close()
	info, err := c.Info(ctx, client.InfoOptions{})
	return info.Info.LiveRestoreEnabled, info.Info.ContainersRunning + info.Info.ContainersPaused, err
}

// restartLater restarts a runtime of the node that a restart makes trust the CA, once
// it can be and no pull of it runs.
func (rs *Runtimes) restartLater(rt *Runtime, reason string) {
	rt.mu.Lock()
	rt.restartHelps = rt.onNode && !rt.kind.oneShot
	begin := rs.o.Restarter != nil && rt.restartHelps && !rt.restarting
	rt.restarting = rt.restarting || begin
	rt.mu.Unlock()
	if !begin {
		return
	}
	passed := func() bool {
		rt.mu.Lock()
		defer rt.mu.Unlock()
		rt.restarting = rt.ctx.Err() == nil && rt.reach == ReachPassthrough
		return rt.restarting
	}
	rs.wg.Go(func() {
		said := ""
		for again := time.NewTimer(0); ; again.Reset(planAgain) {
			select {
			case <-again.C:
			case <-rt.ctx.Done():
				return
			}
			if !passed() {
				return
			}
			_, err := rs.o.Restarter.Plan(rt.ctx, rt)
			if err == nil {
				rs.setStep(rt, "nothing to do: weir restarts it when no pull of it runs")
				if !rs.quiet(rt, rs.portsOf(rs.o.Registries()...)) || !passed() {
					return
				}
				var done bool
				if done, err = rs.o.Restarter.restart(rt.ctx, rt, reason); done {
					return
				}
			}
			if rt.ctx.Err() != nil {
				return
			}
			rs.setStep(rt, rt.restartStep()+"; weir doesn't: "+err.Error())
			if err.Error() != said {
				said = err.Error()
				rs.o.Log.Info("a runtime is not restarted", "runtime", rt.kind.name, "pid", rt.PID, "because", said)
			}
		}
	})
}

// setStep says anew what changes that a runtime is passed through.
func (rs *Runtimes) setStep(rt *Runtime, step string) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if rt.reach == ReachPassthrough {
		rt.step = step
	}
}
