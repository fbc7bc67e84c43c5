// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"weir/test/lab"
)

var (
	results = flag.String("results", "", "write RESULTS.md and its plots to this `directory`")
	quick   = flag.Bool("quick", false, "measure next to nothing, to see that it works")
)

// The client of the benchmarks is this binary under another name: crane, which
// weir follows, or one that it doesn't.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "client" {
		out, err := client(os.Args[2], os.Args[3:])
		if err == nil {
			err = json.NewEncoder(os.Stdout).Encode(out)
		}
		if err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	os.Exit(m.Run())
}

// fetched is what clients print.
type fetched struct {
	Bytes   int64
	Seconds float64
	First   []float64 // seconds to the first byte, of each request
	CPU     float64   // seconds that the client itself used
}

// run runs a client on a node, on one processor if it isn't negative, and
// returns what it measured.
func run(b *testing.B, n *lab.Node, program string, processor int, args ...string) (r fetched) {
	b.Helper()
	unmarshal(b, n.Run(pinned(processor, append([]string{program, "client"}, args...)...)...), &r)
	return r
}

func unmarshal(b *testing.B, out string, r *fetched) {
	b.Helper()
	if err := json.Unmarshal([]byte(out), r); err != nil {
		b.Fatal(out, err)
	}
}

// program installs the client on a node under a name.
func program(b *testing.B, n *lab.Node, name string) string {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	return n.As(self, name)
}

func client(what string, args []string) (out fetched, err error) {
	number := func(i int) int {
		n, nerr := strconv.Atoi(args[i])
		err = errors.Join(err, nerr)
		return n
	}
	switch what {
	case "fetch": // base URL, path, how often, and whether the connection is there before
		return fetch(args[0], args[1], number(2), args[3] == "warm")
	case "burst": // base URL, path, connections
		return burst(args[0], args[1], number(2))
	case "pull": // base URL, repository, tag
		return pull(args[0], args[1], args[2])
	case "hold": // base URL, path, connections: opens them, and closes none
		return hold(args[0], args[1], number(2))
	case "connect": // address, rounds, connections each, cgroups
		return connects(args[0], number(1), number(2), args[3:])
	case "peer":
		return peerClient(args)
	case "peer-server":
		return fetched{}, peerServer(args)
	case "wait":
		select {}
	}
	return out, fmt.Errorf("no client %q", what)
}

func newClient(readBuffer int) *http.Client {
	return &http.Client{Transport: &http.Transport{
		TLSNextProto:       map[string]func(string, *tls.Conn) http.RoundTripper{}, // HTTP/1.1
		ReadBufferSize:     readBuffer,
		DisableCompression: true,
	}}
}

// get gets something and returns its length and when the first byte was there.
func get(c *http.Client, url string) (n int64, first time.Time, err error) {
	resp, err := c.Get(url)
	if err != nil {
		return 0, first, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, first, fmt.Errorf("%s: %s", url, resp.Status)
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		k, err := resp.Body.Read(*buf)
		if n == 0 && k > 0 {
			first = time.Now()
		}
		n += int64(k)
		if err == io.EOF {
			return n, first, nil
		}
		if err != nil {
			return n, first, err
		}
	}
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

func fetch(base, path string, count int, warm bool) (r fetched, err error) {
	c := newClient(64 << 10)
	if warm {
		resp, err := c.Head(base + path)
		if err != nil {
			return r, err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return r, errors.New(resp.Status)
		}
	}
	used, start := ownCPU(), time.Now()
	for range count {
		asked := time.Now()
		n, first, err := get(c, base+path)
		if err != nil {
			return r, err
		}
		r.Bytes += n
		r.First = append(r.First, first.Sub(asked).Seconds())
	}
	r.Seconds, r.CPU = time.Since(start).Seconds(), ownCPU()-used
	return r, nil
}

func ownCPU() float64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// burst opens many connections at the same time, and gets something over each.
func burst(base, path string, count int) (r fetched, err error) {
	var wg sync.WaitGroup
	sizes, errs := make([]int64, count), make([]error, count)
	start := time.Now()
	for i := range count {
		wg.Go(func() {
			c := newClient(0)
			defer c.CloseIdleConnections()
			sizes[i], _, errs[i] = get(c, base+path)
		})
	}
	wg.Wait()
	r.Seconds = time.Since(start).Seconds()
	for _, n := range sizes {
		r.Bytes += n
	}
	return r, errors.Join(errs...)
}

// hold opens connections, and when they are all there it measures requests over
// one more. Then it waits for its end.
func hold(base, path string, count int) (r fetched, err error) {
	gate := make(chan struct{}, 64)
	var wg sync.WaitGroup
	errs := make([]error, count)
	for i := range count {
		gate <- struct{}{}
		wg.Go(func() {
			defer func() { <-gate }()
			_, _, errs[i] = get(newClient(0), base+path)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return r, err
	}
	if r, err = fetch(base, path, 200, true); err != nil {
		return r, err
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return r, err
	}
	fmt.Println("ready")
	select {}
}

// pull gets a manifest and then all that it names, three at a time as dockerd
// and containerd do.
func pull(base, repo, tag string) (r fetched, err error) {
	c := newClient(64 << 10)
	start := time.Now()
	req, err := http.NewRequest(http.MethodGet, base+"/v2/"+repo+"/manifests/"+tag, nil)
	if err != nil {
		return r, err
	}
	req.Header.Set("Accept", manifestType)
	resp, err := c.Do(req)
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return r, errors.New(resp.Status)
	}
	var m struct {
		Config struct{ Digest string }
		Layers []struct{ Digest string }
	}
	if err := json.NewDecoder(resp.Body).Decode(&m); err != nil {
		return r, err
	}
	gate := make(chan struct{}, 3)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, l := range append(m.Layers, m.Config) {
		gate <- struct{}{}
		wg.Go(func() {
			n, _, gerr := get(c, base+"/v2/"+repo+"/blobs/"+l.Digest)
			<-gate
			mu.Lock()
			defer mu.Unlock()
			r.Bytes += n
			err = errors.Join(err, gerr)
		})
	}
	wg.Wait()
	r.Seconds = time.Since(start).Seconds()
	return r, err
}

// connects connects to an address, from one cgroup after the other, and returns
// the seconds that one connection takes, by round and cgroup.
func connects(addr string, rounds, count int, cgroups []string) (r fetched, err error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return r, err
	}
	sa := &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	for range rounds {
		for _, dir := range cgroups {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
				return r, err
			}
			start := time.Now()
			for range count {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
				if err != nil {
					return r, err
				}
				if err := unix.Connect(fd, sa); err != nil {
					return r, err
				}
				_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
				unix.Close(fd)
			}
			r.First = append(r.First, time.Since(start).Seconds()/float64(count))
		}
	}
	return r, nil
}
