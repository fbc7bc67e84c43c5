// SPDX-License-Identifier: Apache-2.0

// Package bench measures weir beside what else one could do, on the same bytes
// and in the same run, and writes RESULTS.md. Each benchmark is a part of that
// file. It repeats what it measures by itself, so it is to be run once.
package bench

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/test/lab"
)

const pullsTitle = "Warm pulls by dockerd and containerd"

// BenchmarkPulls has dockerd and containerd (through CRI) pull an image of 1 GiB
// that weir has, that a distribution registry has, and that nginx has.
func BenchmarkPulls(b *testing.B) {
	c := newContent(b, part(400<<20), part(300<<20), part(200<<20), part(100<<20), part(20<<20), part(4<<20))
	w := newWorld(b, c)
	// Fresh pages cost a virtual machine more than all else here.
	w.node.Run("mount", "-o", "remount,huge=always,size=14G", "/var/lib")
	w.agent(b, shared)
	w.nearNginx(b, shared)
	_, addr, start := w.distribution(b, "distribution.test", lab.Tool(b, "registry"), "", filepath.Join(b.TempDir(), "data"))
	start()
	w.push(b, addr)
	s := section{title: pullsTitle, text: fmt.Sprintf(`An image of %s in 6 layers, pulled and unpacked, and removed again. weir's answers come from its store; distribution and
nginx are on the node itself, with TLS, and have the image as files. Bound: weir takes at most 1.10 times as long as nginx.`, sizeText(c.image.Bytes)),
		head: []string{"runtime", "weir, s", "nginx, s", "distribution, s", "weir / nginx", "weir / distribution", "≤ 1.10 of nginx"}}
	compared := func(runtime string, pull func(ref string) error, remove func(ref string)) {
		measure := func(host string) func() sample {
			return func() sample {
				ref := host + "/" + repo + ":1"
				start := time.Now()
				if err := pull(ref); err != nil {
					b.Fatalf("%s: pulling %s: %v", runtime, ref, err)
				}
				took := time.Since(start)
				remove(ref)
				return sample{seconds: took.Seconds()}
			}
		}
		hosts := []func() sample{measure(known), measure("nginx.test:" + nearPort), measure("distribution.test:" + nearPort)}
		for _, f := range hosts { // once before: into weir's store, and the page cache
			f()
		}
		r := turns(rounds(3), hosts...)
		ratio := compare(r[0], r[1], seconds)
		s.row(runtime, f2(median(r[0], seconds)), f2(median(r[1], seconds)), f2(median(r[2], seconds)),
			ratio, compare(r[0], r[2], seconds), reached(quantile(ratio, 0.5) <= 1.10))
	}
	cd := w.node.NewestContainerd()
	compared("containerd 2.4.2 (CRI)", func(ref string) error { return cd.TryPull(ref) }, func(ref string) { cd.Remove(ref, c.image) })
	d := w.node.Docker()
	compared("dockerd (Debian 12)", func(ref string) error { return d.TryPull(ref) }, d.Remove)
	s.report(b)
}

const blobsTitle = "Blobs from the store"

// BenchmarkBlobs gets blobs from weir's store and from nginx, each on one
// processor, with the client on the other one.
func BenchmarkBlobs(b *testing.B) {
	c := newContent(b, 1000)
	sizes, counts := []int{1 << 10, 1 << 20, 64 << 20, 512 << 20}, []int{4000, 600, 16, 2}
	var blobs []digest.Digest
	for i, size := range sizes {
		blobs = append(blobs, c.add(b, random(size, uint64(i))))
	}
	w := newWorld(b, c)
	agent := w.agent(b, 0)
	nginx, p := w.nearNginx(b, 0)
	s := section{title: blobsTitle, text: `One client over one connection (TLS 1.3, HTTP/1.1) on one processor, the server on the other one. CPU is the server's. Bound: weir's
throughput is at least 0.90 of nginx's.`,
		head: []string{"blob", "weir, MiB/s", "nginx, MiB/s", "weir / nginx", "weir, CPU-s/GiB", "nginx, CPU-s/GiB", "weir / nginx", "first byte p50, weir, ms", "nginx, ms", "≥ 0.90 of nginx"}}
	var x, ours, theirs, cpu, theirCPU []float64
	for i, d := range blobs {
		w.fetch(b, w.crane, 1, "https://"+known, blobPath(d), 1, "cold") // into the store
		count := max(part(counts[i]), 1)
		r := turns(rounds(7),
			func() sample {
				return w.fetch(b, w.crane, 1, "https://"+known, blobPath(d), count, "warm", agent.PID())
			},
			func() sample { return w.fetch(b, w.plain, 1, nginx, blobPath(d), count, "warm", p.PID()) })
		ratio := compare(r[0], r[1], throughput)
		s.row(sizeText(int64(sizes[i])), f2(median(r[0], throughput)), f2(median(r[1], throughput)), ratio,
			f2(median(r[0], cpuPerGiB)), f2(median(r[1], cpuPerGiB)), compare(r[0], r[1], cpuPerGiB),
			ms(first(r[0])), ms(first(r[1])), reached(quantile(ratio, 0.5) >= 0.90))
		x = append(x, float64(sizes[i]))
		ours, theirs = append(ours, median(r[0], throughput)), append(theirs, median(r[1], throughput))
		cpu, theirCPU = append(cpu, median(r[0], cpuPerGiB)), append(theirCPU, median(r[1], cpuPerGiB))
	}
	s.plots = []plot{{"Throughput by the size of a blob", "blobs-throughput.svg", "bytes", "MiB/s", []series{{"weir's store", x, ours}, {"nginx", x, theirs}}},
		{"The server's CPU by the size of a blob", "blobs-cpu.svg", "bytes", "CPU-s/GiB", []series{{"weir's store", x, cpu}, {"nginx", x, theirCPU}}}}
	s.report(b)
}

