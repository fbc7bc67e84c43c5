// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"weir/proxy/store"
	"weir/test/lab"
)

const storeGrowthTitle = "Growth: blobs in the store"

// BenchmarkStoreGrowth opens stores of 100 to a million blobs, and looks blobs
// up in them.
func BenchmarkStoreGrowth(b *testing.B) {
	s := section{title: storeGrowthTitle, text: `Opening a store on disk, and then finding and opening blobs in it. The memory is that of the store's index, after a garbage
collection.`,
		head: []string{"blobs", "open, ms", "µs a blob", "memory, MiB", "bytes a blob", "find and open one, µs"}}
	var x, open, mem []float64
	dir := filepath.Join(b.TempDir(), "store")
	for count := 100; count <= part(1_000_000); count *= 10 {
		fill(b, dir, count)
		before := heap()
		start := time.Now()
		st, err := store.Open(dir, store.Options{})
		if err != nil {
			b.Fatal(err)
		}
		took := time.Since(start)
		used := heap() - before
		if n := st.Stats().Blobs; n != count {
			b.Fatalf("%d blobs, want %d", n, count)
		}
		const gets = 2000
		start = time.Now()
		for i := range gets {
			blob, err := st.Get(digest.FromString(strconv.Itoa(i * 7919 % count)))
			if err != nil {
				b.Fatal(err)
			}
			blob.Close()
		}
		each := time.Since(start) / gets
		st.Close()
		s.row(count, f2(took.Seconds()*1000), f2(took.Seconds()*1e6/float64(count)), mib(used), used/int64(count), f2(each.Seconds()*1e6))
		x, open, mem = append(x, float64(count)), append(open, took.Seconds()), append(mem, max(float64(used)/(1<<20), 0.01))
	}
	s.plots = []plot{{"Opening a store, by its blobs", "store-growth.svg", "blobs", "seconds, MiB", []series{{"seconds to open", x, open}, {"MiB of memory", x, mem}}}}
	s.report(b)
}

// fill puts blobs of a byte into a store's directory, without looking whether
// they are what their names say: neither does the store when it is opened.
func fill(b *testing.B, dir string, count int) {
	b.Helper()
	for _, d := range []string{"blobs/sha256", "sums/sha256"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			b.Fatal(err)
		}
	}
	var source string
	for i := range count {
		name := digest.FromString(strconv.Itoa(i)).Encoded()
		if i%30_000 == 0 { // a file can have 65,000 names on ext4
			source = filepath.Join(dir, "source-"+strconv.Itoa(i))
			if err := os.WriteFile(source, []byte("x"), 0o600); err != nil {
				b.Fatal(err)
			}
		}
		for _, d := range []string{"blobs/sha256", "sums/sha256"} {
			if err := os.Link(source, filepath.Join(dir, d, name)); err != nil && !os.IsExist(err) {
				b.Fatal(err)
			}
		}
	}
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

const connectionsTitle = "Growth: connections"

// BenchmarkConnections holds many connections open, passed through and to the
// store, and measures requests over one more.
func BenchmarkConnections(b *testing.B) {
	c := newContent(b, 1000)
	small := c.add(b, random(1<<10, 4))
	w := newWorld(b, c)
	s := section{title: connectionsTitle, text: `Connections that have given a client 1 KiB and stay open. The memory is what the agent has more than before; the requests are
over one connection more.`,
		head: []string{"connections", "passed through, MiB", "KiB each", "request p50, ms", "to the store, MiB", "KiB each", "request p50, ms"}}
	var x []float64
	var y [2][]float64
	// What is passed through takes two descriptors.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		b.Fatal(err)
	}
	for count := 1; count <= part(10_000); count *= 10 {
		count = min(count, int(limit.Max)/2-500)
		row := []any{count}
		for i, host := range []string{unknown, known} {
			agent := w.agent(b, shared)
			w.fetch(b, w.crane, shared, "https://"+host, blobPath(small), 1, "cold")
			before := memory(b, agent.PID(), "VmRSS")
			p := w.node.Spawn("clients", w.crane, "client", "hold", "https://"+host, blobPath(small), strconv.Itoa(count))
			var r fetched
			unmarshal(b, waitFor(b, p, "ready"), &r)
			used := memory(b, agent.PID(), "VmRSS") - before
			p.Kill()
			agent.Stop()
			row = append(row, mib(used), f2(float64(used)/1024/float64(count)), ms(quantile(r.First, 0.5)))
			y[i] = append(y[i], max(float64(used)/(1<<20), 0.01))
		}
		x = append(x, float64(count))
		s.row(row...)
	}
	s.plots = []plot{{"The agent's memory, by open connections", "connections-growth.svg", "connections", "MiB", []series{{"passed through", x, y[0]}, {"to the store", x, y[1]}}}}
	s.report(b)
}

const namespacesTitle = "Growth: network namespaces"

// BenchmarkNamespaces has programs that weir follows in many network
// namespaces, each of which gets a listener.
func BenchmarkNamespaces(b *testing.B) {
	w := newWorld(b, newContent(b, 1000))
	agent := w.agent(b, shared)
	s := section{title: namespacesTitle, text: `Network namespaces with a program that weir follows, each with a listener of its own. The time is from the start of those that
have come since the line before to the last listener's being open, most of which is the kernel's making of namespaces.`,
		head: []string{"namespaces", "listeners", "memory more, MiB", "KiB each", "ms a namespace", "agent's CPU, ms a namespace"}}
	before := memory(b, agent.PID(), "VmRSS")
	var x, y, t []float64
	running := 0
	for _, count := range []int{1, 10, 100, 200, 300, 400, 500} {
		if count = part(count); count <= running {
			continue
		}
		start, last, used := time.Now(), running, cpuTime(b, agent.PID())
		for ; running < count; running++ {
			w.node.Spawn("pod", "unshare", "--net", "sh", "-c", "ip link set lo up && exec "+w.crane+" client wait")
		}
		listeners := 0
		if err := lab.Eventually(nil, func(context.Context) error {
			if listeners = len(agent.Status().Listeners); listeners < count {
				return fmt.Errorf("%d listeners, want %d", listeners, count)
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
		each := time.Since(start).Seconds() / float64(count-last)
		cpu := (cpuTime(b, agent.PID()) - used) / float64(count-last)
		more := memory(b, agent.PID(), "VmRSS") - before
		s.row(count, listeners, mib(more), f2(float64(more)/1024/float64(count)), ms(each), ms(cpu))
		x, y, t = append(x, float64(count)), append(y, max(float64(more)/(1<<20), 0.01)), append(t, each*1000)
	}
	s.plots = []plot{{"Namespaces with a listener", "namespaces-growth.svg", "namespaces", "MiB, ms", []series{{"MiB more", x, y}, {"ms a namespace", x, t}}}}
	s.report(b)
}
