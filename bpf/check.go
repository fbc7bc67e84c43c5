// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// CgroupRoot returns where cgroup2 is mounted: the mount of its root, where
// there is one, since in a container there may also be one of a part.
func CgroupRoot() (string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return "", err
	}
	found := ""
	for _, m := range mounts {
		if found == "" || m.Root == "/" {
			found = m.Mountpoint
		}
		if m.Root == "/" {
			break
		}
	}
	if found == "" {
		return "", errors.New("no cgroup2 file system is mounted; mount it with: mount -t cgroup2 none /sys/fs/cgroup/unified")
	}
	return found, nil
}

func openCgroup(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("the cgroup %s doesn't exist; name a cgroup2 directory with --cgroup", dir)
		}
		return nil, fmt.Errorf("opening the cgroup: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		f.Close()
		return nil, fmt.Errorf("%s is not a cgroup2 directory; name one with --cgroup, below %s", dir, cgroupHint())
	}
	return f, nil
}

func cgroupHint() string {
	if root, err := CgroupRoot(); err == nil {
		return root
	}
	return "a cgroup2 mount (mount -t cgroup2 none /sys/fs/cgroup/unified)"
}

// attached returns the names of the programs, other than weir's, that are run for
// a cgroup at an attach point: its own, and those above.
func attached(cgroup *os.File, to ebpf.AttachType) (names []string) {
	all, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: to, QueryFlags: unix.BPF_F_QUERY_EFFECTIVE})
	if err != nil {
		return nil
	}
	for _, a := range all.Programs {
		p, err := ebpf.NewProgramFromID(a.ID)
		if err != nil {
			continue
		}
		if info, err := p.Info(); err == nil && !strings.HasPrefix(info.Name, "weir_") {
			names = append(names, info.Name)
		}
		p.Close()
	}
	return names
}

// Others returns the names of programs, other than weir's, that decide
// where processes of a cgroup connect to.
func Others(cgroup string) (names []string, err error) {
	dir, err := openCgroup(cgroup)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	for _, to := range []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect} {
		names = append(names, attached(dir, to)...)
	}
	return names, nil
}

// Check tries out whether the kernel side can work on this machine, below a
// cgroup2 directory, without any effect on it. Each error says what is missing
// and what to do.
func Check(cgroup string) (problems []error) {
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		problems = append(problems, errors.New("the kernel has no BTF type information (/sys/kernel/btf/vmlinux); use one with CONFIG_DEBUG_INFO_BTF"))
	}
	dir, err := openCgroup(cgroup)
	if err != nil {
		return append(problems, err)
	}
	defer dir.Close()
	k, err := load(Options{})
	if err != nil {
		return append(problems, err)
	}
	defer k.Close()
	// With no process tracked, attached programs do nothing.
	if err := k.attach(dir); err != nil {
		problems = append(problems, err)
	}
	return problems
}
