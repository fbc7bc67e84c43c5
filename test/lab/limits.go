// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// LimitMemory gives the agent's process only so many bytes more than it has.
func (a *Agent) LimitMemory(bytes int64) {
	a.node.t.Helper()
	a.limit("memory", "memory.limit_in_bytes", fmt.Sprint(bytes), "memory.max", fmt.Sprint(bytes))
}

// LimitWrites bounds the bytes per second that the agent writes to the disk
// that a directory of its node is on.
func (a *Agent) LimitWrites(dir string, bytes int64) {
	a.node.t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(a.node.root(dir), &st); err != nil {
		a.node.t.Fatal(err)
	}
	disk := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	a.limit("blkio", "blkio.throttle.write_bps_device", fmt.Sprint(disk, " ", bytes), "io.max", fmt.Sprint(disk, " wbps=", bytes))
}

// limit puts the agent's process into a cgroup with a limit, whose file and
// value depend on which version of cgroups has the controller.
func (a *Agent) limit(controller, file1, value1, file2, value2 string) {
	t := a.node.t
	t.Helper()
	name := fmt.Sprintf("weir-lab-%d-%s-%d", os.Getpid(), controller, processes.Add(1))
	dir, file, value := filepath.Join("/sys/fs/cgroup", controller, name), file1, value1
	if _, err := os.Stat(filepath.Dir(dir)); err != nil {
		root := cgroup2(t)
		dir, file, value = filepath.Join(root, name), file2, value2
		enable := "+" + strings.Replace(controller, "blkio", "io", 1)
		if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte(enable), 0); err != nil {
			t.Fatalf("enabling %s for cgroups: %v", enable, err)
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p := a.Process
	t.Cleanup(func() {
		p.Kill()
		if err := removeCgroup(dir); err != nil {
			t.Error(err)
		}
	})
	for _, f := range [][2]string{{file, value}, {"cgroup.procs", fmt.Sprint(p.PID())}} {
		if err := os.WriteFile(filepath.Join(dir, f[0]), []byte(f[1]), 0); err != nil {
			t.Fatalf("%s: %v", f[0], err)
		}
	}
}

// LimitDescriptors lets the agent's process open only so many descriptors more.
// What it returns takes the limit away.
func (a *Agent) LimitDescriptors(more int) (lift func()) {
	t := a.node.t
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.PID()))
	if err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Prlimit(a.PID(), unix.RLIMIT_NOFILE, nil, &was); err != nil {
		t.Fatal(err)
	}
	now := unix.Rlimit{Cur: uint64(len(fds) + more), Max: was.Max}
	if err := unix.Prlimit(a.PID(), unix.RLIMIT_NOFILE, &now, nil); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := unix.Prlimit(a.PID(), unix.RLIMIT_NOFILE, &was, nil); err != nil {
			t.Error(err)
		}
	}
}

// FillMap fills one of the kernel side's maps, by its name, with entries that
// mean nothing. What it returns takes them out.
func (a *Agent) FillMap(name string) (empty func()) {
	t := a.node.t
	t.Helper()
	m := a.kernelMap(name)
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	var filled [][]byte
	for n := 0; ; n++ {
		for i := range key {
			key[i] = 0xfe // no process and no namespace has such a number
		}
		key[0], key[1] = byte(n), byte(n>>8)
		if err := m.Update(key, value, ebpf.UpdateNoExist); err != nil {
			if len(filled) == 0 {
				t.Fatalf("filling the map %s: %v", name, err)
			}
			break
		}
		filled = append(filled, append([]byte(nil), key...))
	}
	return func() {
		for _, k := range filled {
			_ = m.Delete(k)
		}
		m.Close()
	}
}

// kernelMap opens one of the maps that the agent has open.
func (a *Agent) kernelMap(name string) *ebpf.Map {
	t := a.node.t
	t.Helper()
	for _, id := range kernelIDs(a.PID(), "map_id") {
		m, err := ebpf.NewMapFromID(ebpf.MapID(id))
		if err != nil {
			t.Fatal(err)
		}
		if info, err := m.Info(); err == nil && info.Name == name {
			return m
		}
		m.Close()
	}
	t.Fatalf("the agent has no map %s", name)
	return nil
}
