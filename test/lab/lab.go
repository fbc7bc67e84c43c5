// SPDX-License-Identifier: Apache-2.0

// Package lab makes nodes and an internet in a box, so that a test can tell a
// story about real container runtimes, real registries and the real agent:
//
//	in := lab.NewInternet(t)
//	hub := in.DockerHub()
//	img := hub.Push("flyway/flyway:10.11.0", lab.Image{Layers: []int{3 << 20, 1 << 20}})
//	node := in.Node()
//	agent := node.Agent()
//	docker := node.Docker()
//	docker.Pull("flyway/flyway:10.11.0")
//
// The internet is a network namespace with registries behind TLS at the names
// that they have in the world. A node is a network and a mount namespace with
// an /etc, /run and /var/lib of its own, behind a link to the internet, and a
// cgroup for all its processes. Whatever a test makes ends with it: namespaces
// live as long as their first process, and that has the test's process as its
// parent-death condition.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// waitTime is how long the lab waits for something that should happen within
// seconds, on a machine that is busy.
const waitTime = time.Minute

// spawner starts processes that are killed when this process ends: that is
// bound to the thread that starts them, so it is always the same one.
var spawner = sync.OnceValue(func() chan func() {
	jobs := make(chan func())
	go func() {
		runtime.LockOSThread()
		for job := range jobs {
			job()
		}
	}()
	return jobs
})

func start(cmd *exec.Cmd) (err error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	done := make(chan struct{})
	spawner() <- func() { err = cmd.Start(); close(done) }
	<-done
	return err
}

// space is a set of namespaces, kept by a process that sleeps.
type space struct {
	t      testing.TB
	name   string
	holder *exec.Cmd
	cgroup *os.File // for the processes inside; nil for none
}

// newSpace makes namespaces and runs a shell script in them to set them up.
// Inside outer, if it isn't nil.
func newSpace(t testing.TB, name string, outer *space, cgroup *os.File, flags uintptr, script string) *space {
	t.Helper()
	s := &space{t: t, name: name, cgroup: cgroup}
	args := []string{"sh", "-ec", script + "\necho ready\nexec sleep infinity"}
	attr := &syscall.SysProcAttr{Cloneflags: flags}
	if outer != nil {
		// Two steps: enter the outer one, and unshare there.
		what := []string{"nsenter", "-t", outer.pid(), "-m", "-n", "unshare"}
		if flags&unix.CLONE_NEWNET != 0 {
			what = append(what, "-n")
		}
		if flags&unix.CLONE_NEWNS != 0 {
			what = append(what, "-m")
		}
		args = append(what, args...)
		attr.Cloneflags = 0
	}
	s.holder = exec.Command(args[0], args[1:]...)
	if cgroup != nil {
		attr.UseCgroupFD, attr.CgroupFD = true, int(cgroup.Fd())
	}
	s.holder.SysProcAttr = attr
	s.holder.Env = cleanEnv()
	out, err := s.holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	s.holder.Stderr = &errs
	if err := start(s.holder); err != nil {
		t.Fatalf("making %s: %v (needs root)", name, err)
	}
	t.Cleanup(func() { _ = s.holder.Process.Kill(); _ = s.holder.Wait() })
	if b, err := io.ReadAll(io.LimitReader(out, 6)); string(b) != "ready\n" {
		_ = s.holder.Process.Kill()
		_ = s.holder.Wait()
		t.Fatalf("setting %s up: %q, %v\n%s", name, b, err, errs.String())
	}
	return s
}

func (s *space) pid() string { return strconv.Itoa(s.holder.Process.Pid) }

// root is the path of a file inside, seen from outside.
func (s *space) root(path string) string { return filepath.Join("/proc", s.pid(), "root", path) }

// cleanEnv is an environment that has nothing of this machine's settings for
// proxies and certificates.
func cleanEnv(more ...string) []string {
	return append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/var/lib/home", "LANG=C.UTF-8"}, more...)
}

// command is a command that will run inside.
func (s *space) command(ctx context.Context, env []string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", s.pid(), "-m", "-n", "--"}, args...)...)
	cmd.Env = cleanEnv(env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if s.cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(s.cgroup.Fd())
	}
	return cmd
}

// Output runs a program inside to its end and returns what it prints.
func (s *space) Output(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*waitTime)
	defer cancel()
	cmd := s.command(ctx, nil, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s in %s: %w\n%s", strings.Join(args, " "), s.name, err, out.String())
	}
	return out.String(), err
}

