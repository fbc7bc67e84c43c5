// SPDX-License-Identifier: Apache-2.0

package procfs

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/prometheus/procfs"
)

// User returns the user who started a process, proc_pid_status(5). The owner
// of /proc/PID says less: it is root for a process that can't be dumped, which
// any user can make.
func User(pid int) (uint32, error) {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return 0, err
	}
	status, err := p.NewStatus()
	return uint32(status.UIDs[0]), err // the real one
}

// Users are ranges of user ids.
type Users []struct{ first, count uint32 }

func (u Users) Has(uid uint32) bool {
	for _, r := range u {
		if uid >= r.first && uid-r.first < r.count {
			return true
		}
	}
	return false
}

// UsersOf returns the users of the user namespace that a process is in,
// user_namespaces(7), by the ids that the agent's has for them.
func UsersOf(pid int) (Users, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/uid_map")
	if err != nil {
		return nil, err
	}
	return parseUsers(string(b))
}

func parseUsers(uidMap string) (u Users, err error) {
	for line := range strings.Lines(uidMap) {
		var inside, first, count uint32
		if _, err := fmt.Sscan(line, &inside, &first, &count); err != nil {
			return nil, fmt.Errorf("uid_map: %q: %w", line, err)
		}
		u = append(u, struct{ first, count uint32 }{first, count})
	}
	return u, nil
}
