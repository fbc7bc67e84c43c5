// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

const waitTime = 20 * time.Second

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "client":
			client()
			return
		case "loader":
			loader(os.Args[2])
			return
		}
	}
	os.Exit(m.Run())
}

// ---- the client: this binary under a runtime's name ----

// client does what each line of its input says, and answers with a line.
func client() {
	var held []io.Closer
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		args := strings.Fields(in.Text())
		var answer string
		var err error
		switch args[0] {
		case "dial", "hold": // network, address
			var c net.Conn
			if args[1] == "mapped" {
				answer, err = mapped(args[2])
			} else if c, err = net.DialTimeout(args[1], args[2], 2*time.Second); err == nil {
				answer = c.RemoteAddr().String()
				if args[0] == "hold" {
					held = append(held, c)
				} else {
					c.Close()
				}
			}
		case "say": // network, address, what
			var c net.Conn
			if c, err = net.DialTimeout(args[1], args[2], 2*time.Second); err == nil {
				answer = c.RemoteAddr().String()
				_, _ = io.WriteString(c, args[3]) // the other side may have left
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			}
		case "many": // first port of a range of destinations, how many
			err = many(args[1])
		case "bound": // to lo
			d := net.Dialer{Timeout: 2 * time.Second, Control: func(_, _ string, rc syscall.RawConn) (err error) {
				_ = rc.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "lo") })
				return err
			}}
			_, err = d.Dial("tcp4", args[1])
		case "reuse": // address through the listener, then another
			answer, err = reuse(args[1], args[2])
		case "udp":
			var c net.Conn
			if c, err = net.Dial("udp4", args[1]); err == nil {
				answer = c.RemoteAddr().String()
				c.Close()
			}
		case "exec":
			err = unix.Exec("/bin/sleep", []string{"sleep", "100"}, nil)
		}
		if err != nil {
			answer = "error: " + err.Error()
		}
		fmt.Println(answer)
	}
	runtime.KeepAlive(held)
}

// many dials 500 destinations at once, and tells each what it is.
func many(net3 string) error {
	var wg sync.WaitGroup
	errs := make(chan error, 500)
	for i := range 500 {
		wg.Go(func() {
			dst := fmt.Sprintf("%s.%d.%d:443", net3, i/250+1, i%250+1)
			c, err := net.DialTimeout("tcp4", dst, waitTime)
			if err != nil {
				errs <- err
				return
			}
			defer c.Close()
			fmt.Fprintln(c, dst)
			if answer, _ := bufio.NewReader(c).ReadString('\n'); answer != "right\n" {
				errs <- fmt.Errorf("%s: %q", dst, answer)
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

// reuse connects a socket, disconnects it and connects it elsewhere, and
// returns what getpeername then says.
func reuse(first, second string) (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	sockaddr := func(a string) unix.Sockaddr {
		ap := netip.MustParseAddrPort(a)
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	if err := unix.Connect(fd, sockaddr(first)); err != nil {
		return "", fmt.Errorf("first: %w", err)
	}
	unspec := [16]byte{}
	if _, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(ptr(&unspec)), 16); e != 0 {
		return "", fmt.Errorf("disconnecting: %w", e)
	}
	if err := unix.Connect(fd, sockaddr(second)); err != nil {
		return "", fmt.Errorf("second: %w", err)
	}
	peer, err := unix.Getpeername(fd)
	if err != nil {
		return "", err
	}
	p := peer.(*unix.SockaddrInet4)
	return fmt.Sprintf("%s:%d", netip.AddrFrom4(p.Addr), p.Port), nil
}

// mapped connects an IPv6 socket to an IPv4 address, as Java does, and returns
// what getpeername says.
func mapped(addr string) (string, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	ap := netip.MustParseAddrPort(addr)
	if err := unix.Connect(fd, &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}); err != nil {
		return "", err
	}
	peer, err := unix.Getpeername(fd)
	if err != nil {
		return "", err
	}
	p := peer.(*unix.SockaddrInet6)
	return netip.AddrPortFrom(netip.AddrFrom16(p.Addr), uint16(p.Port)).String(), nil
}

// loader loads and waits to be killed.
func loader(cgroup string) {
	k, err := Load(Options{Cgroup: cgroup, Ports: []uint16{443}, Names: []string{"dockerd"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	fmt.Println("loaded")
	_, _ = os.Stdin.Read(make([]byte, 1))
}

// ---- the stage: a network namespace and a cgroup with clients ----

type stage struct {
	t        testing.TB
	cgroup   string
	cgFD     *os.File
	home     *os.File // the cgroup of whoever is outside
	pid      int      // holds the network namespace
	k        *Kernel
	listener [2]*net.TCPListener
	cookie   uint64
	opts     Options

	origins chan Origin
	direct  chan string // addresses of listeners that are not the agent's, when they accept
	stop    chan struct{}
}

var (
	probe1 = netip.MustParseAddr("198.18.116.1")
	probe2 = netip.MustParseAddr("198.18.116.2")
)

// newStage sets up a namespace in which 203.0.113.9 is an address that answers
// itself, and loads the kernel side.
func newStage(t testing.TB) *stage {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	s := &stage{t: t, origins: make(chan Origin, 4096), direct: make(chan string, 64), stop: make(chan struct{})}
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	if s.cgroup, err = os.MkdirTemp(root, fmt.Sprintf("weir-bpf-%d-", os.Getpid())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for deadline := time.Now().Add(waitTime); ; time.Sleep(5 * time.Millisecond) {
			if err := os.Remove(s.cgroup); err == nil {
				return
			} else if time.Now().After(deadline) {
				t.Error(err)
				return
			}
		}
	})
	if s.cgFD, err = os.Open(s.cgroup); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.cgFD.Close() })
	if s.home, err = os.Open(root); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.home.Close() })
	// The listeners are this process's: it is where an agent is.
	s.moveTo(s.cgFD)
	t.Cleanup(func() { s.moveTo(s.home) })
	holder := exec.Command("sh", "-ec", "ip link set lo up; ip addr add 203.0.113.9/32 dev lo; ip addr add 2001:db8::9/128 dev lo nodad; ip route add local 198.51.0.0/16 dev lo; echo; exec sleep 1000")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	holder.Stderr = os.Stderr
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = holder.Process.Kill(); _ = holder.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal("setting up a network namespace: ", err)
	}
	s.pid = holder.Process.Pid
	s.opts = Options{Cgroup: s.cgroup, Ports: []uint16{443, 80, 5000}, Probes: []netip.Addr{probe1, probe2}, Names: []string{"dockerd", "containerd-with-a-long-name"}, MaxBeatAge: time.Hour}
	s.load()
	return s
}

// moveTo moves this process into a cgroup.
func (s *stage) moveTo(cgroup *os.File) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(cgroup.Name(), "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0); err != nil {
		s.t.Fatal("moving into a cgroup: ", err)
	}
}

