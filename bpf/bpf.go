// SPDX-License-Identifier: Apache-2.0

// Package bpf is weir's kernel side: programs that follow the container
// runtimes of a cgroup2 subtree and send their connections to registries to a
// listener of the agent, a door, in the runtime's own network namespace.
//
// The agent hears of each network namespace when the first process is forked in
// it, or starts a program there ([Kernel.NextArrival]), and so can have a door
// there before a runtime comes.
//
// A process is tracked from its exec on, when its program has one of the given
// names. A tracked process's connection to one of the given ports is
// redirected, and only then, when there is a door for it at that moment: the
// programs look for the listener itself, which carries a mark that only its
// owner can set, and at a heartbeat. Whatever is missing, the connection is
// left alone and goes where it was meant to.
//
// The agent learns where an accepted connection wanted to go from its socket
// ([Kernel.Origin]). Nothing has to be cleaned up: what is remembered of a
// connection is stored with its sockets.
//
// All programs are attached by links that are not pinned, so the kernel takes
// them off with the process's last breath, however it ends.
package bpf

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
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
)

var (
	// ErrNoOrigin says that a connection was not redirected here.
	ErrNoOrigin = errors.New("the connection was not redirected")
	// ErrClosed says that the kernel side was closed.
	ErrClosed = fmt.Errorf("the kernel side is closed: %w", os.ErrClosed)
)

// Options for Load.
type Options struct {
	// Cgroup is the cgroup2 directory whose processes, with those of the
	// cgroups below, are concerned.
	Cgroup string
	// Ports are the TCP destination ports that are redirected, at most 16.
	Ports []uint16
	// Probes are IPv4 addresses, at most 4, that every tracked process is
	// redirected from, at port 443.
	Probes []netip.Addr
	// Names are the executables' names that make a process tracked. The
	// kernel compares the first 15 bytes.
	Names []string
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
	var ports [16]uint16
	if len(o.Ports) > len(ports) {
		return nil, fmt.Errorf("%d ports to redirect; at most %d can be", len(o.Ports), len(ports))
	}
	copy(ports[:], o.Ports)
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
	for name, value := range map[string]any{"agent_pid": uint32(os.Getpid()), "max_age": uint64(o.MaxBeatAge), "ports": ports, "probes": probes} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("setting %s of the eBPF programs: %w", name, err)
		}
	}
	k := &Kernel{}
	if err := spec.LoadAndAssign(&k.objs, nil); err != nil {
		return nil, explain("loading the eBPF programs", err)
	}
	return k, nil
}

// explain puts the usual cause into an error: the library's own hint for EPERM,
// the limit on locked memory, is mostly wrong.
func explain(doing string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES) && os.Geteuid() != 0:
		return fmt.Errorf("%s is not permitted (%w); run as root with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, in a container as privileged, and see that the kernel is not locked down", doing, unix.EPERM)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%s: this kernel lacks something (%w); use Linux 5.15 or later with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_DEBUG_INFO_BTF", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func (k *Kernel) setUp(o Options, cgroup *os.File) error {
	var err error
	if k.beat, err = k.objs.Heartbeat.Memory(); err != nil {
		return fmt.Errorf("mapping the heartbeat: %w", err)
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return fmt.Errorf("reading the clock: %w", err)
	}
	// Read in this order, what Beat writes is never in the programs' future.
	k.startNS, k.start = ts.Nano(), time.Now()
	for _, n := range o.Names {
		var key [16]byte
		copy(key[:15], n)
		if err := k.objs.Names.Put(key, uint8(1)); err != nil {
			return fmt.Errorf("naming %q to the kernel side: %w", n, err)
		}
	}
	if err := k.objs.Subtree.Put(uint32(0), uint32(cgroup.Fd())); err != nil {
		return fmt.Errorf("naming the cgroup %s to the kernel side: %w", o.Cgroup, err)
	}
	if k.events, err = ringbuf.NewReader(k.objs.Events); err != nil {
		return fmt.Errorf("reading the kernel side's events: %w", err)
	}
	if k.arrivals, err = ringbuf.NewReader(k.objs.Arrivals); err != nil {
		return fmt.Errorf("reading the kernel side's news of network namespaces: %w", err)
	}
	return nil
}

