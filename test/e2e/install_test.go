// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"weir/test/lab"
)

// atBoot has systemd start the service at boot.
const atBoot = "/etc/systemd/system/multi-user.target.wants/weir.service"

// touched are the names of files that the README says weir makes.
func touched(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(b), "## What it touches\n")
	section, _, ends := strings.Cut(section, "\n## ")
	if !ok || !ends {
		t.Fatal("the README doesn't say what weir touches")
	}
	return section
}

// One command makes weir a service, the same one is the upgrade, in which no
// pull fails, and another takes it off. git has the word on /etc.
func TestInstall(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Systemd()
	node.WriteFile("/etc/weir/weir.env", "# the user's\nWEIR_CGROUP="+node.Cgroup()+"\nWEIR_LOG_LEVEL=\"debug\"\n")
	node.WriteFile("/etc/containerd/config.toml", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc/containerd/certs.d\"\n")
	containerd, docker := node.Containerd(), node.Docker()
	docker.Stop() // it has made its own files in /etc
	git := func(args ...string) string {
		t.Helper()
		return node.Run(append([]string{"git", "-C", "/etc", "-c", "user.name=test", "-c", "user.email=test@example.com"}, args...)...)
	}
	git("init", "-q")
	git("add", "--all")
	git("commit", "-q", "-m", "before")

	out := node.Run(lab.Weir(t), "install")
	for _, want := range []string{"is installed, and runs", "Found containerd", "weir status"} {
		if !strings.Contains(out, want) {
			t.Errorf("weir install doesn't say %q:\n%s", want, out)
		}
	}
	node.Run("test", "-L", atBoot)
	service := func() string { return strings.TrimSpace(node.Run("systemctl", "show", "-P", "MainPID", "weir")) }
	first := service()
	docker.Start()
	pull := func() {
		t.Helper()
		docker.Pull(flyway)
		docker.Remove(flyway)
	}
	pull()
	w.forget()
	pull()
	w.nothingFetched(t)
	if out := node.Run("/usr/local/bin/weir", "install"); !strings.Contains(out, "already") || service() != first {
		t.Errorf("the same version once more, the service is process %s, was %s:\n%s", service(), first, out)
	}
	documented := touched(t)
	for _, line := range strings.Split(strings.TrimSpace(git("status", "--porcelain", "--untracked-files=all")), "\n") {
		file, isNew := strings.CutPrefix(line, "?? ")
		if !isNew || !regexp.MustCompile("`[^`]*\\b"+regexp.QuoteMeta(filepath.Base(file))+"`").MatchString(documented) {
			t.Errorf("in /etc, %q is not what the README names", line)
		}
	}

	// The next version, while a pull stands in the middle and others begin.
	newer := "/var/lib/home/weir"
	node.Run("sh", "-ec", "cp "+lab.Weir(t)+" "+newer+" && echo newer >> "+newer)
	big, half, stopping := w.held()
	pulled, upgraded := make(chan error, 1), make(chan error, 1)
	go func() { pulled <- docker.TryPull("acme/big:1") }()
	<-half
	go func() {
		var err error
		out, err = node.Output(newer, "install")
		upgraded <- err
	}()
	if err := lab.Eventually(nil, func(context.Context) error {
		if state := node.Run("systemctl", "show", "-P", "ActiveState", "weir"); strings.TrimSpace(state) != "deactivating" {
			return fmt.Errorf("the service is %s", state)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	pull() // the old one ends
	close(stopping)
	for upgrading := true; upgrading; pull() {
		select {
		case err := <-upgraded:
			if upgrading = false; err != nil {
				t.Fatal(err)
			}
		default:
		}
	}
	if err := <-pulled; err != nil {
		t.Errorf("the pull that ran: %v", err)
	}
	docker.Same("acme/big:1", big)
	if !strings.Contains(out, "is installed, and runs") || service() == first {
		t.Errorf("the upgrade says\n%s\nand the service is process %s, was %s", out, service(), first)
	}
	if node.Run("cmp", newer, "/usr/local/bin/weir") != "" {
		t.Error("another binary is installed")
	}

	out = node.Run("/usr/local/bin/weir", "uninstall")
	if !strings.Contains(out, "weir is gone") {
		t.Error(out)
	}
	if out := git("status", "--porcelain", "--untracked-files=all"); out != "" {
		t.Errorf("left in /etc:\n%s", out)
	}
	for _, path := range []string{"/usr/local/bin/weir", "/var/lib/weir", "/run/weir", filepath.Dir(atBoot)} {
		if _, err := node.File(path); !os.IsNotExist(err) {
			t.Errorf("%s is left (%v)", path, err)
		}
	}
	if out, err := node.Output("systemctl", "status", "weir"); err == nil || !strings.Contains(out, "could not be found") {
		t.Errorf("the service is left: %v\n%s", err, out)
	}
	pull()
	containerd.Pull(flyway)
	node.Run(lab.Weir(t), "uninstall") // again: nothing to do
}

// A containerd and a dockerd that systemd runs, that have verified certificates before
// weir came, and read none anew: they are restarted where an operator has asked for that,
// once each, and left alone where not. The doctor says what would be done.
func TestRestartRuntimes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.Systemd()
	containerd, docker := node.Containerd(), node.Docker()
	docker.Stop()
	containerd.Stop()
	node.WriteFile("/etc/systemd/system/containerd.service", "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nKillMode=process\nDelegate=yes\nExecStart="+lab.Debian(t, "/usr/bin/containerd", "containerd")+"\n")
	node.WriteFile("/etc/systemd/system/docker.service", "[Unit]\nDefaultDependencies=no\nWants=containerd.service\n[Service]\nType=notify\nKillMode=process\nExecStart="+
		lab.Debian(t, "/usr/sbin/dockerd", "docker.io")+" --bridge=none --iptables=false --ip6tables=false --containerd=/run/containerd/containerd.sock\n")
	node.Run("systemctl", "daemon-reload")
	node.Run("systemctl", "start", "containerd", "docker")
	mainOf := func(name string) int {
		t.Helper()
		pid, err := strconv.Atoi(strings.TrimSpace(node.Run("systemctl", "show", "-P", "MainPID", name)))
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}
	pull := func() {
		t.Helper()
		containerd.Pull(renovate)
		containerd.Remove(renovate, w.renovate)
		docker.Pull(renovate)
		docker.Remove(renovate)
	}
	pull()
	service := func() [2]int { return [2]int{mainOf("containerd"), mainOf("docker")} }
	was := service()
	agent := node.Agent()
	for _, pid := range was {
		if rt := agent.Runtime(pid); rt.Reach != "passthrough" || !rt.RestartHelps {
			t.Errorf("%+v", rt)
		}
	}
	out, _ := node.Output(lab.Weir(t), "doctor", "--cgroup", node.Cgroup())
	for _, want := range []string{"would restart containerd.service once", "would restart docker.service once"} {
		if !strings.Contains(out, want) {
			t.Errorf("the doctor doesn't say %q:\n%s", want, out)
		}
	}
	if now := service(); now != was {
		t.Fatal("something was restarted, and nobody has asked for that")
	}
	agent.Stop()
	agent = node.Agent("--restart-runtimes")
	if err := lab.Eventually(agent.Ended(), func(context.Context) error {
		s := agent.Status()
		done := make(map[string]bool)
		for _, r := range s.Restarts {
			done[r.Service] = r.Done && r.Reason != ""
		}
		if len(s.Restarts) != 2 || !done["containerd.service"] || !done["docker.service"] {
			return fmt.Errorf("restarted were %+v; %+v", s.Restarts, s.Runtimes)
		}
		return nil
	}); err != nil {
		t.Fatalf("%v\n%s", err, agent.Log(4000))
	}
	now := service()
	for i, pid := range now {
		if rt := agent.Runtime(pid); pid == was[i] || rt.Reach != "intercepted" {
			t.Errorf("process %d, before %d: %+v", pid, was[i], rt)
		}
	}
	pull()
	w.forget()
	pull()
	w.nothingFetched(t)
	if out := node.Run(lab.Weir(t), "status"); !strings.Contains(out, "RESTARTED") {
		t.Error(out)
	}
	// Once.
	agent.Stop()
	agent.Start()
	for _, pid := range now {
		agent.Runtime(pid)
	}
	pull()
	if pids := service(); pids != now || len(agent.Status().Restarts) != 2 {
		t.Errorf("processes %v, before %v: %+v", pids, now, agent.Status().Restarts)
	}
}