const requestsTitle = "Requests per second for what is small"

// wrkLine finds what wrk prints of latency and rate, or that something failed.
var wrkLine = regexp.MustCompile(`(?m)^\s+(50|99)%\s+([0-9.]+)(us|ms|s)$|^(Requests/sec):\s+([0-9.]+)|(Non-2xx[^:]*:\s+\d+|Socket errors:.*)`)

// BenchmarkRequests asks for a manifest and a small blob over many connections.
func BenchmarkRequests(b *testing.B) {
	c := newContent(b, 1000)
	small := c.add(b, random(1<<10, 99))
	w := newWorld(b, c)
	agent := w.agent(b, 0)
	nginx, p := w.nearNginx(b, 0)
	tool := lab.Debian(b, "/usr/bin/wrk", "wrk")
	ours := w.node.As(tool, "crane")
	s := section{title: requestsTitle, text: `wrk with 16 connections, TLS, HTTP/1.1, on one processor; the server on the other one. A manifest is asked for by its digest: a
tag is resolved at the registry each time.`,
		head: []string{"what", "weir, requests/s", "nginx, requests/s", "weir / nginx", "weir p50, ms", "p99", "nginx p50, ms", "p99", "weir, CPU-ms a request", "nginx"}}
	for _, what := range []struct{ name, path string }{{"manifest", "/v2/" + repo + "/manifests/" + c.manifest.String()}, {"blob of 1 KiB", blobPath(small)}} {
		load := func(program, base string, pid int) func() sample {
			return func() (r sample) {
				before := cpuTime(b, pid)
				out := w.node.Run(pinned(1, program, "-c", "16", "-t", "1", "-d", fmt.Sprintf("%ds", rounds(3)), "--latency", base+what.path)...)
				used := cpuTime(b, pid) - before
				for _, m := range wrkLine.FindAllStringSubmatch(out, -1) {
					v, _ := strconv.ParseFloat(m[2]+m[5], 64)
					v *= map[string]float64{"us": 1e-6, "ms": 1e-3, "s": 1, "": 1}[m[3]]
					switch {
					case m[6] != "":
						b.Fatal(out)
					case m[1] == "50":
						r.p50 = v
					case m[1] == "99":
						r.p99 = v
					default:
						r.rate = v
					}
				}
				if r.rate == 0 || r.p50 == 0 {
					b.Fatal("wrk prints something unknown: ", out)
				}
				r.cpu = used / (r.rate * float64(rounds(3)))
				return r
			}
		}
		w.fetch(b, w.crane, 1, "https://"+known, what.path, 1, "cold")
		r := turns(rounds(5), load(ours, "https://"+known, agent.PID()), load(tool, nginx, p.PID()))
		p50, p99 := func(s sample) float64 { return s.p50 }, func(s sample) float64 { return s.p99 }
		each := func(s sample) float64 { return s.cpu }
		s.row(what.name, f0(median(r[0], rate)), f0(median(r[1], rate)), compare(r[0], r[1], rate),
			ms(median(r[0], p50)), ms(median(r[0], p99)), ms(median(r[1], p50)), ms(median(r[1], p99)), f3(1000*median(r[0], each)), f3(1000*median(r[1], each)))
	}
	s.report(b)
}

const passTitle = "Passed through"

