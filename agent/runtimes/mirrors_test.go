// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"testing"
)

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
