// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
)

const (
	// commonName begins the subject of every CA that weir makes and is how
	// weir knows its own certificates again.
	commonName = "weir node CA"

	caLife  = 10 * 365 * 24 * time.Hour
	caRenew = 90 * 24 * time.Hour
	caSkew  = 24 * time.Hour

	leafLife  = 24 * time.Hour
	leafRenew = leafLife / 3 // before its end
	leafSkew  = time.Hour
	leafCache = 1024

	// maxPEM bounds the CA's certificate and every file that is compared with
	// it: a thousand registries fit.
	maxPEM = 64 << 10
)

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

// generation is a certificate of a CA. All have the same subject and key, and
// differ in the names that the CA may speak for: who has read one trusts the CA for
// the names of that one.
type generation struct {
	number uint64
	cert   *x509.Certificate
	pem    []byte
	// since has, for each name, the first of the generations up to this one that
	// all have it.
	since map[string]uint64
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

// lockDir opens the CA's directory. Two processes that start at once must not make
// two CAs: the lock goes with the descriptor.
func lockDir(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory of the CA: %w", err)
	}
	if err = checkOwner(d, 0o022); err == nil {
		if err = retryEINTR(func() error { return unix.Flock(int(d.Fd()), unix.LOCK_EX) }); err != nil {
			err = fmt.Errorf("lock %s: %w", dir, err)
		}
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// SetHosts makes the next generation of the certificate, for hosts as [OpenCA] takes
// them, if the present one is for others. On an error nothing has changed.
func (ca *CA) SetHosts(hosts []string) error {
	names, err := constraintsFor(hosts, ca.probes)
	if err != nil {
		return err
	}
	d, err := lockDir(ca.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	g := ca.current.Load()
	if names.equal(g.cert) {
		return nil
	}
	if g, err = ca.issue(d, g, names, time.Now()); err == nil {
		ca.current.Store(g)
	}
	return err
}

// generationFile has what the certificate doesn't say of its generation.
const generationFile = "generation.json"

type generationState struct {
	Number      uint64            `json:"generation"`
	Certificate string            `json:"certificate"` // SHA-256
	Since       map[string]uint64 `json:"since"`
}

// loadGeneration returns the generation of a certificate, and one that is older
// than any for nil. What was written for another certificate says no more than that
// there was one.
func loadGeneration(file string, cert *x509.Certificate) *generation {
	var s generationState
	b, err := readOwn(file, 0o022)
	if err != nil || json.Unmarshal(b, &s) != nil {
		s = generationState{}
	}
	g := &generation{number: s.Number, cert: cert}
	if cert == nil {
		return g
	}
	g.pem, g.since = encodeCert(cert), s.Since
	if s.Certificate != fingerprint(cert) || s.Since == nil {
		g.number++
		g.since = make(map[string]uint64)
		for _, name := range namesIn(cert) {
			g.since[name] = g.number
		}
	}
	return g
}

// issue makes the generation after g. The caller has locked the directory d.
func (ca *CA) issue(d *os.File, g *generation, names constraints, now time.Time) (*generation, error) {
	cert, err := issueRoot(ca.key, names, now)
	if err != nil {
		return nil, err
	}
	next := &generation{number: g.number + 1, cert: cert, pem: encodeCert(cert), since: make(map[string]uint64)}
	for _, name := range namesIn(cert) {
		if next.since[name] = g.since[name]; next.since[name] == 0 {
			next.since[name] = next.number
		}
	}
	b, err := json.Marshal(generationState{next.number, fingerprint(cert), next.since})
	if err == nil {
		err = writeDurably(d, generationFile, b, 0o644)
	}
	if err == nil {
		err = writeDurably(d, "ca.crt", next.pem, 0o644)
	}
	if err != nil {
		return nil, err
	}
	return next, nil
}

// namesIn are the names that a certificate of a CA is for.
func namesIn(cert *x509.Certificate) []string {
	names := slices.Clone(cert.PermittedDNSDomains)
	for _, n := range cert.PermittedIPRanges {
		names = append(names, n.IP.String())
	}
	return names
}

func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// PEM returns the CA's certificate as it is installed. The caller owns it.
func (ca *CA) PEM() []byte { return bytes.Clone(ca.current.Load().pem) }

// ID identifies the CA over all generations of its certificate.
func (ca *CA) ID() string { return hex.EncodeToString(ca.current.Load().cert.SubjectKeyId) }

// Generation is the number of the certificate's present generation, from 1.
func (ca *CA) Generation() uint64 { return ca.current.Load().number }

// Since returns the generation such that whoever has read it, or any later one up to
// the present, trusts the CA for host, which may have a port. It is false for a host
// that the CA may not vouch for.
func (ca *CA) Since(host string) (number uint64, ok bool) {
	e, err := parseEndpoint(host)
	if err != nil {
		return 0, false
	}
	for name, since := range ca.current.Load().since {
		if covers(name, e) && (!ok || since < number) {
			number, ok = since, true
		}
	}
	return number, ok
}

// covers reports whether a name of a CA's certificate stands for an endpoint.
func covers(name string, e endpoint) bool {
	if e.addr.IsValid() {
		return name == e.addr.String()
	}
	return e.name == name || strings.HasSuffix(e.name, "."+name)
}

// Permits reports whether the CA may vouch for host, which may have a port, and
// is valid by the clock, which may have been set since it was made.
func (ca *CA) Permits(host string) bool {
	e, err := parseEndpoint(host)
	g := ca.current.Load()
	return err == nil && permits(g.cert, e) && valid(g.cert)
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

// Oldest is the generation since which the CA may vouch for the first of its names.
func (ca *CA) Oldest() uint64 {
	g := ca.current.Load()
	oldest := g.number
	for since := range maps.Values(g.since) {
		oldest = min(oldest, since)
	}
	return oldest
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

// loadKey returns nil if there is no file.
func loadKey(path string) (*ecdsa.PrivateKey, error) {
	b, err := readOwn(path, 0o077)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// The parser's errors are left out: they may quote the key.
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("%s is not a PEM private key: restore it, or remove it and ca.crt to have a new CA made", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	key, ok := k.(*ecdsa.PrivateKey)
	if err != nil || !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%s is not a P-256 key: restore it, or remove it and ca.crt to have a new CA made", path)
	}
	return key, nil
}

// loadCert returns nil if there is no file.
func loadCert(path string) (*x509.Certificate, error) {
	b, err := readOwn(path, 0o022)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	cert, err := parseCert(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: remove it to have it made again from ca.key", path, err)
	}
	return cert, nil
}

// readOwn reads a regular file of this user that has none of the forbidden
// permission bits.
func readOwn(path string, forbidden fs.FileMode) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open file of the CA: %w", err)
	}
	defer f.Close()
	if err := checkOwner(f, forbidden); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, fmt.Errorf("read file of the CA: %w", err)
	}
	if len(b) > maxPEM {
		return nil, fmt.Errorf("%s is too large to be a file of the CA", path)
	}
	return b, nil
}

// checkOwner reports why f, a regular file or a directory, is not safe from
// other users.
func checkOwner(f *os.File, forbidden fs.FileMode) error {
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("stat file of the CA: %w", err)
	}
	if !fi.Mode().IsRegular() && !fi.IsDir() {
		return fmt.Errorf("%s is not a regular file", f.Name())
	}
	if open := fi.Mode().Perm() & forbidden; open != 0 {
		return fmt.Errorf("%s has mode %04o and is open to other users: if none of them can have used it, chmod %04o it; otherwise remove ca.key and ca.crt to have a new CA made",
			f.Name(), fi.Mode().Perm(), fi.Mode().Perm()&^forbidden)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("%s belongs to user %d: chown it to the user that runs the agent", f.Name(), st.Uid)
	}
	return nil
}

// writeDurably replaces the file name in d, which the caller has locked. After
// a crash there is the old file or the new one.
func writeDurably(d *os.File, name string, b []byte, perm fs.FileMode) error {
	path := filepath.Join(d.Name(), name)
	aside := filepath.Join(d.Name(), "."+name+".new")
	if err := os.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove leftover: %w", err)
	}
	f, err := os.OpenFile(aside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(perm)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(aside, path)
	}
	if err == nil {
		err = d.Sync()
	}
	if err != nil {
		os.Remove(aside)
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