// BenchmarkPassThrough gets blobs from a host that weir doesn't know, through
// weir and directly, over one connection and over 1,000 at once.
func BenchmarkPassThrough(b *testing.B) {
	c := newContent(b, 1000)
	large, small := c.add(b, random(part(512<<20), 1)), c.add(b, random(256<<10, 2))
	w := newWorld(b, c)
	agent := w.agent(b, shared)
	s := section{title: passTitle, text: `The host is nginx, in another network namespace; client, weir and nginx share both processors, so that what weir needs is missing
elsewhere. The last two are over a link of 1 Gbit/s. CPU is weir's. Bound: at least 0.95 of the direct throughput.`,
		head: []string{"what", "through weir, MiB/s", "direct, MiB/s", "ratio", "weir, CPU-s/GiB", "first byte p50, ms", "direct, ms", "≥ 0.95"}}
	one := func(program string, count int) func() sample {
		return func() sample {
			return w.fetch(b, program, shared, "https://"+unknown, blobPath(large), count, "cold", agent.PID())
		}
	}
	many := func(program string) func() sample {
		return func() sample {
			before := cpuTime(b, agent.PID())
			r := run(b, w.node, program, shared, "burst", "https://"+unknown, blobPath(small), "1000")
			return sample{seconds: r.Seconds, bytes: r.Bytes, cpu: cpuTime(b, agent.PID()) - before}
		}
	}
	add := func(what string, r [][]sample) {
		ratio := compare(r[0], r[1], throughput)
		row := []any{what, f0(median(r[0], throughput)), f0(median(r[1], throughput)), ratio, f2(median(r[0], cpuPerGiB)), "", "", reached(quantile(ratio, 0.5) >= 0.95)}
		if len(r[0][0].first) > 0 {
			row[5], row[6] = ms(first(r[0])), ms(first(r[1]))
		}
		s.row(row...)
	}
	one(w.crane, 1)()
	add("512 MiB", turns(rounds(7), one(w.crane, 2), one(w.plain, 2)))
	add("1,000 connections at once, 256 KiB each", turns(rounds(7), many(w.crane), many(w.plain)))
	w.Shape(1000)
	add("512 MiB, 1 Gbit/s", turns(rounds(3), one(w.crane, 1), one(w.plain, 1)))
	add("1,000 connections at once, 256 KiB each, 1 Gbit/s", turns(rounds(3), many(w.crane), many(w.plain)))
	s.report(b)
}

const connectTitle = "connect() of a process that weir doesn't follow"

// BenchmarkConnect has one process connect from cgroups with and without weir's
// programs, in turn.
func BenchmarkConnect(b *testing.B) {
	w := newWorld(b, newContent(b, 1000))
	w.agent(b, shared)
	v4, _ := w.Host(unknown)
	n := rounds(600)
	r := run(b, w.node, w.plain, 1, "connect", v4.String()+":443", strconv.Itoa(n), "300", w.node.Cgroup(), cgroup(b, w.node, "without"), cgroup(b, w.node, "control"))
	of := func(i int) (c []sample) {
		for k := range n {
			c = append(c, sample{seconds: r.First[3*k+i]})
		}
		return c
	}
	ratio, noise := compare(of(0), of(1), seconds), compare(of(2), of(1), seconds)
	s := section{title: connectTitle, text: fmt.Sprintf(`One process moves between cgroups, of which one has weir's programs, and makes 300 connections to another namespace in each,
%d times. The control is a second cgroup without programs: what its ratio is off 1 is noise. Bound: within 1 %%.`, n),
		head: []string{"cgroup", "µs", "ratio to without: median (5 %–95 %)", "≤ 1.01"}}
	spread := func(r ratios) string {
		return fmt.Sprintf("%.4f (%.3f–%.3f)", quantile(r, 0.5), quantile(r, 0.05), quantile(r, 0.95))
	}
	us := func(i int) string { return f2(1e6 * median(of(i), seconds)) }
	s.row("without programs", us(1), "", "")
	s.row("with weir's programs", us(0), spread(ratio), reached(quantile(ratio, 0.5) <= 1.01))
	s.row("control", us(2), spread(noise), "")
	s.report(b)
}

const coldTitle = "Cold pulls"

