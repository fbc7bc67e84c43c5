// SPDX-License-Identifier: Apache-2.0

package procfs

import (
	"os"
	"path/filepath"
	"testing"
)

// The smallest limit counts, of whatever is above the process, in either version
// and as containers see it.
func TestCgroupMemory(t *testing.T) {
	const (
		v2     = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
		v1     = "36 32 0:32 / /sys/fs/cgroup/memory rw shared:16 - cgroup cgroup rw,memory\n33 32 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
		hybrid = "34 32 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
		pod    = "900 880 0:26 /kubepods/pod1/weir /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
	)
	for name, tt := range map[string]struct {
		own, mounts string
		files       map[string]string
		want        int64
	}{
		"none":           {"0::/\n", v2, nil, 0},
		"max":            {"0::/a/b\n", v2, map[string]string{"/sys/fs/cgroup/a/b/memory.max": "max\n"}, 0},
		"own":            {"0::/a/b\n", v2, map[string]string{"/sys/fs/cgroup/a/b/memory.max": "1000\n", "/sys/fs/cgroup/a/memory.max": "max\n"}, 1000},
		"above":          {"0::/a/b/c\n", v2, map[string]string{"/sys/fs/cgroup/a/b/c/memory.max": "1000\n", "/sys/fs/cgroup/a/memory.max": "900\n"}, 900},
		"beside":         {"0::/a\n", v2, map[string]string{"/sys/fs/cgroup/b/memory.max": "900\n"}, 0},
		"in a namespace": {"0::/\n", pod, map[string]string{"/sys/fs/cgroup/memory.max": "700\n"}, 700},
		"part mounted":   {"0::/kubepods/pod1/weir/x\n", pod, map[string]string{"/sys/fs/cgroup/x/memory.max": "700\n"}, 700},
		"not below":      {"0::/../other\n", pod, map[string]string{"/sys/fs/cgroup/memory.max": "700\n"}, 700},
		"a like name":    {"0::/kubepods/pod1/weirdo\n", pod, map[string]string{"/sys/fs/cgroup/memory.max": "700\n"}, 700},
		"v1":             {"5:cpu,cpuacct:/c\n4:memory:/m/n\n", v1, map[string]string{"/sys/fs/cgroup/memory/m/memory.limit_in_bytes": "800\n", "/sys/fs/cgroup/memory/m/n/memory.limit_in_bytes": "9223372036854771712\n"}, 800},
		"v1, no limit":   {"4:memory:/m\n", v1, map[string]string{"/sys/fs/cgroup/memory/m/memory.limit_in_bytes": "9223372036854771712\n"}, 0},
		"hybrid":         {"4:memory:/m\n0::/u\n", v1 + hybrid, map[string]string{"/sys/fs/cgroup/memory/m/memory.limit_in_bytes": "800\n"}, 800},
		"not understood": {"what\n::\n4:memory\n", "x\n" + v2, map[string]string{"/sys/fs/cgroup/memory.max": "700\n"}, 0},
		"a bad number":   {"0::/\n", v2, map[string]string{"/sys/fs/cgroup/memory.max": "-7\n"}, 0},
	} {
		root := t.TempDir()
		files := map[string]string{"/proc/self/cgroup": tt.own, "/proc/self/mountinfo": tt.mounts}
		for name, content := range tt.files {
			files[name] = content
		}
		for name, content := range files {
			name = filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		limit, ok := MemoryLimit(root)
		if !ok {
			limit = 0
		}
		if limit != tt.want {
			t.Errorf("%s: %d, want %d", name, limit, tt.want)
		}
	}
}
