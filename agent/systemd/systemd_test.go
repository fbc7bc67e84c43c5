// SPDX-License-Identifier: Apache-2.0

package systemd

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestUnitOf(t *testing.T) {
	for cgroups, want := range map[string]string{
		"0::/system.slice/containerd.service\n":                                       "containerd.service",
		"0::/../../system.slice/docker.service\n":                                     "docker.service", // from a cgroup namespace
		"12:cpu:/x.service\n1:name=systemd:/system.slice/crio.service\n0::/\n":        "crio.service",
		"0::/system.slice/containerd.service/kubepods-pod1.slice\n":                   "",
		"0::/kubepods.slice/kubepods-besteffort.slice/cri-containerd-0123.scope\n":    "",
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/docker.service\n": "docker.service", // another one of that name: not its main process
		"3:cpu:/system.slice/a.service\nnot a line\n":                                 "",
		"": "",
	} {
		if got := unitOf(cgroups); got != want {
			t.Errorf("%q is in %q, want %q", cgroups, got, want)
		}
	}
}

// The node's systemctl runs in the node's root file system.
func TestRunInRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("run it as root")
	}
	out, err := Manager{"/proc/self/root"}.Run(t.Context(), "--version")
	if err != nil || !strings.HasPrefix(string(out), "systemd ") {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := (Manager{"/proc/self/root"}).Run(t.Context(), "no-such-verb"); err == nil || !strings.Contains(err.Error(), "no-such-verb") {
		t.Error(err)
	}
	if _, err := (Manager{t.TempDir()}).Run(t.Context(), "--version"); err == nil {
		t.Error("a root without systemctl has one")
	}
}

func TestParseUnit(t *testing.T) {
	s, main := parseUnit("containerd.service", "MainPID=42\nKillMode=process\nRequiredBy=\nBoundBy=docker.service\nConsistsOf=a.service docker.service\n")
	if s.Name != "containerd.service" || main != 42 || !s.KeepsOthers || !slices.Equal(s.Along, []string{"a.service", "docker.service"}) {
		t.Errorf("%+v, %d", s, main)
	}
	if s, main := parseUnit("x.service", "MainPID=0\nKillMode=control-group\nRequiredBy=\n"); main != 0 || s.KeepsOthers || len(s.Along) > 0 {
		t.Errorf("%+v, %d", s, main)
	}
}
