// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	"weir/agent/trust"
)

// Uninstall ends the service that [Install] made and any other running agent,
// takes this node's CA out of every root file system that a runtime of the node
// may read it from, and removes what weir has kept. It returns what it removed.
func Uninstall(ctx context.Context, dataDir, runDir string) (removed []string, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("weir uninstall must run as root: it removes files that root has installed; use sudo")
	}
	// First, because systemd would start it again.
	removed, err = removeService(ctx)
	if err != nil {
		return removed, fmt.Errorf("removing the service: %w", err)
	}
	if err := stopAgent(ctx, runDir); err != nil {
		return removed, err
	}
	gone, err := uninstallCA(dataDir)
	removed = append(removed, gone...)
	if err != nil {
		// The list of what was installed stays, for the next try.
		return removed, err
	}
	var errs []error
	for _, dir := range []string{dataDir, runDir} {
		gone, err := removeOwn(dir)
		if err != nil {
			errs = append(errs, err)
		}
		removed = append(removed, gone...)
	}
	return removed, errors.Join(errs...)
}

// uninstallCA takes this node's CA out of the root file systems of the node and of
// its containers, and returns what it removed.
func uninstallCA(dataDir string) (removed []string, err error) {
	var errs []error
	made := func(string) []trust.Made { return nil }
	if path := filepath.Join(dataDir, LedgerFile); exists(path) {
		if ledger, err := trust.OpenLedger(path); err != nil {
			errs = append(errs, err)
		} else {
			defer ledger.Close()
			made = ledger.Made
		}
	}
	done := func(name string, gone []string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("in the root file system %s: %w", name, err))
		}
		for _, g := range gone {
			removed = append(removed, filepath.Join(name, g))
		}
	}
	seen := trust.LastingRoots()
	for _, name := range seen {
		r, err := trust.OpenRootDir(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("opening the root file system %s: %w", name, err))
			continue
		}
		gone, err := trust.Uninstall(r, trust.UsualPlaces(), made(name))
		r.Close()
		done(name, gone, err)
	}
	// Containers: their processes lead to their root file systems. A container
	// may be, or be of, another node with a weir of its own: without this node's
	// CA, the owner of the certificate there isn't known.
	own, _ := os.ReadFile(filepath.Join(dataDir, "ca", "ca.crt"))
	var procs []os.DirEntry
	if len(own) > 0 {
		procs, _ = os.ReadDir("/proc")
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		r, err := trust.OpenRoot(pid)
		if err != nil {
			continue
		}
		if _, ok := seen[r.ID()]; !ok {
			name := "/proc/" + p.Name() + "/root"
			seen[r.ID()] = name
			gone, err := trust.UninstallOf(own, r, trust.UsualPlaces())
			done(name, gone, err)
		}
		r.Close()
	}
	return removed, errors.Join(errs...)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// ownEntries are what weir makes in its directories. Any other file
// there stays.
var ownEntries = []string{"ca", "store", TagsFile, IdentityFile, LearnedFile, LearnedFile + ".new", LedgerFile, RestartsFile, pidFile, SocketFile, "state.json", "state.json.new"}

func removeOwn(dir string) (removed []string, err error) {
	paths := make([]string, 0, len(ownEntries))
	for _, e := range ownEntries {
		paths = append(paths, filepath.Join(dir, e))
	}
	// What was being written when an agent was killed.
	for _, e := range []string{TagsFile, IdentityFile, RestartsFile} {
		half, _ := filepath.Glob(filepath.Join(dir, e) + ".*")
		paths = append(paths, half...)
	}
	for _, path := range paths {
		if _, serr := os.Lstat(path); serr != nil {
			continue
		}
		if rerr := os.RemoveAll(path); rerr != nil {
			err = errors.Join(err, fmt.Errorf("removing %s: %w", path, rerr))
			continue
		}
		removed = append(removed, path)
	}
	// In a container the directory is a mount, which can't be removed, and on
	// the node it is the directory that was mounted.
	for _, root := range []string{"", "/proc/1/root"} {
		if os.Remove(root+dir) == nil {
			removed = append(removed, dir)
		}
	}
	return removed, err
}

// stopAgent stops the agent that has locked a run directory, and waits for its end.
func stopAgent(ctx context.Context, runDir string) error {
	pid, running := Holder(runDir)
	if !running {
		return nil
	}
	if pid == 0 {
		return fmt.Errorf("%s in %s names no process; stop the running agent and try again", pidFile, runDir)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stopping the agent (process %d): %w", pid, err)
	}
	defer unix.Close(pidfd)
	if err := unix.PidfdSendSignal(pidfd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stopping the agent (process %d): %w", pid, err)
	}
	// The lock is given up before the programs are out of the kernel. pidfd_open(2):
	// it is readable when the process has ended, with all that it had open.
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting for the agent (process %d) to end: %w", pid, err)
		}
	}
	return fmt.Errorf("the agent (process %d) does not end; kill it and try again: %w", pid, ctx.Err())
}
