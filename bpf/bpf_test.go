// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
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
	"unsafe"

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

// client is this binary under a runtime's name: it does what each line of its input says, and answers with a line.
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
	s.opts = Options{Cgroup: s.cgroup, Ports: []uint16{443, 80, 5000}, Probes: []netip.Addr{probe1, probe2}, Names: []string{"dockerd", "containerd-with-a-long-name", "nerdctl"}, Guests: []string{"nerdctl"}, MaxBeatAge: time.Hour}
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

// ptr is for system calls that have no wrapper.
func ptr[T any](p *T) unsafe.Pointer { return unsafe.Pointer(p) }
