// SPDX-License-Identifier: Apache-2.0

// Package procfs reads what weir needs of /proc.
//
// Where github.com/prometheus/procfs or github.com/moby/sys/user would do, but
// for what they make of a line that isn't as expected, this package has its own:
// the first takes a process without a Uid for root's, the second a number that
// it can't read for 0, and here both decide what may be written for whom.
package procfs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Process is what /proc says of a process.
type Process struct {
	PID    int
	Parent int
	Start  time.Duration // after boot; tells it from a later one with its pid
	Comm   string
	Exe    string // base name of the program's file
}

// clockTick is the unit of starttime in /proc/PID/stat: USER_HZ, which is 100
// on every architecture that Go runs on.
const clockTick = time.Second / 100

// Read reads a process's identity. The error is fs.ErrNotExist when it
// is gone.
func Read(pid int) (Process, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = fs.ErrNotExist
		}
		return Process{}, err
	}
	p, err := parseStat(b)
	if err != nil {
		return p, fmt.Errorf("process %d: %w", pid, err)
	}
	if exe, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe"); err == nil {
		p.Exe = strings.TrimSuffix(filepath.Base(exe), " (deleted)")
	}
	return p, nil
}

// parseStat reads /proc/PID/stat, proc_pid_stat(5). The name, which a process
// chooses, is in parentheses and may contain some.
func parseStat(b []byte) (p Process, err error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 1 || end < open {
		return p, errors.New("not a line of /proc/PID/stat")
	}
	if p.PID, err = strconv.Atoi(strings.TrimSpace(string(b[:open]))); err != nil {
		return p, fmt.Errorf("pid in /proc/PID/stat: %w", err)
	}
	p.Comm = string(b[open+1 : end])
	fields := strings.Fields(string(b[end+1:]))
	const ppid, starttime = 4 - 3, 22 - 3 // the first field after the name is the third
	if len(fields) <= starttime {
		return p, errors.New("no start time in /proc/PID/stat")
	}
	if p.Parent, err = strconv.Atoi(fields[ppid]); err != nil {
		return p, fmt.Errorf("parent in /proc/PID/stat: %w", err)
	}
	ticks, err := strconv.ParseUint(fields[starttime], 10, 63)
	if err != nil || ticks > uint64(1<<62)/uint64(clockTick) {
		return p, errors.New("start time in /proc/PID/stat out of range")
	}
	p.Start = time.Duration(ticks) * clockTick
	return p, nil
}

// SinceBoot is the clock that processes' start times are of.
func SinceBoot() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}

// BootID tells one boot of the machine from another.
func BootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// Strings reads /proc/PID/cmdline or environ, at most 128 KiB of it: a process
// makes them as long as it likes.
func Strings(pid int, file string) []string {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/" + file)
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, 128<<10)
	n := 0
	for n < len(b) {
		k, err := f.Read(b[n:])
		n += k
		if err != nil {
			break
		}
	}
	return strings.FieldsFunc(string(b[:n]), func(r rune) bool { return r == 0 })
}

// Children are the processes that a process has started, and that run.
func Children(pid int) (all []Process, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, err := Read(n); err == nil && p.Parent == pid {
			all = append(all, p)
		}
	}
	return all, nil
}

// InCgroup lists the processes in a cgroup2 directory and below.
func InCgroup(cgroup string) (pids []int, err error) {
	err = filepath.WalkDir(cgroup, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if path == cgroup {
				return err
			}
			return nil // a cgroup that has gone meanwhile
		}
		if !e.IsDir() {
			return nil
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return nil // gone, or a threaded cgroup, whose processes its domain lists
		}
		for line := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// Connections counts a process's TCP connections to the given ports of others,
// proc_pid_net(5).
func Connections(pid int, ports []uint16) (n int, err error) {
	dir := "/proc/" + strconv.Itoa(pid)
	fds, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return 0, err
	}
	mine := make(map[string]bool) // socket's inodes
	for _, fd := range fds {
		to, _ := os.Readlink(dir + "/fd/" + fd.Name())
		if ino, ok := strings.CutPrefix(to, "socket:["); ok {
			mine[strings.TrimSuffix(ino, "]")] = true
		}
	}
	for _, file := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(dir + "/net/" + file)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) && file == "tcp6" {
				continue // a kernel without IPv6
			}
			return 0, err
		}
		for line := range strings.Lines(string(b)) {
			if port, ino, ok := parseConnection(line); ok && slices.Contains(ports, port) && mine[ino] {
				n++
			}
		}
	}
	return n, nil
}

// parseConnection reads a line of /proc/PID/net/tcp or tcp6: the port at the
// other side, and the socket's inode. It returns false for what is not connected
// to anything, or is not a connection.
func parseConnection(line string) (port uint16, inode string, ok bool) {
	f := strings.Fields(line)
	if len(f) < 10 {
		return 0, "", false
	}
	at := strings.LastIndexByte(f[2], ':')
	p, err := strconv.ParseUint(f[2][at+1:], 16, 16)
	if at < 0 || err != nil || p == 0 {
		return 0, "", false
	}
	return uint16(p), f[9], true
}

// Netns returns the inode of a process's network namespace.
func Netns(pid int) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}