// BenchmarkCold pulls what weir hasn't, over shaped uplinks, and directly.
func BenchmarkCold(b *testing.B) {
	s := section{title: coldTitle, text: `A client gets the manifest and all blobs, three at a time, from nginx behind an uplink of that rate; weir's store is empty each
time. The first byte is that of a blob of 512 MiB, over a new connection, TLS and all; a client has pulled its manifest before, as each does, or
the agent has had no connection at all. CPU is weir's.`,
		head: []string{"what", "through weir, s", "direct, s", "ratio", "received, weir / direct", "weir, CPU-s/GiB", "bound"}}
	for _, link := range []struct {
		mbit, mib int
		bound     float64
	}{{100, 48, 1.02}, {1000, 400, 1.02}, {0, 512, 1.3}} {
		c := newContent(b, part(link.mib<<19), part(link.mib<<20)*3/10, part(link.mib<<20)*2/10)
		large := c.add(b, random(part(512<<20), 7))
		w := newWorld(b, c)
		agent := w.agent(b, shared)
		pull := func(program string) sample {
			before, cpu := received(b, w.node), cpuTime(b, agent.PID())
			r := run(b, w.node, program, shared, "pull", "https://"+known, repo, "1")
			return sample{seconds: r.Seconds, bytes: received(b, w.node) - before, cpu: (cpuTime(b, agent.PID()) - cpu) / float64(r.Bytes) * (1 << 30)}
		}
		begun := func(program string) sample {
			r := w.fetch(b, program, shared, "https://"+known, blobPath(large), 1, "cold")
			return sample{seconds: r.first[0]}
		}
		add := func(what string, bound float64, got, cpu string, r [][]sample) {
			ratio := compare(r[0], r[1], seconds)
			s.row(what, f3(median(r[0], seconds)), f3(median(r[1], seconds)), ratio, got, cpu, fmt.Sprintf("≤ %.2f: %s", bound, reached(quantile(ratio, 0.5) <= bound)))
		}
		what := fmt.Sprintf("%s over %d Mbit/s", sizeText(c.image.Bytes), link.mbit)
		if link.mbit > 0 {
			w.Shape(link.mbit)
		} else {
			what = sizeText(c.image.Bytes) + ", no limit but two processors"
		}
		r := turns(rounds(5), func() sample { w.restart(agent); return pull(w.crane) }, func() sample { return pull(w.plain) })
		got := compare(r[0], r[1], func(s sample) float64 { return float64(s.bytes) })
		add(what, link.bound, got.String(), f2(median(r[0], func(s sample) float64 { return s.cpu })), r)
		if link.mbit == 0 {
			restart := func() { w.restart(agent) }
			asked := func() { // as a pull does before it asks for blobs
				w.restart(agent)
				w.fetch(b, w.crane, shared, "https://"+known, "/v2/"+repo+"/manifests/1", 1, "cold")
			}
			for _, first := range []struct {
				what   string
				before func()
			}{{"to the first byte, after the manifest", asked}, {"to the first byte, an agent's first connection", restart}} {
				add(first.what, 1.15, "", "", turns(rounds(7), func() sample { first.before(); return begun(w.crane) }, func() sample { return begun(w.plain) }))
			}
		}
	}
	s.report(b)
}

const mirrorsTitle = "Against pull-through registries"

