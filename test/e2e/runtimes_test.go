// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"weir/agent/runtimes"
	"weir/test/lab"
)

// Each line of the document's tables that have a column for them names tests that there
// are.
func TestRuntimesDocument(t *testing.T) {
	doc, err := os.ReadFile("../../deploy/RUNTIMES.md")
	if err != nil {
		t.Fatal(err)
	}
	have := tests(t, "../..")
	lines, within, asks := 0, false, false
	for line := range strings.Lines(string(doc)) {
		if !strings.HasPrefix(line, "|") {
			within = false
			continue
		}
		if !within {
			within, asks = true, strings.HasSuffix(line, "| tests |\n")
			continue
		}
		if !asks || strings.HasPrefix(line, "|-") {
			continue
		}
		lines++
		names := regexp.MustCompile(`\bTest\w+`).FindAllString(line, -1)
		if len(names) == 0 {
			t.Errorf("no test is named for %s", line)
		}
		for _, name := range names {
			if !have[name] {
				t.Errorf("there is no %s, named for %s", name, line)
			}
		}
	}
	if lines < 10 {
		t.Errorf("%d lines", lines)
	}
}

// tests are the names of the tests below a directory.
func tests(t *testing.T, dir string) map[string]bool {
	t.Helper()
	have := make(map[string]bool)
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`).FindAllStringSubmatch(string(b), -1) {
			have[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return have
}

// What deploy/README.md says that a test shows has one.
func TestDeployDocument(t *testing.T) {
	doc, err := os.ReadFile("../../deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	have := tests(t, "../..")
	names := regexp.MustCompile(`\bTest[A-Z]\w+`).FindAllString(string(doc), -1)
	if len(names) < 20 {
		t.Errorf("%d tests are named", len(names))
	}
	for _, name := range names {
		if !have[name] {
			t.Errorf("there is no %s", name)
		}
	}
}

// Runtimes that were running, and had verified certificates, before weir came:
// nothing changes for them until they are restarted.
func TestBefore(t *testing.T) {
	t.Parallel()
	type running struct {
		pid           func() int
		pull, restart func()
	}
	buildkit := func(n *lab.Node) running {
		b, builds := n.BuildKit(), 0
		return running{func() int { return b.PID() }, func() {
			builds++
			b.Build(fmt.Sprintf("FROM ghcr.io/renovatebot/renovate:latest\nENV A=%d\n", builds), "--no-cache", "--output=type=oci,dest=/var/lib/home/image.tar")
			n.Run(lab.Tool(t, "buildctl"), "prune", "--all")
		}, func() { b.Stop(); b = n.BuildKit() }}
	}
	docker := func(d *lab.Docker) running {
		return running{func() int { return d.PID() }, func() { d.Pull(renovate); d.Remove(renovate) }, func() { d.Stop(); d.Start() }}
	}
	for name, start := range map[string]func(*world, *lab.Node) running{
		"containerd 1.6": func(w *world, n *lab.Node) running {
			c := n.Containerd()
			return running{func() int { return c.PID() }, func() { c.Pull(renovate); c.Remove(renovate, w.renovate) }, func() { c.Stop(); c.Start() }}
		},
		"dockerd 29": func(_ *world, n *lab.Node) running { return docker(n.NewestDocker()) },
		"dind":       func(_ *world, n *lab.Node) running { return docker(n.Box().Docker()) },
		"buildkitd":  func(_ *world, n *lab.Node) running { return buildkit(n) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			node := w.Node()
			rt := start(w, node)
			rt.pull()
			agent := node.Agent()
			if s := agent.Runtime(rt.pid()); s.Reach != "passthrough" || s.Reason == "" || s.Step == "" {
				t.Errorf("%+v", s)
			}
			rt.pull()
			rt.pull()
			if s := agent.Status(); len(s.Registries) != 0 {
				t.Errorf("it was intercepted: %+v", s.Registries)
			}
			rt.restart()
			if s := agent.Runtime(rt.pid()); s.Reach != "intercepted" {
				t.Errorf("restarted, it is %+v", s)
			}
			rt.pull()
			w.forget()
			rt.pull()
			w.nothingFetched(t)
		})
	}
}

// weir comes while a runtime pulls that reads certs.d at the beginning of each
// pull: that pull goes on as it began, and the next ones are intercepted.
func TestComesDuringPull(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	im := lab.Image{Seed: 77}
	for range 12 {
		im.Layers = append(im.Layers, 1<<20)
	}
	large := w.hub.Push("acme/many:1", im)
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", readsCertsD)
	containerd := node.Containerd()
	containerd.Pull(renovate) // its roots are read
	// Each request takes a new connection.
	w.hub.Fault(func(rw http.ResponseWriter, _ *http.Request) bool {
		rw.Header().Set("Connection", "close")
		return false
	})
	node.Shape(20)
	pulled := make(chan error, 1)
	go func() { pulled <- containerd.TryPull("acme/many:1") }()
	w.hub.Log.WaitFor(t, func(r lab.Request) bool { return strings.Contains(r.Path, "/blobs/") && r.Status == 200 })
	agent := node.Agent()
	if err := <-pulled; err != nil {
		t.Error(err)
	}
	containerd.Same("acme/many:1", large)
	if s := agent.Runtime(containerd.PID()); s.Reach != "intercepted" {
		t.Errorf("afterwards it is %+v", s)
	}
	containerd.Pull(flyway)
	containerd.Remove(flyway, w.flyway)
	w.forget()
	containerd.Pull(flyway)
	w.nothingFetched(t)
}

// A pull that began before the CA was in the certs.d that it has read passes through to
// its end, also when the agent is restarted meanwhile.
func TestPullRunsAsAgentRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", readsCertsD)
	containerd := node.Containerd()
	begun, goOn := make(chan struct{}), make(chan struct{})
	begin := sync.OnceFunc(func() { close(begun) })
	w.ghcr.Fault(func(rw http.ResponseWriter, req *http.Request) bool {
		rw.Header().Set("Connection", "close") // each request has its own
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/manifests/") {
			begin()
			<-goOn
		}
		return false
	})
	pulled := make(chan error, 1)
	go func() { pulled <- containerd.TryPull(renovate) }()
	<-begun
	agent := node.Agent()
	for again := range 2 {
		if again > 0 {
			agent.Stop()
			agent.Start()
		}
		if err := lab.Eventually(agent.Ended(), func(ctx context.Context) error {
			s, err := agent.AskStatus(ctx)
			i := slices.IndexFunc(s.Runtimes, func(rt runtimes.Status) bool { return rt.PID == containerd.PID() })
			if err != nil || i < 0 || s.Runtimes[i].Reach != "intercepted" && !strings.Contains(s.Runtimes[i].Reason, "the others are waited for") {
				return fmt.Errorf("%+v, %w", s.Runtimes, err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	close(goOn)
	if err := <-pulled; err != nil {
		t.Errorf("%v\n%s", err, agent.Log(4000))
	}
	for range 2 { // at once after the next restart
		if rt := agent.Runtime(containerd.PID()); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
		agent.Stop()
		agent.Start()
	}
}

// A containerd that reads no certs.d, and was running before, takes the CA from no other
// that does.
func TestCertsDOfAnother(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.WriteFile(lab.K3s+"/etc/containerd/config.toml", readsCertsD)
	reads, other := node.K3sContainerd(), node.Containerd()
	reads.Pull(renovate)
	other.Pull(renovate) // their roots are read
	agent := node.Agent()
	for again := range 3 {
		if rt := agent.Runtime(other.PID()); rt.Reach != "passthrough" {
			t.Errorf("%+v", rt)
		}
		if rt := agent.Runtime(reads.PID()); rt.Reach != "intercepted" || len(rt.Except) > 0 {
			t.Errorf("%d: %+v", again, rt)
		}
		agent.Stop()
		agent.Start()
	}
	reads.Remove(renovate, w.renovate)
	reads.Pull(renovate)
}

// What was taken to trust the CA, but had not read it yet, isn't any more when it may have
// read its roots while the CA was gone, and the agent was not there.
func TestCAGoneMeanwhile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	docker, boxed := node.Docker(), node.Box().Docker()
	for _, d := range []*lab.Docker{docker, boxed} {
		if rt := agent.Runtime(d.PID()); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
	}
	agent.Stop()
	for _, d := range []*lab.Docker{docker, boxed} {
		node.Run("rm", fmt.Sprintf("/proc/%d/root/etc/ssl/certs/weir-ca.pem", d.PID()))
		d.Pull(flyway)
		d.Remove(flyway)
	}
	agent.Start()
	for _, d := range []*lab.Docker{docker, boxed} {
		if rt := agent.Runtime(d.PID()); rt.Reach != "passthrough" {
			t.Errorf("%+v", rt)
		}
		d.Pull(renovate)
	}
}