func (s *stage) load() {
	s.t.Helper()
	k, err := Load(s.opts)
	if err != nil {
		s.t.Fatalf("%+v", err)
	}
	s.k = k
	s.t.Cleanup(func() { k.Close() })
	k.Beat()
}

// inside runs f in the namespace.
func (s *stage) inside(f func() error) {
	s.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", s.pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = errors.Join(unix.Setns(fd, unix.CLONE_NEWNET), unix.Close(fd))
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		s.t.Fatal(err)
	}
}

func (s *stage) listen(network, addr string) *net.TCPListener {
	s.t.Helper()
	var l net.Listener
	s.inside(func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	s.t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// openListener opens the listener; what is accepted is recorded with its origin.
func (s *stage) openListener() {
	s.t.Helper()
	s.listener = [2]*net.TCPListener{s.listen("tcp4", "127.0.0.1:0"), s.listen("tcp6", "[::1]:0")}
	var err error
	if s.cookie, err = s.k.OpenListener(s.listener[0], s.listener[1]); err != nil {
		s.t.Fatal(err)
	}
	for _, l := range s.listener {
		go func() {
			for {
				c, err := l.AcceptTCP()
				if err != nil {
					return
				}
				o, err := s.k.Origin(c)
				if err != nil {
					c.Close()
					s.direct <- "listener without origin: " + err.Error()
					continue
				}
				select {
				case s.origins <- o:
				default:
				}
				go func() {
					defer c.Close()
					want, err := bufio.NewReader(c).ReadString('\n')
					if err == nil && strings.TrimSpace(want) == o.Dst.String() {
						fmt.Fprintln(c, "right")
					}
				}()
			}
		}()
	}
}

// serve has something else than the listener answer at an address.
func (s *stage) serve(network, addr string) {
	s.t.Helper()
	l := s.listen(network, addr)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
			s.direct <- addr
		}
	}()
}

// proc is a running client.
type proc struct {
	s   *stage
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start starts a client under a name, in the stage's cgroup or not.
func (s *stage) start(name string, inCgroup bool) *proc {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), name)
	if err := os.Symlink("/proc/self/exe", path+".x"); err != nil {
		s.t.Fatal(err)
	}
	b, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.WriteFile(path, b, 0o755)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	p := &proc{s: s, cmd: exec.Command("nsenter", "-n", "-t", fmt.Sprint(s.pid), path, "client")}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(s.home.Fd())}
	if inCgroup {
		p.cmd.SysProcAttr.CgroupFD = int(s.cgFD.Fd())
	}
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		s.t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(p.end)
	p.do("nothing") // it has started
	return p
}

func (p *proc) pid() int { return p.cmd.Process.Pid }

func (p *proc) end() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func (p *proc) do(args ...string) string {
	p.s.t.Helper()
	fmt.Fprintln(p.in, strings.Join(args, " "))
	stuck := time.AfterFunc(waitTime, func() { _ = p.cmd.Process.Kill() })
	defer stuck.Stop()
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.s.t.Fatalf("the client doesn't answer %q: %v", args, err)
	}
	return strings.TrimSpace(line)
}

// redirected dials and expects to come out at the listener.
func (p *proc) redirected(network, addr string) Origin {
	p.s.t.Helper()
	peer := p.do("dial", network, addr)
	want := netip.MustParseAddrPort(addr)
	if got, err := netip.ParseAddrPort(peer); err != nil || got.Addr().Unmap() != want.Addr().Unmap() || got.Port() != want.Port() {
		p.s.t.Errorf("dialled %s, and getpeername says %s", addr, peer)
	}
	select {
	case o := <-p.s.origins:
		if o.Dst != netip.AddrPortFrom(want.Addr().Unmap(), want.Port()) || o.PID != p.pid() || o.Netns != p.s.cookie || o.Cgroup == 0 {
			p.s.t.Errorf("dialled %s, and the listener has %+v", addr, o)
		}
		return o
	case d := <-p.s.direct:
		p.s.t.Errorf("dialled %s, and it went to %s", addr, d)
	case <-time.After(waitTime):
		p.s.t.Errorf("dialled %s, and nothing came", addr)
	}
	return Origin{}
}

