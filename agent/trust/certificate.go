// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	// commonName begins the subject of every CA that weir makes and is how
	// weir knows its own certificates again.
	commonName = "weir node CA"

	caLife = 10 * 365 * 24 * time.Hour
	caSkew = 24 * time.Hour

	// maxPEM bounds the CA's certificate and every file that is compared with
	// it: a thousand registries fit.
	maxPEM = 64 << 10
)

// covers reports whether a name of a CA's certificate stands for an endpoint.
func covers(name string, e endpoint) bool {
	if e.addr.IsValid() {
		return name == e.addr.String()
	}
	return e.name == name || strings.HasSuffix(e.name, "."+name)
}

func valid(cert *x509.Certificate) bool {
	now := time.Now()
	return !now.Before(cert.NotBefore) && !now.After(cert.NotAfter)
}

func permits(cert *x509.Certificate, e endpoint) bool {
	if e.addr.IsValid() {
		return slices.ContainsFunc(cert.PermittedIPRanges, func(n *net.IPNet) bool {
			return n.Contains(e.addr.AsSlice())
		})
	}
	return slices.ContainsFunc(cert.PermittedDNSDomains, func(d string) bool { return covers(d, e) })
}

// constraints are the names that a CA is limited to.
type constraints struct {
	permitDNS, excludeDNS []string
	permitIP, excludeIP   []*net.IPNet
	permitOther           []string // mail and URI domains
}

func constraintsFor(hosts []string, probes []netip.Addr) (constraints, error) {
	var dns []string
	var ips []netip.Addr
	for _, h := range hosts {
		e, err := parseEndpoint(h)
		if err != nil {
			return constraints{}, err
		}
		if e.addr.IsValid() {
			ips = append(ips, e.addr)
		} else {
			dns = append(dns, e.name)
		}
	}
	for _, p := range probes {
		if !p.IsValid() || p.Zone() != "" {
			return constraints{}, fmt.Errorf("probe address %v: not an address that a certificate can have", p)
		}
		ips = append(ips, p.Unmap())
	}
	slices.Sort(dns)
	slices.SortFunc(ips, netip.Addr.Compare)

	// A type of name that no constraint mentions is free (RFC 5280), so every
	// type is mentioned. .invalid will never exist (RFC 6761) and leaves no
	// mail address or URI: those types have no constraint for "all".
	c := constraints{permitDNS: slices.Compact(dns), permitOther: []string{"invalid"}}
	if len(dns) == 0 {
		c.excludeDNS = []string{""}
	}
	var have4, have6 bool
	for _, ip := range slices.Compact(ips) {
		c.permitIP = append(c.permitIP, &net.IPNet{
			IP:   ip.AsSlice(),
			Mask: net.CIDRMask(ip.BitLen(), ip.BitLen()),
		})
		have4, have6 = have4 || ip.Is4(), have6 || ip.Is6()
	}
	// Exclusion beats permission: only a family without permitted addresses
	// can be excluded. The other is limited by those.
	if !have4 {
		c.excludeIP = append(c.excludeIP, &net.IPNet{IP: make(net.IP, 4), Mask: make(net.IPMask, 4)})
	}
	if !have6 {
		c.excludeIP = append(c.excludeIP, &net.IPNet{IP: make(net.IP, 16), Mask: make(net.IPMask, 16)})
	}
	return c, nil
}

// equal reports whether cert has these constraints and no others.
func (c constraints) equal(cert *x509.Certificate) bool {
	same := func(a, b []*net.IPNet) bool {
		return slices.EqualFunc(a, b, func(x, y *net.IPNet) bool { return x.String() == y.String() })
	}
	return cert.PermittedDNSDomainsCritical &&
		slices.Equal(c.permitDNS, cert.PermittedDNSDomains) &&
		slices.Equal(c.excludeDNS, cert.ExcludedDNSDomains) &&
		same(c.permitIP, cert.PermittedIPRanges) &&
		same(c.excludeIP, cert.ExcludedIPRanges) &&
		slices.Equal(c.permitOther, cert.PermittedEmailAddresses) &&
		slices.Equal(c.permitOther, cert.PermittedURIDomains)
}

func issueRoot(key crypto.Signer, names constraints, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("the CA's key is not an ECDSA key")
	}
	id, err := keyID(pub)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      subjectOf(id),
		NotBefore:    now.Add(-caSkew),
		NotAfter:     now.Add(caLife),
		SubjectKeyId: id,
		KeyUsage:     x509.KeyUsageCertSign,
		// In a directory that all programs read, this keeps it from vouching
		// for clients to a server that takes those roots for its clients'.
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},

		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,

		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         names.permitDNS,
		ExcludedDNSDomains:          names.excludeDNS,
		PermittedIPRanges:           names.permitIP,
		ExcludedIPRanges:            names.excludeIP,
		PermittedEmailAddresses:     names.permitOther,
		PermittedURIDomains:         names.permitOther,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign the CA's certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse the CA's certificate: %w", err)
	}
	if n := len(encodeCert(cert)); n > maxPEM {
		return nil, fmt.Errorf("sign the CA's certificate: %d registries make it %d bytes long, more than the %d that are allowed", len(names.permitDNS)+len(names.permitIP), n, maxPEM)
	}
	return cert, nil
}

// keyID identifies a key (RFC 7093, section 2, method 1).
func keyID(pub *ecdsa.PublicKey) ([]byte, error) {
	point, err := pub.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode the CA's public key: %w", err)
	}
	sum := sha256.Sum256(point)
	return sum[:20], nil
}

// subjectOf derives the subject from the key, so that a certificate that got
// lost is made again with the subject that runtimes know.
func subjectOf(keyID []byte) pkix.Name {
	return pkix.Name{CommonName: commonName + " " + hex.EncodeToString(keyID[:4])}
}

func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	b[0] &= 0x7f // positive in 16 octets
	b[15] |= 1   // and never zero
	return new(big.Int).SetBytes(b), nil
}

func encodeCert(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

// parseCert reads a file that holds one certificate and nothing else.
func parseCert(b []byte) (*x509.Certificate, error) {
	block, err := onlyBlock(b)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(block.Bytes)
}

func onlyBlock(b []byte) (*pem.Block, error) {
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("not one PEM certificate")
	}
	return block, nil
}

// IsNodeCA reports whether b is the certificate of a weir node, this or another.
func IsNodeCA(b []byte) bool {
	cert, err := parseCert(b)
	return err == nil && cert.IsCA && strings.HasPrefix(cert.Subject.CommonName, commonName+" ")
}

// checkPair reports why cert is not the certificate that weir made for key.
func checkPair(cert *x509.Certificate, key crypto.PublicKey) error {
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || !pub.Equal(key) {
		return errors.New("the certificate is for another key")
	}
	id, err := keyID(pub)
	if err != nil {
		return err
	}
	if !cert.IsCA || cert.Subject.CommonName != subjectOf(id).CommonName || cert.CheckSignatureFrom(cert) != nil {
		return errors.New("the certificate is not one that weir made")
	}
	return nil
}
