// SPDX-License-Identifier: Apache-2.0

// Package kubernetes tests weir's chart in a real Kubernetes.
package kubernetes

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"weir/agent/admin"
	"weir/test/lab"
)

const busybox = "/bin/busybox"

// status is what the agent in the DaemonSet's pod says of itself.
func (c *cluster) status() (s admin.Status, err error) {
	out, err := c.try("-n", "weir", "exec", "daemonset/weir", "--", "/weir", "status", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &s)
	}
	return s, err
}

// The chart's whole life on a node whose containerd was running before it: it
// is installed, serves pods and the dockerd in a pod, is upgraded while pods
// pull, and taken off.
func TestChart(t *testing.T) {
	in := lab.NewInternet(t)
	in.Registry("registry.k8s.io").Push("pause:3.10.2", lab.Image{Program: lab.Debian(t, busybox, "busybox-static"), Cmd: []string{"sleep", "infinity"}})
	private := in.Registry("registry.example.com")
	private.User("someone", "secret")
	private.Push("weir:next", lab.Image{Program: lab.NextWeir(t),
		Files: map[string]string{"/etc/ssl/certs/ca-certificates.crt": temp(t, in.Roots())}})
	hub := in.DockerHub()
	app := private.Push("team/app:1", lab.Image{Layers: []int{3 << 20}, Seed: 1, Program: busybox, OCI: true})
	private.Private("team/app", "someone")
	app.Layers = app.Layers[:1] // the program's is in other images too
	hub.Push("library/debian:12", lab.Image{Layers: []int{2 << 20, 1 << 20}, Seed: 2})
	const many = 12
	for i := range many {
		private.Push(fmt.Sprintf("team/rolled:%d", i), lab.Image{Layers: []int{1 << 20, 2 << 20}, Seed: uint64(100 + i), Program: busybox, OCI: true})
	}
	private.Push("dind:1", dindImage(t, in))

	node := in.Node()
	c := newCluster(t, node)
	c.dns()
	etc := strings.Join(node.Listing("/etc"), "\n")
	c.kubectl("label", "namespace", "default", "pod-security.kubernetes.io/enforce=privileged") // it has a dind
	c.kubectl("create", "secret", "docker-registry", "login", "--docker-server=registry.example.com", "--docker-username=someone", "--docker-password=secret")
	sleeping := []string{"sleep", "infinity"}

	// Installing what a release has, which says itself where its image is.
	c.release("v0.1.0", in.Roots())
	c.kubectl("create", "namespace", "weir")
	c.kubectl("label", "namespace", "weir", "pod-security.kubernetes.io/enforce=privileged")
	values := []string{"--set=registries={registry.example.com}",
		"--set=env.WEIR_CGROUP=" + node.Cgroup(), "--set=store.size=2GiB"}
	start := time.Now()
	c.helm("install", values...)
	t.Logf("the DaemonSet is ready %.1f s after helm install began", time.Since(start).Seconds())
	if image := c.image(); image != "registry.example.com/weir:0.1.0" {
		t.Errorf("%q runs", image)
	}
	if s, err := c.status(); err != nil || s.Version != "v0.1.0" {
		t.Errorf("%+v, %v", s, err)
	}
	key := c.key()
	c.eventually("containerd's trust", func() error {
		s, err := c.status()
		if err != nil {
			return err
		}
		for _, r := range s.Runtimes {
			if r.PID == c.containerd.PID() && r.Reach == "intercepted" {
				return nil
			}
		}
		return fmt.Errorf("%+v", s.Runtimes)
	})
	t.Logf("containerd, which was running before, is intercepted after %.1f s", time.Since(start).Seconds())

	// A pod of a private image, twice on an empty disk.
	private.Log.Reset()
	for round := range 2 {
		c.apply(pod("app", object{"image": "registry.example.com/team/app:1", "args": sleeping}, object{"imagePullSecrets": []object{{"name": "login"}}}))
		c.running("app")
		if gets := private.Log.BlobGETs(); (gets == 0) != (round == 1) {
			t.Errorf("pod %d: %d blobs were fetched:\n%s", round, gets, private.Log)
		}
		c.kubectl("delete", "pod", "app", "--wait")
		c.containerd.Remove("registry.example.com/team/app:1", app)
		private.Log.Reset()
	}
	// And none for a pod that may not have it.
	c.apply(pod("thief", object{"image": "registry.example.com/team/app:1", "args": sleeping}, nil))
	c.eventually("the refusal", func() error {
		if len(c.failures()) == 0 {
			return errors.New("there is none")
		}
		return nil
	})
	c.kubectl("delete", "pod", "thief", "--wait")
	c.kubectl("delete", "events", "--all")

	// A runner's pod, twice, each with an empty disk.
	for round := range 2 {
		c.runs("default")
		hub.Log.Reset()
		c.docker("default", "pull", "-q", "debian:12")
		if gets := hub.Log.BlobGETs(); (gets == 0) != (round == 1) {
			t.Errorf("dind %d: %d blobs were fetched:\n%s", round, gets, hub.Log)
		}
		c.kubectl("delete", "pod", "runner", "--wait")
	}

	// A new version, while pods pull.
	var wg sync.WaitGroup
	wg.Go(func() { c.helm("upgrade", "--set=image.tag=next", "--set=uninstall=false") })
	for i := range many {
		name := fmt.Sprintf("rolled-%d", i)
		c.apply(pod(name, object{"image": fmt.Sprintf("registry.example.com/team/rolled:%d", i), "args": sleeping}, nil))
		c.running(name)
	}
	wg.Wait()
	if lines := c.failures(); len(lines) > 0 {
		t.Errorf("while weir was upgraded:\n%s", strings.Join(lines, "\n"))
	}
	if image := c.image(); image != "registry.example.com/weir:next" {
		t.Errorf("%q runs", image)
	}
	if s, err := c.status(); err != nil || s.Peers == nil {
		t.Errorf("%+v, %v", s, err)
	}
	if now := c.key(); now != key {
		t.Error("the swarm has another key after the upgrade")
	}

	// Taking it off.
	programs := node.Programs()
	if len(programs) == 0 {
		t.Error("the agent has no programs: the test is blind")
	}
	c.helm("upgrade")
	if log := c.kubectl("-n", "weir", "logs", "daemonset/weir"); !strings.Contains(log, "weir is gone") {
		t.Error(log)
	}
	if now := strings.Join(node.Listing("/etc"), "\n"); now != etc {
		t.Errorf("/etc isn't as before:\n%s\n--- instead of\n%s", now, etc)
	}
	c.helm("uninstall")
	c.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", absolute(t, manifest))
	c.monitoring()
	// The directories themselves are taken off the root of process 1, which
	// isn't the node's in a box.
	for _, dir := range []string{"/var/lib/weir", "/run/weir"} {
		if names, _ := node.ReadDir(dir); len(names) > 0 {
			t.Errorf("%s is left: %v", dir, names)
		}
	}
	if err := lab.Unloaded(programs); err != nil {
		t.Error(err)
	}
	c.containerd.Remove("registry.example.com/team/app:1", app)
	c.apply(pod("app", object{"image": "registry.example.com/team/app:1", "args": sleeping}, object{"imagePullSecrets": []object{{"name": "login"}}}))
	c.running("app")
}

