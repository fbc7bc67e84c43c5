// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"weir/test/lab"
)

// anonymousToken returns the Authorization of an anonymous client.
func anonymousToken(host, repo string) (string, error) {
	resp, err := http.Get("https://" + host + "/token?scope=repository:" + repo + ":pull,push")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var token struct{ Token string }
	err = json.NewDecoder(resp.Body).Decode(&token)
	return "Bearer " + token.Token, err
}

// push pushes a blob of random bytes in one chunk of unknown length, as docker
// does, and prints its digest.
func push(host, repo string, size int64) error {
	token, err := anonymousToken(host, repo)
	if err != nil {
		return err
	}
	send := func(method, url string, body io.Reader, want int) (string, error) {
		req, err := http.NewRequest(method, url, body)
		if err != nil {
			return "", err
		}
		req.Header.Set("Authorization", token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return "", err
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			return "", fmt.Errorf("%s %s: %s", method, url, resp.Status)
		}
		next, err := resp.Location()
		if err != nil {
			return "", err
		}
		return next.String(), nil
	}
	at, err := send(http.MethodPost, "https://"+host+"/v2/"+repo+"/blobs/uploads/", nil, http.StatusAccepted)
	if err != nil {
		return err
	}
	hash := sha256.New()
	bytes := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), hash)
	if at, err = send(http.MethodPatch, at, struct{ io.Reader }{bytes}, http.StatusAccepted); err != nil {
		return err
	}
	digest := fmt.Sprintf("sha256:%x", hash.Sum(nil))
	if _, err := send(http.MethodPut, at+"&digest="+digest, nil, http.StatusCreated); err != nil {
		return err
	}
	fmt.Println(digest)
	return nil
}

// fetch gets a blob as an anonymous client does, and prints its length.
func fetch(host, repo, digest string) error {
	blob := "https://" + host + "/v2/" + repo + "/blobs/" + digest
	token, err := anonymousToken(host, repo)
	if err != nil {
		return err
	}
	req, err := http.NewRequest(http.MethodGet, blob, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", blob, resp.Status)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	fmt.Println(n)
	return err
}

// peakMemory is the most that a process has had resident.
func peakMemory(b testing.TB, pid int) (n int64) {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, hwm, _ := strings.Cut(string(status), "VmHWM:")
	if _, err := fmt.Sscan(hwm, &n); err != nil {
		b.Fatal(err)
	}
	return n << 10
}

// BenchmarkColdBurst has 8 nodes with containerd pull an image of 1 GiB at the
// same time, over an uplink of 200 Mbit/s that they share, and compares that
// with one node alone, without weir. All nodes share this machine's processors.
func BenchmarkColdBurst(b *testing.B) {
	const count, mbit = 8, 200
	for b.Loop() {
		w := newWorld(b)
		im := lab.Image{Seed: 5, Padded: true}
		for _, kib := range []int{320 << 10, 200 << 10, 140 << 10, 100 << 10, 70 << 10, 50 << 10, 40 << 10, 30 << 10, 20 << 10, 16 << 10,
			12 << 10, 8 << 10, 6 << 10, 4 << 10, 3 << 10, 2 << 10, 1536, 700, 650, 32} {
			im.Layers = append(im.Layers, kib<<10)
		}
		pushed := w.hub.Push("acme/large:1", im)
		pull := func(c *lab.Containerd) time.Duration {
			start := time.Now()
			if err := c.TryPull("acme/large:1"); err != nil {
				b.Error(err)
			}
			return time.Since(start)
		}
		w.Shape(mbit)
		node := w.Node()
		c := node.NewestContainerd()
		alone := pull(c)
		c.Remove("acme/large:1", pushed)
		c.Stop()
		nodes, agents := cluster(b, w, count)
		var all []*lab.Containerd
		for i, n := range nodes {
			// Fresh pages cost a virtual machine more than all else here.
			n.Run("mount", "-o", "remount,huge=always", "/var/lib")
			c := n.NewestContainerd()
			agents[i].Runtime(c.PID())
			all = append(all, c)
		}
		w.forget()
		times := make([]time.Duration, count)
		var wg sync.WaitGroup
		for i, c := range all {
			wg.Go(func() { times[i] = pull(c) })
		}
		wg.Wait()
		for _, c := range all {
			c.Same("acme/large:1", pushed)
		}
		last := slices.Max(times)
		share := float64(w.hub.Log.BlobBytes()) / float64(pushed.Bytes)
		b.ReportMetric(alone.Seconds(), "s-alone")
		b.ReportMetric(last.Seconds(), "s-last")
		b.ReportMetric(share, "images-from-upstream")
		if share > 1.05 {
			b.Errorf("the registry sent %.3f of the image", share)
		}
		if last > alone*13/10 {
			b.Errorf("the last node was done after %s, one alone after %s", last, alone)
		}
		for i, c := range all { // and their memory
			c.Stop()
			agents[i].Stop()
			nodes[i].End()
		}
	}
}
