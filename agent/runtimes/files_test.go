// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"weir/agent/internal/agenttest"
	"weir/agent/procfs"
	"weir/agent/trust"
	"weir/proxy/registry"
)

// silentFS starts a process in whose root file system dir is a file system in
// user space that gives no answer until the process ends.
func silentFS(t *testing.T, dir string) (pid int, end func()) {
	t.Helper()
	agenttest.Root(t)
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
func TestReadsAreBounded(t *testing.T) {
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
	rs := &Runtimes{o: Options{CA: ca, Log: slog.New(slog.DiscardHandler)}, state: state, reading: semaphore.NewWeighted(2)}
	pid, end := silentFS(t, filepath.Join(certsD, "ghcr.io"))
	rt := &Runtime{Process: procfs.Process{PID: pid}, kind: kindOf("containerd"), reach: ReachIntercepted, how: trustByCertsD, settled: make(chan struct{}),
		basis: basis{certsD: &trust.CertsD{Dirs: []string{certsD}, HostsFiles: true}}}
	rt.settle()

	if err := rs.except(rt, "ghcr.io")["ghcr.io"]; !errors.Is(err, errNoAnswer) {
		t.Errorf("%v", err)
	}
	if rs.Trusts(rt, "ghcr.io") {
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
	agenttest.Until(t, "looks that have ended holding no place", func() bool { return rs.reading.TryAcquire(2) })
	// So many at once, of all runtimes, and no more.
	if _, err := bounded(rs, rt, func() (int, error) { return 1, nil }); !errors.Is(err, errNoAnswer) {
		t.Errorf("%v", err)
	}
}

// Looks at one runtime's files wait for each other, and not longer than for one.
func TestReadsTakeTurns(t *testing.T) {
	var l fileAccess
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
