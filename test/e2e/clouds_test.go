// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"weir/test/lab"
)

// cloud is how a managed Kubernetes, or a distribution for it, has a node's files and
// its containerd, which runs before weir.
type cloud struct {
	name  string
	mount string // what is mounted, before anything runs
	start func(*lab.Node) *lab.Containerd
	// config is containerd's.
	config string
	// mirror is where it has Docker Hub's images from.
	mirror string
	// before and after are how weir reaches it, and once it is restarted.
	before, after string
}

// Each configuration has what is said of pulls in its source: nodeadm's
// config.template.toml in awslabs/amazon-eks-ami, AgentBaker's
// containerd_v2_no_GPU.toml.gtpl, and what cluster/gce/gci/configure-helper.sh of
// Kubernetes writes for Container-Optimized OS.
var clouds = []cloud{
	{name: "EKS", start: (*lab.Node).OlderContainerd, before: "intercepted", after: "intercepted", config: `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "/etc/containerd/certs.d:/etc/docker/certs.d"
`},
	{name: "AKS", start: (*lab.Node).NewestContainerd, before: "intercepted", after: "intercepted", config: `version = 2
oom_score = -999
[plugins."io.containerd.cri.v1.images"]
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "/etc/containerd/certs.d"
  [plugins."io.containerd.cri.v1.images".registry.headers]
    X-Meta-Source-Client = ["azure/aks"]
`},
	{name: "GKE", mirror: "mirror.gcr.io", start: (*lab.Node).OlderContainerd, before: "passthrough", after: "intercepted", config: `version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
  endpoint = ["https://mirror.gcr.io","https://registry-1.docker.io"]
`, mount: `
mkdir -p /var/lib/etc
cp -a /etc /var/lib/etc/
mount -t tmpfs tmpfs /etc
cp -a /var/lib/etc/etc/. /etc/
mkdir -p /var/lib/weir
mount -t tmpfs -o noexec,nosuid,nodev tmpfs /var/lib/weir
mount --bind /tmp /tmp
mount -o remount,bind,ro /
`},
	{name: "Talos", start: (*lab.Node).NewestContainerd, before: "passthrough", after: "passthrough", config: `version = 3
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '/etc/cri/conf.d/hosts'
`, mount: `
mkdir -p /etc/cri/conf.d/hosts /etc/cni/net.d
mount --bind /tmp /tmp
mount -o remount,bind,ro /etc
mount -o remount,bind,ro /
`},
	{name: "Bottlerocket", start: (*lab.Node).OlderContainerd, before: "passthrough", after: "passthrough", config: `version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "/etc/containerd/certs.d"
`, mount: `
mkdir -p /etc/containerd/certs.d /etc/cni/net.d
mount --bind /tmp /tmp
mount -o remount,bind,ro /etc
mount -o remount,bind,ro /
`},
}

// Nodes as the clouds have them: their containerd runs, and has pulled, when weir
// comes. Where it is intercepted the second pull fetches nothing, and else all is as
// without weir; a dind in a pod is served on each.
func TestClouds(t *testing.T) {
	t.Parallel()
	for _, c := range clouds {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			from := w.hub
			if c.mirror != "" {
				from = w.Registry(c.mirror)
				from.Push(flyway, flywayImage)
			}
			node := w.Node()
			node.WriteFile("/etc/containerd/config.toml", c.config)
			if c.mount != "" {
				node.Run("sh", "-ec", c.mount)
			}
			containerd := c.start(node)
			containerd.Pull(renovate) // its roots are read
			containerd.Remove(renovate, w.renovate)
			agent := node.Agent()
			reaches := func(want string) {
				t.Helper()
				if rt := agent.Runtime(containerd.PID()); rt.Reach != want || want != "intercepted" && rt.Step == "" {
					t.Fatalf("containerd is %+v", rt)
				}
				for warm := range 2 {
					from.Log.Reset()
					containerd.Pull(flyway)
					containerd.Same(flyway, w.flyway)
					if gets := from.Log.BlobGETs(); warm == 1 && (gets == 0) != (want == "intercepted") {
						t.Errorf("%d blobs were fetched:\n%s", gets, from.Log)
					}
					containerd.Remove(flyway, w.flyway)
				}
			}
			reaches(c.before)
			for warm := range 2 {
				docker := node.Box().Docker()
				w.forget()
				docker.Pull(renovate)
				docker.Same(renovate, w.renovate)
				if gets := w.ghcr.Log.BlobGETs(); warm == 1 && gets > 0 {
					t.Errorf("the dind: %d blobs were fetched:\n%s", gets, w.ghcr.Log)
				}
				if rt := agent.Runtime(docker.PID()); rt.Reach != "intercepted" {
					t.Errorf("the dind is %+v", rt)
				}
			}
			containerd.Stop()
			containerd.Start()
			reaches(c.after)
		})
	}
}
