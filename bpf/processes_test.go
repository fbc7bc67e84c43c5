// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

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
	if seen, err := s.k.Track(p.pid(), ModeProbe); !seen || err != nil {
		t.Errorf("it isn't tracked, or can't be: %v", err)
	}
	p.redirected("tcp4", "203.0.113.9:443") // as before
	if err := s.k.Forget(p.pid()); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp4", "203.0.113.9:443")
	if seen, err := s.k.Track(p.pid(), ModeRedirect); seen || err != nil {
		t.Errorf("it is still tracked, or can't be: %v", err)
	}
	p.redirected("tcp4", "203.0.113.9:443")
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
	if err := s.k.Remode(p.pid(), ModeProbe); err != nil {
		t.Fatal(err)
	}
	p.direct("tcp4", "203.0.113.9:443")
	p.redirected("tcp4", probe1.String()+":443")
	p.redirected("tcp4", probe2.String()+":443")
	if err := s.k.Remode(p.pid(), ModeRedirect); err != nil {
		t.Fatal(err)
	}
	if o := p.redirected("tcp4", "203.0.113.9:443"); o.Mode != ModeRedirect {
		t.Errorf("%+v", o)
	}
	q := s.start("dockerd", true)
	if err := s.k.Remode(q.pid(), ModeRedirect); err != nil {
		t.Fatal(err)
	}
	q.direct("tcp4", "203.0.113.9:8443")
	if s.k.Early(q.pid()) {
		t.Error("early although it is not new any more")
	}
}

// What has another process pull for it counts from its exec on, whatever is done with
// the event of that.
func TestGuests(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:443")
	p, other := s.start("dockerd", true), s.start("dockerd", true)
	for who, mode := range map[*proc]Mode{p: ModeLent, other: ModeRedirect} {
		if err := s.k.Remode(who.pid(), mode); err != nil {
			t.Fatal(err)
		}
	}
	lent := func(yes bool) {
		t.Helper()
		if yes {
			p.redirected("tcp4", "203.0.113.9:443")
		} else {
			p.direct("tcp4", "203.0.113.9:443")
		}
		p.redirected("tcp4", probe1.String()+":443")
		other.redirected("tcp4", "203.0.113.9:443")
	}
	lent(true)
	for range 2 { // with one that becomes another program, and one that ends
		s.start("nerdctl", false) // elsewhere
		lent(true)
		guest := s.start("nerdctl", true)
		lent(false)
		second := s.start("nerdctl", true)
		fmt.Fprintln(guest.in, "exec")
		s.event(guest.pid(), Exit)
		lent(false)
		second.end()
		lent(true)
	}
	for _, n := range []int{2, 1} {
		if err := s.k.SeededGuests(n); err != nil {
			t.Fatal(err)
		}
		lent(false)
	}
	if err := s.k.SeededGuests(0); err != nil {
		t.Fatal(err)
	}
	lent(true)
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