// direct dials and expects not to come out at the listener.
func (p *proc) direct(network, addr string) {
	p.s.t.Helper()
	peer := p.do("dial", network, addr)
	connected := !strings.HasPrefix(peer, "error: ")
	wait := 200 * time.Millisecond // nothing listens there
	if connected {
		wait = waitTime // for the word of who does
	}
	select {
	case o := <-p.s.origins:
		p.s.t.Errorf("dialled %s, and was redirected: %+v", addr, o)
	case <-p.s.direct:
		if !strings.Contains(peer, addr) {
			p.s.t.Errorf("dialled %s, and getpeername says %s", addr, peer)
		}
	case <-time.After(wait):
		if connected {
			p.s.t.Errorf("dialled %s, and it went to %s, who knows where", addr, peer)
		}
	}
}

// event waits for a report about a process.
func (s *stage) event(pid int, kind EventKind) Event {
	s.t.Helper()
	found := make(chan Event, 1)
	go func() {
		for {
			ev, err := s.k.Next()
			if err != nil {
				return
			}
			if ev.PID == pid && ev.Kind == kind {
				found <- ev
				return
			}
		}
	}()
	select {
	case ev := <-found:
		return ev
	case <-time.After(waitTime):
		s.t.Fatalf("no event %d of process %d", kind, pid)
		return Event{}
	}
}

// ---- the tests ----

func TestCheck(t *testing.T) {
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range Check(root) {
		t.Errorf("%+v", p)
	}
	for _, dir := range []string{"/sys/fs", "/nowhere"} {
		if p := Check(dir); len(p) != 1 || !strings.Contains(p[0].Error(), "--cgroup") {
			t.Errorf("%s: %v", dir, p)
		}
	}
}

func TestRedirect(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:8443")
	s.serve("tcp4", "127.0.0.1:443")
	s.serve("tcp6", "[::1]:443")
	p := s.start("dockerd", true)
	for _, addr := range []string{"203.0.113.9:443", "203.0.113.9:80", "203.0.113.9:5000", "192.0.2.1:443", "[2001:db8::9]:443", "[2001:db8:1::1]:443"} {
		network := "tcp4"
		if strings.HasPrefix(addr, "[") {
			network = "tcp6"
		}
		if o := p.redirected(network, addr); o.Mode != ModeNew {
			t.Errorf("%s: mode %d", addr, o.Mode)
		}
	}
	p.redirected("mapped", "203.0.113.9:443") // an IPv4 address on an IPv6 socket
	p.redirected("tcp4", probe1.String()+":443")
	p.direct("tcp4", "203.0.113.9:8443")
	p.direct("tcp4", "127.0.0.1:443")
	p.direct("tcp6", "[::1]:443")
	if got := p.do("udp", "203.0.113.9:443"); got != "203.0.113.9:443" {
		t.Errorf("UDP: %s", got)
	}
	if got := p.do("bound", "203.0.113.9:443"); !strings.HasPrefix(got, "error: ") {
		t.Errorf("bound to a device: %s", got)
	}
	if st, err := s.k.Stats(); err != nil || st.Redirected != 8 || st.Unfit != 1 {
		t.Errorf("%+v, %v", st, err)
	}
}

// What is said first to a destination at another port is reported, once, and the
// connection goes where it goes. Ports and destinations can be had redirected, and
// left alone.
func TestDestinations(t *testing.T) {
	s := newStage(t)
	s.openListener()
	for _, addr := range []string{"203.0.113.9:443", "203.0.113.9:8443", "203.0.113.9:9000"} {
		s.serve("tcp4", addr)
	}
	s.serve("tcp6", "[2001:db8::9]:8443")
	other, p := s.start("bash", true), s.start("dockerd", true)
	if err := s.k.SetMode(p.pid(), ModeRedirect); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 10_000)
	say := func(p *proc, network, addr, what string) {
		t.Helper()
		if got := p.do("say", network, addr, what); got != addr {
			t.Errorf("%s: %s", addr, got)
		}
		if d := <-s.direct; d != addr {
			t.Errorf("%s: it went to %s", addr, d)
		}
	}
	said := func(addr, what string) {
		t.Helper()
		got, err := s.k.NextSaid()
		if err != nil || got.Untracked || got.Dst != netip.MustParseAddrPort(addr) || got.PID != p.pid() || got.Netns != s.cookie || string(got.Data) != what {
			t.Errorf("%+v (%v), want %s and %.10s", got, err, addr, what)
		}
	}
	say(other, "tcp4", "203.0.113.9:8443", "other")
	say(p, "tcp4", "203.0.113.9:8443", "hello")
	say(p, "tcp4", "203.0.113.9:8443", "again")
	say(p, "tcp6", "[2001:db8::9]:8443", long)
	said("203.0.113.9:8443", "hello")
	said("[2001:db8::9]:8443", long[:4096])

	// The port, for what was looked at too, and for others.
	if err := s.k.AddPort(8443); err != nil {
		t.Fatal(err)
	}
	p.redirected("tcp4", "203.0.113.9:8443")
	p.redirected("tcp6", "[2001:db8::9]:8443")
	// But not where no registry is, for its time; and a new process nevertheless.
	dst := netip.MustParseAddrPort("203.0.113.9:8443")
	if err := s.k.Leave(s.cookie, dst, time.Hour); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp4", "203.0.113.9:8443")
	p.redirected("tcp6", "[2001:db8::9]:8443")
	p.redirected("tcp4", "203.0.113.9:443")
	s.start("dockerd", true).redirected("tcp4", "203.0.113.9:8443")
	if err := s.k.Leave(s.cookie, dst, -time.Second); err != nil {
		t.Fatal(err)
	}
	p.redirected("tcp4", "203.0.113.9:8443")
	if err := errors.Join(s.k.Leave(s.cookie, dst, time.Hour), s.k.Unleave(s.cookie, dst), s.k.Unleave(s.cookie, dst)); err != nil {
		t.Fatal(err)
	}
	p.redirected("tcp4", "203.0.113.9:8443")
	// One destination.
	if err := s.k.Want(s.cookie, netip.MustParseAddrPort("203.0.113.9:9000")); err != nil {
		t.Fatal(err)
	}
	p.redirected("tcp4", "203.0.113.9:9000")
	if err := s.k.SetMode(p.pid(), ModeProbe); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp4", "203.0.113.9:9000")
}