// monitoring has the API server look at what the chart has for Prometheus'
// operator and Grafana's sidecar.
func (c *cluster) monitoring() {
	c.t.Helper()
	crds := filepath.Join(module(c.t, "github.com/prometheus-operator/prometheus-operator@v0.85.0"), "example/prometheus-operator-crd")
	for _, kind := range []string{"podmonitors", "prometheusrules"} {
		c.kubectl("create", "-f", filepath.Join(crds, "monitoring.coreos.com_"+kind+".yaml"))
		c.kubectl("wait", "--for=condition=Established", "crd/"+kind+".monitoring.coreos.com")
	}
	out, err := helmTemplate(c.t, "--set=image.repository=registry.example.com/weir", "--set=podMonitor.enabled=true", "--set=admin.host=0.0.0.0",
		"--set=prometheusRule.enabled=true", "--set=dashboard.enabled=true", "--namespace=default")
	if err != nil {
		c.t.Fatal(err, out)
	}
	c.node.WriteFile("/var/lib/home/monitoring.yaml", out)
	said := c.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "/var/lib/home/monitoring.yaml")
	for _, made := range []string{"podmonitor.monitoring.coreos.com/weir", "prometheusrule.monitoring.coreos.com/weir", "configmap/weir-dashboard"} {
		if !strings.Contains(said, made+" created") {
			c.t.Errorf("%s isn't made:\n%s", made, said)
		}
	}
}