func (k *Kernel) attach(cgroup *os.File) error {
	// Processes first: who starts meanwhile is new, and what escapes is noted.
	for name, p := range map[string]*ebpf.Program{"fork": k.objs.WeirFork, "exec": k.objs.WeirExec, "exit": k.objs.WeirExit} {
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return explain("following processes' "+name, err)
		}
		k.links = append(k.links, l)
	}
	for _, a := range []struct {
		to ebpf.AttachType
		p  *ebpf.Program
	}{
		{ebpf.AttachCGroupSockOps, k.objs.WeirSockops},
		{ebpf.AttachCgroupInet4GetPeername, k.objs.WeirGetpeername4},
		{ebpf.AttachCgroupInet6GetPeername, k.objs.WeirGetpeername6},
		{ebpf.AttachCGroupInet4Connect, k.objs.WeirConnect4},
		{ebpf.AttachCGroupInet6Connect, k.objs.WeirConnect6},
	} {
		// A link and nothing else: link.AttachCgroup falls back to an
		// attachment that would stay when this process is killed.
		l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: a.p, Attach: a.to})
		if errors.Is(err, unix.EPERM) {
			// Loading them was permitted: somebody has the place to himself.
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
	return nil
}

// Detach takes the programs off. New connections go direct from then on; of
// those that were accepted, [Kernel.Origin] still tells where they wanted to
// go.
func (k *Kernel) Detach() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	// In reverse: redirecting ends first.
	for i := len(k.links) - 1; i >= 0; i-- {
		errs = append(errs, k.links[i].Close())
	}
	k.links = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detaching the eBPF programs: %w", err)
	}
	return nil
}

// StopNews ends [Kernel.Next] and [Kernel.NextArrival].
func (k *Kernel) StopNews() error {
	var err error
	for _, r := range []*ringbuf.Reader{k.events, k.arrivals} {
		if r != nil {
			err = errors.Join(err, r.Close())
		}
	}
	return err
}

// Close detaches and unloads everything. Nothing else may be running that uses
// the kernel side.
func (k *Kernel) Close() error {
	return errors.Join(k.Detach(), k.StopNews(), k.objs.Close())
}

// BeatInterval is how often an agent should call Beat. Connections of an agent
// that hangs wait for it for up to three times as long before others go direct;
// an idle one wakes up no more often than this.
const BeatInterval = 250 * time.Millisecond

// Beat tells the programs that the agent is alive. Without one in MaxBeatAge
// they let all connections go direct.
func (k *Kernel) Beat() {
	// Go's monotonic clock is the same one, and is read without a system call.
	now := k.startNS + int64(time.Since(k.start))
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], uint64(now))
	_, _ = k.beat.WriteAt(b[:], 0) // it is mapped writable
}

// OpenDoor has tracked processes of a network namespace redirected to the
// given listeners, which must be in that namespace, at 127.0.0.1 and ::1. The
// second may be nil. They are redirected only while these addresses work, so the
// listeners may be there before the loopback interface is up. A door that was
// open there is replaced. It returns the namespace's cookie.
func (k *Kernel) OpenDoor(l4, l6 *net.TCPListener) (cookie uint64, err error) {
	d := kernelDoor{Port4: uint16(l4.Addr().(*net.TCPAddr).Port)}
	err = withFD(l4, func(fd int) error {
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return errors.Join(err, k.objs.Marks.Put(uint32(fd), uint8(1)))
	})
	if err == nil && l6 != nil {
		d.Port6 = uint16(l6.Addr().(*net.TCPAddr).Port)
		err = withFD(l6, func(fd int) error { return k.objs.Marks.Put(uint32(fd), uint8(1)) })
	}
	if err != nil {
		return 0, fmt.Errorf("marking a door's listener: %w", err)
	}
	if err := k.objs.Doors.Put(cookie, d); err != nil {
		return 0, fmt.Errorf("registering a door: %w", err)
	}
	return cookie, nil
}

// ShutDoor has nobody more redirected to a door for now, or again.
func (k *Kernel) ShutDoor(cookie uint64, shut bool) error {
	var d kernelDoor
	err := k.objs.Doors.Lookup(cookie, &d)
	if err == nil {
		d.Shut = 0
		if shut {
			d.Shut = 1
		}
		err = k.objs.Doors.Update(cookie, d, ebpf.UpdateExist)
	}
	if err != nil {
		return fmt.Errorf("shutting a door: %w", err)
	}
	return nil
}

// CloseDoor ends redirecting in a network namespace. It is called before the
// listeners are closed, and for an [Arrival] that gets no door: the next process
// that is started there is an arrival again.
func (k *Kernel) CloseDoor(cookie uint64) error {
	if err := k.objs.Doors.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("closing a door: %w", err)
	}
	return nil
}

// Origin is what is known of a redirected connection.
type Origin struct {
	Dst    netip.AddrPort // where the client wanted to go
	PID    int            // of the client, in the initial PID namespace
	Mode   Mode           // that the client was in
	Netns  uint64         // cookie of the client's network namespace
	Cgroup uint64         // id of the client's cgroup
}

