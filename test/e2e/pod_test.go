// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"weir/test/lab"
)

// pod is what a CI runner's pod is: a dockerd in a container with nothing but
// what its image brings, and a runner that has its socket and its network. The
// node's own dockerd runs both.
type pod struct {
	t    testing.TB
	node *lab.Node
	name string
	pid  int // of its dockerd
}

const outerDocker = "docker -H unix:///run/docker.sock "

// podImage makes the image of both: this machine's programs are mounted into it.
func podImage(node *lab.Node) {
	node.Run("sh", "-ec", `
root=/var/lib/home/pod
mkdir -p $root/etc/ssl/certs $root/usr $root/tmp $root/run $root/var/lib $root/proc $root/sys $root/dev $root/work
for d in bin sbin lib lib64; do ln -sfn usr/$d $root/$d; done
cp /etc/ssl/certs/ca-certificates.crt $root/etc/ssl/certs/
cp /etc/passwd /etc/group /etc/nsswitch.conf $root/etc/
tar -C $root -c . | `+outerDocker+`import - pod`)
}

func newPod(t testing.TB, node *lab.Node, name string, flags ...string) *pod {
	t.Helper()
	p := newPodOf(t, node, "pod", "none", name, flags...)
	node.Plug(p.pid)
	return p
}

// newPodOf makes a pod of an image, in one of docker's networks.
func newPodOf(t testing.TB, node *lab.Node, image, network, name string, flags ...string) *pod {
	t.Helper()
	p := &pod{t: t, node: node, name: name}
	node.Run("sh", "-ec", outerDocker+"run --detach --name="+name+" --network="+network+" --cgroup-parent="+filepath.Base(node.Cgroup())+" "+
		// What --privileged would give, but for what a test's machine may not have.
		"--cap-add=SYS_ADMIN --cap-add=NET_ADMIN --security-opt=apparmor=unconfined --security-opt=seccomp=unconfined --security-opt=systempaths=unconfined "+
		"-v /usr:/usr:ro -v /etc/hosts:/etc/hosts:ro -v "+name+"-socket:/run/shared -v /var/lib/docker "+
		image+" dockerd --host=unix:///run/shared/docker.sock --bridge=none --iptables=false --ip6tables=false "+strings.Join(flags, " "))
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := node.Output("sh", "-c", outerDocker+"logs "+name+" 2>&1 | tail -30")
			t.Logf("--- log of the dockerd in %s\n%s", name, log)
		}
		p.remove()
	})
	if _, err := fmt.Sscan(node.Run("sh", "-ec", outerDocker+"inspect --format '{{.State.Pid}}' "+name), &p.pid); err != nil {
		t.Fatal(err)
	}
	return p
}

// ready waits for the dockerd beside it, as jobs do.
const ready = "for i in $(seq 600); do docker version >/dev/null 2>&1 && break; sleep 0.05; done\n"

