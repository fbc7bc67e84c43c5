// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/csv"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"weir/test/lab"
)

var (
	soakFor = flag.Duration("soak.for", 10*time.Second, "how long TestSoak takes, besides its beginning and its end")
	soakOut = flag.String("soak.out", "", "directory for TestSoak's table and graph; empty means none")
)

// soak is three nodes that are peers, with runtimes of all kinds that pull all
// the time, and things that break all the time.
type soak struct {
	*world
	t     *testing.T
	since time.Time
	end   chan struct{}
	nodes []*soakNode
	next  string // another version of weir

	mu     sync.Mutex
	images []soakImage
	pulls  map[string]int // that were made, by who made them
	excuse map[string]int // those that failed, and would have without weir, by what broke them
	faults []*fault
	rows   []soakRow
}

type soakNode struct {
	*lab.Node
	mu    sync.Mutex // held while the agent isn't there
	agent *lab.Agent
}

type soakImage struct {
	ref string
	lab.Pushed
}

// fault is something that broke.
type fault struct {
	kind     string
	node     int // -1 for the registries
	from, to time.Time
	// excuses says that pulls which ran at that time may fail: a registry's
	// faults, as they would without weir, and a killed agent's own node's,
	// whose connections it takes with it.
	excuses bool
}

type soakRow struct {
	at   time.Duration
	node int
	pid  int
	lab.Holdings
}

// puller is a runtime, or a tool that is new each time.
type puller struct {
	name    string
	node    int
	pull    func(ref string) error
	check   func(ref string, im lab.Pushed) // that it has what was pushed, and removes it
	restart func()                          // nil for tools
}

// Runtimes of all kinds on three nodes that are peers pull from registries while
// agents are killed, stopped for a while and upgraded, runtimes restarted, the
// network between nodes parted, and the registries down, slow, silent or
// failing. No pull fails that would not have failed without weir, each is what
// was pushed, and an agent that is never restarted holds no more at the end than
// when it had warmed up. `make soak` lets it run for an hour, and draws what the
// agents hold.
func TestSoak(t *testing.T) {
	t.Parallel()
	s := &soak{t: t, world: newWorld(t), end: make(chan struct{}), next: lab.NextWeir(t), pulls: map[string]int{}, excuse: map[string]int{}}
	nodes, agents := cluster(t, s.world, 3, "--store-size", "128MiB")
	for i, n := range nodes {
		s.nodes = append(s.nodes, &soakNode{Node: n, agent: agents[i]})
	}
	for range 12 {
		s.push()
	}
	pullers := []*puller{
		containerdPuller("containerd 1.6", 0, nodes[0].Containerd()), dockerPuller("dockerd 20.10", 0, nodes[0].Docker()),
		dockerPuller("dockerd 29 in a container", 0, nodes[0].Box().NewestDocker()), s.tool("crane", 0), s.fresh(0),
		containerdPuller("containerd 1.6", 1, nodes[1].Containerd()), containerdPuller("containerd 2 in a container", 1, nodes[1].Box().NewestContainerd()),
		s.tool("skopeo", 1),
		dockerPuller("dockerd 20.10", 2, nodes[2].Docker()), containerdPuller("containerd 2 in a container", 2, nodes[2].Box().NewestContainerd()),
		dockerPuller("dockerd 29 in a container", 2, nodes[2].Box().NewestDocker()), s.tool("crane", 2),
	}
	s.since = time.Now()
	var wg sync.WaitGroup
	for _, p := range pullers {
		wg.Go(func() { s.work(p) })
	}
	wg.Go(s.breakThings)
	enough := make(chan struct{})
	wg.Go(func() { s.sample(enough) })
	wg.Go(func() {
		for s.pause(20 * time.Second) {
			s.push()
		}
	})
	time.Sleep(*soakFor)
	<-enough
	close(s.end)
	wg.Wait()

	total := 0
	for _, n := range s.pulls {
		total += n
	}
	t.Logf("%d pulls by %v; %d faults; failed as they would have without weir: %v", total, s.pulls, len(s.faults), s.excuse)
	s.flat()
	if *soakOut != "" {
		s.write(*soakOut, total)
	}
}

