// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

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
