// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"slices"
	"testing"
)

func TestLeaked(t *testing.T) {
	secrets := []string{"guess", "wonderland", "7c616.4a1f0b2c3d", "aaaa.4a1f0b2c3d"}
	for log, want := range map[string][]string{
		"":                               nil,
		"nothing to see in 4a1f0b2c3d":   nil,
		"a guess":                        {"guess"},
		"wonderland":                     {"wonderland"},
		"token=7c616.4a1f0b2c3d, user=x": {"7c616.4a1f0b2c3d"},
	} {
		if got := leaked(log, secrets); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", log, got, want)
		}
	}
}
