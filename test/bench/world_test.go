// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"weir/test/lab"
)

const (
	repo = "bench/image"
	// known is a registry that weir intercepts, unknown one that it doesn't.
	known, unknown = "ghcr.io", "registry.example"
	// nearPort is that of hosts on the node itself, one that isn't redirected.
	nearPort     = "6443"
	manifestType = "application/vnd.docker.distribution.manifest.v2+json"
	shared       = -1 // all processors
)

// content is a registry's content as files, for nginx: blobs, and an image of
// some of them.
type content struct {
	dir      string
	manifest digest.Digest
	image    lab.Pushed
}

// newContent makes an image of layers of these sizes, which can't be
// compressed.
func newContent(b *testing.B, layers ...int) *content {
	b.Helper()
	c := &content{dir: b.TempDir()}
	type descriptor struct {
		MediaType string        `json:"mediaType"`
		Digest    digest.Digest `json:"digest"`
		Size      int           `json:"size"`
	}
	var all []descriptor
	for i, size := range layers {
		var plain, packed bytes.Buffer
		tw := tar.NewWriter(&plain)
		_ = tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("file-%d", i), Mode: 0o644, Size: int64(size)})
		_, _ = tw.Write(random(size, uint64(i)))
		tw.Close()
		gz, _ := gzip.NewWriterLevel(&packed, gzip.NoCompression)
		_, _ = gz.Write(plain.Bytes())
		gz.Close()
		d := c.add(b, packed.Bytes())
		all = append(all, descriptor{"application/vnd.docker.image.rootfs.diff.tar.gzip", d, packed.Len()})
		c.image.Layers = append(c.image.Layers, d)
		c.image.DiffIDs = append(c.image.DiffIDs, digest.FromBytes(plain.Bytes()))
		c.image.Bytes += int64(packed.Len())
	}
	config, _ := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "created": "2020-01-01T00:00:00Z", "config": map[string]any{"Cmd": []string{"/nothing"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": c.image.DiffIDs}})
	c.image.Config = c.add(b, config)
	manifest, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": manifestType,
		"config": descriptor{"application/vnd.docker.container.image.v1+json", c.image.Config, len(config)}, "layers": all})
	c.manifest = c.add(b, manifest)
	return c
}

// add adds a blob, or a manifest.
func (c *content) add(b *testing.B, blob []byte) digest.Digest {
	b.Helper()
	d := digest.FromBytes(blob)
	if err := os.WriteFile(filepath.Join(c.dir, d.String()), blob, 0o644); err != nil {
		b.Fatal(err)
	}
	return d
}

func random(size int, seed uint64) []byte {
	b := make([]byte, size)
	_, _ = rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, size, seed))).Read(b)
	return b
}

func blobPath(d digest.Digest) string { return "/v2/" + repo + "/blobs/" + d.String() }

// nginx writes the configuration of a registry of the content, as quick as it
// can be: a worker for each processor, and nothing that has to be looked up.
// It gives each connection perConnection bytes a second, "0" for as many as it can.
func (c *content) nginx(b *testing.B, certs func(host string) (cert, key string), workers int, perConnection string, listen map[string][]string) (conf string) {
	b.Helper()
	dir := b.TempDir()
	var servers strings.Builder
	for host, addrs := range listen {
		cert, key := certs(host)
		fmt.Fprintf(&servers, "server {\nserver_name %s;\nssl_certificate %s;\nssl_certificate_key %s;\n", host, cert, key)
		for _, a := range addrs {
			fmt.Fprintf(&servers, "listen %s ssl backlog=4096;\n", a)
		}
		fmt.Fprintf(&servers, `
root %[1]s;
location = /v2/ { default_type application/json; return 200 "{}"; }
location = /v2/%[2]s/manifests/1 { default_type %[3]s; types {} add_header Docker-Content-Digest %[4]s; alias %[1]s/%[4]s; }
location ~ ^/v2/%[2]s/manifests/(sha256:.+)$ { default_type %[3]s; types {} add_header Docker-Content-Digest $1; alias %[1]s/$1; }
location ~ ^/v2/%[2]s/blobs/(sha256:.+)$ { default_type application/octet-stream; types {} add_header Docker-Content-Digest $1; alias %[1]s/$1; }
}
`, c.dir, repo, manifestType, c.manifest)
	}
	conf = filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `
daemon off;
user root;
pid %[1]s/nginx.pid;
error_log stderr warn;
worker_processes %[2]d;
events { worker_connections 15000; }
http {
access_log off;
sendfile on;
tcp_nopush on;
tcp_nodelay on;
keepalive_requests 10000000;
keepalive_timeout 600s;
limit_rate %[4]s;
ssl_protocols TLSv1.2 TLSv1.3;
client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi; uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
open_file_cache max=10000 inactive=600s;
%[3]s
}
`, dir, workers, servers.String(), perConnection), 0o644); err != nil {
		b.Fatal(err)
	}
	return conf
}

