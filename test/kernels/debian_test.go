// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// suite is a suite of Debian's for an architecture. Its packages are got by apt,
// with a state of its own, and unpacked: nothing is installed on this machine.
type suite struct {
	t          testing.TB
	name, arch string
	dir        string // of its state, and of the packages
}

// listsAge is how long it isn't looked for newer packages.
const listsAge = 24 * time.Hour

// debian is a suite, from where this machine has its packages.
func debian(t testing.TB, name, arch string) *suite {
	t.Helper()
	s := &suite{t: t, name: name, arch: arch, dir: filepath.Join(cache(t), "debian", name+"-"+arch)}
	for _, dir := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(s.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.write("status", "") // nothing is installed
	s.write("sources.list", fmt.Sprintf("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", mirror(t), name))
	s.write("apt.conf", fmt.Sprintf(`Dir::State "%[1]s";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferencesparts "-";
APT::Architecture "%[2]s";
APT::Architectures {"%[2]s";};
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
`, s.dir, arch))
	updated := filepath.Join(s.dir, "updated")
	if info, err := os.Stat(updated); err != nil || time.Since(info.ModTime()) > listsAge {
		s.apt("update", "-qq")
		os.Remove(updated)
		s.write("updated", "")
	}
	return s
}

// mirror is where this machine has Debian's packages from.
func mirror(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)").Output()
	if err != nil {
		t.Fatal("asking apt for its sources: ", err)
	}
	for line := range strings.Lines(string(out)) {
		if uri, ok := strings.CutPrefix(strings.TrimSpace(line), "Debian Debian "); ok {
			return uri
		}
	}
	t.Fatal("apt has no source of Debian's: run apt-get update")
	return ""
}

func cache(t testing.TB) string {
	t.Helper()
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "weir-test")
}

func (s *suite) write(name, content string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(content), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

func (s *suite) apt(args ...string) string {
	s.t.Helper()
	cmd := exec.Command("apt-get", args...)
	cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(s.dir, "apt.conf"))
	cmd.Dir = filepath.Join(s.dir, "archives")
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("apt-get %v for %s, %s: %v\n%s", args, s.name, s.arch, err, out)
	}
	return string(out)
}

// unpack unpacks packages, and those that they depend on, if wanted says so of
// their names, into a directory that is kept for as long as they are the newest.
func (s *suite) unpack(wanted func(name string) bool, packages ...string) (dir string) {
	s.t.Helper()
	var debs, names []string
	for line := range strings.Lines(s.apt(append([]string{"install", "-qq", "--print-uris"}, packages...)...)) {
		// 'URI' FILE SIZE HASH
		fields := strings.Fields(line)
		if len(fields) < 3 || !strings.HasSuffix(fields[1], ".deb") {
			continue
		}
		if name, _, _ := strings.Cut(fields[1], "_"); wanted(name) {
			version := strings.Split(fields[1], "_")[1]
			debs, names = append(debs, fields[1]), append(names, name+"="+strings.ReplaceAll(version, "%3a", ":"))
		}
	}
	if len(debs) == 0 {
		s.t.Fatalf("apt knows no %v in %s", packages, s.name)
	}
	slices.Sort(debs)
	kind := filepath.Join(s.dir, digest(strings.Join(packages, " ")))
	dir = kind + "-" + digest(strings.Join(debs, "\n"))
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	older, _ := filepath.Glob(kind + "-*")
	for _, o := range older {
		if err := os.RemoveAll(o); err != nil {
			s.t.Fatal(err)
		}
	}
	s.apt(append([]string{"download", "-qq"}, names...)...)
	for i := range debs {
		debs[i] = filepath.Join(s.dir, "archives", debs[i])
	}
	unpackInto(s.t, dir, debs)
	return dir
}

// unpackInto unpacks packages into a new directory, and removes them.
func unpackInto(t testing.TB, dir string, debs []string) {
	t.Helper()
	work := dir + ".new"
	if err := os.RemoveAll(work); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} { // as Debian's installer makes them
		if err := os.MkdirAll(filepath.Join(work, "usr", d), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path.Join("usr", d), filepath.Join(work, d)); err != nil {
			t.Fatal(err)
		}
	}
	for _, deb := range debs {
		out, err := exec.Command("sh", "-ec", `dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --keep-directory-symlink`, "sh", deb, work).CombinedOutput()
		if err != nil {
			t.Fatalf("unpacking %s: %v\n%s", deb, err, out)
		}
		os.Remove(deb)
	}
	for _, unused := range []string{"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/lib/debug"} {
		_ = os.RemoveAll(filepath.Join(work, unused))
	}
	if err := os.Rename(work, dir); err != nil {
		t.Fatal(err)
	}
}

// jammy are the packages of a Linux 5.15, of Ubuntu 22.04 as it was released,
// with their SHA-256. Debian has none.
var jammy = map[string]string{
	"linux-image-unsigned-5.15.0-25-generic_5.15.0-25.25_amd64.deb": "ac69df20790c48217eb1386ef81fd10d3f20a4ede4dab81cc107c65d29549fa0",
	"linux-modules-5.15.0-25-generic_5.15.0-25.25_amd64.deb":        "d0ba4087d9e1d497925b3481d3531fba6c2a852855f8019d73b0b1385aa4da1f",
}

// ubuntu unpacks jammy into a directory that is kept.
func ubuntu(t testing.TB) (dir string) {
	t.Helper()
	dir = filepath.Join(cache(t), "ubuntu", "5.15.0-25")
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	var debs []string
	for name, want := range jammy {
		resp, err := http.Get("http://archive.ubuntu.com/ubuntu/pool/main/l/linux/" + name)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatalf("getting %s: %v", name, err)
		}
		if got := fmt.Sprintf("%x", sha256.Sum256(b)); got != want {
			t.Fatalf("%s is %s of %d bytes, with the SHA-256 %s instead of %s", resp.Request.URL, resp.Status, len(b), got, want)
		}
		debs = append(debs, filepath.Join(filepath.Dir(dir), name))
		if err := os.WriteFile(debs[len(debs)-1], b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	unpackInto(t, dir, debs)
	return dir
}

// packed packs what is below a directory of an unpacked root, once, after it is
// made ready.
func packed(t testing.TB, root, below string, ready func()) (file string) {
	t.Helper()
	file = root + ".cpio"
	if _, err := os.Stat(file); err == nil {
		return file
	}
	ready()
	pack(t, root, below, file+".new")
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	return file
}

// pack writes the files below a directory of a root as a cpio archive, as the
// kernel wants its first files.
func pack(t testing.TB, root, below, file string) {
	t.Helper()
	var names strings.Builder
	err := filepath.WalkDir(filepath.Join(root, below), func(name string, _ fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(root, name); err == nil && rel != "." {
			names.WriteString(rel + "\x00")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("cpio", "--null", "--create", "--format=newc", "--quiet", "--owner=0:0")
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = root, strings.NewReader(names.String()), out, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("packing %s: %v", root, err)
	}
}
