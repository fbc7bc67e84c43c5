// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/netip"
	"time"
)

const (
	leafLife  = 24 * time.Hour
	leafRenew = leafLife / 3 // before its end
	leafSkew  = time.Hour
	leafCache = 1024
)

// maxProbed bounds the names in a certificate for a probe. crypto/x509 gives up when
// their number by that of the CA's is too large.
const maxProbed = 300

// ProbeLeaf returns a certificate for addr. Who accepts it trusts the CA for all
// names of the present generation that [CA.Since] has from after to upTo. It fails
// when these are too many.
func (ca *CA) ProbeLeaf(addr netip.Addr, after, upTo uint64) (*tls.Certificate, error) {
	g := ca.current.Load()
	names := []endpoint{{addr: addr.Unmap()}}
	for name, since := range g.since {
		if since > after && since <= upTo {
			e, err := parseEndpoint(name)
			if err != nil {
				return nil, err
			}
			names = append(names, e)
		}
	}
	if len(names) > maxProbed {
		return nil, fmt.Errorf("%d names are too many to prove at once", len(names))
	}
	return ca.sign(g, names...)
}

// Leaf returns a certificate for host, which may have a port, signed by the CA
// and good for at least another 8 hours. Callers for one host share the
// certificate; they must not change it. It fails for a host that [CA.Permits]
// refuses.
func (ca *CA) Leaf(host string) (*tls.Certificate, error) {
	e, err := parseEndpoint(host)
	if err != nil {
		return nil, err
	}
	g := ca.current.Load()
	if !permits(g.cert, e) {
		return nil, fmt.Errorf("leaf for %s: the CA is not made for this host", e.subject())
	}
	if !valid(g.cert) {
		return nil, fmt.Errorf("leaf for %s: the CA is valid from %s to %s, and the clock isn't between them", e.subject(),
			g.cert.NotBefore.Format(time.RFC3339), g.cert.NotAfter.Format(time.RFC3339))
	}
	name := e.subject()
	if leaf := ca.cached(name); leaf != nil {
		return leaf, nil
	}
	v, err, _ := ca.signing.Do(name, func() (any, error) {
		if leaf := ca.cached(name); leaf != nil {
			return leaf, nil
		}
		leaf, err := ca.sign(g, e)
		if err != nil {
			return nil, fmt.Errorf("sign leaf for %s: %w", name, err)
		}
		ca.leaves.Add(name, leaf)
		return leaf, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*tls.Certificate), nil
}

// cached returns the leaf for name that is not yet to be renewed, or nil.
func (ca *CA) cached(name string) *tls.Certificate {
	leaf, ok := ca.leaves.Get(name)
	if !ok || time.Until(leaf.Leaf.NotAfter) < leafRenew || time.Now().Before(leaf.Leaf.NotBefore) {
		return nil
	}
	return leaf
}

func (ca *CA) sign(g *generation, names ...endpoint) (*tls.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial,
		// No common name: OpenSSL would hold an address in it, for want of a
		// DNS name, against the constraints on DNS names.
		Subject:     pkix.Name{Organization: []string{"weir"}},
		NotBefore:   now.Add(-leafSkew),
		NotAfter:    now.Add(leafLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},

		BasicConstraintsValid: true,
	}
	for _, e := range names {
		if e.addr.IsValid() {
			template.IPAddresses = append(template.IPAddresses, e.addr.AsSlice())
		} else {
			template.DNSNames = append(template.DNSNames, e.name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, g.cert, &ca.leafKey.PublicKey, ca.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: ca.leafKey, Leaf: leaf}, nil
}
