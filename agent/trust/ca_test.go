// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/x509"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

var (
	testHosts  = []string{"docker.io", "registry-1.docker.io", "ghcr.io", "pkg.dev", "registry.test:5000", "192.0.2.7:5000"}
	testProbes = []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")}
)

func newCA(t testing.TB) *CA {
	t.Helper()
	return openCA(t, filepath.Join(t.TempDir(), "ca"), testHosts, testProbes)
}

func openCA(t testing.TB, dir string, hosts []string, probes []netip.Addr) *CA {
	t.Helper()
	ca, err := OpenCA(dir, hosts, probes)
	if err != nil {
		t.Fatalf("OpenCA: %v", err)
	}
	return ca
}

func pool(ca *CA) *x509.CertPool {
	p := x509.NewCertPool()
	p.AppendCertsFromPEM(ca.PEM())
	return p
}

// Each node has a CA of its own, which the others' runtimes don't trust.
func TestEachNodeHasItsOwn(t *testing.T) {
	one, other := newCA(t), newCA(t)
	leaf := signAny(t, one, "ghcr.io")
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool(one), DNSName: "ghcr.io"}); err != nil {
		t.Fatal(err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool(other), DNSName: "ghcr.io"}); err == nil {
		t.Error("another node's CA vouches for it")
	}
	if opensslVerify(t, other, leaf, "-verify_hostname", "ghcr.io") == nil {
		t.Error("to OpenSSL another node's CA vouches for it")
	}
}

func TestReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	first := openCA(t, dir, testHosts, testProbes)
	for name, mode := range map[string]os.FileMode{"": 0o700, "ca.key": 0o600, "ca.crt": 0o644} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != mode {
			t.Errorf("%q has mode %v, want %v", name, fi.Mode().Perm(), mode)
		}
	}
	shuffled := append([]string{"GHCR.io", "ghcr.io:443"}, testHosts...)
	if again := openCA(t, dir, shuffled, testProbes); again.Generation() != first.Generation() {
		t.Error("the same names in another order made a new certificate")
	}

	more := openCA(t, dir, append([]string{"quay.io"}, testHosts...), testProbes)
	if more.Generation() == first.Generation() {
		t.Fatal("a new host didn't make a new certificate")
	}
	if more.current.Load().cert.Subject.String() != first.current.Load().cert.Subject.String() || more.current.Load().cert.SerialNumber.Cmp(first.current.Load().cert.SerialNumber) == 0 {
		t.Errorf("subject %v after %v, serial number %v after %v", more.current.Load().cert.Subject, first.current.Load().cert.Subject, more.current.Load().cert.SerialNumber, first.current.Load().cert.SerialNumber)
	}
	old := signAny(t, more, "ghcr.io")
	if _, err := old.Verify(x509.VerifyOptions{Roots: pool(first), DNSName: "ghcr.io"}); err != nil {
		t.Errorf("old root, new leaf, old name: %v", err)
	}
	if err := opensslVerify(t, first, old, "-verify_hostname", "ghcr.io"); err != nil {
		t.Errorf("old root, new leaf, old name: %v", err)
	}
	if _, err := signAny(t, more, "quay.io").Verify(x509.VerifyOptions{Roots: pool(first)}); err == nil {
		t.Error("the old root vouches for the new name")
	}

	// Both in one pool, as after an installation over an older one.
	both := pool(first)
	both.AppendCertsFromPEM(more.PEM())
	for _, h := range []string{"ghcr.io", "quay.io"} {
		if _, err := signAny(t, more, h).Verify(x509.VerifyOptions{Roots: both, DNSName: h}); err != nil {
			t.Errorf("both roots, %s: %v", h, err)
		}
	}

	if err := os.Remove(filepath.Join(dir, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	lost := openCA(t, dir, testHosts, testProbes)
	if _, err := signAny(t, lost, "ghcr.io").Verify(x509.VerifyOptions{Roots: pool(first)}); err != nil {
		t.Errorf("after the certificate was lost: %v", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 3 {
		t.Errorf("the directory holds %v (%v), want key, certificate, and its generation", left, err)
	}
}

// While the clock says that the CA isn't valid it vouches for nothing, and then
// again.
func TestClockIsSet(t *testing.T) {
	ca := newCA(t)
	synctest.Test(t, func(t *testing.T) {
		// The bubble's clock is decades before the CA's.
		for _, step := range []struct {
			until time.Time
			ok    bool
		}{
			{time.Now(), false},
			{ca.current.Load().cert.NotBefore.Add(-time.Second), false},
			{ca.current.Load().cert.NotBefore, true},
			{ca.current.Load().cert.NotAfter, true},
			{ca.current.Load().cert.NotAfter.Add(time.Second), false},
		} {
			time.Sleep(time.Until(step.until))
			if ca.Permits("ghcr.io") != step.ok {
				t.Errorf("at %v: Permits is not %t", step.until, step.ok)
			}
			if _, err := ca.Leaf("ghcr.io"); (err == nil) != step.ok {
				t.Errorf("at %v: %v", step.until, err)
			}
		}
	})
}

func TestReissuedBeforeItsEnd(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		first := openCA(t, dir, testHosts, testProbes)
		time.Sleep(caLife - 91*24*time.Hour)
		if openCA(t, dir, testHosts, testProbes).Generation() != first.Generation() {
			t.Error("reissued 91 days before its end")
		}
		time.Sleep(2 * 24 * time.Hour)
		second := openCA(t, dir, testHosts, testProbes)
		if second.Generation() == first.Generation() {
			t.Error("not reissued 89 days before its end")
		}
		if time.Until(second.current.Load().cert.NotAfter) != caLife {
			t.Errorf("the new one ends %v", second.current.Load().cert.NotAfter)
		}
	})
}

func TestOpenCAConcurrently(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	var prints [16]string
	var wg sync.WaitGroup
	for i := range prints {
		wg.Go(func() {
			ca, err := OpenCA(dir, testHosts, testProbes)
			if err != nil {
				t.Errorf("OpenCA: %v", err)
				return
			}
			prints[i] = fingerprint(ca.current.Load().cert)
		})
	}
	wg.Wait()
	for _, p := range prints {
		if p != prints[0] {
			t.Fatalf("two CAs were made: %s and %s", p, prints[0])
		}
	}
}

// Files that OpenCA must refuse, saying what to do, and leave alone.
func TestOpenCARefuses(t *testing.T) {
	other := t.TempDir()
	openCA(t, other, testHosts, testProbes)
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	copyFrom := func(dir, name string) {
		b, err := os.ReadFile(filepath.Join(other, name))
		must(err)
		must(os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	truncate := func(path string) {
		fi, err := os.Stat(path)
		must(err)
		must(os.Truncate(path, fi.Size()/2))
	}
	tests := []struct {
		name string
		do   func(dir string)
		want string
	}{
		{"key lost", func(d string) { must(os.Remove(filepath.Join(d, "ca.key"))) }, "restore the key"},
		{"another key", func(d string) { copyFrom(d, "ca.key") }, "for another key"},
		{"another certificate", func(d string) { copyFrom(d, "ca.crt") }, "for another key"},
		{"half a key", func(d string) { truncate(filepath.Join(d, "ca.key")) }, "not a PEM private key"},
		{"empty key", func(d string) { must(os.Truncate(filepath.Join(d, "ca.key"), 0)) }, "not a PEM private key"},
		{"half a certificate", func(d string) { truncate(filepath.Join(d, "ca.crt")) }, "remove it"},
		{"a huge certificate", func(d string) { must(os.Truncate(filepath.Join(d, "ca.crt"), 1<<30)) }, "too large"},
		{"key readable by others", func(d string) { must(os.Chmod(filepath.Join(d, "ca.key"), 0o640)) }, "chmod 0600"},
		{"certificate writable by others", func(d string) { must(os.Chmod(filepath.Join(d, "ca.crt"), 0o666)) }, "chmod 0644"},
		{"directory writable by others", func(d string) { must(os.Chmod(d, 0o777)) }, "chmod 0755"},
		{"key of another user", func(d string) { must(os.Chown(filepath.Join(d, "ca.key"), 4242, -1)) }, "belongs to user 4242"},
		{"key is a link", func(d string) {
			must(os.Remove(filepath.Join(d, "ca.key")))
			must(os.Symlink(filepath.Join(other, "ca.key"), filepath.Join(d, "ca.key")))
		}, "symbolic link"},
		{"key is a FIFO", func(d string) {
			must(os.Remove(filepath.Join(d, "ca.key")))
			must(unix.Mkfifo(filepath.Join(d, "ca.key"), 0o600))
		}, "not a regular file"},
		{"RSA key", func(d string) {
			out, err := exec.Command("openssl", "genpkey", "-algorithm", "RSA", "-out", filepath.Join(d, "ca.key")).CombinedOutput()
			if err != nil {
				t.Fatalf("openssl genpkey: %v: %s", err, out)
			}
		}, "not a P-256 key"},
		{"a certificate that weir didn't make", func(d string) {
			out, err := exec.Command("openssl", "req", "-x509", "-new", "-key", filepath.Join(d, "ca.key"),
				"-subj", "/CN=weir node CA 00000000", "-out", filepath.Join(d, "ca.crt")).CombinedOutput()
			if err != nil {
				t.Fatalf("openssl req: %v: %s", err, out)
			}
		}, "not one that weir made"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "ca")
			openCA(t, dir, testHosts, testProbes)
			tt.do(dir)
			before := listing(t, dir)
			_, err := OpenCA(dir, append([]string{"quay.io"}, testHosts...), testProbes)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "PRIVATE KEY") {
				t.Errorf("the error has the key in it: %v", err)
			}
			if after := listing(t, dir); after != before {
				t.Errorf("changed files:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

func TestOpenCARefusesNames(t *testing.T) {
	for _, h := range []string{"", ".", "..", "a/b", "../x", "a..b", "-a.test", "*.test", "http://a.test", "a.test:0",
		"a.test:65536", "a.test:", "a.test:+5", "[::1", "[a.test]:1", "::1%eth0", "a b", "a\x00", "127.1", "1.2.3", "0x7f.1", "a.0x1f",
		"é.test", strings.Repeat("a", 64) + ".test", strings.Repeat("a.", 130) + "test", strings.Repeat("a", 4096)} {
		dir := filepath.Join(t.TempDir(), "ca")
		if _, err := OpenCA(dir, []string{h}, nil); err == nil {
			t.Errorf("host %q was accepted", h)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("host %q: a directory was made", h)
		}
	}
	if _, err := OpenCA(t.TempDir(), nil, []netip.Addr{{}}); err == nil {
		t.Error("an invalid probe address was accepted")
	}
	var many []string
	for i := range 5000 {
		many = append(many, fmt.Sprintf("registry-%d.example.test", i))
	}
	if _, err := OpenCA(t.TempDir(), many, nil); err == nil {
		t.Error("a certificate was made that is too large to be read again")
	}
}
