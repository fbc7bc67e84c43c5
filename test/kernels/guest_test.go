// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// step is a program that a machine runs to its end.
type step struct {
	Name string
	Args []string
	Dir  string
}

const (
	stepsFile = "/steps.json"
	// mark begins a line on a machine's console that says what became of a step:
	// "MARK NAME RESULT", where the result is "passed" or why not.
	mark   = "@@weir"
	passed = "passed"
	// stepTime bounds a step, on a processor that is emulated.
	stepTime = 10 * time.Minute
)

// boot is the first process of a machine: it makes a Linux of the kernel and the
// files that are there, runs the steps, and powers off.
func boot() {
	err := setUp()
	if err == nil {
		err = reap(exec.Command("/proc/self/exe", "steps"))
	}
	if err != nil {
		fmt.Println(mark, "boot", err)
	}
	unix.Sync()
	fmt.Println(mark, "poweroff", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	select {} // the kernel panics when its first process ends
}

// setUp mounts what a Linux has, with one hierarchy of cgroups, the second
// version.
func setUp() error {
	for _, m := range [][3]string{
		{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"}, {"tmpfs", "/tmp", "tmpfs"}, {"tmpfs", "/run", "tmpfs"},
		{"tmpfs", "/dev/shm", "tmpfs"}, {"devpts", "/dev/pts", "devpts"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2"}, {"tracefs", "/sys/kernel/tracing", "tracefs"}, {"bpf", "/sys/fs/bpf", "bpf"},
	} {
		if err := errors.Join(os.MkdirAll(m[1], 0o755), unix.Mount(m[0], m[1], m[2], 0, "")); err != nil {
			return fmt.Errorf("mounting %s: %w", m[1], err)
		}
	}
	for name, value := range map[string]string{"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8",
		"WEIR_BINARY": "/root/weir"} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("setting the loopback up: %w\n%s", err, out)
	}
	// It is a directory until base-files is configured, and dockerd listens below it.
	return errors.Join(os.Remove("/var/run"), os.Symlink("/run", "/var/run"), os.Symlink("/proc/self/fd", "/dev/fd"))
}

// reap runs a program, and waits for it and for all processes that have lost
// their parent meanwhile.
func reap(cmd *exec.Cmd) error {
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if pid == cmd.Process.Pid {
			return nil
		}
	}
}

// runSteps runs the steps of a machine.
func runSteps() error {
	b, err := os.ReadFile(stepsFile)
	if err != nil {
		return err
	}
	var steps []step
	if err := json.Unmarshal(b, &steps); err != nil {
		return err
	}
	for _, s := range steps {
		ctx, cancel := context.WithTimeout(context.Background(), stepTime)
		cmd := exec.CommandContext(ctx, s.Args[0], s.Args[1:]...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = s.Dir, os.Stdout, os.Stdout
		result := passed
		fmt.Printf("--- %s: %s\n", s.Name, strings.Join(s.Args, " "))
		start := time.Now()
		if err := cmd.Run(); err != nil {
			result = err.Error()
		}
		cancel()
		fmt.Printf("\n--- %s took %.0f s\n%s %s %s\n", s.Name, time.Since(start).Seconds(), mark, s.Name, result)
	}
	return nil
}