// pause waits, and returns false at the end.
func (s *soak) pause(d time.Duration) bool {
	select {
	case <-s.end:
		return false
	case <-time.After(d):
		return true
	}
}

// There are as many images as soakImages, three times what a node's store has room
// for. So after the first third of an hour nothing is new to the nodes, and what
// they hold is not more because they know more.
const (
	soakImages = 60
	// recentImages are as many as are pulled at a time.
	recentImages = 40
)

// push makes one more image, or has the oldest be the newest again.
func (s *soak) push() {
	s.mu.Lock()
	n := len(s.images)
	if n == soakImages {
		s.images = append(s.images[1:], s.images[0])
	}
	s.mu.Unlock()
	if n == soakImages {
		return
	}
	r, host := s.hub, ""
	if n%3 == 0 {
		r, host = s.ghcr, "ghcr.io/"
	}
	ref := fmt.Sprintf("acme/soak:%d", n)
	im := r.Push(ref, lab.Image{Layers: []int{4 << 20, 1 << 20, 300_000}, Seed: uint64(5000 + n), OCI: n%2 == 0, Index: n%4 == 0})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images = append(s.images, soakImage{host + ref, im})
}

// pick is an image, of the newest.
func (s *soak) pick() soakImage {
	s.mu.Lock()
	defer s.mu.Unlock()
	recent := s.images[max(0, len(s.images)-recentImages):]
	if rand.IntN(3) == 0 {
		return recent[len(recent)-1]
	}
	return recent[rand.IntN(len(recent))]
}

// work has a puller pull, until the end.
func (s *soak) work(p *puller) {
	for i := 1; s.pause(5*time.Second + rand.N(10*time.Second)); i++ {
		im := s.pick()
		if !s.persist(p, im.ref) {
			continue
		}
		p.check(im.ref, im.Pushed)
		s.mu.Lock()
		s.pulls[p.name]++
		s.mu.Unlock()
		if p.restart != nil && i%25 == 0 {
			f := s.fault("restart of a runtime", p.node, false)
			p.restart()
			s.over(f)
		}
	}
}

// persist has a puller pull until that succeeds, as long as what failed excuses it.
func (s *soak) persist(p *puller, ref string) bool {
	for range 20 {
		start := time.Now()
		err := p.pull(ref)
		if err == nil {
			return true
		}
		broken := s.brokenBy(p.node, start)
		if broken == "" {
			s.t.Errorf("after %s, %s on node %d: the pull of %s failed within %s: %v", start.Sub(s.since), p.name, p.node, ref, time.Since(start), err)
			return false
		}
		s.mu.Lock()
		s.excuse[broken]++
		s.mu.Unlock()
		if !s.pause(time.Second) {
			return false
		}
	}
	s.t.Errorf("%s on node %d: 20 pulls of %s failed", p.name, p.node, ref)
	return false
}

// brokenBy says what excuses a pull that failed.
func (s *soak) brokenBy(node int, start time.Time) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		until := f.to
		if f.node < 0 {
			until = until.Add(time.Second) // a client may still hold what was broken
		}
		if f.excuses && (f.node < 0 || f.node == node) && (f.to.IsZero() || until.After(start)) {
			return f.kind
		}
	}
	return ""
}

func (s *soak) fault(kind string, node int, excuses bool) *fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &fault{kind: kind, node: node, from: time.Now(), excuses: excuses}
	s.faults = append(s.faults, f)
	return f
}

func (s *soak) over(f *fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.to = time.Now()
}

