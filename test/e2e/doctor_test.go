// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"syscall"
	"testing"

	"weir/test/lab"
)

// What the doctor finds about real runtimes, registries and agents; what can be
// had without them has its test beside the command.
func TestDoctor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.OwnCA("registry.corp.test")
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc/containerd/certs.d\"\n")
	node.WriteFile("/etc/containerd/certs.d/docker.io/hosts.toml", "[host.\"https://mirror.corp.test\"]\n")
	node.WriteFile("/etc/docker/daemon.json", `{"registry-mirrors": ["https://hub.corp.test"]}`)
	containerd := node.Containerd()
	docker := node.Docker()
	node.Box().Docker("--registry-mirror=https://flag.corp.test")
	doctor := func(args ...string) string {
		out, _ := node.Output(append([]string{lab.Weir(t), "doctor", "--cgroup", node.Cgroup(), "--registry", "registry.corp.test"}, args...)...)
		return out
	}
	docker.Pull(flyway) // it has read its roots
	out := doctor()
	for _, want := range []string{
		"ok    registry ghcr.io", "registries: not reachable from here: quay.io",
		"registry registry.corp.test: its certificate is not of a CA that this machine trusts", "--registry registry.corp.test=CA.pem",
		"it has mirrors configured, which it asks first and weir doesn't know: https://mirror.corp.test",
		"https://hub.corp.test", "https://flag.corp.test",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("without an agent, %q is not in\n%s", want, out)
		}
	}
	agent := node.Agent()
	agent.Runtime(containerd.PID())
	agent.Runtime(docker.PID())
	out = doctor()
	for _, want := range []string{"the agent is running", "it is passed through: it was running before", "restart dockerd"} {
		if !strings.Contains(out, want) {
			t.Errorf("with an agent, %q is not in\n%s", want, out)
		}
	}
	agent.Signal(syscall.SIGSTOP)
	out = doctor()
	agent.Signal(syscall.SIGCONT)
	if !strings.Contains(out, "runs but doesn't answer at 127.0.0.1:5050") {
		t.Errorf("of an agent that hangs:\n%s", out)
	}
}
