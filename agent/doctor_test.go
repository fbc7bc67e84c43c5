// SPDX-License-Identifier: Apache-2.0

package agent

import "testing"

// What confines the process is told from what doesn't.
func TestConfinement(t *testing.T) {
	for _, c := range []struct {
		judge  func(string) *Finding
		in     string
		wanted bool
	}{
		{appArmor, "docker-default (enforce)", true},
		{appArmor, "cri-containerd.apparmor.d (enforce)", true},
		{appArmor, "unconfined", false},
		{appArmor, "docker-default (complain)", false},
		{appArmor, "", false},
		{seLinux, "system_u:system_r:container_t:s0:c5,c7", true},
		{seLinux, "system_u:system_r:spc_t:s0", false},
		{seLinux, "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023", false},
		{seLinux, "unconfined", false},
		{lockdown, "none integrity [confidentiality]", true},
		{lockdown, "none [integrity] confidentiality", false},
		{lockdown, "[none] integrity confidentiality", false},
		{lockdown, "", false},
	} {
		f := c.judge(c.in)
		if (f != nil) != c.wanted {
			t.Errorf("%q: %+v", c.in, f)
		}
		if f != nil && (f.Problem == "" || f.Step == "") {
			t.Errorf("%q: no problem or no step: %+v", c.in, f)
		}
	}
}

func TestMirrors(t *testing.T) {
	for toml, want := range map[string]int{
		"server = \"https://docker.io\"\n[host.\"https://mirror.example.com\"]\n  capabilities = [\"pull\"]\n": 1,
		"# [host.\"https://mirror.example.com\"]\n":                                                            0,
		"[host]\n  [host.\"http://a:5000\"]\n  [host.\"http://b\".header]\n":                                   1,
	} {
		if got := len(hostRE.FindAllString(toml, -1)); got != want {
			t.Errorf("%q has %d mirrors, want %d", toml, got, want)
		}
	}
}