// BenchmarkMirrors pulls through weir and through registries that are
// configured as pull-through caches: cold, warm, and by 8 clients at once.
func BenchmarkMirrors(b *testing.B) {
	c := newContent(b, part(100<<20), part(60<<20), part(40<<20), part(30<<20), part(20<<20), part(6<<20))
	w := newWorld(b, c)
	w.Shape(1000)
	agent := w.agent(b, shared)
	type rival struct {
		base, program string
		empty         func()
		pid           func() int
	}
	all := []rival{{"https://" + known, w.crane, func() { w.restart(agent) }, func() int { return agent.PID() }}}
	for _, r := range []struct{ host, path string }{
		{"distribution.test", lab.Tool(b, "registry")},
		{"debian.test", lab.Debian(b, "/usr/bin/docker-registry", "docker-registry")},
	} {
		data := filepath.Join("/var/lib/home", r.host)
		base, _, start := w.distribution(b, r.host, r.path, "https://"+known, data)
		p := start()
		all = append(all, rival{base, w.plain, func() {
			p.Stop()
			w.node.Run("rm", "-rf", data)
			p = start()
		}, func() int { return p.PID() }})
	}
	pull := func(r rival, clients int, cold bool) func() sample {
		return func() (s sample) {
			if cold {
				r.empty()
			}
			before := cpuTime(b, r.pid())
			var wg sync.WaitGroup
			var mu sync.Mutex
			for range clients {
				wg.Go(func() {
					got := run(b, w.node, r.program, shared, "pull", r.base, repo, "1")
					mu.Lock()
					defer mu.Unlock()
					s.bytes += got.Bytes
					s.seconds = max(s.seconds, got.Seconds)
				})
			}
			wg.Wait()
			s.cpu = cpuTime(b, r.pid()) - before
			return s
		}
	}
	s := section{title: mirrorsTitle, text: fmt.Sprintf(`An image of %s in 6 layers, from nginx behind an uplink of 1 Gbit/s. The registries are pull-through caches (proxy.remoteurl)
with TLS on the node itself; weir's clients name the registry, theirs the cache. Seconds are those of the slowest client; CPU is that of weir or the cache, for each
GiB that clients got.`, sizeText(c.image.Bytes)),
		head: []string{"what", "weir, s", "distribution 3, s", "docker-registry 2.8, s", "weir / distribution 3", "weir / docker-registry 2.8", "weir, CPU-s/GiB", "distribution 3", "docker-registry 2.8"}}
	for _, what := range []struct {
		name    string
		clients int
		cold    bool
	}{{"cold", 1, true}, {"warm", 1, false}, {"8 clients, warm", 8, false}, {"8 clients, cold", 8, true}} {
		var funcs []func() sample
		for _, r := range all {
			funcs = append(funcs, pull(r, what.clients, what.cold))
		}
		if !what.cold {
			turns(1, funcs...) // until the caches have written all
		}
		r := turns(rounds(3), funcs...)
		s.row(what.name, f2(median(r[0], seconds)), f2(median(r[1], seconds)), f2(median(r[2], seconds)),
			compare(r[0], r[1], seconds), compare(r[0], r[2], seconds), f2(median(r[0], cpuPerGiB)), f2(median(r[1], cpuPerGiB)), f2(median(r[2], cpuPerGiB)))
	}
	s.report(b)
}

const agentTitle = "What the agent needs"

// BenchmarkAgent measures the agent's memory and CPU when nothing is pulled,
// its memory under load, and its start with many blobs in the store.
func BenchmarkAgent(b *testing.B) {
	c := newContent(b, part(400<<20), part(300<<20), part(200<<20), part(124<<20))
	small := c.add(b, random(256<<10, 2))
	w := newWorld(b, c)
	data := b.TempDir() // on a disk, as a node's is
	agent := w.agent(b, shared, "--data-dir", data)
	s := section{title: agentTitle, text: `The resident set, which has the binary's own pages too. Idle is the minute after the start. Under load, 8 clients pull an image of
1 GiB, cold and then warm; 1,000 connections get 256 KiB each at the same time. The start is from exec to the first answer of /readyz.`,
		head: []string{"what", "figure", "bound", ""}}
	idle := time.Duration(rounds(60)) * time.Second
	before := cpuTime(b, agent.PID())
	time.Sleep(idle)
	share := 100 * (cpuTime(b, agent.PID()) - before) / idle.Seconds()
	rss := memory(b, agent.PID(), "VmRSS")
	s.row("idle, memory", mib(rss)+" MiB", "< 40 MiB", reached(rss < 40<<20))
	s.row("idle, CPU", fmt.Sprintf("%.3f %%", share), "< 0.1 %", reached(share < 0.1))
	load := func(what string, f func()) {
		most := peak(b, agent.PID(), f)
		s.row(what+", memory at its peak", mib(most)+" MiB", "< 150 MiB", reached(most < 150<<20))
	}
	eight := func() {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { run(b, w.node, w.crane, shared, "pull", "https://"+known, repo, "1") })
		}
		wg.Wait()
	}
	load("8 pulls, cold", eight)
	load("8 pulls, warm", eight)
	load("1,000 connections passed through", func() { run(b, w.node, w.crane, shared, "burst", "https://"+unknown, blobPath(small), "1000") })
	w.fetch(b, w.crane, shared, "https://"+known, blobPath(small), 1, "cold")
	load("1,000 connections to the store", func() { run(b, w.node, w.crane, shared, "burst", "https://"+known, blobPath(small), "1000") })
	agent.Stop()

	fill(b, filepath.Join(data, "store"), 20_000)
	var starts []float64
	for range rounds(5) {
		start := time.Now()
		agent.Start()
		starts = append(starts, time.Since(start).Seconds())
		if got := agent.Status().Store.Blobs; got < 20_000 {
			b.Fatalf("%d blobs in the store, want 20,000", got)
		}
		agent.Stop()
	}
	s.row("start with 20,000 blobs", fmt.Sprintf("%.2f s (%.2f–%.2f)", quantile(starts, 0.5), quantile(starts, 0), quantile(starts, 1)), "< 1 s", reached(quantile(starts, 0.5) < 1))
	s.report(b)
}