// What an untracked process says first to a port of registries is reported, once for
// each destination, and nothing is redirected or left alone for it.
func TestUntrackedIsLookedAt(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:443")
	s.serve("tcp4", "203.0.113.9:8443")
	s.serve("tcp6", "[2001:db8::9]:443")
	p := s.start("some-puller-of-a-long-name", true)
	say := func(network, addr, what string) {
		t.Helper()
		time.Sleep(20 * time.Millisecond) // there is one look in 10
		if got := p.do("say", network, addr, what); got != addr {
			t.Errorf("%s: %s", addr, got)
		}
		if d := <-s.direct; d != addr {
			t.Errorf("%s: it went to %s", addr, d)
		}
	}
	say("tcp4", "203.0.113.9:443", "first")
	say("tcp4", "203.0.113.9:443", "again")
	say("tcp4", "203.0.113.9:8443", "elsewhere")
	say("tcp6", "[2001:db8::9]:443", "v6")
	for _, want := range []struct{ addr, what string }{{"203.0.113.9:443", "first"}, {"[2001:db8::9]:443", "v6"}} {
		got, err := s.k.NextSaid()
		if err != nil || !got.Untracked || got.Dst != netip.MustParseAddrPort(want.addr) || got.PID != p.pid() || got.Comm != "some-puller-of-" || string(got.Data) != want.what {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	tracked := s.start("dockerd", true)
	if err := s.k.SetMode(tracked.pid(), ModeRedirect); err != nil {
		t.Fatal(err)
	}
	tracked.redirected("tcp4", "203.0.113.9:443")
	tracked.redirected("tcp6", "[2001:db8::9]:443")
}

func TestWhoIsTracked(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:443")
	s.start("bash", true).direct("tcp4", "203.0.113.9:443")
	outside := s.start("dockerd", false) // not below the cgroup
	outside.direct("tcp4", "203.0.113.9:443")
	if _, tracked := s.k.Mode(outside.pid()); tracked {
		t.Error("a process outside the cgroup is tracked")
	}
	s.start("containerd-with-a-different-name", true).redirected("tcp4", "203.0.113.9:443") // 15 bytes count
	p := s.start("dockerd", true)
	if err := s.k.Forget(p.pid()); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp4", "203.0.113.9:443")
}

func TestModes(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:443")
	s.serve("tcp4", "203.0.113.9:53")
	s.serve("tcp4", "203.0.113.9:8443")
	p := s.start("dockerd", true)
	if ev := s.event(p.pid(), Exec); ev.Name != "dockerd" || ev.Comm != "dockerd" {
		t.Errorf("%+v", ev)
	}
	if m, _ := s.k.Mode(p.pid()); m != ModeNew {
		t.Errorf("mode %d", m)
	}
	p.redirected("tcp4", "203.0.113.9:443")
	p.direct("tcp4", "203.0.113.9:53") // DNS doesn't count
	if s.k.Early(p.pid()) {
		t.Error("early without having connected past the listener")
	}
	p.direct("tcp4", "203.0.113.9:8443")
	if !s.k.Early(p.pid()) {
		t.Error("a connection past the listener was not noted")
	}
	if err := s.k.SetMode(p.pid(), ModeProbe); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp4", "203.0.113.9:443")
	p.redirected("tcp4", probe1.String()+":443")
	p.redirected("tcp4", probe2.String()+":443")
	if err := s.k.SetMode(p.pid(), ModeRedirect); err != nil {
		t.Fatal(err)
	}
	if o := p.redirected("tcp4", "203.0.113.9:443"); o.Mode != ModeRedirect {
		t.Errorf("%+v", o)
	}
	q := s.start("dockerd", true)
	if err := s.k.SetMode(q.pid(), ModeRedirect); err != nil {
		t.Fatal(err)
	}
	q.direct("tcp4", "203.0.113.9:8443")
	if s.k.Early(q.pid()) {
		t.Error("early although it is not new any more")
	}
}

func TestNoListener(t *testing.T) {
	s := newStage(t)
	s.serve("tcp4", "203.0.113.9:443")
	s.serve("tcp6", "[2001:db8::9]:443")
	p := s.start("dockerd", true)
	p.direct("tcp4", "203.0.113.9:443")
	if !s.k.Early(p.pid()) {
		t.Error("not noted")
	}
	s.openListener()
	p.redirected("tcp4", "203.0.113.9:443")
	// A listener that is gone without a word.
	s.listener[0].Close()
	p.direct("tcp4", "203.0.113.9:443")
	p.redirected("tcp6", "[2001:db8::9]:443")
	// Another program takes its port.
	s.serve("tcp4", s.listener[0].Addr().String())
	p.direct("tcp4", "203.0.113.9:443")
	// A listener that was closed properly.
	if err := s.k.CloseListener(s.cookie); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp6", "[2001:db8::9]:443")
	// One without ::1.
	l := s.listen("tcp4", "127.0.0.1:0")
	if _, err := s.k.OpenListener(l, nil); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp6", "[2001:db8::9]:443")
	if st, _ := s.k.Stats(); st.NoListener != 5 {
		t.Errorf("%+v", st)
	}
}

func TestHeartbeat(t *testing.T) {
	s := newStage(t)
	s.k.Close()
	s.opts.MaxBeatAge = 500 * time.Millisecond
	s.load()
	s.openListener()
	s.serve("tcp4", "203.0.113.9:443")
	p := s.start("dockerd", true)
	time.Sleep(s.opts.MaxBeatAge)
	p.direct("tcp4", "203.0.113.9:443") // the beat was longer ago
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			s.k.Beat()
			time.Sleep(10 * time.Millisecond)
		}
	})
	time.Sleep(s.opts.MaxBeatAge) // the first beat alone would be too old
	p.redirected("tcp4", "203.0.113.9:443")
	cancel()
	wg.Wait()
	time.Sleep(s.opts.MaxBeatAge)
	p.direct("tcp4", "203.0.113.9:443")
	if st, _ := s.k.Stats(); st.StaleHeartbeat < 2 {
		t.Errorf("%+v", st)
	}
}

