// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

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

// containers starts programs as container managers do, by a real runc: each has
// namespaces and a root file system that are made just then, and is linked to
// the node's bridge by a hook. Its certificate directory has never had weir's.
type containers struct {
	node    *lab.Node
	network string
	started atomic.Int64
}

// containersDir is where the containers' root and their configurations are.
const containersDir = "/var/lib/home/containers"

// newContainers makes containers that have the given programs in /.
func newContainers(node *lab.Node, programs ...string) *containers {
	node.Run("sh", "-ec", `
root=`+containersDir+`/root
mkdir -p $root/etc/ssl/certs $root/usr $root/proc $root/dev
for d in bin sbin lib lib64; do ln -sfn usr/$d $root/$d; done
cp /etc/ssl/certs/ca-certificates.crt $root/etc/ssl/certs/
cp /etc/hosts $root/etc/
cp `+strings.Join(programs, " ")+` $root/`)
	node.WriteFile(containersDir+"/link", `
pid=$(sed -n 's/.*"pid":\([0-9]*\).*/\1/p')
ip link add start$1 type veth peer name eth0 netns $pid
ip link set start$1 master br0 up
nsenter -t $pid -n sh -ec "ip addr add $2/16 dev eth0; ip link set eth0 up; ip route add default via $3"
`)
	return &containers{node: node, network: node.Bridge()}
}

// run runs a program in a new container.
func (c *containers) run(args ...string) (string, error) {
	n := c.started.Add(1) + 1
	id := fmt.Sprintf("start%d", n)
	link := map[string]any{"path": "/bin/sh", "args": []string{"sh", "-e", containersDir + "/link", fmt.Sprint(n), fmt.Sprintf("%s%d.%d", c.network, n>>8, n&0xff), c.network + "0.1"},
		"env": []string{"PATH=/usr/sbin:/usr/bin"}}
	config, err := json.Marshal(map[string]any{
		"ociVersion": "1.0.2",
		"process":    map[string]any{"args": args, "cwd": "/", "env": []string{"PATH=/usr/bin", "HOME=/"}},
		"root":       map[string]any{"path": containersDir + "/root"},
		"mounts": []map[string]any{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
			{"destination": "/usr", "type": "bind", "source": "/usr", "options": []string{"rbind", "ro"}},
			{"destination": "/etc/ssl/certs", "type": "tmpfs", "source": "tmpfs", "options": []string{"tmpcopyup"}},
		},
		"hooks": map[string]any{"createRuntime": []any{link}},
		"linux": map[string]any{
			"cgroupsPath": "/" + filepath.Base(c.node.Cgroup()) + "/" + id,
			"namespaces":  []map[string]any{{"type": "pid"}, {"type": "network"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}},
		},
	})
	if err != nil {
		return "", err
	}
	c.node.WriteFile(containersDir+"/"+id+"/config.json", string(config))
	return c.node.Output("runc", "--root", "/run/runc", "run", "--bundle", containersDir+"/"+id, id)
}

// Programs that connect in their first milliseconds, in fresh containers whose
// certificate directory has never had weir's, half of them in network
// namespaces that are made just then: each pull succeeds and is intercepted.
// WEIR_STARTS is how many there are.
func TestStarts(t *testing.T) {
	t.Parallel()
	count := fromEnv(t, "WEIR_STARTS", 40)
	w := newWorld(t)
	node := w.Node()
	const clean = "/var/lib/clean.crt"
	node.Run("cp", "/etc/ssl/certs/ca-certificates.crt", clean)
	crane := node.As(lab.Tool(t, "crane"), "crane")
	fresh := newContainers(node, crane)
	agent := node.Agent()
	node.Run(crane, "pull", flyway, "/dev/null")
	box := node.Box()
	was, err := node.File(clean)
	if err != nil {
		t.Fatal(err)
	}
	box.WriteFile(clean, string(was))
	inside := func(b *lab.Node) func() (string, error) {
		b.WriteFile("/var/lib/start.sh", fmt.Sprintf(`
mount -t tmpfs tmpfs /etc/ssl/certs
cat %s > /etc/ssl/certs/ca-certificates.crt
exec %s pull %s /dev/null
`, clean, crane, flyway))
		return func() (string, error) { return b.Output("unshare", "--mount", "sh", "-e", "/var/lib/start.sh") }
	}
	inFresh := func() (string, error) { return fresh.run("/crane", "pull", flyway, "/dev/null") }
	ways := []func() (string, error){inside(node), inside(box), inFresh, inFresh}
	w.forget()
	before := agent.Status().Connections.Intercepted
	var wg sync.WaitGroup
	for _, start := range ways {
		wg.Go(func() {
			for i := range count / len(ways) {
				if out, err := start(); err != nil {
					t.Errorf("start %d: %v\n%s", i, err, out)
				}
			}
		})
	}
	wg.Wait()
	starts := int64(count / len(ways) * len(ways))
	after := agent.Status()
	// A pull of this image takes 4 blobs, and each of them is a redirect.
	if passed := w.hub.Log.BlobGETs() / 8; passed > 0 {
		t.Errorf("%d of %d starts were not intercepted:\n%s", passed, starts, why(agent))
	}
	n := after.Connections.Intercepted - before
	if n < starts {
		t.Errorf("%d of %d starts were intercepted: %+v", n, starts, after.Kernel)
	}
	t.Logf("%d starts, %d connections intercepted; %+v", starts, n, after.Kernel)
}

