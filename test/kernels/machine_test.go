// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

func digest(s string) string { return fmt.Sprintf("%.8x", sha256.Sum256([]byte(s))) }

// machine is a machine with a kernel of Debian's, whose processor is emulated:
// where CI runs there is none that a guest could use.
type machine struct {
	t        testing.TB
	arch     string
	kernel   string   // its file
	archives []string // of the files that it begins with
}

// userland are the packages that a machine's other files are of.
var userland = []string{"bash", "coreutils", "dash", "grep", "iproute2", "kmod", "mount", "procps", "sed", "util-linux"}

// newMachine makes a machine with the kernel that a suite of Debian's has for
// clouds, or that of Ubuntu's jammy, and packages of Debian 12's beside those of
// the userland.
func newMachine(t testing.TB, kernel, arch string, packages ...string) *machine {
	t.Helper()
	m := &machine{t: t, arch: arch}
	var dir string
	if kernel == "jammy" {
		dir = ubuntu(t)
	} else {
		// The kernel's own packages alone: others of those that it depends on make an
		// image with which it finds its disks.
		dir = debian(t, kernel, arch).unpack(func(name string) bool { return strings.HasPrefix(name, "linux-") && name != "linux-base" }, "linux-image-cloud-"+arch)
	}
	images, _ := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	more, _ := filepath.Glob(filepath.Join(dir, "usr/lib/modules/*/vmlinuz"))
	if images = append(images, more...); len(images) == 0 {
		t.Fatalf("there is no kernel in %s", dir)
	}
	m.kernel = images[0]
	modules := packed(t, dir, "usr/lib/modules", func() {
		versions, _ := filepath.Glob(filepath.Join(dir, "usr/lib/modules/*"))
		for _, v := range versions {
			if out, err := exec.Command("depmod", "-b", dir, filepath.Base(v)).CombinedOutput(); err != nil {
				t.Fatalf("depmod: %v\n%s", err, out)
			}
		}
	})
	all := func(string) bool { return true }
	files := debian(t, "bookworm", arch).unpack(all, append(packages, userland...)...)
	m.archives = []string{packed(t, files, ".", func() {}), modules}
	return m
}

// run boots the machine with some more files, by their path in it, has it run
// the steps, and returns what became of each, and what its console said.
func (m *machine) run(files map[string]string, steps ...step) (results map[string]string, console string) {
	m.t.Helper()
	root := m.t.TempDir()
	b, err := json.Marshal(steps)
	if err != nil {
		m.t.Fatal(err)
	}
	plan := filepath.Join(m.t.TempDir(), "steps")
	if err := os.WriteFile(plan, b, 0o644); err != nil {
		m.t.Fatal(err)
	}
	put := func(to, from string) {
		to = filepath.Join(root, to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			m.t.Fatal(err)
		}
		if err := copyFile(from, to); err != nil {
			m.t.Fatal(err)
		}
	}
	put(stepsFile, plan)
	for to, from := range files {
		put(to, from)
	}
	first := filepath.Join(m.t.TempDir(), "first")
	pack(m.t, root, ".", first+".own")
	if err := join(first, append(m.archives, first+".own")...); err != nil {
		m.t.Fatal(err)
	}
	// The guest's clock goes by its instructions, of which one takes a nanosecond,
	// and leaps while it waits: how busy this machine is makes no difference to it.
	// That is with one processor only.
	args := []string{"-icount", "shift=0,sleep=off", "-rtc", "clock=vm", "-smp", "1", "-m", "3G", "-nodefaults", "-display", "none", "-serial", "stdio",
		"-no-reboot", "-kernel", m.kernel, "-initrd", first}
	if m.arch == "arm64" {
		args = append([]string{"qemu-system-aarch64", "-machine", "virt,accel=tcg", "-cpu", "max", "-append", "console=ttyAMA0 quiet panic=-1"}, args...)
	} else {
		// Without ERMS the kernel copies words: each byte of a string instruction is emulated.
		args = append([]string{"qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max,-erms,-fsrm", "-append", "console=ttyS0 quiet panic=-1"}, args...)
	}
	// No machine goes on when the test ends, however it does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(m.t.Context(), args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	results = make(map[string]string)
	var said strings.Builder
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		fmt.Fprintln(&said, line)
		if _, after, ok := strings.Cut(line, mark+" "); ok {
			name, result, _ := strings.Cut(after, " ")
			results[name] = result
			m.t.Logf("%s: %s, %.0f s after the machine was switched on", name, result, time.Since(start).Seconds())
		}
	}
	if err := cmd.Wait(); err != nil {
		m.t.Errorf("qemu: %v", err)
	}
	return results, said.String()
}

// join writes files one after the other.
func join(to string, files ...string) error {
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	for _, f := range files {
		in, err := os.Open(f)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, in)
		in.Close()
		if err != nil {
			return err
		}
	}
	return out.Close()
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	return err
}