// Origin tells where an accepted connection wanted to go. The error is
// [ErrNoOrigin] for one that was not redirected.
func (k *Kernel) Origin(c *net.TCPConn) (Origin, error) {
	var o kernelOrigin
	err := withFD(c, func(fd int) error {
		err := k.objs.Accepted.Lookup(uint32(fd), &o)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			err = k.handedOver(c, fd, &o)
		}
		return err
	})
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return Origin{}, ErrNoOrigin
	}
	if err != nil {
		return Origin{}, fmt.Errorf("looking up where a connection wanted to go: %w", err)
	}
	addr := *(*[16]byte)(unsafe.Pointer(&o.Ip6)) // in network order, as are the ports
	port := *(*[2]byte)(unsafe.Pointer(&o.Port))
	return Origin{
		Dst:    netip.AddrPortFrom(netip.AddrFrom16(addr).Unmap(), uint16(port[0])<<8|uint16(port[1])),
		PID:    int(o.Tgid),
		Mode:   Mode(o.Mode),
		Netns:  o.Netns,
		Cgroup: o.Cgroup,
	}, nil
}

// handedOver takes the origin from where the client's side has put it. The
// programs see only the sockets of their cgroups: when the door's is not among
// them, because this process is elsewhere, nobody has moved it.
func (k *Kernel) handedOver(c *net.TCPConn, fd int, o *kernelOrigin) error {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return err
	}
	remote := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	addr := remote.Addr().As16()
	key := kernelEndpoint{Netns: cookie, Ip6: *(*[4]uint32)(unsafe.Pointer(&addr)), Port: uint32(remote.Port())}
	return k.objs.Handover.LookupAndDelete(&key, o)
}

func withFD(c syscall.Conn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	return errors.Join(raw.Control(func(fd uintptr) { ferr = f(int(fd)) }), ferr)
}

// Remode says how the connections of a process are treated that is tracked. One
// that isn't any more, because it has ended, stays so.
func (k *Kernel) Remode(pid int, m Mode) error {
	err := k.objs.Tracked.Update(uint32(pid), uint32(m), ebpf.UpdateExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("tracking process %d: %w", pid, err)
	}
	return nil
}

// SetMode says how a process's connections are treated, and has it tracked if
// it wasn't.
func (k *Kernel) SetMode(pid int, m Mode) error {
	if err := k.objs.Tracked.Put(uint32(pid), uint32(m)); err != nil {
		return fmt.Errorf("tracking process %d: %w", pid, err)
	}
	return nil
}

// Mode returns how a process's connections are treated, false when it isn't
// tracked.
func (k *Kernel) Mode(pid int) (Mode, bool) {
	var m uint32
	err := k.objs.Tracked.Lookup(uint32(pid), &m)
	return Mode(m), err == nil
}

