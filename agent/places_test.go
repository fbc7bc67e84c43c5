// SPDX-License-Identifier: Apache-2.0

package agent

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

	"golang.org/x/sys/unix"
	"weir/agent/trust"
	"weir/proxy/registry"
)

func TestParseUsers(t *testing.T) {
	u, err := parseUsers("         0       1000          1\n         1     100000      65536\n")
	if err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]bool{0: false, 999: false, 1000: true, 1001: false, 99999: false, 100000: true, 165535: true, 165536: false} {
		if u.has(uid) != want {
			t.Errorf("%d: %v", uid, !want)
		}
	}
	if u, err := parseUsers("0 0 4294967295\n"); err != nil || !u.has(0) || !u.has(4294967294) || u.has(4294967295) {
		t.Errorf("%v, %v", u, err)
	}
	if u, err := parseUsers(""); err != nil || u.has(0) {
		t.Errorf("of a namespace without users: %v, %v", u, err)
	}
	for _, bad := range []string{"0 0", "x y z", "0 0 99999999999"} {
		if _, err := parseUsers(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// A user whose process can't be dumped is still not root.
func TestUserOf(t *testing.T) {
	needRoot(t)
	sleep := filepath.Join(t.TempDir(), "sleep")
	b, err := os.ReadFile("/bin/sleep")
	if err := errors.Join(err, os.WriteFile(sleep, b, 0o111), os.Chmod(filepath.Dir(filepath.Dir(sleep)), 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, uid := range []uint32{0, 1000} {
		cmd := exec.Command(sleep, "60")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		got, err := userOf(cmd.Process.Pid)
		if err != nil || got != uid {
			t.Errorf("the process of %d is said to be %d's, %v", uid, got, err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

// Blobs are read in place where root of the node keeps them, and nowhere else.
func TestIsNodes(t *testing.T) {
	needRoot(t)
	lasting := lastingRoots()
	one := []syscall.SysProcIDMap{{HostID: 1000, Size: 1}}
	for name, c := range map[string]struct {
		as   syscall.SysProcAttr
		want bool
	}{
		"root":                       {syscall.SysProcAttr{}, true},
		"an ordinary user":           {syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}, false},
		"root in another directory":  {syscall.SysProcAttr{Chroot: "/usr"}, false},
		"root in other mounts":       {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}, false},
		"who is root in a namespace": {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: one, GidMappings: one, Credential: &syscall.Credential{NoSetGroups: true}}, false},
		"root in another network":    {syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, true},
	} {
		cmd := &exec.Cmd{Path: "/bin/sleep", Args: []string{"sleep", "60"}, SysProcAttr: &c.as}
		if err := cmd.Start(); err != nil {
			t.Fatal(name, err)
		}
		if got := isNodes(cmd.Process.Pid, lasting); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if isNodes(cmd.Process.Pid, lasting) {
			t.Errorf("%s: and when it has ended", name)
		}
	}
}

// What a user has given a runtime counts, but weir doesn't show a registry a
// client certificate that the runtime's user may not be able to read.
func TestUserSettings(t *testing.T) {
	needRoot(t)
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
		cmd := exec.Command("/bin/sleep", "60")
		cmd.Env = []string{"HOME=" + home}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		rt := &runtimeProc{process: process{pid: cmd.Process.Pid}, kind: kindOf("podman")}
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
