// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"weir/agent/internal/agenttest"
	"weir/agent/procfs"
	"weir/agent/trust"
	"weir/proxy/registry"
)

// What a user has given a runtime counts, but weir doesn't show a registry a
// client certificate that the runtime's user may not be able to read.
func TestUserSettings(t *testing.T) {
	agenttest.Root(t)
	home := t.TempDir()
	dir := filepath.Join(home, ".config", trust.UserContainersCertsD, "registry.test")
	cert, key := selfSigned(t)
	err := os.MkdirAll(dir, 0o755)
	for name, b := range map[string][]byte{"ca.crt": cert, "client.cert": cert, "client.key": key} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, uid := range []uint32{0, 1000} {
		cmd := exec.Command("/bin/cat")
		cmd.Env = []string{"HOME=" + home}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Its environment can be read once it runs, which is a moment after exec.
		if _, err := in.Write([]byte{0}); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		rt := &Runtime{Process: procfs.Process{PID: cmd.Process.Pid}, kind: kindOf("podman")}
		s, err := settings(rt, registry.Known{}, "registry.test")
		if uid == 0 && (err != nil || len(s.Certificates) != 1 || s.Roots == nil) || uid != 0 && err == nil {
			t.Errorf("user %d: %+v, %v", uid, s, err)
		}
		if s, err := settings(rt, registry.Known{}, "other.test"); err != nil || s.Key != "" {
			t.Errorf("user %d, of another registry: %+v, %v", uid, s, err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

func selfSigned(t *testing.T) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	c, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	p, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: p})
}
