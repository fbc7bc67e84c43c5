// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// listing describes everything below dir: names, types, modes, owners, contents.
func listing(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := os.Lstat(p)
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&b, "%s %v %d:%d", strings.TrimPrefix(p, dir), fi.Mode(), st.Uid, st.Gid)
		switch {
		case fi.Mode().IsRegular():
			f, err := os.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, io.LimitReader(f, 1<<20)); err != nil {
				return err
			}
			fmt.Fprintf(&b, " %d %x", fi.Size(), h.Sum(nil)[:8])
		case fi.Mode()&fs.ModeSymlink != 0:
			l, err := os.Readlink(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", l)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatalf("list %s: %v", dir, err)
	}
	return b.String()
}

// build makes a tree: "dir/", "file=content", "link->target".
func build(t testing.TB, dir string, entries ...string) {
	t.Helper()
	for _, e := range entries {
		var err error
		parent := func(p string) string {
			p = filepath.Join(dir, p)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				t.Fatal(err)
			}
			return p
		}
		if name, target, ok := strings.Cut(e, "->"); ok {
			err = os.Symlink(target, parent(name))
		} else if name, content, ok := strings.Cut(e, "="); ok {
			err = os.WriteFile(parent(name), []byte(content), 0o644)
		} else {
			err = os.MkdirAll(filepath.Join(dir, e), 0o755)
		}
		if err != nil {
			t.Fatalf("build %s: %v", e, err)
		}
	}
}

func openDirRoot(t testing.TB, dir string) *Root {
	t.Helper()
	r, err := OpenRootDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	// These tests run as root: a Root that doesn't confine must not get to
	// write to the machine.
	if ok, err := r.Exists("/proc/self/status"); ok && dir != "/" {
		t.Fatalf("paths below %s lead to the machine's own root (%v)", dir, err)
	}
	return r
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root: mounts, devices and other users' processes")
	}
}

// within fails the test if f is not done soon: it would block for ever.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s blocks", what)
	}
}

// Nothing in the tree leads out of it.
func TestRootConfines(t *testing.T) {
	base := t.TempDir()
	build(t, base, "outside/secret=secret", "root/etc/", "root/in/file=in",
		"root/abs->/outside", "root/up->../../../../../outside", "root/etc/up->../../outside",
		"root/real->"+filepath.Join(base, "outside"), "root/etc/in->/in", "root/loop->loop", "root/hop->etc/in/../in")
	r := openDirRoot(t, filepath.Join(base, "root"))
	outside := listing(t, filepath.Join(base, "outside"))
	for _, link := range []string{"abs", "up", "etc/up", "real", "../outside", "/../outside", "loop"} {
		if b, err := r.ReadFile(link+"/secret", 100); err == nil {
			t.Errorf("ReadFile(%s/secret) = %q", link, b)
		}
		if err := r.writeFile(link+"/new", []byte("x"), 0o644); err == nil {
			t.Errorf("writeFile(%s/new) succeeded", link)
		}
		if err := r.remove(link + "/secret"); err == nil {
			t.Errorf("remove(%s/secret) succeeded", link)
		}
		if ok, err := r.RemoveDirIfEmpty(link + "/secret"); ok {
			t.Errorf("RemoveDirIfEmpty(%s/secret) = %v, %v", link, ok, err)
		}
		if names, err := r.ReadDir(link); err == nil {
			t.Errorf("ReadDir(%s) = %v", link, names)
		}
		if ok, _ := r.Exists(link + "/secret"); ok {
			t.Errorf("Exists(%s/secret)", link)
		}
		if strings.Contains(link, "..") {
			continue // above the root is the root: mkdirAll makes /outside there
		}
		if made, err := r.mkdirAll(link + "/dir"); err == nil {
			t.Errorf("mkdirAll(%s/dir) made %v through a link that leads nowhere", link, made)
		}
	}
	if after := listing(t, filepath.Join(base, "outside")); after != outside {
		t.Errorf("outside was changed:\n%s\nbefore:\n%s", after, outside)
	}
	// While links within it do work.
	for _, name := range []string{"etc/in/file", "/etc/in/file", "hop/file", "../../in/file"} {
		if b, err := r.ReadFile(name, 100); err != nil || string(b) != "in" {
			t.Errorf("ReadFile(%s) = %q, %v", name, b, err)
		}
	}
}