// why is what the agent's log has of each runtime that was passed through, and
// what was before.
func why(agent *lab.Agent) string {
	lines := strings.Split(agent.Log(64<<20), "\n")
	var b strings.Builder
	for i, line := range lines {
		if strings.Contains(line, "a runtime is passed through") {
			b.WriteString(strings.Join(lines[max(0, i-20):i+1], "\n") + "\n\n")
		}
	}
	return b.String()
}

// While the agent gets hardly any processor time, programs that start succeed,
// also those that read their roots before they connect, and those that first connect
// to what is no registry.
func TestStartsWithSlowAgent(t *testing.T) {
	t.Parallel()
	count := fromEnv(t, "WEIR_STARTS", 40)
	w := newWorld(t)
	w.HTTPS("web.example", false, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, "a web page") }))
	node := w.Node()
	crane, executor, ko := node.As(lab.Tool(t, "crane"), "crane"), clientNamed(t, "executor"), clientNamed(t, "ko")
	fresh := newContainers(node, crane, executor, ko)
	agent := node.Agent()
	slow, end := context.WithCancel(t.Context())
	var wg, slowing sync.WaitGroup
	slowing.Go(func() {
		defer agent.Signal(syscall.SIGCONT)
		for slow.Err() == nil {
			// For less than what has it count as hanging.
			for i, d := range []time.Duration{250 * time.Millisecond, 20 * time.Millisecond} {
				agent.Signal([]syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT}[i])
				select {
				case <-slow.Done():
				case <-time.After(d):
				}
			}
		}
	})
	for _, args := range [][]string{{"/crane", "pull", flyway, "/dev/null"}, {"/executor", "client", "eager", "https://registry-1.docker.io/v2/"},
		{"/ko", "client", "each", "https://web.example/", "https://registry-1.docker.io/v2/"}} {
		wg.Go(func() {
			for i := range count / 2 {
				if out, err := fresh.run(args...); err != nil {
					t.Errorf("%s %d: %v\n%s", args[0], i, err, out)
				}
			}
		})
	}
	wg.Wait()
	end()
	slowing.Wait()
	s := agent.Status()
	t.Logf("%d starts: %+v, %+v", count, s.Connections, s.Kernel)
}

