// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"testing"
)

func TestHosts(t *testing.T) {
	h := NewHosts("Registry.Example.COM:443", "10.0.0.1:5000")
	for host, want := range map[string]bool{
		"registry-1.docker.io": true, "ghcr.io": true, "x.ghcr.io": false, "europe-docker.pkg.dev": true, "pkg.dev.evil.test": false,
		"evilpkg.dev": false, "registry.example.com": true, "10.0.0.1:5000": true, "10.0.0.1": false, "auth.docker.io": false,
	} {
		if _, got := h.Find(Canonical(host)); got != want {
			t.Errorf("%s: %v", host, got)
		}
	}
	if (Upstream{Host: "index.docker.io"}).ID() != DockerHub || (Upstream{Host: "ghcr.io"}).ID() != "ghcr.io" {
		t.Error("Docker Hub has two identities, or others have its")
	}
	for in, want := range map[string]string{"GHCR.io": "ghcr.io", "ghcr.io.": "ghcr.io", "a:443": "a", "a:5000": "a:5000", "[::1]:443": "::1", "[::1]": "::1", "": ""} {
		if got := Canonical(in); got != want {
			t.Errorf("Canonical(%q) = %q, want %q", in, got, want)
		}
	}
}
