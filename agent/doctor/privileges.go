// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	"weir/bpf"
)

// needed are the capabilities that the agent can't do without: capabilities(7).
var needed = []struct {
	bit          uint
	name, reason string
}{
	{unix.CAP_SYS_ADMIN, "SYS_ADMIN", "loading eBPF programs and entering network namespaces"},
	{unix.CAP_NET_ADMIN, "NET_ADMIN", "attaching the programs to connections"},
	{unix.CAP_SYS_PTRACE, "SYS_PTRACE", "reaching the runtimes' files through /proc"},
	{unix.CAP_DAC_OVERRIDE, "DAC_OVERRIDE", "putting the certificate into containers whoever owns their files"},
	{unix.CAP_FOWNER, "FOWNER", "replacing the certificate there"},
}

func (d *doctor) capabilities() {
	var status procfs.ProcStatus
	self, err := procfs.Self()
	if err == nil {
		status, err = self.NewStatus()
	}
	if err != nil {
		d.warn("privileges", "it can't be seen which capabilities there are", "mount /proc")
		return
	}
	missing := 0
	for _, c := range needed {
		if status.CapEff&(1<<c.bit) == 0 {
			missing++
			d.problem("privileges", "the capability "+c.name+" is missing: it is for "+c.reason, "add it: docker run --cap-add="+c.name+", or capabilities.add in the pod")
		}
	}
	if missing == 0 {
		d.ok("privileges")
	}
}

// confinement looks at what keeps even root from other processes' files and
// from eBPF.
func (d *doctor) confinement() {
	read := func(path string) string {
		b, _ := os.ReadFile(path) // not there: the kernel has no such module
		return strings.TrimRight(string(b), "\x00\n")
	}
	label := read("/proc/self/attr/current")
	if f := appArmor(label); f != nil && read("/sys/module/apparmor/parameters/enabled") == "Y" {
		d.findings = append(d.findings, *f)
	}
	if f := seLinux(label); f != nil && read("/sys/fs/selinux/enforce") == "1" {
		d.findings = append(d.findings, *f)
	}
	if f := lockdown(read("/sys/kernel/security/lockdown")); f != nil {
		d.findings = append(d.findings, *f)
	}
}

// appArmor checks a process's profile, "NAME (MODE)".
func appArmor(label string) *Finding {
	profile, mode, _ := strings.Cut(label, " ")
	if mode != "(enforce)" || profile == "unconfined" {
		return nil
	}
	return &Finding{What: "AppArmor", Problem: "the profile " + profile + " confines weir, and denies it other processes' files",
		Step: "docker run --security-opt apparmor=unconfined, or appArmorProfile: {type: Unconfined} in the pod"}
}

// seLinux checks a process's context, USER:ROLE:TYPE:LEVEL.
func seLinux(label string) *Finding {
	fields := strings.Split(label, ":")
	if len(fields) < 4 || !strings.HasPrefix(fields[2], "container_") {
		return nil
	}
	return &Finding{What: "SELinux", Problem: "the type " + fields[2] + " confines weir, and denies it other containers' files",
		Step: "docker run --security-opt label=type:spc_t, or seLinuxOptions: {type: spc_t} in the pod"}
}

// lockdown checks the kernel's mode, as in "none integrity [confidentiality]":
// kernel_lockdown(7). The last one denies programs the kernel's memory, which
// those that follow processes read.
func lockdown(modes string) *Finding {
	if !strings.Contains(modes, "[confidentiality]") {
		return nil
	}
	return &Finding{What: "kernel lockdown", Problem: "the kernel is locked down for confidentiality, which denies eBPF programs what they have to read",
		Step: "boot with lockdown=integrity or without it"}
}

// cgroup examines the kernel side. It returns false when there is no cgroup to
// go on with.
func (d *doctor) cgroup() bool {
	whole := d.conf.Cgroup == ""
	if whole {
		var err error
		if d.conf.Cgroup, err = bpf.CgroupRoot(); err != nil {
			d.problem("cgroup2", err.Error(), "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")
			return false
		}
	}
	if whole {
		// A root has no type: cgroup-v2.rst, "Core Interface Files".
		if _, err := os.Stat(filepath.Join(d.conf.Cgroup, "cgroup.type")); err == nil {
			d.problem("cgroup2", d.conf.Cgroup+" is that of a container, in which there are none of the node's runtimes",
				"run the container with docker run --cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup, or mount the node's /sys/fs/cgroup in the pod")
		}
	}
	if errs := bpf.Check(d.conf.Cgroup); len(errs) > 0 {
		for _, err := range errs {
			d.problem("kernel", err.Error(), "")
		}
	} else {
		d.ok("kernel: eBPF on " + d.conf.Cgroup)
	}
	if others, err := bpf.Others(d.conf.Cgroup); err == nil && len(others) > 0 {
		d.warn("other eBPF programs", strings.Join(others, ", ")+" decide about connections too, as Cilium's in place of kube-proxy do",
			"nothing to do: what they send elsewhere is passed through")
	}
	return true
}

func (d *doctor) processes() {
	what := "the node's processes are visible"
	if _, err := os.Stat("/proc/1"); err != nil {
		d.problem(what, err.Error(), "mount /proc")
	} else if inContainerPIDs() {
		d.problem(what, "weir sees only its own container's processes", "run the container with the host's PID namespace (docker run --pid=host, or hostPID: true)")
	} else {
		d.ok(what)
	}
}

// inContainerPIDs says whether the process is in a PID namespace other than the
// node's. The node's first one has this inode on every kernel
// (PROC_PID_INIT_INO in include/linux/proc_ns.h).
func inContainerPIDs() bool {
	const initial = 0xEFFFFFFC
	var st unix.Stat_t
	return unix.Stat("/proc/self/ns/pid", &st) == nil && st.Ino != initial
}
