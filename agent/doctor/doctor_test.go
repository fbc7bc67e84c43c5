// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What confines the process is told from what doesn't.
func TestConfinement(t *testing.T) {
	for _, c := range []struct {
		judge  func(string) *Finding
		in     string
		wanted bool
	}{
		{appArmor, "docker-default (enforce)", true},
		{appArmor, "cri-containerd.apparmor.d (enforce)", true},
		{appArmor, "unconfined", false},
		{appArmor, "docker-default (complain)", false},
		{appArmor, "", false},
		{seLinux, "system_u:system_r:container_t:s0:c5,c7", true},
		{seLinux, "system_u:system_r:spc_t:s0", false},
		{seLinux, "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023", false},
		{seLinux, "unconfined", false},
		{lockdown, "none integrity [confidentiality]", true},
		{lockdown, "none [integrity] confidentiality", false},
		{lockdown, "[none] integrity confidentiality", false},
		{lockdown, "", false},
	} {
		f := c.judge(c.in)
		if (f != nil) != c.wanted {
			t.Errorf("%q: %+v", c.in, f)
		}
		if f != nil && (f.Problem == "" || f.Step == "") {
			t.Errorf("%q: no problem or no step: %+v", c.in, f)
		}
	}
}

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

// A disk that hangs is waited for no longer than a moment.
func TestHangingDisk(t *testing.T) {
	fuse, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	dir, run := t.TempDir(), t.TempDir()
	// Nothing answers what the kernel asks of it.
	if err := unix.Mount("hangs", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The end of its server fails all that waits for it.
		if err := errors.Join(unix.Close(fuse), unix.Unmount(dir, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	d := &doctor{conf: Config{DataDir: filepath.Join(dir, "weir"), RunDir: run}}
	d.directories()
	d.clock()
	if len(d.findings) != 2 || !d.findings[0].Warning || !strings.Contains(d.findings[0].Problem, "does not answer") || d.findings[1].Problem != "" {
		t.Errorf("%+v", d.findings)
	}
}
