// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
)

// Holdings is what an agent holds of the kernel and of Go.
type Holdings struct {
	// Descriptors are all but pipes: Go keeps those that splice(2) went through
	// for the next one, until two garbage collections have passed. Namespaces
	// are those of network and mount namespaces.
	Descriptors, Namespaces    int
	Goroutines                 int
	Entries                    int // of the kernel side's maps
	Listeners, Runtimes, Peers int
	Resident                   int64 // bytes of memory
}

var goroutinesRE = regexp.MustCompile(`(?m)^go_goroutines (\d+)`)

// Holdings looks at what the agent holds at the moment.
func (a *Agent) Holdings(ctx context.Context) (h Holdings, err error) {
	dir := fmt.Sprintf("/proc/%d", a.PID())
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return h, err
	}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
		if err != nil {
			continue // it is closed by now
		}
		if strings.HasPrefix(to, "pipe:") {
			continue
		}
		h.Descriptors++
		if strings.HasPrefix(to, "net:") || strings.HasPrefix(to, "mnt:") {
			h.Namespaces++
		}
	}
	for _, id := range kernelIDs(a.PID(), "map_id") {
		n, err := mapEntries(ebpf.MapID(id))
		if err != nil {
			return h, err
		}
		h.Entries += n
	}
	if h.Resident, err = resident(a.PID()); err != nil {
		return h, err
	}
	page, err := a.Get(ctx, "/metrics")
	if err != nil {
		return h, err
	}
	n := goroutinesRE.FindSubmatch(page)
	if n == nil {
		return h, errors.New("no go_goroutines in the metrics")
	}
	h.Goroutines, _ = strconv.Atoi(string(n[1]))
	s, err := a.AskStatus(ctx)
	h.Listeners, h.Runtimes = len(s.Listeners), len(s.Runtimes)
	if s.Peers != nil {
		h.Peers = len(s.Peers.Peers)
	}
	return h, err
}

// noMoreThan says what the agent holds for nothing: beside what it held when it
// was ready, it may hold something for each runtime, each listener and each peer,
// and a little that comes and goes.
func (h Holdings) noMoreThan(ready Holdings) error {
	var errs []error
	for _, x := range []struct {
		what      string
		n, before int
		each      int // of a runtime or a listener
		peer      int
		spare     int
	}{
		{"descriptors", h.Descriptors, ready.Descriptors, 4, 3, 12},
		{"namespaces", h.Namespaces, ready.Namespaces, 1, 0, 0},
		{"goroutines", h.Goroutines, ready.Goroutines, 6, 30, 20},
		{"map entries", h.Entries, ready.Entries, 2, 0, 0},
	} {
		if most := x.before + x.each*(h.Runtimes+h.Listeners) + x.peer*h.Peers + x.spare; x.n > most {
			errs = append(errs, fmt.Errorf("%d %s, want at most %d", x.n, x.what, most))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%+v, and when it was ready %+v: %w", h, ready, err)
	}
	return nil
}

// leaves fails the test when the agent, if it still runs, goes on holding more
// than when it was ready. By then those runtimes are gone that were started
// after it.
func (a *Agent) leaves(ready Holdings) {
	a.node.t.Helper()
	select {
	case <-a.done:
		return
	default:
	}
	err := Eventually(a.done, func(ctx context.Context) error {
		h, err := a.Holdings(ctx)
		if err != nil {
			return err
		}
		return h.noMoreThan(ready)
	})
	if err == nil {
		return
	}
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.PID()))
	var open []string
	for _, fd := range fds {
		to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", a.PID(), fd.Name()))
		open = append(open, to)
	}
	a.Signal(syscall.SIGQUIT) // it prints its goroutines
	<-a.done
	a.node.t.Errorf("the agent holds something for nothing: %v\n%s\n%s", err, strings.Join(open, "\n"), a.Log(64<<10))
}

// kernelIDs are the ids, of a kind as in fdinfo, of what a process has open.
func kernelIDs(pid int, kind string) (ids []uint32) {
	infos, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	for _, f := range infos {
		b, _ := os.ReadFile(f)
		for line := range strings.Lines(string(b)) {
			var id uint32
			if n, _ := fmt.Sscanf(line, kind+":\t%d", &id); n == 1 {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

// mapEntries counts what is in a map that something has to be deleted from.
func mapEntries(id ebpf.MapID) (n int, err error) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	if m.Type() != ebpf.Hash {
		return 0, nil // others keep nothing of what has ended, or are bounded by design
	}
	var k, v []byte
	for it := m.Iterate(); it.Next(&k, &v); {
		n++
	}
	return n, nil
}

// resident is a process's memory, in bytes.
func resident(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	var size, pages int64
	_, err = fmt.Sscan(string(b), &size, &pages)
	return pages * int64(os.Getpagesize()), err
}
