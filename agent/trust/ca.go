// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"
)

// caRenew is how long before its end the certificate is made anew.
const caRenew = 90 * 24 * time.Hour

// CA is a node's certificate authority. Its methods may be called concurrently.
type CA struct {
	dir     string
	key     crypto.Signer
	probes  []netip.Addr
	current atomic.Pointer[generation]

	mu         sync.Mutex
	superseded map[FileID]FileID // by which file of a later generation

	// All leaves share one key, which lives as long as the process. Whoever
	// can read one key from this process's memory can read them all, and that
	// of the CA, so more keys would only be more secrets to keep.
	leafKey *ecdsa.PrivateKey
	leaves  *lru.Cache[string, *tls.Certificate] // by subject
	signing singleflight.Group
}

// OpenCA loads the CA of the node from dir/ca.key and dir/ca.crt, or makes it.
//
// Its certificate is name-constrained (RFC 5280, section 4.2.1.10) to hosts and
// probes. A host is a registry as image references spell it; a DNS name covers
// the names below it, a port is left out, and an address covers itself alone.
// When the certificate on disk was made for other names, or is within 90 days
// of its end, it is replaced by one with the same subject and key, the next
// generation, so that a runtime that trusts the old one goes on trusting leaves for
// the old names.
//
// The key is never replaced. OpenCA fails, without having changed anything,
// when the files don't belong together, can't be parsed, or are open to other
// users of the node.
func OpenCA(dir string, hosts []string, probes []netip.Addr) (*CA, error) {
	names, err := constraintsFor(hosts, probes)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of the CA: %w", err)
	}
	d, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()

	keyPath, certPath := filepath.Join(dir, "ca.key"), filepath.Join(dir, "ca.crt")
	key, err := loadKey(keyPath)
	if err != nil {
		return nil, err
	}
	cert, err := loadCert(certPath)
	if err != nil {
		return nil, err
	}
	switch {
	case key == nil && cert != nil:
		return nil, fmt.Errorf("%s is there but its key %s is not: restore the key, or remove the certificate to have a new CA made", certPath, keyPath)
	case key == nil:
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, fmt.Errorf("make the CA's key: %w", err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fmt.Errorf("encode the CA's key: %w", err)
		}
		b := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		if err := writeDurably(d, "ca.key", b, 0o600); err != nil {
			return nil, err
		}
	case cert != nil:
		if err := checkPair(cert, key.Public()); err != nil {
			return nil, fmt.Errorf("%s and %s: %w: restore the right one, or remove both to have a new CA made", certPath, keyPath, err)
		}
	}

	ca := &CA{dir: dir, key: key, probes: slices.Clone(probes), superseded: make(map[FileID]FileID)}
	g := loadGeneration(filepath.Join(dir, generationFile), cert)
	now := time.Now()
	expires := cert != nil && (now.Before(cert.NotBefore) || now.Add(caRenew).After(cert.NotAfter))
	if expires {
		g.since = nil
	}
	if cert == nil || !names.equal(cert) || expires {
		if g, err = ca.issue(d, g, names, now); err != nil {
			return nil, err
		}
	}
	ca.current.Store(g)
	if ca.leafKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, fmt.Errorf("make the key of the leaves: %w", err)
	}
	if ca.leaves, err = lru.New[string, *tls.Certificate](leafCache); err != nil {
		return nil, fmt.Errorf("make the cache of leaves: %w", err)
	}
	return ca, nil
}

// PEM returns the CA's certificate as it is installed. The caller owns it.
func (ca *CA) PEM() []byte { return bytes.Clone(ca.current.Load().pem) }

// ID identifies the CA over all generations of its certificate.
func (ca *CA) ID() string { return hex.EncodeToString(ca.current.Load().cert.SubjectKeyId) }

// Permits reports whether the CA may vouch for host, which may have a port, and
// is valid by the clock, which may have been set since it was made.
func (ca *CA) Permits(host string) bool {
	e, err := parseEndpoint(host)
	g := ca.current.Load()
	return err == nil && permits(g.cert, e) && valid(g.cert)
}

// own returns the certificate in b if it is one of this CA's, of any generation.
func (ca *CA) own(der []byte) (*x509.Certificate, bool) {
	g := ca.current.Load()
	if bytes.Equal(der, g.cert.Raw) {
		return g.cert, true
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil || checkPair(cert, ca.key.Public()) != nil {
		return nil, false
	}
	return cert, true
}

// ownPEM is own for a file that holds one certificate and nothing else.
func (ca *CA) ownPEM(b []byte) (*x509.Certificate, bool) {
	if g := ca.current.Load(); bytes.Equal(b, g.pem) {
		return g.cert, true
	}
	block, err := onlyBlock(b)
	if err != nil {
		return nil, false
	}
	return ca.own(block.Bytes)
}