// Forget ends the tracking of a process.
func (k *Kernel) Forget(pid int) error {
	for _, m := range []*ebpf.Map{k.objs.Tracked, k.objs.Early} {
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
	return k.objs.Early.Lookup(uint32(pid), &v) == nil
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

// Event is news of a process.
type Event struct {
	Kind EventKind
	PID  int           // in the initial PID namespace
	Time time.Duration // since boot
	Name string        // of an Exec: which of the names it was
	Comm string        // the process's name at that moment
}

// Next waits for the next event. The error is [ErrClosed] once news
// is stopped. Only one goroutine may call it.
func (k *Kernel) Next() (Event, error) {
	e, err := read[kernelEvent](k.events)
	if err != nil {
		return Event{}, err
	}
	return Event{Kind: EventKind(e.Kind), PID: int(e.Tgid), Time: time.Duration(e.Time), Name: text(e.Name), Comm: text(e.Comm)}, nil
}

// Arrival is news of a network namespace without a door: a process has been
// forked in it, or has started a program there.
type Arrival struct {
	Netns  uint64 // cookie
	PID    int    // of the process, in the initial PID namespace
	Parent int    // of its parent, if that is in there too; else 0
}

// NextArrival waits for the next network namespace. Each is reported once, until
// its door is closed ([Kernel.CloseDoor]). The error is [ErrClosed] once news
// is stopped. Only one goroutine may call it.
func (k *Kernel) NextArrival() (Arrival, error) {
	a, err := read[kernelArrival](k.arrivals)
	if err != nil {
		return Arrival{}, err
	}
	return Arrival{Netns: a.Netns, PID: int(a.Tgid), Parent: int(a.Parent)}, nil
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

// Watch has the end of a process reported, as [Gone]. That of one that has
// begun to end may not be.
func (k *Kernel) Watch(pid int) error {
	if err := k.objs.Watched.Put(uint32(pid), uint8(1)); err != nil {
		return fmt.Errorf("watching process %d: %w", pid, err)
	}
	return nil
}

// Unwatch takes Watch back.
func (k *Kernel) Unwatch(pid int) {
	_ = k.objs.Watched.Delete(uint32(pid)) // or it has ended
}

func text(c [16]int8) string {
	s, _, _ := strings.Cut(string((*[16]byte)(unsafe.Pointer(&c))[:]), "\x00")
	return s
}

// Stats count what the programs decided about tracked processes' connections,
// since they were loaded.
type Stats struct {
	Redirected uint64 `json:"redirected"`
	NoDoor     uint64 `json:"no_door"`     // went direct: there was no door, it was shut or full, or loopback was down
	StaleBeat  uint64 `json:"stale_beat"`  // went direct: no heartbeat
	Unfit      uint64 `json:"unfit"`       // went direct: not plain TCP, or bound to a device
	Early      uint64 `json:"early"`       // connections of new processes that went direct
	NoOrigin   uint64 `json:"no_origin"`   // came to a door without having been redirected
	EventsLost uint64 `json:"events_lost"` // because Next was not called often enough
	Knocked    uint64 `json:"knocked"`     // refused: came to a door's port by themselves
	// ArrivalsLost are network namespaces that were not reported at first,
	// because NextArrival was not called often enough.
	ArrivalsLost uint64 `json:"arrivals_lost"`
}

// Stats returns the counts.
func (k *Kernel) Stats() (s Stats, err error) {
	for i, n := range []*uint64{&s.Redirected, &s.NoDoor, &s.StaleBeat, &s.Unfit, &s.Early, &s.NoOrigin, &s.EventsLost, &s.Knocked, &s.ArrivalsLost} {
		var perCPU []uint64
		if err := k.objs.Counters.Lookup(uint32(i), &perCPU); err != nil {
			return s, fmt.Errorf("reading the kernel side's counts: %w", err)
		}
		for _, v := range perCPU {
			*n += v
		}
	}
	return s, nil
}

// CgroupRoot returns where cgroup2 is mounted: the mount of its root, where
// there is one, since in a container there may also be one of a part.
func CgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	found := ""
	for s := bufio.NewScanner(f); s.Scan(); {
		// proc_pid_mountinfo(5): ID parent dev root mountpoint options... - type source
		before, after, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(before)
		if !ok || !strings.HasPrefix(after, "cgroup2 ") || len(fields) < 5 {
			continue
		}
		if found == "" || fields[3] == "/" {
			found = fields[4]
		}
		if fields[3] == "/" {
			break
		}
	}
	if found == "" {
		return "", errors.New("no cgroup2 file system is mounted; mount it with: mount -t cgroup2 none /sys/fs/cgroup/unified")
	}
	return found, nil
}

func openCgroup(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("the cgroup %s doesn't exist; name a cgroup2 directory with --cgroup", dir)
		}
		return nil, fmt.Errorf("opening the cgroup: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		f.Close()
		return nil, fmt.Errorf("%s is not a cgroup2 directory; name one with --cgroup, below %s", dir, cgroupHint())
	}
	return f, nil
}

func cgroupHint() string {
	if root, err := CgroupRoot(); err == nil {
		return root
	}
	return "a cgroup2 mount (mount -t cgroup2 none /sys/fs/cgroup/unified)"
}

// attached returns the names of the programs, other than weir's, that are run for
// a cgroup at an attach point: its own, and those above.
func attached(cgroup *os.File, to ebpf.AttachType) (names []string) {
	all, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: to, QueryFlags: unix.BPF_F_QUERY_EFFECTIVE})
	if err != nil {
		return nil
	}
	for _, a := range all.Programs {
		p, err := ebpf.NewProgramFromID(a.ID)
		if err != nil {
			continue
		}
		if info, err := p.Info(); err == nil && !strings.HasPrefix(info.Name, "weir_") {
			names = append(names, info.Name)
		}
		p.Close()
	}
	return names
}

// Others returns the names of programs, other than weir's, that have a say in
// where processes of a cgroup connect to.
func Others(cgroup string) (names []string, err error) {
	dir, err := openCgroup(cgroup)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	for _, to := range []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect} {
		names = append(names, attached(dir, to)...)
	}
	return names, nil
}

// Check tries out whether the kernel side can work on this machine, below a
// cgroup2 directory, without any effect on it. Each error says what is missing
// and what to do.
func Check(cgroup string) (problems []error) {
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		problems = append(problems, errors.New("the kernel has no BTF type information (/sys/kernel/btf/vmlinux); use one with CONFIG_DEBUG_INFO_BTF"))
	}
	dir, err := openCgroup(cgroup)
	if err != nil {
		return append(problems, err)
	}
	defer dir.Close()
	k, err := load(Options{})
	if err != nil {
		return append(problems, err)
	}
	defer k.Close()
	// With no process tracked, attached programs do nothing.
	if err := k.attach(dir); err != nil {
		problems = append(problems, err)
	}
	return problems
}
