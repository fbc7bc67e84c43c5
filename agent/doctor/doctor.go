// SPDX-License-Identifier: Apache-2.0

// Package doctor looks for what would keep weir from working on a node.
package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	"weir/agent/admin"
	weirproc "weir/agent/procfs"
	"weir/agent/registries"
	"weir/agent/runtimes"
	"weir/agent/service"
	"weir/agent/systemd"
	"weir/bpf"
	"weir/p2p"
	"weir/proxy/registry"
)

// Finding is one thing that weir needs on a node, and how it stands.
type Finding struct {
	What    string `json:"what"`
	Problem string `json:"problem,omitempty"` // empty when all is well
	Step    string `json:"step,omitempty"`    // what mends it
	// Warning says that weir works in spite of the problem, only less well.
	Warning bool `json:"warning,omitempty"`
}

// Config is what an agent is run with: see the agent's Config.
type Config struct {
	DataDir, RunDir, Cgroup, Admin string
	Registries                     []string
	RegistryFile                   string
	PeerListen, SwarmKey           string
}

// Examine examines the node, the most important things first. It changes
// nothing.
func Examine(ctx context.Context, conf Config) []Finding {
	d := &doctor{conf: conf}
	if os.Geteuid() != 0 {
		d.problem("privileges", "not root", "run it with sudo, or in a container as the README has it")
		return d.findings // the rest would only say the same
	}
	d.capabilities()
	d.confinement()
	if !d.cgroup() {
		return d.findings
	}
	d.processes()
	d.directories()
	d.clock()
	d.agent(ctx)
	d.peers()
	d.reachable(ctx)
	d.runtimes(ctx)
	return d.findings
}

// doctor collects findings.
type doctor struct {
	conf     Config
	findings []Finding
	hangs    bool         // the disk of --data-dir
	running  bool         // an agent answers at --admin
	status   admin.Status // of it
}

func (d *doctor) ok(what string) { d.findings = append(d.findings, Finding{What: what}) }

func (d *doctor) problem(what, problem, step string) {
	d.findings = append(d.findings, Finding{What: what, Problem: problem, Step: step})
}

func (d *doctor) warn(what, problem, step string) {
	d.findings = append(d.findings, Finding{What: what, Problem: problem, Step: step, Warning: true})
}

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

// diskTime bounds how long a disk is waited for.
const diskTime = 2 * time.Second

// within returns what f returns, and whether it did so in time. A system call on a
// disk that hangs can't be ended: it is left behind.
func within[T any](f func() T) (v T, ok bool) {
	done := make(chan T, 1)
	go func() { done <- f() }()
	select {
	case v = <-done:
		return v, true
	case <-time.After(diskTime):
		return v, false
	}
}

func (d *doctor) directories() {
	for _, dir := range []struct{ flag, path string }{{"--data-dir", d.conf.DataDir}, {"--run-dir", d.conf.RunDir}} {
		what, store := dir.flag+" "+dir.path, dir.flag == "--data-dir"
		found, ok := within(func() *Finding { return directory(dir.path, store) })
		switch {
		case !ok && store:
			d.hangs = true
			d.warn(what, "its disk does not answer: blobs are served and pushed through without being kept",
				"look at the disk and the kernel's log (dmesg), or choose another directory with --data-dir")
		case !ok:
			d.problem(what, "its disk does not answer", "look at the disk and the kernel's log (dmesg), or choose another directory with "+dir.flag)
		case found == nil:
			d.ok(what)
		default:
			found.What = what
			if found.Step == "" {
				found.Step = "choose a writable directory with " + dir.flag
			}
			d.findings = append(d.findings, *found)
		}
	}
}

// directory says what is wrong with a directory, of the store or not, if anything.
func directory(path string, store bool) *Finding {
	if err := writable(path); err != nil {
		return &Finding{Problem: err.Error()}
	}
	if store {
		if problem, step := disk(path); problem != "" {
			return &Finding{Problem: problem, Step: step, Warning: true}
		}
	}
	return nil
}

// disk says what is wrong with the file system of the store.
func disk(dir string) (problem, step string) {
	const other = "choose another directory with --data-dir"
	var st unix.Statfs_t
	for unix.Statfs(dir, &st) != nil {
		if dir == filepath.Dir(dir) {
			return "", ""
		}
		dir = filepath.Dir(dir)
	}
	switch st.Type {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC:
		return "it is on a network's file system, from where blobs come no faster than from a registry nearby", other
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "it is in a container's own file system, and goes with it", "mount a directory of the node there: docker run -v /var/lib/weir:/var/lib/weir"
	}
	if st.Bavail < st.Blocks/20 {
		return fmt.Sprintf("only %d MiB are free; weir keeps nothing when less than 5%% of a file system is", int64(st.Bavail)*st.Bsize>>20),
			"free some space, or " + other
	}
	if st.Files > 0 && st.Ffree < st.Files/100 {
		return fmt.Sprintf("only %d inodes are free, of %d", st.Ffree, st.Files), "remove files there, or " + other
	}
	return "", ""
}

