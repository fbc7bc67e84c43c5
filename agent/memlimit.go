// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"log/slog"
	"os"
	"runtime/debug"

	"weir/agent/procfs"
)

// limitMemory has the garbage collector work harder before the process comes to
// its cgroup's memory limit, where the kernel would kill it. GOMEMLIMIT goes
// before it.
func limitMemory(log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	if bytes, ok := procfs.MemoryLimit("/"); ok {
		limit := bytes / 10 * 9 // the rest is for what isn't Go's
		debug.SetMemoryLimit(limit)
		log.Info("memory is limited by the cgroup", "cgroup_bytes", bytes, "soft_limit_bytes", limit)
	}
}
