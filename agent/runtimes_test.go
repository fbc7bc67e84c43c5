// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"weir/agent/internal/agenttest"
	"weir/agent/procfs"
	"weir/agent/trust"
	"weir/bpf"
)

func TestConfigPath(t *testing.T) {
	var got []string
	for _, m := range configPathRE.FindAllSubmatch([]byte(`
version = 2
# config_path = "/commented"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
  config_path='/other'
x_config_path = "/no"
`), -1) {
		got = append(got, string(m[1]))
	}
	if !slices.Equal(got, []string{"/etc/containerd/certs.d", "/other"}) {
		t.Errorf("%q", got)
	}
}

func TestExceptions(t *testing.T) {
	why, other := errors.New("a file"), errors.New("another")
	for _, tt := range []struct {
		all  map[string]error
		want []string
	}{
		{map[string]error{"a": nil, "b": nil}, nil},
		{map[string]error{"a": why, "b": nil}, []string{"a"}},
		{map[string]error{"a": why, "b": other}, []string{"a", "b"}},
		{map[string]error{"a": why, "b": why}, []string{"any registry"}},
	} {
		got := exceptions(tt.all)
		var hosts []string
		for h := range got {
			hosts = append(hosts, h)
		}
		slices.Sort(hosts)
		if !slices.Equal(hosts, tt.want) {
			t.Errorf("%v: %v", tt.all, got)
		}
	}
}

// Where a pull was led without the CA it may still be on its way when the
// settings have changed.
func TestLedLingers(t *testing.T) {
	rt := &runtimeProc{rests: ground{certsD: &trust.CertsD{}}}
	if err := rt.lingers("ghcr.io", nil); err != nil {
		t.Error(err)
	}
	if err := rt.lingers("ghcr.io", trust.ErrNoCA); !errors.Is(err, trust.ErrNoCA) {
		t.Error(err)
	}
	if err := rt.lingers("ghcr.io", nil); err != nil {
		t.Error(err)
	}
	_ = rt.lingers("ghcr.io", trust.ErrLeads)
	if err := rt.lingers("ghcr.io", nil); !errors.Is(err, trust.ErrLeads) {
		t.Error(err)
	}
	if err := rt.lingers("quay.io", nil); err != nil {
		t.Error(err)
	}
	rt.led["ghcr.io"] = time.Now().Add(-lingerTime)
	if err := rt.lingers("ghcr.io", nil); err != nil {
		t.Error(err)
	}
	for i := range 2 * maxLed {
		rt.leads(fmt.Sprint(i))
	}
	if len(rt.led) > maxLed {
		t.Errorf("%d are kept", len(rt.led))
	}
}

// What may have read its roots before the CA came isn't taken to trust it.
func TestMayHaveRead(t *testing.T) {
	agenttest.Root(t)
	dir := t.TempDir()
	root, err := trust.OpenRootDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	now := procfs.SinceBoot()
	for _, c := range []struct {
		kind  *kind
		since time.Duration // after its exec
		known bool
		dir   string
		may   bool
	}{
		{kindOf("crane"), time.Second, true, "", false},
		{kindOf("executor"), time.Second, true, "", true},
		{kindOf("executor"), -time.Second, true, "", false},
		{kindOf("executor"), -time.Second, false, "", true},
		{kindOf("skopeo"), time.Second, true, "", false},
		{kindOf("skopeo"), time.Second, true, trust.DockerCertsD + "/example.com", true},
		{kindOf("skopeo"), -time.Second, true, trust.DockerCertsD + "/example.com", false},
	} {
		if c.dir != "" {
			if err := os.MkdirAll(filepath.Join(dir, c.dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		rt := &runtimeProc{kind: c.kind}
		if c.known {
			rt.execed = now - time.Minute
		}
		since := time.Now().Add(c.since - (procfs.SinceBoot() - now) - time.Minute)
		if may := mayHaveRead(rt, root, since); may != c.may {
			t.Errorf("%s, CA %s after its exec (known: %v), settings %q: %v", c.kind.name, c.since, c.known, c.dir, may)
		}
	}
}

// What has ended isn't tracked any more, whatever was still being found out
// about it: the next process of its number isn't it.
func TestNotTrackedAfterEnd(t *testing.T) {
	cgroup := agenttest.Cgroup(t)
	k, err := bpf.Load(bpf.Options{Cgroup: cgroup.Name(), Names: programs()})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	a := &Agent{kernel: k, log: log, ctx: ctx}
	rs := newRuntimes(a, openState(t.TempDir(), "x", log))
	a.runtimes = rs
	bin := filepath.Join(t.TempDir(), "buildkitd")
	if err := os.Symlink("/bin/sleep", bin); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	agenttest.Until(t, "tracking", func() bool { _, ok := k.Mode(pid); return ok })
	p, err := procfs.Read(pid)
	if err != nil {
		t.Fatal(err)
	}
	rt := &runtimeProc{Process: p, kind: kindOf("buildkitd"), settled: make(chan struct{})}
	rt.ctx, rt.cancel = context.WithCancel(ctx)
	rs.all[pid] = rt
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if _, ok := k.Mode(pid); ok {
		t.Fatal("the kernel side didn't forget it")
	}
	// Before the news of its end is read, and after.
	rs.intercept(rt, trustByStart, ground{})
	if m, ok := k.Mode(pid); ok {
		t.Errorf("it is still tracked, as %d", m)
	}
	rs.ended(pid)
	rs.intercept(rt, trustByStart, ground{})
	if rs.state.remembers(rt) != rememberedNothing {
		t.Error("it is remembered")
	}
}

// Blobs are read in place where root of the node keeps them, and nowhere else.
func TestIsNodes(t *testing.T) {
	agenttest.Root(t)
	lasting := trust.LastingRoots()
	one := []syscall.SysProcIDMap{{HostID: 1000, Size: 1}}
	for name, c := range map[string]struct {
		as   syscall.SysProcAttr
		want bool
	}{
		"root":                       {syscall.SysProcAttr{}, true},
		"an ordinary user":           {syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}, false},
		"root in another directory":  {syscall.SysProcAttr{Chroot: "/usr"}, false},
		"root in other mounts":       {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}, false},
		"who is root in a namespace": {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: one, GidMappings: one, Credential: &syscall.Credential{NoSetGroups: true}}, false},
		"root in another network":    {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, true},
	} {
		cmd := &exec.Cmd{Path: "/bin/sleep", Args: []string{"sleep", "60"}, SysProcAttr: &c.as}
		if err := cmd.Start(); err != nil {
			t.Fatal(name, err)
		}
		if got := isNodes(cmd.Process.Pid, lasting); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if isNodes(cmd.Process.Pid, lasting) {
			t.Errorf("%s: and when it has ended", name)
		}
	}
}