// A client that connects to the listener by itself is refused, and has no origin if the programs
// don't see it.
func TestSquatter(t *testing.T) {
	s := newStage(t)
	s.openListener()
	addr4, addr6 := s.listener[0].Addr().String(), s.listener[1].Addr().String()
	_, port, _ := net.SplitHostPort(addr4)
	s.serve("tcp4", "127.0.0.2:"+port) // its port alone is not the listener
	for _, name := range []string{"bash", "dockerd"} {
		p := s.start(name, true)
		for _, to := range [][2]string{{"tcp4", addr4}, {"tcp6", addr6}, {"mapped", addr4}, {"tcp4", "0.0.0.0:" + port}} {
			if got := p.do("dial", to[0], to[1]); !strings.Contains(got, "not permitted") {
				t.Errorf("%s, %v: %s", name, to, got)
			}
		}
		p.direct("tcp4", "127.0.0.2:"+port)
	}
	if st, _ := s.k.Stats(); st.Refused != 8 {
		t.Errorf("%+v", st)
	}
	s.start("bash", false).do("dial", "tcp4", addr4)
	select {
	case d := <-s.direct:
		if !strings.Contains(d, ErrNoOrigin.Error()) {
			t.Error(d)
		}
	case o := <-s.origins:
		t.Errorf("%+v", o)
	case <-time.After(waitTime):
		t.Error("nothing came")
	}
}

// Where there is no loopback interface to reach the listener by, or no 127.0.0.1 or
// ::1 on it, connections go direct; so do those to a listener that is suspended.
func TestListenerOutOfReach(t *testing.T) {
	s := newStage(t)
	s.openListener()
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("nsenter", append([]string{"-n", "-t", fmt.Sprint(s.pid), "ip"}, args...)...).CombinedOutput(); err != nil {
			t.Fatal(err, string(out))
		}
	}
	p := s.start("dockerd", true)
	p.redirected("tcp4", "203.0.113.9:443")
	p.redirected("tcp6", "[2001:db8::9]:443")
	s.serve("tcp6", "[2001:db8::9]:443")
	ip("addr", "del", "::1/128", "dev", "lo")
	p.redirected("tcp4", "203.0.113.9:443")
	p.direct("tcp6", "[2001:db8::9]:443")
	ip("addr", "add", "::1/128", "dev", "lo")
	p.redirected("tcp6", "[2001:db8::9]:443")

	was, err := s.k.Stats()
	if err != nil {
		t.Fatal(err)
	}
	ip("link", "set", "lo", "down")
	p.direct("tcp4", "192.0.2.77:443") // and fails as it does without weir
	if now, _ := s.k.Stats(); now.NoListener != was.NoListener+1 {
		t.Errorf("%+v, %+v before", now, was)
	}
	ip("link", "set", "lo", "up")
	p.redirected("tcp4", "203.0.113.9:443")

	s.serve("tcp4", "203.0.113.9:443")
	reached := func() {
		t.Helper()
		p.direct("tcp4", "203.0.113.9:443")
		if got := p.do("dial", "tcp4", "203.0.113.9:443"); got != "203.0.113.9:443" {
			t.Fatal(got)
		}
		<-s.direct
	}
	ip("addr", "del", "127.0.0.1/8", "dev", "lo")
	reached()
	ip("addr", "add", "127.0.0.2/32", "dev", "lo")
	reached()
	ip("addr", "add", "127.0.0.1/32", "dev", "lo")
	p.redirected("tcp4", "203.0.113.9:443")
	ip("addr", "del", "127.0.0.1/32", "dev", "lo")
	ip("addr", "add", "127.0.0.3/8", "dev", "lo")
	p.redirected("tcp4", "203.0.113.9:443")
	if err := s.k.SuspendListener(s.cookie, true); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp4", "203.0.113.9:443")
	if err := s.k.SuspendListener(s.cookie, false); err != nil {
		t.Fatal(err)
	}
	p.redirected("tcp4", "203.0.113.9:443")
	if err := s.k.CloseListener(s.cookie); err != nil {
		t.Fatal(err)
	}
	if err := s.k.SuspendListener(s.cookie, false); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Error("a listener that is closed was opened:", err)
	}
}