// job runs a script in the runner's container.
func (p *pod) job(script string) string {
	p.t.Helper()
	out, err := p.try(script)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

func (p *pod) try(script string) (string, error) {
	p.t.Helper()
	p.node.WriteFile("/var/lib/home/jobs/"+p.name, ready+script)
	return p.node.Output("sh", "-ec", outerDocker+"run --rm --network=container:"+p.name+" --cgroup-parent="+filepath.Base(p.node.Cgroup())+" -v /usr:/usr:ro -v /etc/hosts:/etc/hosts:ro -v "+p.name+"-socket:/run/shared "+
		"-v /var/lib/home/jobs:/jobs:ro -e DOCKER_HOST=unix:///run/shared/docker.sock -e DOCKER_BUILDKIT=1 -e HOME=/tmp -e PATH=/usr/sbin:/usr/bin -w /work pod sh -ec '. /jobs/"+p.name+"'")
}

func (p *pod) remove() { _, _ = p.node.Output("sh", "-c", outerDocker+"rm --force --volumes "+p.name) }

// The job of a self-hosted runner with a docker:dind beside it, whose disk is
// empty each time: pulls from two registries, at the same time, a build and a
// push. The second job's bytes come from the node.
func TestPod(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	node.Docker()
	podImage(node)
	job := func(n int) string {
		return fmt.Sprintf(`
docker pull -q %[1]s
docker pull -q %[2]s & first=$!
docker pull -q ghcr.io/acme/tool:1 & second=$!
wait $first
wait $second
printf 'FROM ghcr.io/acme/base:1\nCOPY Dockerfile /a\nLABEL job=%[3]d\n' > Dockerfile
docker build -q -t ghcr.io/acme/built:%[3]d .
docker push -q ghcr.io/acme/built:%[3]d
docker image inspect --format '{{.Id}}' %[1]s
`, flyway, renovate, n)
	}
	w.ghcr.Push("acme/tool:1", lab.Image{Layers: []int{300_000, 700_000}, Seed: 61, OCI: true})
	w.ghcr.Push("acme/base:1", lab.Image{Layers: []int{900_000}, Seed: 62})
	for n := range 2 {
		p := newPod(t, node, fmt.Sprintf("job%d", n))
		w.forget()
		out := p.job(job(n))
		if !strings.Contains(out, w.flyway.Config.String()) {
			t.Errorf("the job has another image than %s:\n%s", w.flyway.Config, out)
		}
		if gets := w.hub.Log.BlobGETs() + w.ghcr.Log.BlobGETs(); (gets == 0) != (n == 1) {
			t.Errorf("job %d: %d blobs were fetched:\n%s\n%s", n, gets, w.hub.Log, w.ghcr.Log)
		}
		p.remove()
	}
	if s := agent.Status(); len(s.Listeners) > 1 { // the node's own is left
		t.Logf("%+v", s.Listeners)
	}
}

// Several pods pull the same at the same time, one of them with a mirror of its
// own that isn't there, and one ends in the middle of it: the others get all,
// and the registry sends it once.
func TestPodsAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	im := w.hub.Push("acme/large:1", lab.Image{Layers: []int{12 << 20, 6 << 20, 2 << 20}, Seed: 63})
	node := w.Node()
	agent := node.Agent()
	node.Docker()
	podImage(node)
	pods := []*pod{newPod(t, node, "first"), newPod(t, node, "second", "--registry-mirror=http://127.0.0.1:9"), newPod(t, node, "third")}
	for _, p := range pods {
		p.job("true")
	}
	node.Shape(40)
	w.forget()
	var wg sync.WaitGroup
	for i, p := range pods {
		wg.Go(func() {
			out, err := p.try("docker pull -q acme/large:1 && docker image inspect --format '{{.Id}}' acme/large:1")
			if i > 0 && (err != nil || !strings.Contains(out, im.Config.String())) {
				t.Errorf("%s: %s %v", p.name, out, err)
			}
		})
	}
	begun(t, agent)
	pods[0].remove()
	wg.Wait()
	if n := w.hub.Log.BlobBytes(); n > im.Bytes*105/100 {
		t.Errorf("%d bytes left the registry, for %d\n%s", n, im.Bytes, w.hub.Log)
	}
}

// What a pod has pulled stays when the pod is gone: for the node, for a pod in
// the node's own network, and for the node's peers.
func TestPodsShare(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	nodes, agents := cluster(t, w, 2)
	docker := nodes[0].Docker()
	podImage(nodes[0])
	first := newPod(t, nodes[0], "first")
	first.job("docker pull -q " + flyway + "; docker pull -q " + renovate)
	first.remove()
	w.forget()
	docker.Pull(flyway)
	docker.Pull(renovate)
	docker.Same(flyway, w.flyway)
	host := newPodOf(t, nodes[0], "pod", "host", "host")
	host.job("docker pull -q " + flyway + "; docker pull -q " + renovate)
	if rt := agents[0].Runtime(host.pid); rt.Reach != "intercepted" || rt.Netns != agents[0].Runtime(docker.PID()).Netns {
		t.Errorf("%+v", rt)
	}
	w.nothingFetched(t)
	peer := nodes[1].Containerd()
	peer.Pull(flyway)
	peer.Pull(renovate)
	peer.Same(flyway, w.flyway)
	w.onlyManifests(t)
	if n := bytesFromPeers(agents[1]); n < 6<<20 {
		t.Errorf("%d bytes came from the peer", n)
	}
}

