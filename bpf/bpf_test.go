// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"testing"
)

func TestLoad(t *testing.T) {
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range Check(root) {
		t.Errorf("%+v", p)
	}
}
