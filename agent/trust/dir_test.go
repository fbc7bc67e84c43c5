// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRootMkdirAll(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	dir := t.TempDir()
	build(t, dir, "a/", "link->/a", "dangling->/nowhere", "file=x")
	r := openDirRoot(t, dir)
	made, err := r.mkdirAll("/link/b/c:/d")
	if want := []string{"/link/b", "/link/b/c:", "/link/b/c:/d"}; err != nil || !slices.Equal(made, want) {
		t.Errorf("made %v, %v, want %v", made, err, want)
	}
	for _, p := range []string{"a/b", "a/b/c:", "a/b/c:/d"} {
		if fi, err := os.Stat(filepath.Join(dir, p)); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v", p, fi, err)
		}
	}
	if made, err := r.mkdirAll("a/b/c:/d"); err != nil || len(made) != 0 {
		t.Errorf("a second time it made %v, %v", made, err)
	}
	for _, p := range []string{"dangling", "dangling/x", "file", "file/x"} {
		if made, err := r.mkdirAll(p); err == nil || len(made) != 0 {
			t.Errorf("mkdirAll(%s) made %v, %v", p, made, err)
		}
	}
	if _, err := openDirRoot(t, "/").mkdirAll("/sys/fs/cgroup/unified/weir-trust-test"); err == nil || !strings.Contains(err.Error(), "file system of the kernel") {
		t.Errorf("a directory among the cgroups: %v", err)
	}
}

// mkdirAll makes the directory name and those above it that are missing, with
// mode 0755 whatever the umask. It returns the directories that it made, the
// topmost first, also when it fails.
func (r *Root) mkdirAll(name string) (made []string, err error) {
	d, made, err := r.makeDir(name)
	if err != nil {
		return made, err
	}
	d.close()
	return made, nil
}
