// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"weir/agent/trust"
	"weir/proxy/registry"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
}

func TestParseStat(t *testing.T) {
	p, err := parseStat([]byte("42 (a) b (c)) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 1234 0 0\n"))
	if err != nil || p.pid != 42 || p.comm != "a) b (c)" || p.start != 12340*time.Millisecond {
		t.Errorf("%+v, %v", p, err)
	}
	for _, bad := range []string{"", "x", "1 (a", "1 (a) S", "x (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", ") 1 (", "1 (a) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 99999999999999999999 0"} {
		if p, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, p)
		}
	}
	self, err := readProcess(os.Getpid())
	if err != nil || self.pid != os.Getpid() || self.exe == "" || self.start > sinceBoot() || sinceBoot()-self.start > time.Hour {
		t.Errorf("%+v at %s, %v", self, sinceBoot(), err)
	}
	if _, err := readProcess(1 << 30); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("42 (a) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 1234 0 0\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parseStat(b); err == nil && p.start < 0 {
			t.Errorf("%+v", p)
		}
	})
}

func TestKinds(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range kinds {
		for _, p := range k.programs {
			if seen[p] || len(p) > 15 || p == "" {
				t.Errorf("%s: the program %q is there twice, or too long for the kernel", k.name, p)
			}
			seen[p] = true
			if kindOf("x", p) != k {
				t.Errorf("%q is not found", p)
			}
		}
		if k.pullsThrough != "" && !slices.ContainsFunc(kinds, func(o *kind) bool { return o.name == k.pullsThrough }) {
			t.Errorf("%s pulls through %s, which is not a kind", k.name, k.pullsThrough)
		}
	}
	if kindOf("bash", "weir") != nil {
		t.Error("bash is a container runtime")
	}
}

func TestConfigPath(t *testing.T) {
	var got []string
	for _, m := range configPathRE.FindAllSubmatch([]byte(`
version = 2
# config_path = "/commented"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
  config_path='/other'
x_config_path = "/no"
`), -1) {
		got = append(got, string(m[1]))
	}
	if !slices.Equal(got, []string{"/etc/containerd/certs.d", "/other"}) {
		t.Errorf("%q", got)
	}
}

func TestState(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	s := openState(dir, "cert1", log)
	rt := &runtimeProc{process: process{pid: 7, start: 5 * time.Second}}
	if s.installedBefore("/", time.Hour) || s.remembers(rt) != rememberedNothing {
		t.Error("something out of nothing")
	}
	s.installed("/", false)
	s.remember(rt)

	s = openState(dir, "cert1", log)
	if !s.installedBefore("/", sinceBoot()+time.Second) || s.installedBefore("/", 0) || s.installedBefore("/other", time.Hour*1e6) {
		t.Error("when it was installed is lost")
	}
	if s.remembers(rt) != rememberedSystem {
		t.Error("a runtime is forgotten")
	}
	if s.remembers(&runtimeProc{process: process{pid: 7, start: 6 * time.Second}}) != rememberedNothing {
		t.Error("a later process with the same pid is taken for the earlier one")
	}
	s.refused(rt)
	s = openState(dir, "cert1", log)
	if s.remembers(rt) != rememberedRefusal {
		t.Error("a refusal is forgotten")
	}
	s.forget(7)
	if openState(dir, "cert1", log).remembers(rt) != rememberedNothing {
		t.Error("a process that has ended is remembered")
	}
	s.remember(rt)
	if openState(dir, "cert2", log).remembers(rt) != rememberedNothing {
		t.Error("trust in another certificate counts")
	}
	if err := os.WriteFile(filepath.Join(dir, "state.json"), []byte("{half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if openState(dir, "cert1", log).installedBefore("/", time.Hour*1e6) {
		t.Error("a damaged file counts")
	}
}

// inNewNetns runs a process in a network namespace of its own, with lo up or
// not, and returns its pid.
func inNewNetns(t *testing.T, loUp bool) int {
	t.Helper()
	needRoot(t)
	script := "echo; exec sleep 1000"
	if loUp {
		script = "ip link set lo up && ip addr add 203.0.113.7/32 dev lo && " + script
	}
	cmd := exec.Command("sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal("setting up a network namespace: ", err)
	}
	return cmd.Process.Pid
}

func listenIn(t *testing.T, ns *netns, addr string) (l *net.TCPListener) {
	t.Helper()
	if err := ns.do(func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err := lc.Listen(context.Background(), "tcp", addr)
		if err == nil {
			l = ln.(*net.TCPListener)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestNetns(t *testing.T) {
	ns, err := openNetns(inNewNetns(t, true))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if ns.own {
		t.Error("another namespace is taken for the own one")
	}
	l := listenIn(t, ns, "203.0.113.7:0")
	addr := netip.MustParseAddrPort(l.Addr().String())
	// It is there, and only there.
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "hello")
			c.Close()
		}
	}()
	for range 50 {
		c, err := ns.dial(t.Context(), addr)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := c.Read(b); err != nil || string(b) != "hello" {
			t.Fatalf("%q, %v", b, err)
		}
		c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr.String()); err == nil {
		c.Close()
		t.Error("it can be reached from outside")
	}
	if _, err := ns.dial(t.Context(), netip.MustParseAddrPort("203.0.113.7:1")); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a port where nobody listens: %v", err)
	}
	if _, err := ns.dial(t.Context(), netip.MustParseAddrPort("198.51.100.1:443")); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("no route: %v", err)
	}
	if _, err := ns.dial(t.Context(), netip.MustParseAddrPort("[2001:db8::1]:443")); err == nil {
		t.Error("no IPv6 route, and yet a connection")
	}
	// No thread has stayed behind.
	tasks, _ := filepath.Glob("/proc/self/task/*/ns/net")
	home, _ := os.Readlink("/proc/self/ns/net")
	for _, task := range tasks {
		if at, err := os.Readlink(task); err == nil && at != home {
			t.Errorf("%s is in %s", task, at)
		}
	}
}