// An agent that hangs holds no container up: some are started, pull and end
// while it does nothing at all.
func TestStartsWithHangingAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	fresh := newContainers(node, node.As(lab.Tool(t, "crane"), "crane"))
	agent := node.Agent()
	agent.Signal(syscall.SIGSTOP)
	defer agent.Signal(syscall.SIGCONT)
	for range 3 {
		if out, err := fresh.run("/crane", "pull", flyway, "/dev/null"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", agent.PID()))
	if err != nil || !strings.Contains(string(stat), ") T ") {
		t.Errorf("the agent was not stopped all the time: %q, %v", stat, err)
	}
	if w.hub.Log.BlobGETs() == 0 {
		t.Error("no pull came to the registry")
	}
}

// A pod that has more connections than it may is alone in noticing: its further
// ones go direct, other workloads are served, and afterwards it is too.
func TestFlood(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	pod, other := node.Box(), node.Box()
	crane := node.As(lab.Tool(t, "crane"), "crane")
	other.Run(crane, "pull", flyway, "/dev/null")
	idle := residentMemory(t, agent.PID())

	const many = 3000
	flood := pod.Spawn("flood", "sh", "-c", fmt.Sprintf("ulimit -n 8192; exec %s client flood registry-1.docker.io:443 %d", clientNamed(t, "crane"), many))
	if err := lab.Eventually(nil, func(context.Context) error {
		if log := flood.Log(1 << 10); log != "flooded\n" {
			return fmt.Errorf("it says %q", log)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var taken int64
	for _, d := range agent.Status().Listeners {
		taken = max(taken, d.Accepted)
	}
	if taken < 500 || taken > 600 {
		t.Errorf("%d of %d connections were taken", taken, many)
	}
	if grown := residentMemory(t, agent.PID()) - idle; grown > 128<<20 {
		t.Errorf("the agent has grown by %d MiB", grown>>20)
	}
	w.forget()
	other.Run(crane, "pull", flyway, "/dev/null")
	w.nothingFetched(t)
	pod.Run(crane, "pull", flyway, "/dev/null")
	if w.hub.Log.BlobGETs() == 0 {
		t.Errorf("the pod's listener was not limited: %+v", agent.Status())
	}
	flood.Kill()
	if err := lab.Eventually(nil, func(context.Context) error {
		w.forget()
		pod.Run(crane, "pull", flyway, "/dev/null")
		if n := w.hub.Log.BlobGETs(); n > 0 {
			return fmt.Errorf("%d blobs were fetched", n)
		}
		return nil
	}); err != nil {
		t.Errorf("after the flood: %v, %+v", err, agent.Status())
	}
}

// Pods that have manifests held up, each by a registry of its own, take little of
// the agent's memory, and no other workload's pulls. WEIR_PODS is how many there
// are, with 200 connections each.
func TestFloodOfManifests(t *testing.T) {
	t.Parallel()
	count := fromEnv(t, "WEIR_PODS", 20)
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	other := node.Box()
	crane := node.As(lab.Tool(t, "crane"), "crane")
	pull := func() (took time.Duration) {
		t.Helper()
		w.forget()
		for range 10 {
			start := time.Now()
			other.Run(crane, "pull", flyway, "/dev/null")
			took += time.Since(start)
		}
		return took / 10
	}
	pull()
	before := pull()
	w.nothingFetched(t)

	helm := clientNamed(t, "helm")
	var floods []*lab.Process
	for i := range count {
		floods = append(floods, node.Box().Spawn(fmt.Sprintf("flood %d", i), helm, "client", "stall", "200"))
	}
	begun := pull()
	w.nothingFetched(t)
	for _, f := range floods {
		f.Says("stalled")
	}
	stalled := pull()
	w.nothingFetched(t)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", agent.PID()))
	if err != nil {
		t.Fatal(err)
	}
	var most int64 // KiB
	for line := range strings.Lines(string(status)) {
		if n, err := fmt.Sscanf(line, "VmHWM: %d kB", &most); n == 1 && err == nil {
			break
		}
	}
	if most == 0 || most >= 256<<10 {
		t.Errorf("the agent had %d KiB", most)
	}
	t.Logf("%d MiB at most; a pull took %s before, %s while they began, %s while they stalled: %+v", most>>10, before, begun, stalled, agent.Status().Connections)
	for _, f := range floods {
		f.Kill()
	}
}

// Containers with a dockerd in them come and go: nothing of them is left.
// WEIR_CONTAINERS is how many there are.
func TestContainersLeaveNothing(t *testing.T) {
	t.Parallel()
	count := fromEnv(t, "WEIR_CONTAINERS", 10)
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	var first lab.Holdings
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
			first = settled(t, agent, func(h lab.Holdings) error {
				if h.Listeners > 1 || h.Runtimes > 0 { // the node's own listener is left
					return fmt.Errorf("%+v", h)
				}
				return nil
			})
		}
	}
	last := settled(t, agent, func(h lab.Holdings) error {
		// Go keeps a few goroutines and pipes for what comes next.
		if h.Listeners > 1 || h.Runtimes > 0 || h.Entries > first.Entries || h.Namespaces > first.Namespaces || h.Descriptors > first.Descriptors+4 || h.Goroutines > first.Goroutines+4 {
			return errors.New("more than before")
		}
		return nil
	})
	t.Logf("after 3 containers %+v, after %d %+v", first, count, last)
}

// Network namespaces without any runtime come and go, as sandboxes make them:
// nothing of them is left either.
func TestNamespacesLeaveNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	came := func(n int) {
		t.Helper()
		node.Run("sh", "-ec", fmt.Sprintf("for i in $(seq %d); do unshare --net sh -ec 'ip link set lo up; true & wait'; done", n))
	}
	left := func(most lab.Holdings) lab.Holdings {
		t.Helper()
		return settled(t, agent, func(h lab.Holdings) error {
			if h.Listeners > 1 || h.Namespaces > 1 || h.Entries > most.Entries || h.Descriptors > most.Descriptors || h.Goroutines > most.Goroutines {
				return fmt.Errorf("more is there than %+v", most)
			}
			return nil
		})
	}
	came(10)
	first := left(lab.Holdings{Entries: math.MaxInt, Descriptors: math.MaxInt, Goroutines: math.MaxInt})
	came(300) // more than are opened at once
	most := first
	most.Descriptors += 4
	most.Goroutines += 4
	left(most)
}

func settled(t *testing.T, a *lab.Agent, ok func(lab.Holdings) error) (h lab.Holdings) {
	t.Helper()
	if err := lab.Eventually(nil, func(ctx context.Context) (err error) {
		if h, err = a.Holdings(ctx); err != nil {
			return err
		}
		return ok(h)
	}); err != nil {
		t.Errorf("%v: %+v", err, h)
	}
	return h
}