// breakThings breaks one thing after another. Node 0's agent is never
// restarted.
func (s *soak) breakThings() {
	network := func(how func(net.Conn)) {
		for _, h := range []string{"registry-1.docker.io", "auth.docker.io", "production.cloudflare.docker.com", "ghcr.io"} {
			s.Break(h, how)
		}
	}
	answers := func(f func(http.ResponseWriter, *http.Request) bool) {
		s.hub.Fault(f)
		s.ghcr.Fault(f)
	}
	// agent breaks a node's agent, which no other fault looks at meanwhile.
	agent := func(kind string, node int, excuses bool, f func(a *lab.Agent, over func())) {
		n := s.nodes[node]
		n.mu.Lock()
		defer n.mu.Unlock()
		fault := s.fault(kind, node, excuses)
		f(n.agent, func() { s.over(fault) })
	}
	// registries breaks them, for a while.
	registries := func(kind string, excuses bool, set func(broken bool), while time.Duration) {
		f := s.fault(kind, -1, excuses)
		set(true)
		s.pause(while)
		set(false)
		s.over(f)
	}
	const moment = 4 * time.Second
	versions := []string{lab.Weir(s.t), s.next}
	all := []func(){
		func() {
			agent("kill -9 of the agent", 1+rand.IntN(2), true, func(a *lab.Agent, over func()) {
				a.Kill()
				over()
				s.pause(rand.N(moment))
				a.Start()
			})
		},
		func() {
			agent("upgrade of the agent", 1+rand.IntN(2), false, func(a *lab.Agent, over func()) {
				versions[0], versions[1] = versions[1], versions[0]
				a.Upgrade(versions[0])
				over()
			})
		},
		func() {
			agent("SIGSTOP of the agent", rand.IntN(3), false, func(a *lab.Agent, over func()) {
				a.Signal(syscall.SIGSTOP)
				s.pause(2 * moment)
				a.Signal(syscall.SIGCONT)
				over()
			})
		},
		func() {
			i := rand.IntN(3)
			f := s.fault("network between nodes parted", i, false)
			mend := s.Part(s.nodes[i].Node)
			s.pause(2 * moment)
			mend()
			s.over(f)
		},
		func() {
			registries("503 by the registries", true, func(broken bool) {
				if broken {
					answers(answer(503))
				} else {
					answers(nil)
				}
			}, moment)
		},
		func() {
			registries("slow registries", false, func(broken bool) {
				if broken {
					answers(func(http.ResponseWriter, *http.Request) bool { time.Sleep(rand.N(time.Second)); return false })
				} else {
					answers(nil)
				}
			}, 2*moment)
		},
		func() {
			registries("registries down", true, func(broken bool) {
				if broken {
					network(lab.Down)
				} else {
					network(nil)
				}
			}, moment)
		},
		func() {
			registries("silent registries", true, func(broken bool) {
				if broken {
					network(func(c net.Conn) {
						_ = c.SetReadDeadline(time.Now().Add(moment))
						lab.Silent(c)
						c.Close()
					})
				} else {
					network(nil)
					s.pause(moment) // until the last of them is closed
				}
			}, moment)
		},
		func() {
			registries("connections to registries reset", true, func(broken bool) {
				if broken {
					network(lab.Down)
				} else {
					network(nil)
				}
			}, 0)
		},
	}
	for i := 0; s.pause(3*time.Second + rand.N(10*time.Second)); i++ {
		if i%len(all) == 0 {
			rand.Shuffle(len(all), func(a, b int) { all[a], all[b] = all[b], all[a] })
		}
		all[i%len(all)]()
	}
}

// samples are as many as flat needs to tell the beginning from the end.
const samples = 8

// sample notes what the agents hold. It closes enough when that is so.
func (s *soak) sample(enough chan<- struct{}) {
	for i := 1; s.pause(min(10*time.Second, *soakFor/20)); i++ {
		if i == samples+1 {
			close(enough)
		}
		for i, n := range s.nodes {
			n.mu.Lock()
			h, err := n.agent.Holdings(s.t.Context())
			pid := n.agent.PID()
			n.mu.Unlock()
			if err != nil {
				s.t.Errorf("what node %d's agent holds: %v", i, err)
				continue
			}
			s.rows = append(s.rows, soakRow{time.Since(s.since), i, pid, h})
		}
		for _, r := range []*lab.Registry{s.hub, s.ghcr} {
			r.Log.Reset()
		}
	}
}

func containerdPuller(name string, node int, c *lab.Containerd) *puller {
	return &puller{name: name, node: node, restart: func() { c.Stop(); c.Start() }, pull: func(ref string) error { return c.TryPull(ref) },
		check: func(ref string, im lab.Pushed) { c.Same(ref, im); c.Remove(ref, im) }}
}