// A listener whose queue is half full gets no more: the next client would wait.
func TestFullListener(t *testing.T) {
	s := newStage(t)
	l := s.listen("tcp4", "127.0.0.1:0")
	raw, err := l.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { _ = unix.Listen(int(fd), 4) })
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.k.OpenListener(l, nil); err != nil {
		t.Fatal(err)
	}
	s.serve("tcp4", "203.0.113.9:443")
	p := s.start("dockerd", true)
	for range 3 {
		if got := p.do("hold", "tcp4", "203.0.113.9:443"); got != "203.0.113.9:443" {
			t.Error(got)
		}
	}
	p.direct("tcp4", "203.0.113.9:443")
}

// arrival waits until a network namespace is reported.
func (s *stage) arrival() Arrival {
	s.t.Helper()
	stuck := time.AfterFunc(waitTime, func() { s.k.Close() })
	defer stuck.Stop()
	a, err := s.k.NextArrival()
	if err != nil {
		s.t.Fatal("no arrival: ", err)
	}
	return a
}

// A network namespace is reported when a process is forked in it, or comes there
// and starts a program; once, until its listener is closed.
func TestArrivals(t *testing.T) {
	s := newStage(t)
	p := s.start("bash", true) // by nsenter, which is forked here, and doesn't fork
	if a := s.arrival(); a.PID != p.pid() || a.Parent != os.Getpid() {
		t.Errorf("%+v, of %d forked by %d", a, p.pid(), os.Getpid())
	}
	a := s.arrival()
	if a.PID != p.pid() || a.Parent != 0 {
		t.Errorf("%+v, of %d", a, p.pid())
	}
	s.openListener()
	if s.cookie != a.Netns {
		t.Errorf("the listener is in %d, announced was %d", s.cookie, a.Netns)
	}
	s.start("bash", true)
	if err := s.k.CloseListener(s.cookie); err != nil {
		t.Fatal(err)
	}
	s.start("bash", false) // not below the cgroup
	q := s.start("bash", true)
	if a := s.arrival(); a.PID != q.pid() || a.Netns != s.cookie {
		t.Errorf("%+v; the second is %d", a, q.pid())
	}
	// A child has its namespace before it runs anything.
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	if a := s.arrival(); a.PID != cmd.Process.Pid || a.Parent != 0 || a.Netns == s.cookie {
		t.Errorf("%+v; the child is %d", a, cmd.Process.Pid)
	}
}

// The end of what is watched is reported, whatever program it has become, and
// not that of others.
func TestWatch(t *testing.T) {
	s := newStage(t)
	p, q := s.start("bash", true), s.start("bash", true)
	for _, w := range []*proc{p, q} {
		if err := s.k.Watch(w.pid()); err != nil {
			t.Fatal(err)
		}
	}
	s.k.Unwatch(p.pid())
	fmt.Fprintln(q.in, "exec")
	p.end()
	q.end()
	stuck := time.AfterFunc(waitTime, func() { s.k.Close() })
	defer stuck.Stop()
	for {
		ev, err := s.k.Next()
		if err != nil {
			t.Fatal(err)
		}
		if ev.Kind == Gone && ev.PID == p.pid() {
			t.Error("told of what is not watched")
		}
		if ev.Kind == Gone && ev.PID == q.pid() {
			return
		}
	}
}

// A storm of namespaces overflows the reports of them. What isn't reported leaves
// nothing.
func TestArrivalsLost(t *testing.T) {
	s := newStage(t)
	// As many as there is room for, and some.
	out, err := exec.Command("sh", "-c", "for i in $(seq 2900); do unshare -n /bin/true || exit 1; done").CombinedOutput()
	if err != nil {
		t.Fatal(err, string(out))
	}
	st, err := s.k.Stats()
	if err != nil || st.ArrivalsLost == 0 {
		t.Errorf("%+v %v", st, err)
	}
	var netns uint64
	var d kernelListener
	told := 0
	for it := s.k.objs.WeirListeners.Iterate(); it.Next(&netns, &d); {
		told++
	}
	for range told {
		if err := s.k.CloseListener(s.arrival().Netns); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.k.objs.WeirListeners.NextKey(nil, &netns); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("something is left of namespaces that are gone: %d, %v", netns, err)
	}
}

