// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"weir/agent/admin"
	"weir/test/lab"
)

// dns runs the cluster's DNS on its first node.
func (c *cluster) dns() {
	c.t.Helper()
	c.node.WriteFile("/etc/coredns/Corefile", fmt.Sprintf(`.:53 {
  bind %s
  hosts /etc/hosts {
    fallthrough
  }
  kubernetes cluster.local {
    kubeconfig %s box
  }
  ready 127.0.0.1:8181
}
`, c.node.Addr(), config))
	c.node.Spawn("coredns", lab.Tool(c.t, "coredns"), "-conf=/etc/coredns/Corefile")
}

// pods are those of a namespace that a selector selects, by their node.
func (c *cluster) pods(namespace, selector string) map[string]string {
	c.t.Helper()
	out := c.kubectl("-n", namespace, "get", "pods", "-l", selector, "-o", `jsonpath={range .items[*]}{.spec.nodeName} {.metadata.name}{"\n"}{end}`)
	pods := make(map[string]string)
	for line := range strings.Lines(out) {
		if node, name, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			pods[node] = name
		}
	}
	return pods
}

// deployment has a pod on each node.
func deployment(name, image string, replicas int) object {
	labels := object{"app": name}
	return object{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": object{"name": name, "namespace": "default"}, "spec": object{
		"replicas": replicas, "selector": object{"matchLabels": labels}, "template": object{"metadata": object{"labels": labels}, "spec": object{
			"terminationGracePeriodSeconds": 0, "enableServiceLinks": false,
			"affinity": object{"podAntiAffinity": object{"requiredDuringSchedulingIgnoredDuringExecution": []object{
				{"labelSelector": object{"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}}}},
			// A node that comes back finds its pods.
			"tolerations": []object{{"operator": "Exists", "effect": "NoExecute"}},
			"containers":  []object{{"name": name, "image": image, "args": []string{"sleep", "infinity"}}},
		}}}}
}

// tryShell runs commands of a document, as an administrator does, beside weir.yaml.
func (c *cluster) tryShell(commands string) (string, error) {
	return c.node.Output("sh", "-ec", "cd /var/lib/home\nkubectl() { "+lab.Tool(c.t, "kubectl")+" \"$@\"; }\n"+commands)
}

func (c *cluster) shell(commands string) {
	c.t.Helper()
	if _, err := c.tryShell(commands); err != nil {
		c.t.Fatal(err)
	}
}

// find returns what a pattern's first group matches in a file of deploy's.
func find(t *testing.T, file, pattern string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(pattern).FindSubmatch(b)
	if m == nil {
		t.Fatalf("%s has no %s", file, pattern)
	}
	return string(m[1])
}

// withoutHelm installs weir as the head of weir.yaml says, with settings for the lab.
func (c *cluster) withoutHelm(t *testing.T, env string) {
	t.Helper()
	b, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	c.node.WriteFile("/var/lib/home/weir.yaml", strings.Replace(string(b), "          env:\n", "          env:\n"+env, 1))
	c.shell(strings.ReplaceAll(find(t, manifest, `(?m)^#\n((?:#   .*\n)+)`), "#   ", ""))
}

// Three nodes with peers, by the manifest for clusters without Helm. An image leaves
// the registry once for all of them; a node that goes away in the middle of a pull
// holds up none of the others, and comes back; where Pod Security is baseline.
func TestNodes(t *testing.T) {
	in := lab.NewInternet(t)
	in.Registry("registry.k8s.io").Push("pause:3.10.2", lab.Image{Program: lab.Debian(t, busybox, "busybox-static"), Cmd: []string{"sleep", "infinity"}})
	registry := in.Registry("registry.example.com")
	registry.Push(find(t, manifest, `image: "registry.example.com/(weir:[^"]+)"`), lab.Image{Program: lab.Weir(t), Files: map[string]string{"/etc/ssl/certs/ca-certificates.crt": temp(t, in.Roots())}})
	app := func(tag string, seed uint64) lab.Pushed {
		return registry.Push("team/app:"+tag, lab.Image{Layers: []int{3 << 20, 2 << 20}, Seed: seed, Program: busybox, OCI: true})
	}
	one := app("1", 1)
	two := app("2", 2)

	nodes := []*lab.Node{in.Node(), in.Node(), in.Node()}
	// One name for the cgroup of whichever node.
	own := nodes[0].EmptyCgroup()
	for _, n := range nodes {
		n.Run("mount", "--bind", n.Cgroup(), own)
	}
	c := newCluster(t, nodes[0])
	c.dns()
	for _, n := range nodes[1:] {
		c.join(n)
	}
	c.withoutHelm(t, fmt.Sprintf(`            - {name: WEIR_CGROUP, value: %s}
            - {name: WEIR_STORE_SIZE, value: 1GiB}
            - {name: WEIR_REGISTRY, value: registry.example.com}
`, own))
	c.settled(len(nodes))

	// A Deployment on all nodes.
	registry.Log.Reset()
	c.apply(deployment("one", "registry.example.com/team/app:1", len(nodes)))
	c.kubectl("rollout", "status", "deployment/one", "--timeout=2m")
	once(t, registry, one)

	// The third node loses its network while a layer is on its way.
	var asked sync.Once
	var mend func()
	registry.Fault(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, two.Layers[0].String()) {
			asked.Do(func() { mend = nodes[2].Drop(netip.MustParsePrefix("0.0.0.0/0")) })
		}
		return false
	})
	c.apply(deployment("two", "registry.example.com/team/app:2", len(nodes)))
	c.eventually("pods on the other nodes", func() error {
		out := c.kubectl("get", "pods", "-l", "app=two", "-o", `jsonpath={range .items[?(@.status.phase=="Running")]}{.spec.nodeName} {end}`)
		if !strings.Contains(out, "node-1") || !strings.Contains(out, "node-2") {
			return fmt.Errorf("they run on %q", out)
		}
		return nil
	})
	if mend == nil {
		t.Fatal("no node has asked for the layer")
	}
	mend()
	c.kubectl("rollout", "status", "deployment/two", "--timeout=3m")
	c.ready("node-3")

	// It leaves nothing on any node.
	patch := find(t, "../../deploy/README.md", `(?ms)^(kubectl -n weir patch daemonset weir .*?)^kubectl -n weir logs`)
	logs := find(t, "../../deploy/README.md", `(?m)^(kubectl -n weir logs --selector=\S+ .*)$`)
	c.shell(patch)
	c.eventually("weir is gone", func() error {
		said, err := c.tryShell(logs)
		if err == nil && strings.Count(said, "weir is gone from this node.") != len(nodes) {
			err = fmt.Errorf("it says %s", said)
		}
		return err
	})
	c.shell("kubectl delete -f weir.yaml")
	for i, n := range nodes {
		for _, dir := range []string{"/var/lib/weir", "/run/weir"} {
			if names, _ := n.ReadDir(dir); len(names) > 0 {
				t.Errorf("node %d has left %s: %v", i+1, dir, names)
			}
		}
		for _, name := range n.Listing("/etc") {
			if strings.Contains(filepath.Base(name), "weir-ca") {
				t.Errorf("node %d has left /etc%s", i+1, name)
			}
		}
	}
}

// settled waits until all nodes know each other, and serve their containerd.
func (c *cluster) settled(nodes int) {
	c.t.Helper()
	c.eventually("peers and trust", func() error {
		pods := c.pods("weir", "app.kubernetes.io/name=weir")
		for i := range nodes {
			out, err := c.try("-n", "weir", "exec", pods[fmt.Sprintf("node-%d", i+1)], "--", "/weir", "status", "--json")
			var s admin.Status
			if err == nil {
				err = json.Unmarshal([]byte(out), &s)
			}
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			if s.Peers == nil || len(s.Peers.Peers) != nodes-1 {
				return fmt.Errorf("node %d has the peers %+v", i+1, s.Peers)
			}
			for _, r := range s.Runtimes {
				if r.Kind == "containerd" && r.Reach != "intercepted" {
					return fmt.Errorf("node %d: %+v", i+1, r)
				}
			}
			if len(s.Runtimes) == 0 {
				return fmt.Errorf("node %d has no runtime", i+1)
			}
		}
		return nil
	})
}
