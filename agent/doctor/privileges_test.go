// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"testing"
)

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