// BenchmarkPod is the time of a job that pulls an image of 120 MiB, in a fresh
// pod each time, over an uplink of 100 Mbit/s: without weir, and with it for the
// first and for the second time.
func BenchmarkPod(b *testing.B) {
	w := newWorld(b)
	w.hub.Push("acme/large:1", lab.Image{Layers: []int{64 << 20, 32 << 20, 16 << 20, 8 << 20}, Seed: 64})
	w.Shape(100)
	job := func(node *lab.Node, name string) float64 {
		p := newPod(b, node, name)
		defer p.remove()
		p.job("true")
		start := time.Now()
		p.job("docker pull -q acme/large:1")
		return time.Since(start).Seconds()
	}
	for b.Loop() {
		bare, node := w.Node(), w.Node()
		node.Agent()
		for _, n := range []*lab.Node{bare, node} {
			n.Docker()
			podImage(n)
		}
		b.ReportMetric(job(bare, "without"), "s-without")
		b.ReportMetric(job(node, "first"), "s-first")
		b.ReportMetric(job(node, "second"), "s-second")
	}
}

// A pod that means harm: symlinks where certificates are lead to what isn't its
// own, and it connects to the listener by itself. weir neither writes nor reads
// outside the pod's root, gives it nothing, and lets its pulls through.
func TestHostilePod(t *testing.T) { // alone: its links are in the way of others' weir uninstall
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	node.Docker()
	podImage(node)
	for i, link := range []string{"/escape", "../../../../../../../../escape", "/proc/1/root/var/lib/escape", "/proc/self/root/escape"} {
		name := fmt.Sprintf("evil%d", i)
		node.Run("sh", "-ec", fmt.Sprintf(`
mkdir -p /var/lib/escape
cp -a /var/lib/home/pod /var/lib/home/%[1]s
rm -rf /var/lib/home/%[1]s/etc/ssl/certs /var/lib/home/%[1]s/etc/docker
mkdir -p /var/lib/home/%[1]s/etc/docker
ln -s %[2]s /var/lib/home/%[1]s/etc/ssl/certs
ln -s %[2]s /var/lib/home/%[1]s/etc/docker/certs.d
cp /etc/ssl/certs/ca-certificates.crt /var/lib/home/%[1]s/etc/ssl/cert.pem
tar -C /var/lib/home/%[1]s -c . | `+outerDocker+`import - %[1]s`, name, link))
		p := newPodOf(t, node, name, "none", name)
		node.Plug(p.pid)
		p.job("docker pull -q " + flyway)
		if rt := agent.Runtime(p.pid); rt.Reach != "passthrough" || !strings.Contains(rt.Reason, "the CA can't be installed") {
			t.Errorf("%s: %+v", link, rt)
		}
		var listeners []string
		for _, d := range agent.Status().Listeners {
			listeners = append(listeners, d.Addrs...)
		}
		for _, listener := range listeners {
			host, port, _ := net.SplitHostPort(listener)
			if out, err := p.try(fmt.Sprintf(`bash -c 'exec 3<>/dev/tcp/%s/%s; printf "GET /v2/ HTTP/1.1\r\nHost: ghcr.io\r\n\r\n" >&3; timeout 10 cat <&3' || [ $? != 124 ]`, host, port)); err != nil || strings.Contains(out, "HTTP/") {
				t.Errorf("a listener answers a connection that wasn't redirected to it: %v %q", err, out)
			}
		}
		p.remove()
		if names := node.Listing("/var/lib/escape"); len(names) != 1 {
			t.Errorf("%s: outside the pod there is now %q", link, names)
		}
	}
	if _, err := os.Stat("/escape"); err == nil {
		t.Error("/escape is there")
	}
}