func TestSocketUsedAgain(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:8443")
	p := s.start("dockerd", true)
	if got := p.do("reuse", "203.0.113.9:443", "203.0.113.9:8443"); got != "203.0.113.9:8443" {
		t.Errorf("through the listener and then past it: %s", got)
	}
	if got := p.do("reuse", "203.0.113.9:443", "198.51.100.7:80"); got != "198.51.100.7:80" {
		t.Errorf("through the listener twice: %s", got)
	}
}

func TestEvents(t *testing.T) {
	s := newStage(t)
	p := s.start("dockerd", true)
	s.event(p.pid(), Exec)
	fmt.Fprintln(p.in, "exec") // becomes another program
	s.event(p.pid(), Exit)
	if _, tracked := s.k.Mode(p.pid()); tracked {
		t.Error("tracked although it is another program")
	}
	q := s.start("dockerd", true)
	s.event(q.pid(), Exec)
	q.end()
	s.event(q.pid(), Exit)
	for range 30 {
		s.start("dockerd", true).end()
	}
	for deadline := time.Now().Add(waitTime); ; runtime.Gosched() {
		n := 0
		var pid, mode uint32
		for it := s.k.objs.WeirTracked.Iterate(); it.Next(&pid, &mode); {
			n++
		}
		if n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d processes are still tracked", n)
		}
	}
	s.k.Close()
	if _, err := s.k.Next(); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// Each of many connections at once is known for what it is.
func TestMany(t *testing.T) {
	s := newStage(t)
	s.openListener()
	var wg sync.WaitGroup
	for i := range 4 {
		p := s.start("dockerd", true)
		wg.Go(func() {
			if got := p.do("many", fmt.Sprintf("198.%d", 51+0*i)); got != "" {
				t.Error(got)
			}
		})
	}
	wg.Wait()
	if st, _ := s.k.Stats(); st.Redirected != 2000 || st.NoOrigin != 0 {
		t.Errorf("%+v", st)
	}
	var key kernelEndpoint
	if err := s.k.objs.WeirHandover.NextKey(nil, &key); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("something is left between client and listener: %+v, %v", key, err)
	}
}

// An agent that is not below the cgroup that it serves.
func TestListenerFromElsewhere(t *testing.T) {
	s := newStage(t)
	s.moveTo(s.home)
	s.openListener()
	p := s.start("dockerd", true)
	p.redirected("tcp4", "203.0.113.9:443")
	p.redirected("tcp6", "[2001:db8::9]:443")
	p.redirected("mapped", "203.0.113.9:443")
	if got := p.do("many", "198.51"); got != "" {
		t.Error(got)
	}
}

func linksOf(t *testing.T, cgroup string) (n int) {
	t.Helper()
	f, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupSockOps, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername} {
		attr := struct {
			target, attach, query, flags uint32
			ids                          uint64
			count                        uint32
			_                            [64]byte
		}{target: uint32(f.Fd()), attach: uint32(at)}
		if _, _, e := unix.Syscall(unix.SYS_BPF, 16 /* BPF_PROG_QUERY */, uintptr(ptr(&attr)), 64); e != 0 {
			t.Fatal("querying the programs of a cgroup: ", e)
		}
		n += int(attr.count)
	}
	return n
}

func TestDetach(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:443")
	if n := linksOf(t, s.cgroup); n != 5 {
		t.Fatalf("%d programs are attached", n)
	}
	p := s.start("dockerd", true)
	// Accepted, and looked at only after the end.
	l := s.listen("tcp4", "127.0.0.1:0")
	if _, err := s.k.OpenListener(l, nil); err != nil {
		t.Fatal(err)
	}
	p.do("hold", "tcp4", "192.0.2.7:443")
	if err := s.k.Detach(); err != nil {
		t.Fatal(err)
	}
	if n := linksOf(t, s.cgroup); n != 0 {
		t.Errorf("%d programs are left", n)
	}
	c, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if o, err := s.k.Origin(c); err != nil || o.Dst.String() != "192.0.2.7:443" {
		t.Errorf("%+v, %v", o, err)
	}
	p.direct("tcp4", "203.0.113.9:443")
}

func TestKilled(t *testing.T) {
	s := newStage(t)
	s.k.Close()
	cmd := exec.Command(os.Args[0], "loader", s.cgroup)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "loaded\n" {
		t.Error(line)
	}
	if n := linksOf(t, s.cgroup); n != 5 {
		t.Errorf("%d programs are attached", n)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for deadline := time.Now().Add(waitTime); linksOf(t, s.cgroup) != 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d programs are left", linksOf(t, s.cgroup))
		}
	}
}

