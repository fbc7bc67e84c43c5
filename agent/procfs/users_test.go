// SPDX-License-Identifier: Apache-2.0

package procfs

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"weir/agent/internal/agenttest"
)

func FuzzParseUsers(f *testing.F) {
	f.Add("         0          0 4294967295\n", uint32(0))
	f.Add("0 1000 1\n1 100000 65536\n", uint32(165535))
	f.Add("0 4294967295 4294967295\n", uint32(4294967295))
	f.Fuzz(func(t *testing.T, uidMap string, uid uint32) {
		u, err := parseUsers(uidMap)
		if err != nil {
			return
		}
		if len(u) > len(strings.Split(uidMap, "\n")) {
			t.Errorf("%d ranges of %q", len(u), uidMap)
		}
		in := false
		for _, r := range u {
			in = in || uint64(uid) >= uint64(r.first) && uint64(uid) < uint64(r.first)+uint64(r.count)
		}
		if u.Has(uid) != in {
			t.Errorf("%d in %v: %v", uid, u, !in)
		}
	})
}

func TestParseUsers(t *testing.T) {
	u, err := parseUsers("         0       1000          1\n         1     100000      65536\n")
	if err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]bool{0: false, 999: false, 1000: true, 1001: false, 99999: false, 100000: true, 165535: true, 165536: false} {
		if u.Has(uid) != want {
			t.Errorf("%d: %v", uid, !want)
		}
	}
	if u, err := parseUsers("0 0 4294967295\n"); err != nil || !u.Has(0) || !u.Has(4294967294) || u.Has(4294967295) {
		t.Errorf("%v, %v", u, err)
	}
	if u, err := parseUsers(""); err != nil || u.Has(0) {
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
	agenttest.Root(t)
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
		got, err := User(cmd.Process.Pid)
		if err != nil || got != uid {
			t.Errorf("the process of %d is said to be %d's, %v", uid, got, err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}
