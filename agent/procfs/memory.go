// SPDX-License-Identifier: Apache-2.0

package procfs

import (
	"bufio"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// MemoryLimit returns the smallest memory limit of this process's cgroup and
// those above it, in either version, and false when there is none. root is where
// /proc and the cgroups are.
func MemoryLimit(root string) (limit int64, ok bool) {
	own, err := os.Open(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return 0, false
	}
	defer own.Close()
	mounts, err := os.Open(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return 0, false
	}
	defer mounts.Close()
	limit = math.MaxInt64
	for _, c := range memoryCgroups(own, mounts) {
		for dir := c.path; ; dir = path.Dir(dir) {
			if n, ok := readLimit(filepath.Join(root, c.mount, dir, c.file)); ok {
				limit = min(limit, n)
			}
			if dir == "/" {
				break
			}
		}
	}
	return limit, limit < maxLimit
}

// maxLimit is more than any machine has: cgroup v1 has a number for no limit.
const maxLimit = 1 << 60

// readLimit reads a file with a limit.
func readLimit(file string) (int64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // "max" is none
	return n, err == nil && n > 0 && n < maxLimit
}

// memoryCgroup is where a process's cgroup has its memory limit: in a file of
// the directory path below mount, and in those above it up to mount.
type memoryCgroup struct{ mount, path, file string }

// memoryCgroups finds a process's cgroups that limit memory. own is
// /proc/PID/cgroup and mounts is /proc/PID/mountinfo, see cgroups(7) and
// proc_pid_mountinfo(5).
func memoryCgroups(own, mounts io.Reader) (found []memoryCgroup) {
	paths := make(map[string]string) // by the name of a controller, or "" for version 2
	for s := bufio.NewScanner(own); s.Scan(); {
		parts := strings.SplitN(s.Text(), ":", 3) // ID:CONTROLLERS:PATH
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			continue
		}
		for c := range strings.SplitSeq(parts[1], ",") {
			paths[c] = parts[2]
		}
	}
	all, err := mountinfo.GetMountsFromReader(mounts, nil)
	if err != nil {
		return nil
	}
	for _, m := range all {
		controller, file := "", "memory.max"
		switch {
		case m.FSType == "cgroup" && slices.Contains(strings.Split(m.VFSOptions, ","), "memory"):
			controller, file = "memory", "memory.limit_in_bytes"
		case m.FSType != "cgroup2":
			continue
		}
		of, ok := paths[controller]
		if !ok {
			continue
		}
		// The mount may show a part of the hierarchy, and in a cgroup namespace
		// the paths begin there. Where the process's cgroup isn't below what is
		// mounted, the mount's own is the best that is known.
		below, ok := strings.CutPrefix(of, strings.TrimSuffix(m.Root, "/"))
		if !ok || below != "" && below[0] != '/' {
			below = "/"
		}
		found = append(found, memoryCgroup{m.Mountpoint, path.Clean("/" + below), file})
	}
	return found
}
