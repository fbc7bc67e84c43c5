// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

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