// nginxCommand is one whose workers end with it, however it ends.
func nginxCommand(processor int, conf string) []string {
	return pinned(processor, "unshare", "--fork", "--pid", "--kill-child", "/usr/sbin/nginx", "-c", conf)
}

// pinned is a command on one processor.
func pinned(processor int, args ...string) []string {
	if processor == shared {
		return args
	}
	return append([]string{"taskset", "-c", strconv.Itoa(processor)}, args...)
}

// world is an internet whose registries are nginx with the content, and a node.
type world struct {
	*lab.Internet
	content *content
	node    *lab.Node
	crane   string // a client that weir follows
	plain   string // one that it doesn't
	client  *http.Client
	near    int // hosts on the node
}

func newWorld(b *testing.B, c *content) *world { return newWorldWith(b, c, "0") }

// newWorldWith is one whose registries give each connection so many bytes a second.
func newWorldWith(b *testing.B, c *content, perConnection string) *world {
	b.Helper()
	w := &world{Internet: lab.NewInternet(b), content: c}
	listen := make(map[string][]string)
	for _, host := range []string{known, unknown} {
		v4, v6 := w.Host(host)
		listen[host] = []string{v4.String() + ":443", "[" + v6.String() + "]:443"}
	}
	w.Spawn("nginx", nginxCommand(shared, c.nginx(b, w.CertificateFiles, 2, perConnection, listen))...)
	w.node = w.Node()
	w.crane, w.plain = program(b, w.node, "crane"), program(b, w.node, "someprogram")
	w.client = &http.Client{Transport: &http.Transport{DialContext: w.node.Dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	b.Cleanup(w.client.CloseIdleConnections)
	v4, _ := w.Host(known)
	w.answers(b, "https://"+v4.String())
	return w
}

// agent starts weir on the node, on one processor if it isn't shared.
func (w *world) agent(b *testing.B, processor int, args ...string) *lab.Agent {
	b.Helper()
	a := w.node.Agent(append([]string{"--store-size", "6GiB", "--log-level", "warn"}, args...)...)
	if processor != shared {
		// Go's runtime sees within a second that it has one processor.
		if out, err := exec.Command("taskset", "-acp", strconv.Itoa(processor), strconv.Itoa(a.PID())).CombinedOutput(); err != nil {
			b.Fatalf("binding the agent to a processor: %v\n%s", err, out)
		}
		time.Sleep(1500 * time.Millisecond)
	}
	return a
}

// restart has an agent start again, with an empty store.
func (w *world) restart(a *lab.Agent) {
	a.Stop()
	w.node.Run("rm", "-rf", "/var/lib/weir/store")
	a.Start()
}

// host gives a name an address on the node itself, and returns it.
func (w *world) host(b *testing.B, name string) string {
	b.Helper()
	w.near++
	addr := fmt.Sprintf("198.51.100.%d", w.near)
	w.node.Run("ip", "addr", "add", addr+"/32", "dev", "lo")
	hosts, err := w.node.File("/etc/hosts")
	if err != nil {
		b.Fatal(err)
	}
	w.node.WriteFile("/etc/hosts", string(hosts)+addr+" "+name+"\n")
	return net.JoinHostPort(addr, nearPort)
}

// nearNginx starts nginx with the content on the node itself.
func (w *world) nearNginx(b *testing.B, processor int) (base string, p *lab.Process) {
	b.Helper()
	addr := w.host(b, "nginx.test")
	workers := 2
	if processor != shared {
		workers = 1
	}
	p = w.node.Spawn("nginx", nginxCommand(processor, w.content.nginx(b, w.CertificateFiles, workers, "0", map[string][]string{"nginx.test": {addr}}))...)
	w.answers(b, "https://"+addr)
	return "https://nginx.test:" + nearPort, p
}

// distribution makes a registry of the distribution project, or Debian's older
// version of it, on the node: start starts it, and waits until it answers. With
// upstream, it is a pull-through cache of that.
func (w *world) distribution(b *testing.B, name, path, upstream, data string) (base, addr string, start func() *lab.Process) {
	b.Helper()
	addr = w.host(b, name)
	cert, key := w.CertificateFiles(name)
	conf := fmt.Sprintf(`
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %s}
  delete: {enabled: true}
  cache: {blobdescriptor: inmemory}
http: {addr: %q, secret: bench, tls: {certificate: %s, key: %s}}
`, data, addr, cert, key)
	if upstream != "" {
		conf += fmt.Sprintf("proxy: {remoteurl: %q}\n", upstream)
	}
	file := filepath.Join(b.TempDir(), "config.yml")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		b.Fatal(err)
	}
	return "https://" + name + ":" + nearPort, addr, func() *lab.Process {
		p := w.node.Spawn(name, "env", "OTEL_TRACES_EXPORTER=none", path, "serve", file)
		w.answers(b, "https://"+addr)
		return p
	}
}

// push puts the image into a registry.
func (w *world) push(b *testing.B, addr string) {
	b.Helper()
	base := "https://" + addr + "/v2/" + repo
	read := func(d digest.Digest) []byte {
		blob, err := os.ReadFile(filepath.Join(w.content.dir, d.String()))
		if err != nil {
			b.Fatal(err)
		}
		return blob
	}
	for _, d := range append([]digest.Digest{w.content.image.Config}, w.content.image.Layers...) {
		at, err := w.ask(b.Context(), http.MethodPost, base+"/blobs/uploads/", nil, "")
		if err == nil {
			_, err = w.ask(b.Context(), http.MethodPut, at+"&digest="+d.String(), bytes.NewReader(read(d)), "application/octet-stream")
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	if _, err := w.ask(b.Context(), http.MethodPut, base+"/manifests/1", bytes.NewReader(read(w.content.manifest)), manifestType); err != nil {
		b.Fatal(err)
	}
}

// answers waits until a registry answers.
func (w *world) answers(b *testing.B, base string) {
	b.Helper()
	if err := lab.Eventually(nil, func(ctx context.Context) error {
		_, err := w.ask(ctx, http.MethodGet, base+"/v2/", nil, "")
		return err
	}); err != nil {
		b.Fatal(err)
	}
}

// ask sends a request from the node, and returns where the answer leads to.
func (w *world) ask(ctx context.Context, method, url string, body io.Reader, mediaType string) (next string, err error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return "", err
	}
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		msg, _ := io.ReadAll(resp.Body)
		return "", fmt.Errorf("%s %s: %s %s", method, url, resp.Status, msg)
	}
	return resp.Header.Get("Location"), nil
}

// fetch measures a client's getting a path so many times, and the CPU of what
// serves it.
func (w *world) fetch(b *testing.B, program string, processor int, base, path string, count int, state string, pids ...int) sample {
	b.Helper()
	cpu := cpuTime(b, pids...)
	r := run(b, w.node, program, processor, "fetch", base, path, strconv.Itoa(count), state)
	return sample{seconds: r.Seconds, bytes: r.Bytes, first: r.First, cpu: cpuTime(b, pids...) - cpu}
}

// cpuTime is what processes and their children have used, user and system.
func cpuTime(b *testing.B, pids ...int) (seconds float64) {
	b.Helper()
	for _, pid := range family(pids...) {
		// In nanoseconds, where stat has hundredths of a second.
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(threads) == 0 {
			b.Fatalf("process %d is gone: %v", pid, err)
		}
		for _, t := range threads {
			var ns float64
			if raw, err := os.ReadFile(t); err == nil {
				fmt.Sscan(string(raw), &ns)
			}
			seconds += ns / 1e9
		}
	}
	return seconds
}

// family are processes and their children.
func family(pids ...int) []int {
	all := pids
	for _, pid := range pids {
		raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		for f := range strings.FieldsSeq(string(raw)) {
			if n, err := strconv.Atoi(f); err == nil {
				all = append(all, family(n)...)
			}
		}
	}
	return all
}

// memory is a line of a process's status in bytes: VmRSS, VmHWM.
func memory(b *testing.B, pid int, line string) (n int64) {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), line+":")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		b.Fatal(err)
	}
	return n << 10
}

