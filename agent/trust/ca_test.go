// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
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

// signAny signs for any host, as an attacker with the key could.
func signAny(t *testing.T, ca *CA, host string) *x509.Certificate {
	t.Helper()
	e, err := parseEndpoint(host)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ca.sign(ca.current.Load(), e)
	if err != nil {
		t.Fatalf("sign %s: %v", host, err)
	}
	return c.Leaf
}

func opensslVerify(t *testing.T, ca *CA, leaf *x509.Certificate, nameFlag, name string) error {
	t.Helper()
	dir := t.TempDir()
	root, cert := filepath.Join(dir, "root.pem"), filepath.Join(dir, "leaf.pem")
	if err := os.WriteFile(root, ca.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cert, encodeCert(leaf), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("openssl", "verify", "-x509_strict", "-purpose", "sslserver",
		"-no-CApath", "-no-CAstore", "-CAfile", root, nameFlag, name, cert).CombinedOutput()
	if err != nil {
		return fmt.Errorf("openssl verify: %w: %s", err, out)
	}
	return nil
}

// Go and OpenSSL agree on what the CA may vouch for, and Permits with them.
func TestConstraints(t *testing.T) {
	tests := []struct {
		host string
		ok   bool
	}{
		{"docker.io", true},
		{"auth.docker.io", true},
		{"REGISTRY-1.Docker.IO", true},
		{"europe-docker.pkg.dev", true},
		{"registry.test", true},
		{"registry.test:6000", true},
		{"192.0.2.7", true},
		{"198.18.0.1", true},
		{"198.18.0.2:443", true},
		{"evildocker.io", false},
		{"docker.io.evil.test", false},
		{"io", false},
		{"example.com", false},
		{"192.0.2.8", false},
		{"198.18.0.3", false},
		{"127.0.0.1", false},
		{"2001:db8::1", false},
		{"::ffff:192.0.2.8", false},
		{"::ffff:192.0.2.7", true},
	}
	ca := newCA(t)
	for _, tt := range tests {
		t.Run(tt.host, func(t *testing.T) {
			if got := ca.Permits(tt.host); got != tt.ok {
				t.Errorf("Permits = %v, want %v", got, tt.ok)
			}
			if _, err := ca.Leaf(tt.host); (err == nil) != tt.ok {
				t.Errorf("Leaf: error %v, want ok=%v", err, tt.ok)
			}
			e, _ := parseEndpoint(tt.host)
			leaf := signAny(t, ca, tt.host)
			_, err := leaf.Verify(x509.VerifyOptions{Roots: pool(ca), DNSName: e.subject()})
			if (err == nil) != tt.ok {
				t.Errorf("crypto/x509: error %v, want ok=%v", err, tt.ok)
			}
			flag := "-verify_hostname"
			if e.addr.IsValid() {
				flag = "-verify_ip"
			}
			if err := opensslVerify(t, ca, leaf, flag, e.subject()); (err == nil) != tt.ok {
				t.Errorf("OpenSSL: error %v, want ok=%v", err, tt.ok)
			}
		})
	}
}

func TestConstraintsByFamily(t *testing.T) {
	tests := []struct {
		name    string
		hosts   []string
		probes  []netip.Addr
		yes, no []string
	}{
		{"no addresses", []string{"a.test"}, nil, []string{"a.test"}, []string{"b.test", "192.0.2.1", "::1"}},
		{"IPv6 only", []string{"[2001:db8::1]:5000"}, nil, []string{"2001:db8::1"}, []string{"a.test", "2001:db8::2", "192.0.2.1"}},
		{"both", []string{"2001:db8::1"}, testProbes, []string{"2001:db8::1", "198.18.0.1"}, []string{"a.test", "2001:db8::2", "192.0.2.1"}},
		{"nothing", nil, nil, nil, []string{"a.test", "192.0.2.1", "::1"}},
		{"one label", []string{"registry:5000"}, nil, []string{"registry"}, []string{"registry2", "a.test"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ca := openCA(t, t.TempDir(), tt.hosts, tt.probes)
			check := func(host string, ok bool) {
				t.Helper()
				e, _ := parseEndpoint(host)
				leaf := signAny(t, ca, host)
				_, err := leaf.Verify(x509.VerifyOptions{Roots: pool(ca), DNSName: e.subject()})
				if (err == nil) != ok {
					t.Errorf("%s: crypto/x509: error %v, want ok=%v", host, err, ok)
				}
				flag := "-verify_hostname"
				if e.addr.IsValid() {
					flag = "-verify_ip"
				}
				if err := opensslVerify(t, ca, leaf, flag, e.subject()); (err == nil) != ok {
					t.Errorf("%s: OpenSSL: error %v, want ok=%v", host, err, ok)
				}
			}
			for _, h := range tt.yes {
				check(h, true)
			}
			for _, h := range tt.no {
				check(h, false)
			}
		})
	}
}

// What else an attacker with the key could try.
func TestRootVouchesForServersOnly(t *testing.T) {
	ca := newCA(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	base := func() *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(1),
			NotBefore:    time.Now().Add(-time.Hour),
			NotAfter:     time.Now().Add(time.Hour),
			DNSNames:     []string{"ghcr.io"},
			ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
	}
	create := func(template, parent *x509.Certificate, signer crypto.Signer) *x509.Certificate {
		t.Helper()
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	verify := func(c *x509.Certificate, o x509.VerifyOptions) error {
		o.Roots = pool(ca)
		_, err := c.Verify(o)
		return err
	}

	if err := verify(create(base(), ca.current.Load().cert, ca.key), x509.VerifyOptions{}); err != nil {
		t.Fatalf("plain server certificate: %v", err)
	}
	if verify(create(base(), ca.current.Load().cert, ca.key), x509.VerifyOptions{KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}) == nil {
		t.Error("a client certificate verifies")
	}
	mail := base()
	mail.EmailAddresses = []string{"root@ghcr.io"}
	if verify(create(mail, ca.current.Load().cert, ca.key), x509.VerifyOptions{}) == nil {
		t.Error("a certificate with a mail address verifies")
	}
	uri := base()
	uri.URIs = []*url.URL{{Scheme: "spiffe", Host: "ghcr.io", Path: "/x"}}
	if verify(create(uri, ca.current.Load().cert, ca.key), x509.VerifyOptions{}) == nil {
		t.Error("a certificate with a URI verifies")
	}
	sub := base()
	sub.DNSNames, sub.Subject = nil, pkix.Name{CommonName: "sub"}
	sub.IsCA, sub.BasicConstraintsValid, sub.KeyUsage = true, true, x509.KeyUsageCertSign
	inter := create(sub, ca.current.Load().cert, ca.key)
	pool := x509.NewCertPool()
	pool.AddCert(inter)
	if verify(create(base(), inter, key), x509.VerifyOptions{Intermediates: pool}) == nil {
		t.Error("a certificate of a subordinate CA verifies")
	}
}

func TestRootProfile(t *testing.T) {
	c := newCA(t).current.Load().cert
	if !strings.HasPrefix(c.Subject.CommonName, "weir node CA ") || len(c.Subject.CommonName) != len("weir node CA ")+8 {
		t.Errorf("subject %q", c.Subject)
	}
	if !c.IsCA || !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign || !c.PermittedDNSDomainsCritical {
		t.Errorf("IsCA %v, MaxPathLenZero %v, KeyUsage %v, constraints critical %v", c.IsCA, c.MaxPathLenZero, c.KeyUsage, c.PermittedDNSDomainsCritical)
	}
	if len(c.SubjectKeyId) != 20 {
		t.Errorf("subject key id %x", c.SubjectKeyId)
	}
	if n := c.SerialNumber.BitLen(); n < 64 || n > 127 {
		t.Errorf("serial number has %d bits", n)
	}
	if !IsNodeCA(encodeCert(c)) {
		t.Error("IsNodeCA doesn't know it")
	}
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

func TestLeafServesTLS(t *testing.T) {
	ca := newCA(t)
	leaf, err := ca.Leaf("ghcr.io")
	if err != nil {
		t.Fatal(err)
	}
	if string(leaf.Leaf.AuthorityKeyId) != string(ca.current.Load().cert.SubjectKeyId) {
		t.Errorf("authority key id %x, want %x", leaf.Leaf.AuthorityKeyId, ca.current.Load().cert.SubjectKeyId)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	done := make(chan error, 1)
	go func() { done <- tls.Server(a, &tls.Config{Certificates: []tls.Certificate{*leaf}}).Handshake() }()
	if err := tls.Client(b, &tls.Config{ServerName: "ghcr.io", RootCAs: pool(ca)}).Handshake(); err != nil {
		t.Errorf("client: %v", err)
	}
	if err := <-done; err != nil {
		t.Errorf("server: %v", err)
	}
}

// countingSigner holds signatures back until told, to let callers pile up.
type countingSigner struct {
	crypto.Signer
	n    atomic.Int32
	gate chan struct{}
}

func (s *countingSigner) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	s.n.Add(1)
	<-s.gate
	return s.Signer.Sign(r, digest, o)
}

func TestLeafSignedOnce(t *testing.T) {
	ca := newCA(t)
	synctest.Test(t, func(t *testing.T) {
		s := &countingSigner{Signer: ca.key, gate: make(chan struct{})}
		ca.key = s
		// The bubble's clock is decades before the CA's.
		time.Sleep(time.Until(ca.current.Load().cert.NotBefore) + caSkew)
		var got [64]*tls.Certificate
		var wg sync.WaitGroup
		for i := range got {
			host := "ghcr.io"
			if i%2 == 1 {
				host = "GHCR.io:443" // the same certificate
			}
			wg.Go(func() {
				c, err := ca.Leaf(host)
				if err != nil {
					t.Errorf("Leaf: %v", err)
				}
				got[i] = c
			})
		}
		synctest.Wait()
		close(s.gate)
		wg.Wait()
		for i, c := range got {
			if c == nil || c != got[0] {
				t.Fatalf("caller %d got %p, caller 0 got %p", i, c, got[0])
			}
		}
		if n := s.n.Load(); n != 1 {
			t.Errorf("%d signatures, want 1", n)
		}
	})
}

func TestLeafRenewed(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		ca := openCA(t, dir, testHosts, testProbes)
		first, err := ca.Leaf("ghcr.io")
		if err != nil {
			t.Fatal(err)
		}
		if life := time.Until(first.Leaf.NotAfter); life != 24*time.Hour {
			t.Errorf("a new leaf lives for %v", life)
		}
		time.Sleep(15 * time.Hour)
		if c, _ := ca.Leaf("ghcr.io"); c != first {
			t.Error("renewed after 15 hours")
		}
		time.Sleep(2 * time.Hour)
		c, err := ca.Leaf("ghcr.io")
		if err != nil {
			t.Fatal(err)
		}
		if c == first {
			t.Error("not renewed after 17 hours")
		}
		if c.Leaf.SerialNumber.Cmp(first.Leaf.SerialNumber) == 0 {
			t.Error("the serial number was used again")
		}
	})
}

func TestLeafCacheIsBounded(t *testing.T) {
	ca := newCA(t)
	for i := range leafCache + 10 {
		if _, err := ca.Leaf(fmt.Sprintf("r%d.pkg.dev", i)); err != nil {
			t.Fatal(err)
		}
	}
	if n := ca.leaves.Len(); n != leafCache {
		t.Errorf("%d leaves in the cache, want %d", n, leafCache)
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

func FuzzParseEndpoint(f *testing.F) {
	for _, s := range append([]string{"a", "[::1]:5000", "::1", "1.2.3.4:5", "A.b:65535", "a..b", "[", ":"}, testHosts...) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := parseEndpoint(s)
		if err != nil {
			return
		}
		for _, name := range []string{e.dir(), e.containerdDir()} {
			if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > 255+8 {
				t.Errorf("%q gives the directory %q", s, name)
			}
		}
		again, err := parseEndpoint(e.dir())
		if err != nil || again != e {
			t.Errorf("%q is %+v, but its directory %q is %+v (%v)", s, e, e.dir(), again, err)
		}
		if e.name != "" {
			u := x509.Certificate{DNSNames: []string{e.name}}
			if err := u.VerifyHostname(e.subject()); err != nil {
				t.Errorf("%q: %v", s, err)
			}
		}
	})
}

func FuzzIsNodeCA(f *testing.F) {
	pemCA := newCA(f).PEM()
	f.Add(pemCA)
	f.Add(pemCA[:len(pemCA)/2])
	f.Add(append(append([]byte{}, pemCA...), pemCA...))
	f.Add([]byte("# a comment\n" + string(pemCA)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if !IsNodeCA(b) {
			return
		}
		block, _ := pem.Decode(b)
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil || !strings.HasPrefix(c.Subject.CommonName, "weir node CA") {
			t.Errorf("taken for a CA of weir: %q", b)
		}
	})
}
