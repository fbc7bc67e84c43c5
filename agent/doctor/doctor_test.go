// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestDoctorsClock(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		from, to time.Duration
		wanted   int
	}{{-time.Hour, time.Hour, 0}, {time.Hour, 2 * time.Hour, 1}, {-2 * time.Hour, -time.Hour, 1}} {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(c.from), NotAfter: time.Now().Add(c.to)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "ca"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "ca", "ca.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		d := &doctor{conf: Config{DataDir: dir}}
		d.clock()
		if len(d.findings) != c.wanted {
			t.Errorf("valid from %v to %v: %+v", c.from, c.to, d.findings)
		}
		for _, f := range d.findings {
			if f.What != "clock" || !strings.Contains(f.Problem, "passed through") || f.Step == "" {
				t.Errorf("%+v", f)
			}
		}
	}
}