// peak is the most memory that a process has had resident during f.
func peak(b *testing.B, pid int, f func()) int64 {
	b.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		b.Fatal(err)
	}
	f()
	return memory(b, pid, "VmHWM")
}

// cgroup makes a cgroup beside the node's.
func cgroup(b *testing.B, n *lab.Node, name string) string {
	b.Helper()
	dir := n.Cgroup() + "-" + name
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := lab.Eventually(nil, func(context.Context) error { return unix.Rmdir(dir) }); err != nil {
			b.Error(errors.Join(fmt.Errorf("removing %s", dir), err))
		}
	})
	return dir
}

// waitFor waits until a program has printed a line, and returns what it has
// printed before.
func waitFor(b *testing.B, p *lab.Process, line string) (before string) {
	b.Helper()
	if err := lab.Eventually(nil, func(context.Context) error {
		var lines []string
		for sc := bufio.NewScanner(strings.NewReader(p.Log(1 << 20))); sc.Scan(); {
			if sc.Text() == line {
				before = strings.Join(lines, "\n")
				return nil
			}
			lines = append(lines, sc.Text())
		}
		return fmt.Errorf("it says %q", lines)
	}); err != nil {
		b.Fatal(err)
	}
	return before
}

// rounds is how often something is measured, once to see whether all works.
func rounds(n int) int {
	if *quick {
		return 1
	}
	return n
}

// part is a size, or a small one to see whether all works.
func part(n int) int {
	if *quick {
		return max(n/64, 1)
	}
	return n
}

// received is how many bytes have come to a node over the network.
func received(b *testing.B, node *lab.Node) (n int64) {
	b.Helper()
	for line := range strings.Lines(node.Run("cat", "/proc/net/dev")) {
		name, counts, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok || name == "lo" {
			continue
		}
		k, err := strconv.ParseInt(strings.Fields(counts)[0], 10, 64)
		if err != nil {
			b.Fatalf("/proc/net/dev: %v", err)
		}
		n += k
	}
	return n
}