func dockerPuller(name string, node int, d *lab.Docker) *puller {
	return &puller{name: name, node: node, restart: func() { d.Stop(); d.Start() }, pull: func(ref string) error { return d.TryPull(ref) },
		check: func(ref string, im lab.Pushed) { d.Same(ref, im); d.Remove(ref) }}
}

// tool runs crane or skopeo, which verify what they get, each time as the first
// process in a container of its own.
func (s *soak) tool(name string, node int) *puller {
	n := s.nodes[node]
	const clean = "/var/lib/clean.crt"
	n.WriteFile(clean, s.Roots())
	script := "mount -t tmpfs tmpfs /etc/ssl/certs\ncp " + clean + " /etc/ssl/certs/ca-certificates.crt\nrm -rf /var/lib/pulled\n"
	if name == "crane" {
		script += "exec " + n.As(lab.Tool(s.t, "crane"), "crane") + " pull $1 /var/lib/pulled\n"
	} else {
		script += "case $1 in ghcr.io/*) from=$1;; *) from=docker.io/$1;; esac\nexec skopeo copy docker://$from dir:/var/lib/pulled\n"
	}
	n.WriteFile("/var/lib/"+name+".sh", script)
	return &puller{name: name, node: node, check: func(string, lab.Pushed) {}, pull: func(ref string) error {
		_, err := n.Output("unshare", "--mount", "sh", "-e", "/var/lib/"+name+".sh", ref)
		return err
	}}
}

// fresh is a containerd in a container that is made for one pull.
func (s *soak) fresh(node int) *puller {
	return &puller{name: "containerd 2 in a new container", node: node, check: func(string, lab.Pushed) {}, pull: func(ref string) error {
		box := s.nodes[node].Box()
		defer box.End()
		c := box.NewestContainerd()
		defer c.Kill() // with the container
		return c.TryPull(ref)
	}}
}

// series are the parts of what an agent holds that are drawn.
var series = []struct {
	name string
	of   func(lab.Holdings) float64
	// slack is by how much the last quarter's median may be above the second's:
	// what differs with what is running at the time. In a short run, which ends
	// while it is getting warm, it is four times that.
	slack float64
}{
	{"resident memory, MiB", func(h lab.Holdings) float64 { return float64(h.Resident) / (1 << 20) }, 4},
	{"goroutines", func(h lab.Holdings) float64 { return float64(h.Goroutines) }, 15},
	{"descriptors", func(h lab.Holdings) float64 { return float64(h.Descriptors) }, 15},
	{"map entries", func(h lab.Holdings) float64 { return float64(h.Entries) }, 5},
}

// flat fails the test when the agent that was never restarted holds more at the
// end than it did before.
func (s *soak) flat() {
	var mine []soakRow
	for _, r := range s.rows {
		if r.node == 0 {
			mine = append(mine, r)
		}
	}
	if len(mine) < samples {
		s.t.Fatalf("only %d samples", len(mine))
	}
	if mine[0].pid != mine[len(mine)-1].pid {
		s.t.Errorf("node 0's agent was process %d, and is %d", mine[0].pid, mine[len(mine)-1].pid)
	}
	for _, g := range series {
		slack := g.slack
		if *soakFor < time.Hour {
			slack *= 4
		}
		before, after := median(mine[len(mine)/4:len(mine)/2], g.of), median(mine[len(mine)*3/4:], g.of)
		s.t.Logf("%s: %.0f, and at last %.0f", g.name, before, after)
		if after > before+slack {
			s.t.Errorf("%s: %.0f at the end, %.0f before", g.name, after, before)
		}
	}
}

