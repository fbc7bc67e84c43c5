// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
)

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
	if err := s.k.Remode(p.pid(), ModeRedirect); err != nil {
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
		if err != nil || got.Direct || got.Dst != netip.MustParseAddrPort(addr) || got.PID != p.pid() || got.Netns != s.cookie || string(got.Data) != what {
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
	if err := s.k.Remode(p.pid(), ModeProbe); err != nil {
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
		if err != nil || !got.Direct || got.Dst != netip.MustParseAddrPort(want.addr) || got.PID != p.pid() || got.Comm != "some-puller-of-" || string(got.Data) != want.what {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	tracked := s.start("dockerd", true)
	if err := s.k.Remode(tracked.pid(), ModeRedirect); err != nil {
		t.Fatal(err)
	}
	tracked.redirected("tcp4", "203.0.113.9:443")
	tracked.redirected("tcp6", "[2001:db8::9]:443")
}

// So is what a process says that is passed through, at any port; it can be redirected
// afterwards.
func TestPassedThroughIsLookedAt(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:443")
	s.serve("tcp4", "203.0.113.9:8443")
	p := s.start("dockerd", true)
	if err := s.k.Remode(p.pid(), ModeProbe); err != nil {
		t.Fatal(err)
	}
	for addr, direct := range map[string]bool{"203.0.113.9:443": true, "203.0.113.9:8443": false} {
		if got := p.do("say", "tcp4", addr, "hello"); got != addr {
			t.Errorf("%s: %s", addr, got)
		}
		if d := <-s.direct; d != addr {
			t.Errorf("%s: it went to %s", addr, d)
		}
		got, err := s.k.NextSaid()
		if err != nil || got.Direct != direct || got.Dst != netip.MustParseAddrPort(addr) || got.PID != p.pid() || string(got.Data) != "hello" {
			t.Errorf("%+v, %v, want %s", got, err, addr)
		}
	}
	if err := s.k.Remode(p.pid(), ModeRedirect); err != nil {
		t.Fatal(err)
	}
	p.redirected("tcp4", "203.0.113.9:443")
}