// Run runs a program inside, which must succeed.
func (s *space) Run(args ...string) string {
	s.t.Helper()
	out, err := s.Output(args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// do runs f on a thread that is in the network namespace.
func (s *space) do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		fd, err := unix.Open("/proc/"+s.pid()+"/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = errors.Join(unix.Setns(fd, unix.CLONE_NEWNET), unix.Close(fd))
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// Listen listens inside.
func (s *space) Listen(network, addr string) (l net.Listener, err error) {
	err = s.do(func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	return l, err
}

// Dial connects from inside.
func (s *space) Dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = s.do(func() error {
		d := net.Dialer{Timeout: 10 * time.Second, FallbackDelay: -1}
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Process is a program that runs inside until it is stopped.
type Process struct {
	t    testing.TB
	name string
	cmd  *exec.Cmd
	log  *os.File
	done chan struct{}
	err  error
}

var processes atomic.Int64

// start starts a program inside. Its log is kept for when something fails.
func (s *space) start(name string, env []string, args ...string) *Process {
	s.t.Helper()
	log, err := os.Create(filepath.Join(s.t.TempDir(), fmt.Sprintf("%s-%d.log", name, processes.Add(1))))
	if err != nil {
		s.t.Fatal(err)
	}
	p := &Process{t: s.t, name: name, log: log, done: make(chan struct{})}
	p.cmd = s.command(context.Background(), env, args...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := start(p.cmd); err != nil {
		s.t.Fatalf("starting %s: %v", name, err)
	}
	go func() { p.err = p.cmd.Wait(); close(p.done) }()
	s.t.Cleanup(func() {
		p.Kill()
		if s.t.Failed() {
			s.t.Logf("--- log of %s\n%s", name, p.Log(8<<10))
		}
		log.Close()
	})
	return p
}

// PID is the program's process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Ended is closed when the program has ended.
func (p *Process) Ended() <-chan struct{} { return p.done }

// Log returns the last n bytes of what the program has printed.
func (p *Process) Log(n int) string {
	b, _ := os.ReadFile(p.log.Name())
	return string(b[max(0, len(b)-n):])
}

// Says waits until something is in what the program has printed last.
func (p *Process) Says(text string) {
	p.t.Helper()
	p.until("saying "+strconv.Quote(text), func(context.Context) error {
		if !strings.Contains(p.Log(1<<20), text) {
			return errors.New("it hasn't yet")
		}
		return nil
	})
}

// Signal sends a signal.
func (p *Process) Signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// Kill kills the program and waits for its end.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Stop ends the program with SIGTERM, and kills it when it doesn't listen.
func (p *Process) Stop() {
	p.t.Helper()
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(waitTime):
		p.t.Errorf("%s doesn't end on SIGTERM", p.name)
		p.Kill()
	}
}

// until waits until f succeeds, and fails the test when the program ends or
// waitTime does.
func (p *Process) until(what string, f func(context.Context) error) {
	p.t.Helper()
	if err := Eventually(p.done, f); err != nil {
		p.t.Fatalf("%s: %s: %v\n--- its log\n%s", p.name, what, err, p.Log(4<<10))
	}
}

// Eventually calls f until it succeeds. It gives up, with f's last error, when
// waitTime ends or gone is closed, which may be nil.
func Eventually(gone <-chan struct{}, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), waitTime)
	defer cancel()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-gone:
			return fmt.Errorf("it has ended: %w", err)
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// cgroup2 returns where cgroup2 is mounted.
func cgroup2(t testing.TB) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	t.Fatal("no cgroup2 file system is mounted")
	return ""
}

// newCgroup makes a cgroup, after removing those of earlier tests that were
// killed.
func newCgroup(t testing.TB, name string) *os.File {
	t.Helper()
	root := cgroup2(t)
	for _, dir := range anywhere("weir-lab-*") {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), "weir-lab-"), "-")
		if _, err := os.Stat("/proc/" + pid); err != nil {
			removeCgroup(dir)
		}
	}
	dir := filepath.Join(root, fmt.Sprintf("weir-lab-%d-%s-%d", os.Getpid(), name, processes.Add(1)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal("making a cgroup: ", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		for _, dir := range anywhere(filepath.Base(dir)) {
			if err := Eventually(nil, func(context.Context) error { return removeCgroup(dir) }); err != nil {
				t.Errorf("processes were left in %s: %v", dir, err)
			}
		}
	})
	return f
}

// anywhere finds a cgroup in all hierarchies: where there are some of cgroup v1,
// runc makes a container's in each.
func anywhere(name string) []string {
	v2, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup", name))
	all, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup/*", name))
	return append(all, v2...)
}

// removeCgroup kills what is in a cgroup and those below, and removes them.
func removeCgroup(dir string) error {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append([]string{path}, dirs...)
		}
		return nil
	})
	for _, d := range dirs {
		b, _ := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		for pid := range strings.FieldsSeq(string(b)) {
			if n, err := strconv.Atoi(pid); err == nil && n > 1 {
				_ = syscall.Kill(n, syscall.SIGKILL)
			}
		}
		if err := os.Remove(d); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
