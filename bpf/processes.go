// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
)

// Mode is how a tracked process's connections are treated.
type Mode uint32

const (
	// ModeProbe redirects connections to probe addresses only.
	ModeProbe Mode = iota + 1
	// ModeNew is what a process is in from its exec on. It redirects as
	// ModeRedirect does, and notes a process that has connected to somewhere
	// without being redirected; see [Kernel.Early].
	ModeNew
	// ModeRedirect redirects connections to the given ports.
	ModeRedirect
	// ModeLent is ModeRedirect, and ModeProbe while a process of Options.Guests runs:
	// from its exec on, and so before it can have asked for a pull.
	ModeLent
)

// SeededGuests says how many processes of Options.Guests run whose exec was before the
// programs were attached.
func (k *Kernel) SeededGuests(n int) error {
	if err := k.objs.WeirGuestCounts.Put(uint32(1), uint32(n)); err != nil {
		return fmt.Errorf("counting the processes that have others pull for them: %w", err)
	}
	return nil
}

// Remode says how the connections of a process are treated that is tracked. One
// that isn't any more, because it has ended, stays so.
func (k *Kernel) Remode(pid int, m Mode) error {
	err := k.objs.WeirTracked.Update(uint32(pid), uint32(m), ebpf.UpdateExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("tracking process %d: %w", pid, err)
	}
	return nil
}

// Track has a process tracked whose exec was before the programs were attached. It
// returns true for one that is tracked, and leaves that as it is.
func (k *Kernel) Track(pid int, m Mode) (tracked bool, err error) {
	err = k.objs.WeirTracked.Update(uint32(pid), uint32(m), ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("tracking process %d: %w", pid, err)
	}
	return false, nil
}

// Mode returns how a process's connections are treated, false when it isn't
// tracked.
func (k *Kernel) Mode(pid int) (Mode, bool) {
	var m uint32
	err := k.objs.WeirTracked.Lookup(uint32(pid), &m)
	return Mode(m), err == nil
}

// Forget ends the tracking of a process.
func (k *Kernel) Forget(pid int) error {
	for _, m := range []*ebpf.Map{k.objs.WeirTracked, k.objs.WeirEarly} {
		if err := m.Delete(uint32(pid)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forgetting process %d: %w", pid, err)
		}
	}
	return nil
}

// Early says whether a process connected to somewhere, other than to itself or
// for DNS, without being redirected while it was in ModeNew. Only such a process
// can have verified a certificate already.
func (k *Kernel) Early(pid int) bool {
	var v uint8
	return k.objs.WeirEarly.Lookup(uint32(pid), &v) == nil
}

// EventKind is what happened to a process.
type EventKind uint32

const (
	// Exec: a process has started one of the named programs.
	Exec EventKind = iota + 1
	// Exit: a tracked process has ended, or started another program.
	Exit
	// Gone: a watched process has ended.
	Gone
)

// Event is what happened to a process.
type Event struct {
	Kind EventKind
	PID  int           // in the initial PID namespace
	Time time.Duration // since boot
	Name string        // of an Exec: which of the names it was
	Comm string        // the process's name at that moment
}

// Next waits for the next event. The error is [ErrClosed] once events
// are stopped. Only one goroutine may call it.
func (k *Kernel) Next() (Event, error) {
	e, err := read[kernelEvent](k.events)
	if err != nil {
		return Event{}, err
	}
	return Event{Kind: EventKind(e.Kind), PID: int(e.Tgid), Time: time.Duration(e.Time), Name: text(e.Name), Comm: text(e.Comm)}, nil
}

// Watch has the end of a process reported, as [Gone]. That of one that has
// begun to end may not be.
func (k *Kernel) Watch(pid int) error {
	if err := k.objs.WeirWatched.Put(uint32(pid), uint8(1)); err != nil {
		return fmt.Errorf("watching process %d: %w", pid, err)
	}
	return nil
}

// Unwatch takes Watch back.
func (k *Kernel) Unwatch(pid int) {
	_ = k.objs.WeirWatched.Delete(uint32(pid)) // or it has ended
}

func text(c [16]int8) string {
	s, _, _ := strings.Cut(string((*[16]byte)(unsafe.Pointer(&c))[:]), "\x00")
	return s
}