// The programs use nothing that is newer than the oldest kernel, as far as it
// has a number: Linux 5.15 ends with these.
func TestOldestKernel(t *testing.T) {
	const lastHelper, lastMap = asm.FnTaskPtRegs, ebpf.TaskStorage
	spec, err := loadKernel()
	if err != nil {
		t.Fatal(err)
	}
	helpers := 0
	for name, p := range spec.Programs {
		for _, ins := range p.Instructions {
			if ins.IsKfuncCall() {
				t.Errorf("%s calls a kfunc: %v", name, ins)
			}
			if !ins.IsBuiltinCall() {
				continue
			}
			if helpers++; asm.BuiltinFunc(ins.Constant) > lastHelper {
				t.Errorf("%s calls %v", name, asm.BuiltinFunc(ins.Constant))
			}
		}
	}
	for name, m := range spec.Maps {
		if m.Type > lastMap {
			t.Errorf("%s is a %v", name, m.Type)
		}
	}
	if helpers == 0 {
		t.Error("no program calls a helper")
	}
}

func TestLoadMistakes(t *testing.T) {
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]Options{
		"cgroup":     {Cgroup: "/sys/fs"},
		"no cgroup":  {Cgroup: "/nowhere"},
		"IPv6 probe": {Cgroup: root, Probes: []netip.Addr{netip.IPv6Loopback()}},
		"probes":     {Cgroup: root, Probes: make([]netip.Addr, 5)},
	} {
		if k, err := Load(o); err == nil {
			k.Close()
			t.Errorf("%s: loaded", name)
		} else if bytes.ContainsRune([]byte(err.Error()), '\n') {
			t.Errorf("%s: not one line: %v", name, err)
		}
	}
}

// ---- benchmarks ----

// runs reports how long a program runs, by the kernel's own account: on a busy machine
// that is what can be compared.
func runs(b *testing.B, p *ebpf.Program) {
	off, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		defer off.Close()
		if st, err := p.Stats(); err != nil {
			b.Error(err)
		} else if st.RunCount > 0 {
			b.ReportMetric(float64(st.Runtime)/float64(st.RunCount), "ns/run")
			b.ReportMetric(float64(st.RunCount)/float64(b.N), "runs/op")
		}
	})
}

// connects measures connect() and close() of this process, in a cgroup of its
// own, to a listener on loopback.
func connects(b *testing.B, setUp func(*stage, int) string) {
	s := newStage(b)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:443")
	go func() {
		for range s.direct {
		}
	}()
	go func() {
		for range s.origins {
		}
	}()
	runs(b, s.k.objs.WeirConnect4)
	addr := setUp(s, os.Getpid())
	b.Cleanup(func() { _ = s.k.Forget(os.Getpid()) })
	ap := netip.MustParseAddrPort(addr)
	sa := &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	s.inside(func() error {
		for b.Loop() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			if err := unix.Connect(fd, sa); err != nil {
				return err
			}
			_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			unix.Close(fd)
		}
		return nil
	})
}

func BenchmarkConnectWithoutPrograms(b *testing.B) {
	connects(b, func(s *stage, _ int) string { _ = s.k.Detach(); return "203.0.113.9:443" })
}

func BenchmarkConnectUntracked(b *testing.B) {
	connects(b, func(*stage, int) string { return "203.0.113.9:443" })
}

func BenchmarkConnectTracked(b *testing.B) {
	connects(b, func(s *stage, pid int) string { _ = s.k.SetMode(pid, ModeRedirect); return "203.0.113.9:443" })
}

// BenchmarkConnectLeftAlone is a tracked program's, at a redirected port where no
// registry is, and BenchmarkConnectElsewhere the same at another port, of which it was
// seen what is said.
func BenchmarkConnectLeftAlone(b *testing.B) {
	connects(b, func(s *stage, pid int) string {
		_ = s.k.SetMode(pid, ModeRedirect)
		_ = s.k.Leave(s.cookie, netip.MustParseAddrPort("203.0.113.9:443"), time.Hour)
		return "203.0.113.9:443"
	})
}

func BenchmarkConnectElsewhere(b *testing.B) {
	connects(b, func(s *stage, pid int) string {
		_ = s.k.SetMode(pid, ModeRedirect)
		s.serve("tcp4", "203.0.113.9:8443")
		_ = s.k.Leave(s.cookie, netip.MustParseAddrPort("203.0.113.9:8443"), time.Hour)
		return "203.0.113.9:8443"
	})
}

// packets measures small packets there and back, on a connection of a process that
// isn't tracked.
func packets(b *testing.B, setUp func(*stage)) {
	s := newStage(b)
	runs(b, s.k.objs.WeirEgress)
	setUp(s)
	l := s.listen("tcp4", "203.0.113.9:7")
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(c, c)
		}
	}()
	s.inside(func() error {
		c, err := net.Dial("tcp4", "203.0.113.9:7")
		if err != nil {
			return err
		}
		defer c.Close()
		var one [1]byte
		for b.Loop() {
			if _, err := c.Write(one[:]); err != nil {
				return err
			}
			if _, err := c.Read(one[:]); err != nil {
				return err
			}
		}
		return nil
	})
}

func BenchmarkPacketsWithoutPrograms(b *testing.B) { packets(b, func(s *stage) { _ = s.k.Detach() }) }

func BenchmarkPackets(b *testing.B) { packets(b, func(*stage) {}) }

// starts measures fork, exec and the end of a program.
func starts(b *testing.B, setUp func(*stage)) {
	s := newStage(b)
	setUp(s)
	for b.Loop() {
		if err := exec.Command("/bin/true").Run(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStartWithoutPrograms(b *testing.B) { starts(b, func(s *stage) { _ = s.k.Detach() }) }

func BenchmarkStart(b *testing.B) { starts(b, func(*stage) {}) }
