// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range Check(root) {
		t.Errorf("%+v", p)
	}
	for _, dir := range []string{"/sys/fs", "/nowhere"} {
		if p := Check(dir); len(p) != 1 || !strings.Contains(p[0].Error(), "--cgroup") {
			t.Errorf("%s: %v", dir, p)
		}
	}
}
