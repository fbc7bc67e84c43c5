// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"testing"
	"time"

	"weir/agent/internal/agenttest"
	"weir/agent/procfs"
)

// The ports of the proxies that a runtime is told of are among those of its pulls.
func TestProxyPorts(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	cmd.Env = []string{"HTTPS_PROXY=http://ci:secret@proxy.corp:3128", "http_proxy=proxy.corp:8080", "ALL_PROXY=socks5://proxy.corp", "NO_PROXY=10.0.0.0/8:99", "HTTP_PROXY=", "no=http://x:7"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	rt := &Runtime{Process: procfs.Process{PID: cmd.Process.Pid}, kind: kindOf("containerd")}
	hasEnvironment(t, rt.PID)
	if got := proxyPorts(rt); !slices.Equal(got, []uint16{3128, 8080, 1080}) {
		t.Errorf("%v", got)
	}
	rt = fakeDocker(t, `{"HttpsProxy":"http://xxxxx:xxxxx@proxy.corp:3130","HttpProxy":"http://proxy.corp"}`)
	if got := proxyPorts(rt); !slices.Contains(got, 3130) || !slices.Contains(got, 80) {
		t.Errorf("%v", got)
	}
}

// hasEnvironment waits until a process that was started has its environment: that is a
// moment after exec.
func hasEnvironment(t *testing.T, pid int) {
	t.Helper()
	agenttest.Until(t, "its environment", func() bool {
		return slices.ContainsFunc(procfs.Strings(pid, "environ"), func(kv string) bool { return kv != "" })
	})
}

// A runtime that pulls through a proxy is not quiet.
func TestNotQuietBehindProxy(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	// bash has its own connections.
	cmd := exec.Command("bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/127.0.0.1/%d; read <&3", port))
	cmd.Env = []string{fmt.Sprintf("HTTPS_PROXY=http://127.0.0.1:%d", port)}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	pulling, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), quietTime+2*time.Second)
	defer cancel()
	rt := &Runtime{Process: procfs.Process{PID: cmd.Process.Pid}, kind: kindOf("containerd"), ctx: ctx}
	if new(Runtimes).quiet(rt, []uint16{443}) {
		t.Error("it is quiet while it pulls")
	}
	pulling.Close()
}
