// SPDX-License-Identifier: Apache-2.0

// Package bpf is weir's kernel side: programs that follow the container
// runtimes of a cgroup2 subtree and redirect their connections to registries to a
// listener of the agent in the runtime's own network namespace.
//
// Each network namespace is reported to the agent when the first process is forked
// in it, or starts a program there ([Kernel.NextArrival]), so that the agent can
// listen there before a runtime starts.
//
// A process is tracked from its exec on, when its program has one of the given
// names. A tracked process's connection to one of the given ports is
// redirected, and only then, when there is a listener for it at that moment: the
// programs look for the listener itself, which carries a mark that only its
// owner can set, and at a heartbeat. Whatever is missing, the connection is
// left alone and goes to its original destination.
//
// The agent gets an accepted connection's original destination from its socket
// ([Kernel.Origin]). Nothing has to be cleaned up: what is known of a connection
// is stored with its sockets.
//
// All programs are attached by links that are not pinned, so the kernel detaches
// them when the process ends, however it ends.
package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// ErrClosed says that the kernel side was closed.
var ErrClosed = fmt.Errorf("the kernel side is closed: %w", os.ErrClosed)

// Options for Load.
type Options struct {
	// Cgroup is the cgroup2 directory whose processes, with those of the
	// cgroups below, are concerned.
	Cgroup string
	// Ports are the TCP destination ports that are redirected at first; see
	// [Kernel.AddPort].
	Ports []uint16
	// Probes are IPv4 addresses, at most 4, that every tracked process is
	// redirected from, at port 443.
	Probes []netip.Addr
	// Names are the executables' names that make a process tracked. The
	// kernel compares the first 15 bytes.
	Names []string
	// Guests are those of Names whose processes have another one pull for them; see
	// [ModeLent].
	Guests []string
	// MaxBeatAge is how old the last Beat may be. Zero means three times
	// BeatInterval.
	MaxBeatAge time.Duration
}

// Kernel is the kernel side, loaded and attached. Its methods may be called
// concurrently.
type Kernel struct {
	objs     kernelObjects
	beat     *ebpf.Memory // shared with the programs
	start    time.Time    // what startNS was at
	startNS  int64        // of the clock of bpf_ktime_get_ns
	events   *ringbuf.Reader
	arrivals *ringbuf.Reader
	said     *ringbuf.Reader

	mu    sync.Mutex
	links []link.Link
}

// Load loads the programs and attaches them. It needs a kernel of 5.15 or
// later with BTF, and root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON or
// CAP_SYS_ADMIN).
func Load(o Options) (*Kernel, error) {
	cgroup, err := openCgroup(o.Cgroup)
	if err != nil {
		return nil, err
	}
	defer cgroup.Close()
	k, err := load(o)
	if err != nil {
		return nil, err
	}
	if err := k.setUp(o, cgroup); err != nil {
		k.Close()
		return nil, err
	}
	if err := k.attach(cgroup); err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

// load loads the programs without attaching them.
func load(o Options) (*Kernel, error) {
	spec, err := loadKernel()
	if err != nil {
		return nil, fmt.Errorf("reading the eBPF programs: %w", err)
	}
	if o.MaxBeatAge == 0 {
		o.MaxBeatAge = 3 * BeatInterval
	}
	var probes [4][4]byte // in network order
	if len(o.Probes) > len(probes) {
		return nil, fmt.Errorf("%d probe addresses; at most %d can be", len(o.Probes), len(probes))
	}
	for i, p := range o.Probes {
		if !p.Is4() {
			return nil, fmt.Errorf("the probe address %s is not an IPv4 address", p)
		}
		probes[i] = p.As4()
	}
	for name, value := range map[string]any{"agent_pid": uint32(os.Getpid()), "max_age": uint64(o.MaxBeatAge), "probes": probes} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("setting %s of the eBPF programs: %w", name, err)
		}
	}
	// Kernels that count programs and maps as locked memory allow next to none of
	// it. Where that can't be raised, loading says what is the matter.
	_ = rlimit.RemoveMemlock()
	k := &Kernel{}
	if err := spec.LoadAndAssign(&k.objs, nil); err != nil {
		return nil, explain("loading the eBPF programs", err)
	}
	return k, nil
}

// oldest is the first kernel that has all that the programs use, as
// [features.LinuxVersionCode] has it: bpf_get_netns_cookie in a sockops program
// came last.
const oldest = 5<<16 | 15<<8

