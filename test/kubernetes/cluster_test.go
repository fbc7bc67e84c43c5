// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"weir/test/lab"
)

// cluster is a real Kubernetes: etcd, the API server, the controllers, the
// scheduler and DNS on its first node, containerd and the kubelet on each.
type cluster struct {
	t          testing.TB
	node       *lab.Node // the first one
	containerd *lab.Containerd
	nodes      int
}

const containerdConfig = `version = 3
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '/etc/containerd/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true # a test's machine may lack CAP_SYS_RESOURCE
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/usr/lib/cni']
`

const cniConfig = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.%d.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
`

const kubeconfig = `apiVersion: v1
kind: Config
clusters: [{name: box, cluster: {server: "https://%s:6443", insecure-skip-tls-verify: true}}]
users: [{name: admin, user: {token: admin}}]
contexts: [{name: box, context: {cluster: box, user: admin}}]
current-context: box
`

const config = "/var/lib/home/.kube/config"

// kubeletConfig allows for a machine with cgroup v1 beside v2, and for a node
// whose pods are in a cgroup of the test's.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: [%s]
clusterDomain: cluster.local
failCgroupV1: false
failSwapOn: false
cgroupDriver: cgroupfs
cgroupRoot: /%s
enforceNodeAllocatable: []
evictionHard: {memory.available: "1Mi", nodefs.available: "0%%", imagefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
serializeImagePulls: false
`

// admission has all namespaces but those that are labelled otherwise allow what
// Pod Security's baseline does.
const admission = `apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: PodSecurity
  configuration:
    apiVersion: pod-security.admission.config.k8s.io/v1
    kind: PodSecurityConfiguration
    defaults: {enforce: baseline, enforce-version: latest}
`

// newCluster starts a cluster on a node, and waits until the node is ready.
func newCluster(t testing.TB, node *lab.Node) *cluster {
	t.Helper()
	c := &cluster{t: t, node: node}
	node.WriteFile("/etc/kubernetes/tokens.csv", "admin,admin,admin,system:masters\n")
	node.WriteFile("/etc/kubernetes/admission.yaml", admission)
	node.WriteFile(config, fmt.Sprintf(kubeconfig, node.Addr()))
	node.Run("openssl", "genrsa", "-out", "/etc/kubernetes/sa.key", "2048")
	node.Spawn("etcd", lab.Debian(t, "/usr/bin/etcd", "etcd-server"), "--data-dir=/var/lib/etcd", "--unsafe-no-fsync")
	node.Spawn("kube-apiserver", lab.Tool(t, "kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379", "--cert-dir=/run/kubernetes",
		"--token-auth-file=/etc/kubernetes/tokens.csv", "--service-cluster-ip-range=10.96.0.0/16", "--advertise-address="+node.Addr().String(),
		"--service-account-issuer=https://box", "--service-account-key-file=/etc/kubernetes/sa.key", "--service-account-signing-key-file=/etc/kubernetes/sa.key",
		"--disable-admission-plugins=ServiceAccount", "--admission-control-config-file=/etc/kubernetes/admission.yaml", "--allow-privileged=true",
		"--endpoint-reconciler-type=none", "--kubelet-preferred-address-types=InternalIP")
	c.eventually("the API server", func() error {
		_, err := c.try("get", "--raw", "/readyz")
		return err
	})
	node.Spawn("kube-controller-manager", lab.Tool(t, "kube-controller-manager"), "--kubeconfig="+config, "--leader-elect=false",
		"--service-account-private-key-file=/etc/kubernetes/sa.key")
	node.Spawn("kube-scheduler", lab.Tool(t, "kube-scheduler"), "--kubeconfig="+config, "--leader-elect=false")
	c.containerd, _ = c.join(node)
	t.Cleanup(func() {
		if t.Failed() {
			for _, args := range [][]string{{"get", "pods", "-A", "-o", "wide"}, {"get", "events", "-A"}, {"logs", "runner", "--all-containers", "--tail=15"}, {"-n", "weir", "logs", "daemonset/weir", "--tail=30"}} {
				out, _ := c.try(args...)
				t.Logf("--- kubectl %v\n%s", args, out)
			}
		}
		// What containerd's shims have started doesn't end with it.
		_, _ = c.try("delete", "pods,daemonsets", "--all", "-A", "--force", "--grace-period=0", "--wait=false")
	})
	return c
}

// join makes a node one of the cluster's, and waits until it is ready.
func (c *cluster) join(node *lab.Node) (*lab.Containerd, *lab.Process) {
	c.t.Helper()
	c.nodes++
	name := fmt.Sprintf("node-%d", c.nodes)
	for path, content := range map[string]string{
		"/etc/containerd/config.toml":     containerdConfig,
		"/etc/cni/net.d/10-pods.conflist": fmt.Sprintf(cniConfig, c.nodes),
		"/etc/kubernetes/kubelet.yaml":    fmt.Sprintf(kubeletConfig, c.node.Addr(), filepath.Base(node.Cgroup())),
		config:                            fmt.Sprintf(kubeconfig, c.node.Addr()),
	} {
		node.WriteFile(path, content)
	}
	node.Run("mkdir", "-p", "/etc/containerd/certs.d")
	node.Cgroups()
	containerd := node.NewestContainerd()
	kubelet := node.Spawn("kubelet", lab.Tool(c.t, "kubelet"), "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig="+config,
		"--hostname-override="+name, "--node-ip="+node.Addr().String())
	c.ready(name)
	return containerd, kubelet
}

// ready waits until a node is ready.
func (c *cluster) ready(name string) {
	c.t.Helper()
	c.eventually("the node "+name, func() error {
		out, err := c.try("get", "node", name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != "True" {
			err = fmt.Errorf("it is not ready: %q", out)
		}
		return err
	})
}

func (c *cluster) eventually(what string, f func() error) {
	c.t.Helper()
	if err := lab.Eventually(nil, func(context.Context) error { return f() }); err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
}

// try runs kubectl.
func (c *cluster) try(args ...string) (string, error) {
	return c.node.Output(append([]string{lab.Tool(c.t, "kubectl")}, args...)...)
}

func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("kubectl %v: %v\n%s", args, err, out)
	}
	return out
}