// A door's network namespace may be closed while a connection is being opened
// there, that nobody waits for. It is opened there, or not at all: never where
// the descriptor's number leads next.
func TestNetnsClosedMeanwhile(t *testing.T) {
	pid := inNewNetns(t, true)
	for range 200 {
		ns, err := openNetns(pid)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				err := ns.do(func() error {
					var st unix.Stat_t
					if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil || st.Ino != ns.ino {
						t.Errorf("in the network namespace %d instead of %d: %v", st.Ino, ns.ino, err)
					}
					return nil
				})
				if err != nil && !errors.Is(err, os.ErrClosed) {
					t.Error(err)
				}
			})
		}
		wg.Go(func() { ns.Close() })
		wg.Go(func() { // whose descriptor may get the same number
			if other, err := openNetns(os.Getpid()); err == nil {
				other.Close()
			}
		})
		wg.Wait()
		if err := ns.do(func() error { t.Error("in a closed network namespace"); return nil }); !errors.Is(err, os.ErrClosed) {
			t.Errorf("a closed network namespace: %v", err)
		}
	}
}

// A dial that gets no answer ends with its context, and holds no thread.
func TestNetnsDialCancelled(t *testing.T) {
	pid := inNewNetns(t, true)
	ns, err := openNetns(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	l := listenIn(t, ns, "127.0.0.1:0")
	// Nobody accepts: once the backlog is full, SYNs get no answer.
	raw, _ := l.SyscallConn()
	_ = raw.Control(func(fd uintptr) { _ = unix.Listen(int(fd), 0) })
	addr := netip.MustParseAddrPort(l.Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	for {
		c, err := ns.dial(ctx, addr)
		if err == nil {
			defer c.Close()
			continue
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		break
	}
}

// A door's listeners are there before the loopback interface is, and are reached
// once it is up; their ports are none that a program is given.
func TestListenBeforeLoopback(t *testing.T) {
	pid := inNewNetns(t, false)
	ns, err := openNetns(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	l4, l6, err := ns.listen()
	if err != nil || l6 == nil {
		t.Fatal(l6, err)
	}
	defer l4.Close()
	defer l6.Close()
	for _, l := range []*net.TCPListener{l4, l6} {
		addr := l.Addr().(*net.TCPAddr).AddrPort()
		if p := addr.Port(); p < firstDoorPort || p > lastDoorPort {
			t.Errorf("port %d", p)
		}
		if c, err := ns.dial(t.Context(), addr); err == nil {
			c.Close()
			t.Errorf("%s can be reached while the interface is down", addr)
		}
	}
	if out, err := exec.Command("nsenter", "-n", "-t", fmt.Sprint(pid), "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	for _, l := range []*net.TCPListener{l4, l6} {
		c, err := ns.dial(t.Context(), l.Addr().(*net.TCPAddr).AddrPort())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// A program that is called dockerd, and never ends its answer, is not listened to
// for longer than a dockerd needs.
func TestEndlessAnswer(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	var said atomic.Int64
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Api-Version", "1.45")
		if r.URL.Path == "/_ping" {
			return
		}
		_, _ = io.WriteString(w, `{"status":"`)
		for b := bytes.Repeat([]byte("a"), 1<<20); said.Load() < 1<<30; said.Add(1 << 20) {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	rt := &runtimeProc{process: process{pid: os.Getpid()}, kind: &kind{name: "dockerd", sockets: []string{sock}}}
	if err := askDocker(t.Context(), rt, "198.18.116.1/weir/probe:x"); err == nil || said.Load() > 4*maxAnswers {
		t.Errorf("%d bytes, %v", said.Load(), err)
	}
	if said.Load() == 0 {
		t.Error("it wasn't asked")
	}
}

// Who takes all the ports that doors have doesn't keep an agent from starting.
func TestListenWhereAllIsTaken(t *testing.T) {
	ns, err := openNetns(inNewNetns(t, true))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	for port := firstDoorPort; port <= lastDoorPort; port++ {
		listenIn(t, ns, fmt.Sprintf("127.0.0.1:%d", port))
		listenIn(t, ns, fmt.Sprintf("[::1]:%d", port))
	}
	l4, l6, err := ns.listen()
	if err != nil || l6 == nil {
		t.Fatal(l6, err)
	}
	l4.Close()
	l6.Close()
}

func TestSecondAgentIsRefused(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	left := filepath.Join(dir, pidFile) // by one that was killed, when others could read it
	if err := os.WriteFile(left, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	first := &Agent{conf: Config{RunDir: dir}}
	if err := first.lockRunDir(); err != nil {
		t.Fatal(err)
	}
	defer first.pidFile.Close()
	if info, err := os.Stat(left); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("another user could hold the lock: %v, %v", info.Mode(), err)
	}
	err := (&Agent{conf: Config{RunDir: dir}}).lockRunDir()
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("the second one: %v", err)
	}
}

func TestRegistries(t *testing.T) {
	dir := t.TempDir()
	ca, err := trust.OpenCA(filepath.Join(dir, "ca"), []string{"a.test"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	pem := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(pem, ca.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "registries")
	write := func(content string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# ours\nlisted.a.test # for now\n\n")
	var rs registries
	if err := rs.load([]string{"Plain.test", "own.test:5000=" + pem}, file); err != nil {
		t.Fatal(err)
	}
	if rs.roots("plain.test") != nil || rs.roots("own.test:5000") == nil || rs.roots("own.test") != nil {
		t.Error("the wrong registry has a CA of its own")
	}
	known := func(want string) {
		t.Helper()
		var got []string
		for _, k := range rs.hosts.All()[len(registry.WellKnown):] {
			got = append(got, k.Host)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("known are %q, want %q", got, want)
		}
	}
	known("plain.test own.test:5000 listed.a.test")
	// A changed file counts at once, as far as the CA may speak.
	write("new.a.test\nelse.test\n")
	rs.reload(func(host string) bool {
		return ca.Permits(host) || host == "plain.test" || host == "own.test" || slices.ContainsFunc(registry.WellKnown, func(k registry.Known) bool { return k.Host == host })
	}, slog.Default())
	known("plain.test own.test:5000 new.a.test else.test")
	if got := rs.waiting(); len(got) != 1 || got[0] != "else.test" {
		t.Errorf("%q wait for a restart", got)
	}
	// One that makes no sense doesn't.
	write("a/b\n")
	rs.reload(ca.Permits, slog.Default())
	os.Remove(file)
	rs.reload(ca.Permits, slog.Default())
	known("plain.test own.test:5000 new.a.test else.test")

	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "=" + pem, "x.test=" + filepath.Join(dir, "none"), "x.test=" + empty} {
		var rs registries
		if err := rs.load([]string{bad}, ""); err == nil || strings.Contains(err.Error(), "\n") || !utf8.ValidString(err.Error()) {
			t.Errorf("--registry %q: %v", bad, err)
		}
	}
}

// The descriptors of many doors' namespaces are given back.
func TestDoorsGiveBack(t *testing.T) {
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	pid := inNewNetns(t, true)
	before := 0
	for i := range 100 {
		if i == 1 { // the runtime has its own descriptors by now
			before = count()
		}
		ns, err := openNetns(pid)
		if err != nil {
			t.Fatal(err)
		}
		l4, l6, err := ns.listen()
		if err != nil {
			t.Fatal(err)
		}
		l4.Close()
		l6.Close()
		ns.Close()
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// A process's connections are counted by the port at the other side.
func TestConnections(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	count := func() int {
		n, err := connections(os.Getpid(), []uint16{1, port})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := count(); n != 0 {
		t.Errorf("%d connections before there is one", n)
	}
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if n := count(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	c.Close()
	if n := count(); n != 0 {
		t.Errorf("%d connections after it was closed", n)
	}
	for _, line := range []string{"", "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
		"0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1", "0: a b c d e f g h i"} {
		if _, _, ok := parseConnection(line); ok {
			t.Errorf("%q is taken for a connection", line)
		}
	}
}
