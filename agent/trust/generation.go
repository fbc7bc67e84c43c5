// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"slices"
	"time"
)

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

// Oldest is the generation since which the CA may vouch for the first of its names.
func (ca *CA) Oldest() uint64 {
	g := ca.current.Load()
	oldest := g.number
	for since := range maps.Values(g.since) {
		oldest = min(oldest, since)
	}
	return oldest
}