func median(rows []soakRow, of func(lab.Holdings) float64) float64 {
	var all []float64
	for _, r := range rows {
		all = append(all, of(r.Holdings))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// write writes SOAK.md, soak.csv and soak.svg.
func (s *soak) write(dir string, total int) {
	s.t.Helper()
	kinds := make(map[string]int)
	for _, f := range s.faults {
		kinds[f.kind]++
	}
	var md strings.Builder
	fmt.Fprintf(&md, `# %s of pulls and faults

Made by `+"`make soak`"+` on a machine with %d processors that had other work too: three nodes
that are peers, %d pulls of %d images, %d faults one after another. Node 0's agent is never restarted,
the others' are. What was pulled was compared with what had been pushed.

![What the agents hold](soak.svg)

The figures are in [soak.csv](soak.csv). The vertical lines are faults; where a line ends an
agent does, and the next one is another process.

| pulled by | pulls |
|---|--:|
`, *soakFor, runtime.NumCPU(), total, len(s.images), len(s.faults))
	for _, k := range slices.Sorted(maps.Keys(s.pulls)) {
		fmt.Fprintf(&md, "| %s | %d |\n", k, s.pulls[k])
	}
	md.WriteString(`
A pull that ran while registries failed, or whose connections a killed agent took with it,
may fail, and is made again.
`)
	if s.t.Failed() {
		md.WriteString("**Others failed too.**\n")
	} else {
		md.WriteString("No other one failed.\n")
	}
	md.WriteString(`
| fault | how often | pulls that failed by it |
|---|--:|--:|
`)
	for _, k := range slices.Sorted(maps.Keys(kinds)) {
		fmt.Fprintf(&md, "| %s | %d | %d |\n", k, kinds[k], s.excuse[k])
	}
	table := [][]string{{"seconds", "node", "pid", "resident_bytes", "goroutines", "descriptors", "map_entries", "listeners", "runtimes"}}
	for _, r := range s.rows {
		row := []string{fmt.Sprintf("%.0f", r.at.Seconds())}
		for _, n := range []int64{int64(r.node), int64(r.pid), r.Resident, int64(r.Goroutines), int64(r.Descriptors), int64(r.Entries), int64(r.Listeners), int64(r.Runtimes)} {
			row = append(row, fmt.Sprint(n))
		}
		table = append(table, row)
	}
	var c strings.Builder
	if err := csv.NewWriter(&c).WriteAll(table); err != nil {
		s.t.Error(err)
	}
	for name, content := range map[string]string{"SOAK.md": md.String(), "soak.csv": c.String(), "soak.svg": s.draw()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			s.t.Error(err)
		}
	}
}

// draw draws each of the series, a line for each process, as SVG.
func (s *soak) draw() string {
	const width, height, left, gap = 900, 150, 60, 40
	colors := []string{"#1f5fa8", "#c0602a", "#3f8f4f"}
	var b strings.Builder
	bottom := len(series)*(height+gap) + gap
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="white"/>
`, left+width+20, bottom)
	for i, c := range colors {
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"16\" fill=\"%s\">node %d%s</text>\n", left+i*200, c, i, []string{" (never restarted)", "", ""}[i])
	}
	x := func(at time.Duration) float64 { return left + width*min(1, at.Seconds()/soakFor.Seconds()) }
	for k, g := range series {
		top := float64(gap + k*(height+gap))
		most := 1.0
		for _, r := range s.rows {
			most = max(most, 1.1*g.of(r.Holdings))
		}
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"%.0f\">%s</text>\n<text x=\"%d\" y=\"%.0f\" text-anchor=\"end\">%.0f</text><text x=\"%d\" y=\"%.0f\" text-anchor=\"end\">0</text>\n",
			left, top-6, g.name, left-6, top+10, most, left-6, top+height)
		for _, f := range s.faults {
			fmt.Fprintf(&b, "<path d=\"M%.1f %.0fv%d\" stroke=\"#e8e8e8\"/>\n", x(f.from.Sub(s.since)), top, height)
		}
		fmt.Fprintf(&b, "<rect x=\"%d\" y=\"%.0f\" width=\"%d\" height=\"%d\" fill=\"none\" stroke=\"#888\"/>\n", left, top, width, height)
		for node, c := range colors {
			lines := make(map[int]string) // by process
			for _, r := range s.rows {
				if r.node == node {
					lines[r.pid] += fmt.Sprintf(" %.1f,%.1f", x(r.at), top+height-height*g.of(r.Holdings)/most)
				}
			}
			for _, pid := range slices.Sorted(maps.Keys(lines)) {
				fmt.Fprintf(&b, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.3\" points=\"%s\"/>\n", c, lines[pid][1:])
			}
		}
	}
	fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\">0</text><text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>\n</svg>\n", left, bottom-20, left+width, bottom-20, *soakFor)
	return b.String()
}