// image is what the DaemonSet's pod runs.
func (c *cluster) image() string {
	c.t.Helper()
	return c.kubectl("-n", "weir", "get", "pods", "-o", "jsonpath={.items[*].spec.containers[*].image}")
}

// key is the swarm's key.
func (c *cluster) key() string {
	c.t.Helper()
	b, err := base64.StdEncoding.DecodeString(c.kubectl("-n", "weir", "get", "secret", "weir-swarm", "-o", `jsonpath={.data.swarm\.key}`))
	if err != nil || len(b) != len("/key/swarm/psk/1.0.0/\n/base16/\n")+64+1 {
		c.t.Errorf("the key is %q, %v", b, err)
	}
	return string(b)
}

// dindImage is what a docker:dind brings beside its programs.
func dindImage(t testing.TB, in *lab.Internet) lab.Image {
	return lab.Image{Program: busybox, OCI: true, Files: map[string]string{
		"/etc/ssl/certs/ca-certificates.crt": temp(t, in.Roots()), "/etc/passwd": "/etc/passwd", "/etc/group": "/etc/group", "/etc/nsswitch.conf": "/etc/nsswitch.conf"}}
}

// runner is a pod as the Actions Runner Controller makes it: a job's container,
// and beside it a privileged one with a dockerd, whose socket they share. Their
// programs are this machine's.
func runner(namespace string) object {
	var volumes, mounts []object
	mount := func(path string, volume object) {
		name := fmt.Sprintf("v%d", len(volumes))
		volume["name"] = name
		volumes = append(volumes, volume)
		_, readOnly := volume["hostPath"]
		mounts = append(mounts, object{"name": name, "mountPath": path, "readOnly": readOnly})
	}
	for _, path := range []string{"/usr", "/usr/bin:/bin", "/usr/sbin:/sbin", "/usr/lib:/lib", "/usr/lib64:/lib64", "/etc/alternatives"} {
		from, to, both := strings.Cut(path, ":")
		if !both {
			to = from
		}
		mount(to, object{"hostPath": object{"path": from}})
	}
	mount("/run/docker", object{"emptyDir": object{}})
	env := []object{{"name": "PATH", "value": "/usr/sbin:/usr/bin"}, {"name": "DOCKER_HOST", "value": "unix:///run/docker/docker.sock"}}
	p := pod("runner", object{"image": "registry.example.com/dind:1", "volumeMounts": slices.Clone(mounts), "command": []string{"/usr/bin/sleep", "infinity"}, "env": env}, nil)
	for _, path := range []string{"/var/lib", "/run", "/tmp"} {
		mount(path, object{"emptyDir": object{}})
	}
	p["metadata"].(object)["namespace"] = namespace
	spec := p["spec"].(object)
	spec["volumes"] = volumes
	spec["containers"] = append(spec["containers"].([]object), object{"name": "dind", "image": "registry.example.com/dind:1", "volumeMounts": mounts, "env": env,
		"command":         []string{"/usr/sbin/dockerd", "--storage-driver=vfs", "--host=unix:///run/docker/docker.sock"},
		"securityContext": object{"privileged": true}})
	return p
}

func TestMain(m *testing.M) {
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests need root: they make namespaces and load eBPF programs")
		os.Exit(1)
	}
	os.Exit(m.Run())
}
