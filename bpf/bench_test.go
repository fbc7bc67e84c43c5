// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

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
	connects(b, func(s *stage, pid int) string { _ = s.k.Remode(pid, ModeRedirect); return "203.0.113.9:443" })
}

// BenchmarkConnectLeftAlone is a tracked program's, at a redirected port where no
// registry is, and BenchmarkConnectElsewhere the same at another port, of which it was
// seen what is said.
func BenchmarkConnectLeftAlone(b *testing.B) {
	connects(b, func(s *stage, pid int) string {
		_ = s.k.Remode(pid, ModeRedirect)
		_ = s.k.Leave(s.cookie, netip.MustParseAddrPort("203.0.113.9:443"), time.Hour)
		return "203.0.113.9:443"
	})
}

func BenchmarkConnectElsewhere(b *testing.B) {
	connects(b, func(s *stage, pid int) string {
		_ = s.k.Remode(pid, ModeRedirect)
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
