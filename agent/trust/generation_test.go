// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
)

// roots is what a program that has read a generation's certificate trusts.
func roots(ca *CA) *x509.CertPool {
	p := x509.NewCertPool()
	p.AppendCertsFromPEM(ca.PEM())
	return p
}

// A name that the CA is made for later is trusted by those who have read a
// certificate since, and by no others; also when it was given up and came back.
func TestGenerations(t *testing.T) {
	dir := t.TempDir()
	ca := openCA(t, dir, []string{"ghcr.io", "gcr.io"}, testProbes)
	first := roots(ca)
	since := func(host string, want uint64) {
		t.Helper()
		got, ok := ca.Since(host)
		if got != want || ok != (want > 0) || ok && got > ca.Generation() {
			t.Errorf("%s is of generation %d, want %d", host, got, want)
		}
	}
	set := func(hosts ...string) {
		t.Helper()
		if err := ca.SetHosts(hosts); err != nil {
			t.Fatal(err)
		}
	}
	since("ghcr.io", 1)
	since("eu.gcr.io:443", 1)
	since("registry.corp.example:8443", 0)
	if _, err := ca.Leaf("registry.corp.example"); err == nil {
		t.Error("it speaks for a host that it isn't made for")
	}

	set("gcr.io", "ghcr.io", "registry.corp.example:8443")
	second := roots(ca)
	since("ghcr.io", 1)
	since("registry.corp.example:8443", 2)
	if err := ca.SetHosts([]string{"registry.corp.example", "ghcr.io", "gcr.io"}); err != nil || ca.Generation() != 2 {
		t.Errorf("the same names made generation %d (%v)", ca.Generation(), err)
	}
	leaf, err := ca.Leaf("registry.corp.example")
	if err != nil {
		t.Fatal(err)
	}
	accepts := func(c *x509.Certificate, p *x509.CertPool) bool {
		_, err := c.Verify(x509.VerifyOptions{Roots: p})
		return err == nil
	}
	if accepts(leaf.Leaf, first) || !accepts(leaf.Leaf, second) {
		t.Error("the wrong generation is trusted for it")
	}

	set("ghcr.io", "gcr.io")
	since("registry.corp.example", 0)
	set("ghcr.io", "gcr.io", "registry.corp.example", "10.1.2.3:5000")
	since("registry.corp.example", 4) // who has read the third does not trust it
	since("10.1.2.3", 4)
	if ca = openCA(t, dir, []string{"ghcr.io", "gcr.io", "registry.corp.example", "10.1.2.3"}, testProbes); ca.Generation() != 4 {
		t.Errorf("opened again it is of generation %d", ca.Generation())
	}
	since("registry.corp.example", 4)
	since("ghcr.io", 1)
	if ca.Oldest() != 1 {
		t.Errorf("the oldest is %d", ca.Oldest())
	}

	// A probe is accepted by who trusts all that it is for.
	for _, tt := range []struct {
		after, upTo   uint64
		by            *x509.CertPool
		want, present bool
	}{
		{0, 4, first, false, true}, {0, 4, second, false, true}, // that one lacks 10.1.2.3
		{0, 1, first, true, true}, {1, 1, first, true, true}, {1, 4, first, false, true},
	} {
		leaf, err := ca.ProbeLeaf(testProbes[0], tt.after, tt.upTo)
		if err != nil {
			t.Fatal(err)
		}
		if accepts(leaf.Leaf, tt.by) != tt.want || accepts(leaf.Leaf, roots(ca)) != tt.present {
			t.Errorf("from %d to %d: %q", tt.after, tt.upTo, leaf.Leaf.DNSNames)
		}
	}

	// What was written for another certificate says nothing of this one.
	if err := os.WriteFile(filepath.Join(dir, "generation.json"), []byte(`{"generation":7,"certificate":"x","since":{"ghcr.io":1}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if ca = openCA(t, dir, []string{"ghcr.io", "gcr.io", "registry.corp.example", "10.1.2.3"}, testProbes); ca.Generation() != 8 {
		t.Errorf("it is of generation %d", ca.Generation())
	}
	since("ghcr.io", 8)
}
