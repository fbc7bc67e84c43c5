// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestRootWriteFile(t *testing.T) {
	for _, noTmpfile := range []bool{false, true} {
		t.Run(fmt.Sprintf("noTmpfile=%v", noTmpfile), func(t *testing.T) {
			dir := t.TempDir()
			build(t, dir, "etc/target=old", "etc/link->/etc/target", "etc/dir/", "var->/etc")
			r := openDirRoot(t, dir)
			r.noTmpfile = noTmpfile
			for i, name := range []string{"/etc/new", "var/new", "etc/link"} {
				content := bytes.Repeat([]byte{byte('a' + i)}, 100_000*i)
				if err := r.writeFile(name, content, 0o640); err != nil {
					t.Errorf("writeFile(%s): %v", name, err)
				}
				if b, err := r.ReadFile(name, 1<<20); err != nil || !bytes.Equal(b, content) {
					t.Errorf("%s has %d bytes, %v, want %d", name, len(b), err, len(content))
				}
				if fi, err := os.Lstat(filepath.Join(dir, strings.Replace(name, "var", "etc", 1))); err != nil || fi.Mode() != 0o640 {
					t.Errorf("%s: mode %v, %v", name, fi.Mode(), err)
				}
			}
			if b, _ := r.ReadFile("etc/target", 100); string(b) != "old" {
				t.Errorf("wrote through the link: %q", b)
			}
			if err := r.writeFile("etc/dir", nil, 0o644); err == nil {
				t.Error("replaced a directory")
			}
			names, err := r.ReadDir("/etc")
			slices.Sort(names)
			if want := []string{"dir", "link", "new", "target"}; err != nil || !slices.Equal(names, want) {
				t.Errorf("the directory has %v, %v, want %v", names, err, want)
			}
		})
	}
}

// writeFile makes the file name hold b, replacing what has that name. It
// follows symbolic links to the directory but not the file's own. No reader
// sees the file with only a part of b.
func (r *Root) writeFile(name string, b []byte, perm fs.FileMode) error {
	parent, base, err := r.openParent(name)
	if err != nil {
		return err
	}
	defer parent.close()
	s, err := r.stage(parent, nil, b, perm, true)
	if err == nil {
		defer s.close()
		err = s.place(parent, base, true)
	}
	if err != nil {
		return &fs.PathError{Op: "write", Path: name, Err: err}
	}
	return nil
}
