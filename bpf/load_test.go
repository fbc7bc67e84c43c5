// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
	"bytes"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

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

// Processes are followed once all connections are: one that has started is not to have
// connected unseen. The end of one is seen before its start is.
func TestConnectionsFirst(t *testing.T) {
	s := newStage(t)
	var order []ebpf.ProgramID
	at := make(map[link.ID]ebpf.ProgramID)
	for _, l := range s.k.links {
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		at[info.ID] = info.Program // links are numbered as they are made
	}
	for _, id := range slices.Sorted(maps.Keys(at)) {
		order = append(order, at[id])
	}
	for i, p := range []*ebpf.Program{s.k.objs.WeirConnect4, s.k.objs.WeirConnect6, s.k.objs.WeirExit, s.k.objs.WeirFork, s.k.objs.WeirExec} {
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		if id, _ := info.ID(); order[len(order)-5+i] != id {
			t.Errorf("%s is not attached as the last but %d", info.Name, 4-i)
		}
	}
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
