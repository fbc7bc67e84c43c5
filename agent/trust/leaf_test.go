// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

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