// clock compares the clock with the CA's time: it may have been wrong when the
// CA was made, or is now.
func (d *doctor) clock() {
	if d.hangs {
		return
	}
	b, err := os.ReadFile(filepath.Join(d.conf.DataDir, "ca", "ca.crt"))
	if err != nil {
		return // weir hasn't run yet
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return // the agent says what to do
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if now := time.Now(); err == nil && (now.Before(cert.NotBefore) || now.After(cert.NotAfter)) {
		d.warn("clock", fmt.Sprintf("it is %s, but weir's CA is valid from %s to %s: registries are passed through",
			now.Format(time.RFC3339), cert.NotBefore.Format(time.RFC3339), cert.NotAfter.Format(time.RFC3339)),
			"set the clock, with NTP; if it is right, restart the agent, which makes another CA, and then the runtimes")
	}
}

// agent looks for a running agent.
func (d *doctor) agent(ctx context.Context) {
	what := "--admin " + d.conf.Admin
	d.status, d.running = askStatus(ctx, d.conf.Admin)
	holder, held := service.Holder(d.conf.RunDir)
	switch {
	case d.running:
		d.ok(fmt.Sprintf("the agent is running: weir %s, process %d", d.status.Version, d.status.PID))
		if d.status.Kernel.StaleHeartbeat > 0 {
			d.warn("the agent's heartbeat", fmt.Sprintf("%d connections went direct because it was late", d.status.Kernel.StaleHeartbeat),
				"see whether the node is short of processor time")
		}
		if since := d.status.Store.Hangs; !since.IsZero() && !d.hangs {
			d.warn("--data-dir "+d.status.DataDir, "its disk does not answer since "+since.Local().Format(time.DateTime)+": blobs are served and pushed through without being kept",
				"look at the disk and the kernel's log (dmesg); weir keeps blobs again as soon as it answers")
		}
	case held:
		d.problem("the agent", fmt.Sprintf("process %d runs but doesn't answer at %s: connections go direct meanwhile", holder, d.conf.Admin),
			fmt.Sprintf("give the agent's --admin, if it has another; or else kill -9 %d, and look at its log", holder))
	default:
		l, err := net.Listen("tcp", d.conf.Admin)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			d.problem(what, "the address is in use by something that is not weir", "stop it, or choose another address with --admin")
		case err != nil:
			d.problem(what, err.Error(), "choose another address with --admin")
		default:
			l.Close()
			d.ok(what)
		}
	}
	if pids := agents(); len(pids) > 1 {
		d.warn("the agent", fmt.Sprintf("there are %d in this network namespace (processes %s)", len(pids), strings.Trim(fmt.Sprint(pids), "[]")),
			"one is enough: stop the others, as the container or the service that they are")
	}
}

