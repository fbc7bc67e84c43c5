// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"weir/test/lab"
)

// fromEnv is how often something is done: more often by `make soak`.
func fromEnv(t testing.TB, name string, n int) int {
	t.Helper()
	if s := os.Getenv(name); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return n
}

// Programs that connect in their first milliseconds, in fresh containers whose
// certificate directory has never had weir's: each pull succeeds. Each is
// intercepted, but for those that connect before the agent has come to open a
// door in their network namespace, on a machine that is busy: they are passed
// through. WEIR_STARTS is how many there are.
func TestStarts(t *testing.T) {
	count := fromEnv(t, "WEIR_STARTS", 40)
	w := newWorld(t)
	node := w.Node()
	const clean = "/var/lib/clean.crt"
	node.Run("cp", "/etc/ssl/certs/ca-certificates.crt", clean)
	agent := node.Agent()
	crane := node.As(lab.Tool(t, "crane"), "crane")
	node.Run(crane, "pull", flyway, "/dev/null")
	// Every other one in a network namespace of its own, where no door is.
	boxes := []*lab.Node{node, node.Box(), node, node.Box()}
	for _, b := range boxes {
		b.WriteFile("/var/lib/start.sh", fmt.Sprintf(`
mount -t tmpfs tmpfs /etc/ssl/certs
cat %s > /etc/ssl/certs/ca-certificates.crt
exec %s pull %s /dev/null
`, clean, crane, flyway))
		if b != node {
			was, err := node.File(clean)
			if err != nil {
				t.Fatal(err)
			}
			b.WriteFile(clean, string(was))
		}
	}
	w.forget()
	before := agent.Status().Connections.Intercepted
	var wg sync.WaitGroup
	for _, b := range boxes {
		wg.Go(func() {
			for i := range count / len(boxes) {
				if out, err := b.Output("unshare", "--mount", "sh", "-e", "/var/lib/start.sh"); err != nil {
					t.Errorf("start %d: %v\n%s", i, err, out)
				}
			}
		})
	}
	wg.Wait()
	starts := int64(count / len(boxes) * len(boxes))
	// A pull of this image takes 4 blobs, and each of them is a redirect.
	passed := int64(w.hub.Log.BlobGETs() / 8)
	if passed > starts/20 {
		t.Errorf("%d of %d starts were not intercepted:\n%s", passed, starts, w.hub.Log)
	}
	if n := agent.Status().Connections.Intercepted - before; n < starts-passed {
		t.Errorf("%d of %d starts were intercepted", n, starts)
	}
	t.Logf("%d starts, %d passed through", starts, passed)
}

// holdings is what an agent holds of the kernel and of Go.
type holdings struct {
	descriptors, namespaces, goroutines, entries, doors, runtimes int
}

func held(t *testing.T, a *lab.Agent) (h holdings) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d", a.PID())
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
		if err != nil {
			continue
		}
		h.descriptors++
		if strings.HasPrefix(to, "net:") || strings.HasPrefix(to, "mnt:") {
			h.namespaces++
		}
		info, _ := os.ReadFile(filepath.Join(dir, "fdinfo", fd.Name()))
		if id := regexp.MustCompile(`map_id:\s+(\d+)`).FindSubmatch(info); id != nil {
			n, _ := strconv.Atoi(string(id[1]))
			h.entries += mapEntries(t, ebpf.MapID(n))
		}
	}
	page, err := a.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	n := regexp.MustCompile(`(?m)^go_goroutines (\d+)`).FindSubmatch(page)
	if n == nil {
		t.Fatal("no go_goroutines in the metrics")
	}
	h.goroutines, _ = strconv.Atoi(string(n[1]))
	s := a.Status()
	h.doors, h.runtimes = len(s.Doors), len(s.Runtimes)
	return h
}

func mapEntries(t *testing.T, id ebpf.MapID) (n int) {
	t.Helper()
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if m.Type() != ebpf.Hash {
		return 0 // others keep nothing of what has ended, or are bounded by design
	}
	var k, v []byte
	for it := m.Iterate(); it.Next(&k, &v); {
		n++
	}
	return n
}

// Containers with a dockerd in them come and go: nothing of them is left.
// WEIR_CONTAINERS is how many there are.
func TestContainersLeaveNothing(t *testing.T) {
	count := fromEnv(t, "WEIR_CONTAINERS", 10)
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	var first holdings
	for i := range count {
		box := node.Box()
		c := box.NewestContainerd()
		c.Pull(flyway)
		if i%3 == 0 {
			c.Kill() // with the container, and all at once
		} else {
			c.Stop()
		}
		box.End()
		if i == 2 {
			first = settled(t, agent, func(h holdings) error {
				if h.doors+h.runtimes > 0 {
					return fmt.Errorf("%+v", h)
				}
				return nil
			})
		}
	}
	last := settled(t, agent, func(h holdings) error {
		// Go keeps a few goroutines and pipes for what comes next.
		if h.doors+h.runtimes > 0 || h.entries > first.entries || h.namespaces > first.namespaces || h.descriptors > first.descriptors+4 || h.goroutines > first.goroutines+4 {
			return errors.New("more than before")
		}
		return nil
	})
	t.Logf("after 3 containers %+v, after %d %+v", first, count, last)
}

func settled(t *testing.T, a *lab.Agent, ok func(holdings) error) (h holdings) {
	t.Helper()
	if err := lab.Eventually(nil, func(context.Context) error {
		h = held(t, a)
		return ok(h)
	}); err != nil {
		t.Errorf("%v: %+v", err, h)
	}
	return h
}