func TestRootMagicLinks(t *testing.T) {
	r := openDirRoot(t, "/")
	if _, err := r.ReadFile("/proc/self/status", 1<<20); err != nil {
		t.Errorf("a file of /proc: %v", err)
	}
	if _, err := r.ReadDir("/proc/self/root/etc"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("through a link of /proc: error %v, want ELOOP", err)
	}
}

func TestRootReadFile(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	build(t, dir, "file=12345", "empty=", "dir/", "link->file", "etc/fifo-link->/fifo")
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666); err != nil {
		t.Fatal(err)
	}
	// /dev/zero: endless, if it were read.
	if err := unix.Mknod(filepath.Join(dir, "zero"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := openDirRoot(t, dir)
	for _, name := range []string{"file", "link"} {
		if b, err := r.ReadFile(name, 5); err != nil || string(b) != "12345" {
			t.Errorf("ReadFile(%s) = %q, %v", name, b, err)
		}
	}
	if b, err := r.ReadFile("empty", 0); err != nil || len(b) != 0 {
		t.Errorf("ReadFile(empty) = %q, %v", b, err)
	}
	if _, err := r.ReadFile("file", 4); !errors.Is(err, ErrTooLarge) {
		t.Errorf("5 bytes with a limit of 4: %v", err)
	}
	if _, err := r.ReadFile("none", 4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	for _, name := range []string{"fifo", "etc/fifo-link", "zero", "dir", "socket"} {
		within(t, "ReadFile("+name+")", func() {
			if _, err := r.ReadFile(name, 100); err == nil || !strings.Contains(err.Error(), "not a regular file") {
				t.Errorf("ReadFile(%s): %v", name, err)
			}
		})
	}
	// Its size is 0 and its content isn't.
	if b, err := openDirRoot(t, "/proc").ReadFile("/version", 4096); err != nil || len(b) == 0 {
		t.Errorf("a file that hides its size: %q, %v", b, err)
	}
	if _, err := openDirRoot(t, "/proc").ReadFile("/version", 3); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a file that hides its size, with a limit: %v", err)
	}
}

// A process that has a lease on a file would hold up those who open it.
func TestRootReadFileLease(t *testing.T) {
	dir := t.TempDir()
	build(t, dir, "file=12345")
	f, err := os.OpenFile(filepath.Join(dir, "file"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Fatalf("set lease: %v", err)
	}
	r := openDirRoot(t, dir)
	within(t, "ReadFile", func() {
		if _, err := r.ReadFile("file", 100); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("error %v, want EAGAIN", err)
		}
	})
}

func TestRootRemove(t *testing.T) {
	dir := t.TempDir()
	build(t, dir, "full/file=x", "empty/", "link->/full/file", "dirlink->/empty")
	r := openDirRoot(t, dir)
	if ok, err := r.RemoveDirIfEmpty("/full"); ok || err != nil {
		t.Errorf("RemoveDirIfEmpty(full) = %v, %v", ok, err)
	}
	if ok, err := r.RemoveDirIfEmpty("/none"); ok || err != nil {
		t.Errorf("RemoveDirIfEmpty(none) = %v, %v", ok, err)
	}
	if ok, err := r.RemoveDirIfEmpty("/dirlink"); ok || err == nil {
		t.Errorf("RemoveDirIfEmpty(dirlink) = %v, %v", ok, err)
	}
	if ok, err := r.RemoveDirIfEmpty("/"); ok || err == nil {
		t.Errorf("RemoveDirIfEmpty(/) = %v, %v", ok, err)
	}
	if ok, err := r.RemoveDirIfEmpty("/empty"); !ok || err != nil {
		t.Errorf("RemoveDirIfEmpty(empty) = %v, %v", ok, err)
	}
	if err := r.remove("link"); err != nil {
		t.Errorf("remove(link): %v", err)
	}
	if ok, err := r.Exists("/full/file"); !ok || err != nil {
		t.Errorf("what the link led to: %v, %v", ok, err)
	}
	if ok, err := r.Exists("link"); ok || err != nil {
		t.Errorf("the link: %v, %v", ok, err)
	}
}

func TestRootDialUnix(t *testing.T) {
	dir := t.TempDir()
	deep := strings.Repeat("long/", 30)
	build(t, dir, "run/", "var/run->/run", deep, "file=x", "run/up.sock->../../../../run/x.sock")
	// Sockets are bound by paths that fit sockaddr_un.
	for _, p := range []string{"run/x.sock", deep + "x.sock"} {
		d, err := os.Open(filepath.Join(dir, filepath.Dir(p)))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		l, err := net.Listen("unix", procFD(int(d.Fd()))+"/x.sock")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Write([]byte(p))
				c.Close()
			}
		}()
	}
	r := openDirRoot(t, dir)
	for name, want := range map[string]string{
		"/run/x.sock": "run/x.sock", "/var/run/x.sock": "run/x.sock", "run/up.sock": "run/x.sock", deep + "x.sock": deep + "x.sock",
	} {
		c, err := r.DialUnix(t.Context(), name)
		if err != nil {
			t.Errorf("DialUnix(%s): %v", name, err)
			continue
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != want {
			t.Errorf("DialUnix(%s) reached %q, %v, want %q", name, b, err, want)
		}
		c.Close()
	}
	if _, err := r.DialUnix(t.Context(), "/run/none.sock"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	if _, err := r.DialUnix(t.Context(), "/file"); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.DialUnix(ctx, "/run/x.sock"); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// start runs a shell command with args and returns once it has said it is there.
func start(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
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
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		t.Fatalf("%v did not start: %v", args, err)
	}
	return cmd
}

func TestOpenRoot(t *testing.T) {
	needRoot(t)
	open := func(pid int) *Root {
		t.Helper()
		r, err := OpenRoot(pid)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return r
	}
	self, same := open(os.Getpid()), open(os.Getpid())
	if self.ID() != same.ID() {
		t.Errorf("one process, two ids: %v, %v", self.ID(), same.ID())
	}
	child := start(t, "sh", "-c", "echo; read x")
	if got := open(child.Process.Pid).ID(); got != self.ID() {
		t.Errorf("a child has id %v, we have %v", got, self.ID())
	}
	// A mount that only it sees: another world with the same root directory.
	private := start(t, "unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt && mkdir -p /mnt/etc && echo mine >/mnt/etc/file && echo; read x")
	r := open(private.Process.Pid)
	if r.ID() == self.ID() {
		t.Errorf("a process with mounts of its own has our id %v", r.ID())
	}
	if b, err := r.ReadFile("/mnt/etc/file", 10); err != nil || string(b) != "mine\n" {
		t.Errorf("its file: %q, %v", b, err)
	}
	if err := r.writeFile("/mnt/etc/ssl", []byte("x"), 0o644); err != nil {
		t.Errorf("write into its mount: %v", err)
	}
	private.Process.Kill()
	private.Wait()
	if ok, err := r.Exists("/etc"); !ok || err != nil {
		t.Errorf("the root directory after its end: %v, %v", ok, err)
	}
	if _, err := OpenRoot(private.Process.Pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a process that is gone: %v", err)
	}
	if _, err := OpenRoot(0); err == nil {
		t.Error("process 0 was opened")
	}
	r.Close()
	if _, err := r.ReadFile("/etc", 10); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// remove removes the file name, which may be a symbolic link but not a
// directory.
func (r *Root) remove(name string) error {
	parent, base, err := r.openParent(name)
	if err != nil {
		return err
	}
	defer parent.close()
	if err := unix.Unlinkat(parent.fd, base, 0); err != nil {
		return &fs.PathError{Op: "remove", Path: name, Err: err}
	}
	return nil
}
