// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"testing"

	"weir/proxy/registry"
)

func TestTexts(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 5 << 30: "5.00 GiB", 12345 << 20: "12.1 GiB", 1 << 62: "4.00 EiB"} {
		if got := BytesText(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
	for want, n := range map[string][2]int64{"–": {0, 0}, "0 %": {0, 3}, "33 %": {1, 3}, "<1 %": {1, 1000}, ">99 %": {999, 1000}, "99 %": {99, 100}, "100 %": {3, 3}} {
		if got := PercentText(n[0], n[1]); got != want {
			t.Errorf("%v is %q, want %q", n, got, want)
		}
	}
	for s, want := range map[float64]string{0: "–", 0.01: "<0.1 s", 0.25: "0.2 s", 99: "99.0 s", 754.6: "12m34s"} {
		if got := SecondsText(s); got != want {
			t.Errorf("%v is %q, want %q", s, got, want)
		}
	}
	for want, p := range map[string]registry.Pull{"": {UpstreamSeconds: 2, BytesFromUpstream: 9}, "about 2.0 s": {UpstreamSeconds: 2, BytesFromPeers: 1, BytesFromUpstream: 9}} {
		if got := AloneText(p); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	for want, p := range map[string]registry.Pull{
		"ghcr.io/a/b":                     {Registry: "ghcr.io", Repository: "a/b"},
		"ghcr.io/a/b:1.2":                 {Registry: "ghcr.io", Repository: "a/b", Reference: "1.2"},
		"ghcr.io/a/b@sha256:0123456789ab": {Registry: "ghcr.io", Repository: "a/b", Reference: "sha256:0123456789abcdef"},
	} {
		if got := PullName(p); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
