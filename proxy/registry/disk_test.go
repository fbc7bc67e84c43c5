// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"weir/proxy/store"
)

// A disk hangs, and what is read from it turns out to be damaged: the answer goes
// on with what the upstream sends, manifests and blobs pass by, and all of that
// asks the disk once.
func TestDiskHangs(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	want, cold := bytesOf(6, 1_500_000), bytesOf(7, 300_000)
	d, other := u.put("a", want), u.put("a", cold)
	manifest, body := u.putManifest("a", "x", docker2, d)
	s := newSide(t, u, store.Options{})
	path := "/v2/a/blobs/" + d.String()
	s.want(s.do("GET", path, ""), 200, want, "GET "+path)
	f, err := os.OpenFile(filepath.Join(s.dir, "blobs", "sha256", d.Encoded()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteAt([]byte("damage"), 1_000_000)
	f.Close()

	// Where blobs arrive is a file system of its own, which is frozen.
	image, ingest := filepath.Join(t.TempDir(), "image"), filepath.Join(s.dir, "ingest")
	run := func(args ...string) {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v (needs root): %v\n%s", args, err, out)
		}
	}
	run("truncate", "-s", "64M", image)
	run("mkfs.ext4", "-q", "-F", image)
	run("mount", "-o", "loop", image, ingest)
	defer run("umount", "-l", ingest)
	run("fsfreeze", "-f", ingest)
	thaw := sync.OnceFunc(func() { run("fsfreeze", "-u", ingest) })
	defer thaw()
	// The kernel doesn't end a process with a thread that waits for it.
	defer time.AfterFunc(time.Minute, thaw).Stop()

	s.want(s.do("GET", path, ""), 200, want, "GET "+path)
	since := s.store.Stats().Hangs
	if since.IsZero() {
		t.Fatal("the store doesn't say that its disk hangs")
	}
	for range 2 {
		path = "/v2/a/blobs/" + other.String()
		s.want(s.do("GET", path, ""), 200, cold, "GET "+path)
		path = "/v2/a/manifests/" + manifest.String()
		s.want(s.do("GET", path, ""), 200, body, "GET "+path)
	}
	if st := s.store.Stats(); !st.Hangs.Equal(since) || st.Blobs != 0 || st.Bytes != 0 {
		t.Errorf("%+v", st)
	}
}