// explain puts the usual cause into an error: the library's own hint for EPERM,
// the limit on locked memory, is mostly wrong, and what an older kernel says is
// about the first of what it lacks. One with all of it brought back to it is
// never asked for its version.
func explain(doing string, err error) error {
	version, verr := features.LinuxVersionCode()
	switch {
	case verr == nil && version < oldest:
		return fmt.Errorf("%s: this kernel is Linux %d.%d, which is too old; use Linux 5.15 or later (%w)", doing, version>>16, version>>8&0xff, err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES) && os.Geteuid() != 0:
		return fmt.Errorf("%s is not permitted (%w); run as root with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, in a container as privileged, and see that the kernel is not locked down", doing, unix.EPERM)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%s: this kernel lacks something (%w); use Linux 5.15 or later with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_DEBUG_INFO_BTF", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func (k *Kernel) setUp(o Options, cgroup *os.File) error {
	var err error
	if k.beat, err = k.objs.WeirHeartbeat.Memory(); err != nil {
		return fmt.Errorf("mapping the heartbeat: %w", err)
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return fmt.Errorf("reading the clock: %w", err)
	}
	// Read in this order, what Beat writes is never in the programs' future.
	k.startNS, k.start = ts.Nano(), time.Now()
	for kind, names := range [][]string{1: o.Names, 2: o.Guests} {
		for _, n := range names {
			var key [16]byte
			copy(key[:15], n)
			if err := k.objs.WeirNames.Put(key, uint8(kind)); err != nil {
				return fmt.Errorf("naming %q to the kernel side: %w", n, err)
			}
		}
	}
	if err := k.objs.WeirSubtree.Put(uint32(0), uint32(cgroup.Fd())); err != nil {
		return fmt.Errorf("naming the cgroup %s to the kernel side: %w", o.Cgroup, err)
	}
	if k.events, err = ringbuf.NewReader(k.objs.WeirEvents); err != nil {
		return fmt.Errorf("reading the kernel side's events: %w", err)
	}
	for _, p := range o.Ports {
		if err := k.AddPort(p); err != nil {
			return err
		}
	}
	if k.said, err = ringbuf.NewReader(k.objs.WeirSaid); err != nil {
		return fmt.Errorf("reading what the kernel side has looked at: %w", err)
	}
	if k.arrivals, err = ringbuf.NewReader(k.objs.WeirArrivals); err != nil {
		return fmt.Errorf("reading the kernel side's reports of network namespaces: %w", err)
	}
	return nil
}

func (k *Kernel) attach(cgroup *os.File) error {
	// Connections first: of what starts from then on, and is new, all that goes direct is
	// noted.
	for _, a := range []struct {
		to ebpf.AttachType
		p  *ebpf.Program
	}{
		{ebpf.AttachCGroupSockOps, k.objs.WeirSockops},
		{ebpf.AttachCgroupInet4GetPeername, k.objs.WeirGetpeername4},
		{ebpf.AttachCgroupInet6GetPeername, k.objs.WeirGetpeername6},
		{ebpf.AttachCGroupInetEgress, k.objs.WeirEgress},
		{ebpf.AttachCGroupInet4Connect, k.objs.WeirConnect4},
		{ebpf.AttachCGroupInet6Connect, k.objs.WeirConnect6},
	} {
		// A link and nothing else: link.AttachCgroup falls back to an
		// attachment that would stay when this process is killed.
		l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: a.p, Attach: a.to})
		if errors.Is(err, unix.EPERM) {
			// Loading them was permitted: another program has the cgroup exclusively.
			if there := attached(cgroup, a.to); len(there) > 0 {
				return fmt.Errorf("attaching %s to %s: %s is attached there or above, without BPF_F_ALLOW_MULTI, which lets no other program beside it; take it off, or have it attached with that flag",
					a.to, cgroup.Name(), strings.Join(there, ", "))
			}
		}
		if err != nil {
			return explain(fmt.Sprintf("attaching %s to %s", a.to, cgroup.Name()), err)
		}
		k.links = append(k.links, l)
	}
	// Of what is tracked, or counted among the guests, the end is seen.
	for _, a := range []struct {
		what string
		p    *ebpf.Program
	}{{"exit", k.objs.WeirExit}, {"fork", k.objs.WeirFork}, {"exec", k.objs.WeirExec}} {
		l, err := link.AttachTracing(link.TracingOptions{Program: a.p})
		if err != nil {
			return explain("following processes' "+a.what, err)
		}
		k.links = slices.Insert(k.links, 0, l) // to be detached when nothing is redirected any more
	}
	return nil
}

// Detach takes the programs off. New connections go direct from then on; of
// those that were accepted, [Kernel.Origin] still returns the original
// destination.
func (k *Kernel) Detach() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	// From the end: redirecting ends first.
	for i := len(k.links) - 1; i >= 0; i-- {
		errs = append(errs, k.links[i].Close())
	}
	k.links = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detaching the eBPF programs: %w", err)
	}
	return nil
}

// StopEvents ends [Kernel.Next], [Kernel.NextArrival] and [Kernel.NextSaid].
func (k *Kernel) StopEvents() error {
	var err error
	for _, r := range []*ringbuf.Reader{k.events, k.arrivals, k.said} {
		if r != nil {
			err = errors.Join(err, r.Close())
		}
	}
	return err
}

// Close detaches and unloads everything. Nothing else may be running that uses
// the kernel side.
func (k *Kernel) Close() error {
	return errors.Join(k.Detach(), k.StopEvents(), k.objs.Close())
}

// BeatInterval is how often an agent should call Beat. Connections of an agent
// that hangs wait for it for up to three times as long before others go direct;
// an idle one wakes up no more often than this.
const BeatInterval = 250 * time.Millisecond

// Beat is the agent's heartbeat. Without one in MaxBeatAge
// they let all connections go direct.
func (k *Kernel) Beat() {
	// Go's monotonic clock is the same one, and is read without a system call.
	now := k.startNS + int64(time.Since(k.start))
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], uint64(now))
	_, _ = k.beat.WriteAt(b[:], 0) // it is mapped writable
}

// read takes the next record out of a ring buffer.
func read[T any](from *ringbuf.Reader) (v T, err error) {
	r, err := from.Read()
	if errors.Is(err, ringbuf.ErrClosed) {
		return v, ErrClosed
	}
	if err == nil && len(r.RawSample) < int(unsafe.Sizeof(v)) {
		err = fmt.Errorf("%d bytes are too few", len(r.RawSample))
	}
	if err != nil {
		return v, fmt.Errorf("reading the kernel side's events: %w", err)
	}
	return *(*T)(unsafe.Pointer(&r.RawSample[0])), nil
}
