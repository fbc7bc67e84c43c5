// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The CA's file is told from one that was made anew, and not from one whose
// owner or mode was changed.
func TestHolds(t *testing.T) {
	ca, dir := newCA(t), t.TempDir()
	r := openDirRoot(t, dir)
	build(t, dir, "ca.pem=roots")
	res := ca.Install(r, Places{System: []string{"/none", "/roots"}, Bundles: []string{"/ca.pem"}}, nil)
	if res.System != nil || res.File != "/none/weir-ca.pem" {
		t.Fatal(res)
	}
	id, err := ca.Holds(r, res.File)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, res.File)
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if now, err := ca.Holds(r, res.File); err != nil || now != id {
		t.Errorf("%+v was %+v, %v", now, id, err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Holds(r, res.File); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	time.Sleep(fileClock) // or the new one is born in the same tick
	ca.Install(r, Places{System: []string{"/none"}, Bundles: []string{"/ca.pem"}}, nil)
	if now, err := ca.Holds(r, res.File); err != nil || now == id {
		t.Errorf("%+v was %+v, %v", now, id, err)
	}
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Holds(r, res.File); err == nil {
		t.Error("another content is taken for the CA")
	}
}

// The next generation takes the place of the one before, and is known to have been
// there all the time; one that was removed in between isn't.
func TestSuperseded(t *testing.T) {
	dir := t.TempDir()
	build(t, dir, "ca.pem=x", "etc/ssl/certs/", "etc/docker/certs.d/")
	r := openDirRoot(t, dir)
	ca := openCA(t, t.TempDir(), []string{"ghcr.io"}, testProbes)
	p := usual
	install := func() (Result, FileID) {
		t.Helper()
		res := ca.Install(r, p, []string{"ghcr.io"})
		id, err := ca.Holds(r, res.File)
		if res.System != nil || err != nil {
			t.Fatal(res.System, err)
		}
		return res, id
	}
	res, was := install()
	if res.Superseded {
		t.Error("there was none before")
	}
	certsD := CertsD{Dirs: []string{DockerCertsD}, HostsFiles: true}
	var ids []FileID
	for i := range 3 {
		hosts := []string{"ghcr.io", string(rune('a'+i)) + ".corp.example"}
		if err := ca.SetHosts(hosts); err != nil {
			t.Fatal(err)
		}
		// Until it is replaced, a directory has the names of what is there.
		if cov := ca.Coverage(r, certsD, hosts); !cov.Covers("ghcr.io") || cov.Covers(hosts[1]) {
			t.Errorf("%v", cov)
		}
		if _, err := ca.Holds(r, res.File); err != nil {
			t.Error(err)
		}
		res, id := install()
		if !res.Superseded || !slices.Contains(res.Files, res.File) || !ca.Follows(id, was) || ca.Follows(was, id) {
			t.Errorf("%+v", res)
		}
		ids = append(ids, id)
	}
	if !ca.Follows(ids[2], ids[0]) {
		t.Error("the last doesn't follow the first")
	}
	if err := os.Remove(filepath.Join(dir, res.File)); err != nil {
		t.Fatal(err)
	}
	if res, id := install(); res.Superseded || ca.Follows(id, ids[2]) {
		t.Errorf("%+v", res)
	}
	// A registry's directory goes, and what a user has in one stays.
	build(t, dir, "etc/docker/certs.d/ghcr.io:443/client.cert=x")
	if err := Withdraw(r, DockerCertsD, "ghcr.io", nil); err != nil {
		t.Error(err)
	}
	if names, _ := r.ReadDir(DockerCertsD); slices.Contains(names, "ghcr.io") || !slices.Contains(names, "ghcr.io:443") || !slices.Contains(names, testProbes[1].String()) {
		t.Errorf("there are %q", names)
	}
	if names, _ := r.ReadDir(DockerCertsD + "/ghcr.io:443"); !slices.Equal(names, []string{"client.cert"}) {
		t.Errorf("there are %q", names)
	}
}

// A file is the same one when its identity has been written down and read again.
func TestFileIDAsText(t *testing.T) {
	again := func(id FileID) FileID {
		b, err := json.Marshal(id)
		var read FileID
		if err == nil {
			err = json.Unmarshal(b, &read)
		}
		if err != nil {
			t.Fatal(err)
		}
		return read
	}
	id := FileID{dev: 1<<40 + 1, ino: 1<<63 + 2, born: unix.StatxTimestamp{Sec: -3, Nsec: 999999999}}
	if read := again(id); read != id {
		t.Errorf("%+v, not %+v", read, id)
	}
	if again(FileID{}) != (FileID{}) {
		t.Error("none is one")
	}
}
