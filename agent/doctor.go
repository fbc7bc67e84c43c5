// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"weir/bpf"
)

// Finding is one thing that weir needs on a node, and how it stands.
type Finding struct {
	What    string `json:"what"`
	Problem string `json:"problem,omitempty"` // empty when all is well
	Step    string `json:"step,omitempty"`    // what mends it
	// Warning says that weir works in spite of the problem, only less well.
	Warning bool `json:"warning,omitempty"`
}

// Doctor examines the node, the most important things first. It changes
// nothing.
func Doctor(ctx context.Context, conf Config) (findings []Finding) {
	add := func(what, problem, step string) {
		findings = append(findings, Finding{What: what, Problem: problem, Step: step})
	}
	if os.Geteuid() != 0 {
		add("privileges", "not root", "run it with sudo, or in a privileged container")
		return findings // the rest would only say the same
	}
	add("privileges", "", "")

	cgroup := conf.Cgroup
	if cgroup == "" {
		var err error
		if cgroup, err = bpf.CgroupRoot(); err != nil {
			add("cgroup2", err.Error(), "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")
			return findings
		}
	}
	if errs := bpf.Check(cgroup); len(errs) > 0 {
		for _, err := range errs {
			add("kernel", err.Error(), "")
		}
	} else {
		add("kernel: eBPF on "+cgroup, "", "")
	}

	what := "the node's processes are visible"
	if _, err := os.Stat("/proc/1"); err != nil {
		add(what, err.Error(), "mount /proc")
	} else if inContainerPIDs() {
		add(what, "weir sees only its own container's processes", "run the container with the host's PID namespace (docker run --pid=host, or hostPID: true)")
	} else {
		add(what, "", "")
	}

	for _, d := range []struct{ flag, dir string }{{"--data-dir", conf.DataDir}, {"--run-dir", conf.RunDir}} {
		what := d.flag + " " + d.dir
		if err := writable(d.dir); err != nil {
			add(what, err.Error(), "choose a writable directory with "+d.flag)
		} else if free, total, err := space(d.dir); err == nil && d.flag == "--data-dir" && free < total/20 {
			findings = append(findings, Finding{What: what, Problem: fmt.Sprintf("only %d MiB are free; weir keeps nothing when less than 5%% of a file system is", free>>20),
				Step: "free some space, or choose another directory with " + d.flag, Warning: true})
		} else {
			add(what, "", "")
		}
	}

	running := agentAnswers(ctx, conf.Admin)
	what = "--admin " + conf.Admin
	if running {
		add(what+": the agent is running", "", "")
	} else if l, err := net.Listen("tcp", conf.Admin); err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			add(what, "the address is in use by something that is not weir", "stop it, or choose another address with --admin")
		} else {
			add(what, err.Error(), "choose another address with --admin")
		}
	} else {
		l.Close()
		add(what, "", "")
	}

	pids, err := processesIn(cgroup)
	if err != nil {
		add("runtimes", err.Error(), "choose the cgroup2 directory that the runtimes are in with --cgroup")
		return findings
	}
	n := 0
	for _, pid := range pids {
		p, err := readProcess(pid)
		if err != nil {
			continue
		}
		k := kindOf(p.comm, p.exe)
		if k == nil {
			continue
		}
		n++
		what := fmt.Sprintf("%s (process %d)", k.name, p.pid)
		for _, kv := range nulSeparated(pid, "environ") {
			if proxied(kv) {
				findings = append(findings, Finding{What: what, Problem: "it has a proxy set in its environment, so its pulls don't go to registries directly and are passed through",
					Step: "exempt its registries with NO_PROXY, or leave it so", Warning: true})
				what = ""
				break
			}
		}
		if what != "" {
			add(what, "", "")
		}
	}
	if n == 0 {
		findings = append(findings, Finding{What: "runtimes", Problem: "no container runtime is running in " + cgroup,
			Step: "nothing to do: weir will see it when it starts", Warning: true})
	}
	return findings
}

func proxied(kv string) bool {
	for _, name := range []string{"HTTPS_PROXY=", "https_proxy="} {
		if len(kv) > len(name) && kv[:len(name)] == name {
			return true
		}
	}
	return false
}

// inContainerPIDs says whether the process is in a PID namespace other than the
// node's. The node's first one has this inode on every kernel
// (PROC_PID_INIT_INO in include/linux/proc_ns.h).
func inContainerPIDs() bool {
	const initial = 0xEFFFFFFC
	var st unix.Stat_t
	return unix.Stat("/proc/self/ns/pid", &st) == nil && st.Ino != initial
}

// writable says whether files can be made in dir or, if it isn't there, in the
// next directory above it that is.
func writable(dir string) error {
	for {
		st, err := os.Stat(dir)
		if errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
			dir = filepath.Dir(dir)
			continue
		}
		if err != nil {
			return err
		}
		if !st.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
		if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
			return fmt.Errorf("%s can't be written to: %w", dir, err)
		}
		return nil
	}
}

func space(dir string) (free, total int64, err error) {
	var st unix.Statfs_t
	for unix.Statfs(dir, &st) != nil {
		if dir == filepath.Dir(dir) {
			return 0, 0, fs.ErrNotExist
		}
		dir = filepath.Dir(dir)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// agentAnswers says whether an agent serves at an admin address.
func agentAnswers(ctx context.Context, admin string) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/api/status", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	return resp.StatusCode == http.StatusOK && resp.Header.Get("Content-Type") == "application/json"
}
