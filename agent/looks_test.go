// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"weir/agent/trust"
	"weir/proxy/registry"
)

// silentFS starts a process in whose root file system dir is a file system in
// user space that gives no answer until the process ends.
func silentFS(t *testing.T, dir string) (pid int, end func()) {
	t.Helper()
	needRoot(t)
	cmd := exec.Command("sh", "-ec", `exec 3<>/dev/fuse
mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 silent "$0"
echo mounted
read line`, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "mounted\n" {
		t.Fatalf("%q, %v", line, err)
	}
	end = func() { in.Close(); _, _ = io.Copy(io.Discard, out); _ = cmd.Wait() }
	t.Cleanup(end)
	return cmd.Process.Pid, end
}

// A file system below a certs.d that gives no answer holds one look, and those
// who come meanwhile are told at once. When it answers, all goes on.
func TestLooksAreBounded(t *testing.T) {
	dir := t.TempDir()
	certsD := filepath.Join(dir, "certs.d")
	if err := os.MkdirAll(filepath.Join(certsD, "ghcr.io"), 0o755); err != nil {
		t.Fatal(err)
	}
	ca, err := trust.OpenCA(filepath.Join(dir, "ca"), []string{"ghcr.io"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	state := openState(t.TempDir(), "x", slog.New(slog.DiscardHandler))
	a := &Agent{ca: ca, log: slog.New(slog.DiscardHandler)}
	rs := &runtimes{a: a, state: state, looking: semaphore.NewWeighted(2)}
	pid, end := silentFS(t, filepath.Join(certsD, "ghcr.io"))
	rt := &runtimeProc{process: process{pid: pid}, kind: kindOf("containerd"), reach: ReachIntercepted, how: trustByCertsD, settled: make(chan struct{}),
		rests: ground{certsD: &trust.CertsD{Dirs: []string{certsD}, HostsFiles: true}}}
	rt.settle()

	if err := rs.except(rt, "ghcr.io")["ghcr.io"]; !errors.Is(err, errNoAnswer) {
		t.Errorf("%v", err)
	}
	if rs.trusts(rt, "ghcr.io") {
		t.Error("what can't be looked at is taken for good")
	}
	known := registry.Known{Host: "ghcr.io"}
	if _, err := bounded(rs, rt, func() (any, error) { return settings(rt, known, "ghcr.io") }); !errors.Is(err, errNoAnswer) {
		t.Errorf("%v", err)
	}
	rt.files.mu.Lock()
	taken := rt.files.taken
	rt.files.mu.Unlock()
	if taken == nil {
		t.Fatal("nothing hangs, so this test shows nothing")
	}
	end()
	<-taken
	if _, err := bounded(rs, rt, func() (int, error) { return 1, nil }); err != nil {
		t.Errorf("it answers again, but %v", err)
	}
	if !rs.looking.TryAcquire(2) {
		t.Error("a look that has ended holds its place")
	}
	// So many at once, of all runtimes, and no more.
	if _, err := bounded(rs, rt, func() (int, error) { return 1, nil }); !errors.Is(err, errNoAnswer) {
		t.Errorf("%v", err)
	}
}

// Looks at one runtime's files wait for each other, and not longer than for one.
func TestLooksTakeTurns(t *testing.T) {
	var l looks
	never := make(chan time.Time)
	if !l.begin(never) {
		t.Fatal("the first has to wait")
	}
	passed := make(chan time.Time, 1)
	passed <- time.Time{}
	if l.begin(passed) {
		t.Error("two look at once")
	}
	turn := make(chan bool)
	go func() { turn <- l.begin(never) }()
	l.end()
	if !<-turn {
		t.Error("the second isn't let in after the first")
	}
	l.late()
	if l.begin(never) {
		t.Error("one is let in, or waits, while another is stuck")
	}
	l.end()
	if !l.begin(never) {
		t.Error("it isn't free again")
	}
}

func TestOwnRoots(t *testing.T) {
	for command, want := range map[string]string{
		"oras pull ghcr.io/a/b:1":                           "",
		"oras pull --ca-file x ghcr.io/a/b:1":               "--ca-file",
		"oras cp --from-ca-file=x ghcr.io/a/b:1 ghcr.io/c":  "--from-ca-file",
		"oras cp --to-ca-file x ghcr.io/a/b:1 ghcr.io/c":    "--to-ca-file",
		"helm pull --kube-ca-file x oci://ghcr.io/a":        "",
		"helm push a.tgz oci://ghcr.io/a --ca-file=x":       "--ca-file",
		"cosign save --registry-cacert x ghcr.io/a":         "--registry-cacert",
		"ctr images pull --local --tlscacert=x ghcr.io/a:1": "--tlscacert",
		"skopeo copy --src-cert-dir x docker://a dir:b":     "",
		"crane pull --ca-file x":                            "",
	} {
		args := strings.Fields(command)
		if got := ownRoots(kindOf(args[0]), args); got != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
}

func TestProgramRefusals(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	dir := t.TempDir()
	s := openState(dir, "cert1", log)
	p := programOf(os.Getpid(), "/")
	if p.Path == "" || p.Size == 0 || p != programOf(os.Getpid(), "/") || p == programOf(os.Getpid(), "") || programOf(1<<30, "/") != (program{}) {
		t.Errorf("%+v", p)
	}
	s.programRefuses(program{}, "ghcr.io")
	if s.programRefused(program{}, "ghcr.io") {
		t.Error("a program that nobody could look at counts for all such")
	}
	for range 2 {
		s.programRefuses(p, "ghcr.io")
	}
	s = openState(dir, "cert1", log)
	other := p
	other.Size++
	if !s.programRefused(p, "ghcr.io") || s.programRefused(p, "quay.io") || s.programRefused(other, "ghcr.io") || len(s.s.Refusals) != 1 {
		t.Errorf("%+v", s.s.Refusals)
	}
	if openState(dir, "cert2", log).programRefused(p, "ghcr.io") {
		t.Error("what was refused was another certificate")
	}
	for i := range maxRefusals {
		s.s.Refusals = append(s.s.Refusals, refusal{p, fmt.Sprint(i)})
	}
	s.programRefuses(p, "new")
	if len(s.s.Refusals) != maxRefusals || s.programRefused(p, "ghcr.io") || !s.programRefused(p, "new") {
		t.Errorf("%d refusals are kept", len(s.s.Refusals))
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
