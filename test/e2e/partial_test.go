// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"weir/test/lab"
)

// sentOf is how many bytes of a layer were sent, wherever.
func sentOf(r *lab.Registry, p lab.Pushed) (n int64) {
	for _, q := range r.Log.All(func(q lab.Request) bool {
		return q.Method == "GET" && strings.Contains(q.Path, p.Layers[0].Encoded()) && q.Status/100 == 2
	}) {
		n += q.Bytes
	}
	return n
}

// stopping is an answer that stops after some bytes, until on is closed, and breaks off.
type stopping struct {
	http.ResponseWriter
	left int64
	on   <-chan struct{}
}

// Write implements io.Writer.
func (s *stopping) Write(p []byte) (int, error) {
	n, err := s.ResponseWriter.Write(p[:min(int64(len(p)), s.left)])
	if s.left -= int64(n); s.left > 0 || err != nil {
		return n, err
	}
	_ = http.NewResponseController(s.ResponseWriter).Flush()
	<-s.on
	panic(http.ErrAbortHandler)
}

// The agent is killed when 90 % of a large layer has come, and started again: the next pull fetches
// what was missing, and is right.
func TestKilledAtNinetyPercent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	const ref = "acme/large:1"
	large := w.hub.Push(ref, lab.Image{Layers: []int{96 << 20}, Seed: 77, Padded: true})
	size := large.Sizes[0]
	var once sync.Once
	on := make(chan struct{})
	goOn := sync.OnceFunc(func() { close(on) })
	defer goOn()
	w.hub.Front(func(rw http.ResponseWriter, q *http.Request, next http.Handler) {
		if q.Method == http.MethodGet && strings.Contains(q.URL.Path, large.Layers[0].Encoded()) && q.Host == "production.cloudflare.docker.com" {
			once.Do(func() { rw = &stopping{rw, size * 9 / 10, on} })
		}
		next.ServeHTTP(rw, q)
	})
	agent := node.Agent("--upstream-connections", "1", "--store-size", "4GiB") // others would bring the rest; a tenth of it is for this
	docker := node.Docker()
	pulled := make(chan error, 1)
	go func() { pulled <- docker.TryPull(ref) }()
	err := lab.Eventually(nil, func(context.Context) error {
		n, err := recorded(node)
		if err == nil && n < size*86/100 {
			err = fmt.Errorf("%d of %d bytes are written down", n, size)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	agent.Kill()
	goOn()
	if err := <-pulled; err != nil { // dockerd fetches the rest directly
		t.Fatal(err)
	}
	docker.Same(ref, large)
	docker.Remove(ref)
	agent.Start()
	if n := agent.Status().Store.Partial; n < size*86/100 {
		t.Errorf("%d of %d bytes are found again", n, size)
	}
	if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" {
		t.Fatalf("dockerd is %+v", rt)
	}
	w.forget()
	docker.Pull(ref)
	docker.Same(ref, large)
	n := sentOf(w.hub, large)
	t.Logf("%.1f %% of the layer was fetched again", 100*float64(n)/float64(size))
	if n == 0 || n > size*15/100 {
		t.Errorf("%d of %d bytes were fetched again", n, size)
	}
	docker.Remove(ref)
	w.forget()
	docker.Pull(ref)
	w.nothingFetched(t)
}

// recorded is how many bytes the records of partials name.
func recorded(node *lab.Node) (n int64, err error) {
	const dir = "/var/lib/weir/store/ingest/"
	names, err := node.ReadDir(dir)
	for _, name := range names {
		if !strings.HasSuffix(name, ".partial") {
			continue
		}
		b, err := node.File(dir + name)
		if err != nil {
			return 0, err
		}
		var r struct{ Have [][2]int64 }
		if err := json.NewDecoder(bytes.NewReader(b)).Decode(&r); err != nil {
			return 0, err
		}
		for _, s := range r.Have {
			n += s[1] - s[0]
		}
	}
	return n, err
}

// The newest containerd fetches layers in chunks: cold, again, and killed in the middle.
func TestContainerdChunks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	node.WriteFile("/etc/containerd/config.toml", `version = 3
[plugins."io.containerd.transfer.v1.local"]
  concurrent_layer_fetch_buffer = 8388608
`)
	agent := node.Agent()
	containerd := node.NewestContainerd()
	const ref = "ghcr.io/acme/chunks:1"
	im := w.ghcr.Push("acme/chunks:1", lab.Image{Layers: []int{96 << 20}, Seed: 78, Padded: true})
	size := im.Sizes[0]
	pull := func(what string, most int64) {
		t.Helper()
		w.forget()
		containerd.Pull(ref)
		containerd.Same(ref, im)
		n := sentOf(w.ghcr, im)
		t.Logf("%s: %.3f of the layer was fetched", what, float64(n)/float64(size))
		if n > most {
			t.Errorf("%s: %d of %d bytes were fetched", what, n, size)
		}
		if n > size*101/100 {
			for _, q := range w.ghcr.Log.All(func(q lab.Request) bool { return strings.Contains(q.Path, im.Layers[0].Encoded()) }) {
				t.Log(q)
			}
		}
	}
	pull("cold", size*105/100)
	if rs := w.ghcr.Log.All(func(q lab.Request) bool { return strings.HasPrefix(q.Range, "bytes=8388608-") }); len(rs) == 0 {
		t.Error("it doesn't fetch in chunks")
	}
	stored := func() error {
		_, err := node.File("/var/lib/weir/store/blobs/sha256/" + im.Layers[0].Encoded())
		return err
	}
	if err := lab.Eventually(nil, func(context.Context) error { return stored() }); err != nil {
		t.Fatal(err)
	}
	containerd.Remove(ref, im)
	pull("again", 0)
	containerd.Remove(ref, im)

	// Another one, which is killed with a part of it.
	const other = "ghcr.io/acme/chunks:2"
	im = w.ghcr.Push("acme/chunks:2", lab.Image{Layers: []int{96 << 20}, Seed: 79, Padded: true})
	begun := make(chan struct{})
	var once sync.Once
	hold := make(chan struct{})
	w.ghcr.Fault(func(_ http.ResponseWriter, q *http.Request) bool {
		var from int64
		if !strings.Contains(q.URL.Path, im.Layers[0].Encoded()) {
			return false
		}
		if _, err := fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-", &from); err == nil && from >= 48<<20 {
			once.Do(func() { close(begun) })
			select {
			case <-hold:
			case <-q.Context().Done():
			}
		}
		return false
	})
	w.forget()
	pulled := make(chan error, 1)
	go func() { pulled <- containerd.TryPull(other) }()
	<-begun
	containerd.Kill()
	if err := <-pulled; err == nil {
		t.Error("a pull of a killed containerd succeeds")
	}
	w.ghcr.Fault(nil)
	close(hold)
	first := sentOf(w.ghcr, im)
	containerd.Start()
	if rt := agent.Runtime(containerd.PID()); rt.Reach != "intercepted" {
		t.Fatalf("containerd is %+v", rt)
	}
	w.forget()
	containerd.Pull(other)
	containerd.Same(other, im)
	if n := first + sentOf(w.ghcr, im); n > im.Sizes[0]*105/100 {
		t.Errorf("%d and then %d of %d bytes were fetched", first, n-first, im.Sizes[0])
	}
}