// apply makes objects.
func (c *cluster) apply(objects ...any) {
	c.t.Helper()
	list, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		c.t.Fatal(err)
	}
	c.node.WriteFile("/var/lib/home/objects.json", string(list))
	c.kubectl("apply", "-f", "/var/lib/home/objects.json")
}

// helm runs a command of helm as the README has it, with more flags.
func (c *cluster) helm(command string, more ...string) {
	c.t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		c.t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^helm ` + command + ` .*$`).FindString(string(b))
	if line == "" {
		c.t.Fatalf("the README has no helm %s", command)
	}
	args := append([]string{lab.Tool(c.t, "helm")}, strings.Fields(line)[1:]...)
	if out, err := c.node.Output(append(append(args, "--wait", "--timeout", "3m"), more...)...); err != nil {
		c.t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// release makes what a release has, of weir as it is, and publishes and signs it
// in a registry of the lab, as the workflow does it in a real one. Signing
// without a key takes services of the world's.
func (c *cluster) release(version, roots string) {
	c.t.Helper()
	dist := filepath.Join(c.t.TempDir(), "dist")
	args := []string{"VERSION=" + version, "REGISTRY=registry.example.com", "DIST=" + dist, "ROOTS=" + temp(c.t, roots),
		"HELM=" + lab.Tool(c.t, "helm"), "COSIGN=" + lab.Tool(c.t, "cosign"),
		"SIGN_FLAGS=--key /var/lib/home/cosign.key --use-signing-config=false --tlog-upload=false"}
	if out, err := exec.Command("make", append([]string{"-C", "../..", "dist"}, args...)...).CombinedOutput(); err != nil {
		c.t.Fatalf("make dist: %v\n%s", err, out)
	}
	cosign := func(args ...string) {
		c.t.Helper()
		c.node.Run(append([]string{"env", "-C", "/var/lib/home", "COSIGN_PASSWORD=", lab.Tool(c.t, "cosign")}, args...)...)
	}
	cosign("generate-key-pair")
	// A node's /var/lib is its own, and which packages there are is this machine's.
	c.node.Run(append([]string{"env", "COSIGN_PASSWORD=", fmt.Sprintf("DPKG_ADMINDIR=/proc/%d/root/var/lib/dpkg", os.Getpid()),
		"make", "-C", absolute(c.t, "../.."), "publish", "sign"}, args...)...)
	release := strings.TrimPrefix(version, "v")
	verify := []string{"--key=cosign.pub", "--insecure-ignore-tlog"}
	for _, ref := range []string{"weir:" + release, "charts/weir:" + release} {
		cosign(append([]string{"verify", "registry.example.com/" + ref}, verify...)...)
	}
	cosign(append([]string{"verify-attestation", "--type=cyclonedx", "registry.example.com/weir:" + release}, verify...)...)
	cosign(append([]string{"verify-blob", "--bundle=" + dist + "/SHA256SUMS.sigstore.json", dist + "/SHA256SUMS"}, verify...)...)
	c.node.Run("sh", "-ec", "cd "+dist+"; sha256sum --check --strict SHA256SUMS")
}

// module returns the directory of a Go module's files.
func module(t testing.TB, path string) string {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", path)
	cmd.Dir = t.TempDir() // of no module
	out, err := cmd.Output()
	var downloaded struct{ Dir string }
	if err == nil {
		err = json.Unmarshal(out, &downloaded)
	}
	if err != nil {
		t.Fatalf("getting %s: %v", path, err)
	}
	return downloaded.Dir
}

func absolute(t testing.TB, path string) string {
	t.Helper()
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// object is a Kubernetes object.
type object = map[string]any

// pod makes a pod with one container.
func pod(name string, container object, more object) object {
	spec := object{"containers": []object{container}, "terminationGracePeriodSeconds": 0, "enableServiceLinks": false}
	for k, v := range more {
		spec[k] = v
	}
	container["name"] = name
	return object{"apiVersion": "v1", "kind": "Pod", "metadata": object{"name": name, "namespace": "default"}, "spec": spec}
}

// running waits until a pod runs, which flags of kubectl may say more of.
func (c *cluster) running(name string, flags ...string) {
	c.t.Helper()
	c.eventually("the pod "+name, func() error {
		out, err := c.try(append(flags, "get", "pod", name, "-o", "jsonpath={.status.phase}")...)
		if err == nil && out != "Running" {
			err = fmt.Errorf("it is %s", out)
		}
		return err
	})
}

// failures are the events that say that an image couldn't be pulled.
func (c *cluster) failures() (lines []string) {
	c.t.Helper()
	out := c.kubectl("get", "events", "-A", "--field-selector=reason=Failed", "-o", `jsonpath={range .items[*]}{.message}{"\n"}{end}`)
	for l := range strings.Lines(out) {
		if strings.Contains(l, "pull") {
			lines = append(lines, strings.TrimSpace(l))
		}
	}
	return lines
}

// temp writes a file for an image.
func temp(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}