// agents are the processes that run weir's agent in this network namespace.
func agents() (pids []int) {
	own, _ := weirproc.Netns(os.Getpid())
	all, _ := os.ReadDir("/proc")
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		args := weirproc.Strings(pid, "cmdline")
		if len(args) < 2 || filepath.Base(args[0]) != "weir" || args[1] != "agent" {
			continue
		}
		if ns, err := weirproc.Netns(pid); err == nil && ns == own {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (d *doctor) peers() {
	if d.conf.SwarmKey == "" {
		return
	}
	what := "--swarm-key " + d.conf.SwarmKey
	if _, err := p2p.ReadSwarmKey(d.conf.SwarmKey); err != nil {
		d.problem(what, err.Error(), "")
	} else if st, err := os.Stat(d.conf.SwarmKey); err == nil && st.Mode()&0o077 != 0 {
		d.warn(what, fmt.Sprintf("others than root may read it (mode %04o)", st.Mode().Perm()), "chmod 600 "+d.conf.SwarmKey)
	} else {
		d.ok(what)
	}
	if d.running {
		return
	}
	what = "--peer-listen " + d.conf.PeerListen
	if l, err := net.Listen("tcp", d.conf.PeerListen); err != nil {
		d.problem(what, err.Error(), "stop what listens there, or choose another address with --peer-listen")
	} else {
		l.Close()
		d.ok(what)
	}
}

// reachTime bounds how long registries are waited for.
const reachTime = 5 * time.Second

// reachable tries whether registries can be reached from here, and verified: the
// ones that most images come from, and those that were added.
func (d *doctor) reachable(ctx context.Context) {
	var rs registries.List
	if err := rs.Load(d.conf.Registries, d.conf.RegistryFile); err != nil {
		d.problem("registries", err.Error(), "")
		return
	}
	hosts := []string{registry.DockerHub, "ghcr.io", "quay.io", "registry.k8s.io"}
	for _, k := range rs.Hosts.All() {
		if !slices.Contains(registry.WellKnown, k) {
			hosts = append(hosts, k.Host)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, reachTime)
	defer cancel()
	errs := make([]error, len(hosts))
	var wg sync.WaitGroup
	for i, host := range hosts {
		wg.Go(func() { errs[i] = greet(ctx, host, rs.Roots(host)) })
	}
	wg.Wait()
	var unreachable []string
	var why error
	for i, host := range hosts {
		var untrusted x509.UnknownAuthorityError
		var invalid x509.CertificateInvalidError
		switch err := errs[i]; {
		case err == nil:
			d.ok("registry " + host)
		case errors.As(err, &untrusted):
			d.warn("registry "+host, "its certificate is not of a CA that this machine trusts: its connections are passed through",
				"give weir the CA: --registry "+host+"=CA.pem")
		case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
			d.warn("registry "+host, "its certificate is not valid now: "+invalid.Error(), "look at the clock")
		default:
			unreachable, why = append(unreachable, host), err
		}
	}
	if len(unreachable) > 0 {
		d.warn("registries", "not reachable from here: "+strings.Join(unreachable, ", ")+" ("+why.Error()+")",
			"see whether the runtimes reach them; if not either, it is not for weir to mend")
	}
}

// greet shakes hands with a registry.
func greet(ctx context.Context, host string, roots *x509.CertPool) error {
	name, addr := host, net.JoinHostPort(host, "443")
	if h, _, err := net.SplitHostPort(host); err == nil {
		name, addr = h, host
	}
	c, err := (&tls.Dialer{Config: &tls.Config{ServerName: name, RootCAs: roots}}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return c.Close()
}

// Runtimes looks at each runtime's own settings and, with an agent running, at
// how it is treated.
func (d *doctor) runtimes(ctx context.Context) {
	all, err := runtimes.Running(d.conf.Cgroup)
	if err != nil {
		d.problem("runtimes", err.Error(), "choose the cgroup2 directory that the runtimes are in with --cgroup")
		return
	}
	for _, rt := range all {
		what, found := fmt.Sprintf("%s (process %d)", rt.Name(), rt.PID), len(d.findings)
		if slices.ContainsFunc(weirproc.Strings(rt.PID, "environ"), proxied) {
			d.warn(what, "the proxy in its environment is spoken to with TLS, so its pulls can't be seen and are passed through",
				"name the proxy as http://, if it speaks that too, exempt its registries with NO_PROXY, or leave it so")
		}
		if mirrors := rt.Mirrors(); len(mirrors) > 0 {
			d.warn(what, "it has mirrors configured, which it asks first and weir doesn't know: "+strings.Join(mirrors, ", "),
				"take them out of its configuration to have weir in their place, or leave it so")
		}
		if i := slices.IndexFunc(d.status.Runtimes, func(r runtimes.Status) bool { return r.PID == rt.PID && r.Reach == runtimes.ReachPassthrough }); i >= 0 {
			d.warn(what, "it is passed through: "+d.status.Runtimes[i].Reason, d.status.Runtimes[i].Step)
			if d.status.Runtimes[i].RestartHelps {
				d.ok(what + ": " + d.restart(ctx, rt))
			}
		}
		if len(d.findings) == found {
			d.ok(what)
		}
	}
	if len(all) == 0 {
		d.warn("runtimes", "no container runtime is running in "+d.conf.Cgroup, "nothing to do: weir will see it when it starts")
	}
}

// restart says what an agent with --restart-runtimes would do about a runtime that has
// to be restarted.
func (d *doctor) restart(ctx context.Context, rt *runtimes.Runtime) string {
	manager, err := systemd.OfNode()
	var s systemd.Service
	if err == nil {
		s, err = runtimes.NewRestarter(manager, filepath.Join(d.conf.DataDir, service.RestartsFile), slog.New(slog.DiscardHandler)).Plan(ctx, rt)
	}
	if err != nil {
		return "with --restart-runtimes it would not be restarted: " + err.Error()
	}
	return "with --restart-runtimes, weir would restart " + s.Name + " once, when no pull of it runs"
}

// proxied says whether a variable of the environment names a proxy that TLS is spoken
// to.
func proxied(kv string) bool {
	name, value, _ := strings.Cut(kv, "=")
	return strings.EqualFold(name, "HTTPS_PROXY") && strings.HasPrefix(strings.ToLower(value), "https://")
}

// inContainerPIDs says whether the process is in a PID namespace other than the
// node's. The node's first one has this inode on every kernel
// (PROC_PID_INIT_INO in include/linux/proc_ns.h).
func inContainerPIDs() bool {
	const initial = 0xEFFFFFFC
	var st unix.Stat_t
	return unix.Stat("/proc/self/ns/pid", &st) == nil && st.Ino != initial
}

// writable says whether files can be made in dir or, if it isn't there, in the
// next directory above it that is.
func writable(dir string) error {
	for {
		st, err := os.Stat(dir)
		if errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
			dir = filepath.Dir(dir)
			continue
		}
		if err != nil {
			return err
		}
		if !st.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
		if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
			return fmt.Errorf("%s can't be written to: %w", dir, err)
		}
		return nil
	}
}

// askStatus asks the agent at an admin address.
func askStatus(ctx context.Context, admin string) (s admin.Status, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/api/status", nil)
	if err != nil {
		return s, false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return s, false
	}
	defer resp.Body.Close()
	ok = resp.StatusCode == http.StatusOK && resp.Header.Get("Content-Type") == "application/json"
	return s, ok && json.NewDecoder(resp.Body).Decode(&s) == nil
}
