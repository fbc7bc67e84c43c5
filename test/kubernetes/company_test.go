// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"weir/test/lab"
)

// policies has kube-router enforce NetworkPolicies on a node, which the bridge CNI
// doesn't.
func (c *cluster) policies(node *lab.Node, name string) {
	c.t.Helper()
	lab.Debian(c.t, "/usr/sbin/ipset", "ipset")
	node.Spawn("kube-router", lab.Tool(c.t, "kube-router"), "--kubeconfig="+config, "--hostname-override="+name, "--service-cluster-ip-range=10.96.0.0/16",
		"--run-firewall=true", "--run-router=false", "--run-service-proxy=false", "--run-loadbalancer=false")
}

// deny is a policy that denies a namespace's pods everything, but to go out to the
// ports.
func deny(namespace string, ports map[uint16][]netip.Addr) object {
	egress := []object{}
	for port, addrs := range ports {
		var to []object
		for _, a := range addrs {
			to = append(to, object{"ipBlock": object{"cidr": netip.PrefixFrom(a, a.BitLen()).String()}})
		}
		egress = append(egress, object{"to": to, "ports": []object{{"protocol": "TCP", "port": port}, {"protocol": "UDP", "port": port}}})
	}
	return object{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": object{"name": "deny", "namespace": namespace}, "spec": object{
		"podSelector": object{}, "policyTypes": []string{"Ingress", "Egress"}, "egress": egress}}
}

// dials says whether a runner's pod reaches an address.
func (c *cluster) dials(namespace string, a netip.Addr) error {
	_, err := c.try("-n", namespace, "exec", "runner", "-c", "runner", "--", "/usr/bin/timeout", "5", "/bin/bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/443", a))
	return err
}

// A cluster as companies have them. weir's own image needs a login, a registry has a
// CA of the company's, and NetworkPolicies deny everything in all namespaces, weir's
// too, but for jobs the names and a registry. Nodes share what they have, jobs are
// served, and a pod that may look up names alone gets nothing.
func TestCompany(t *testing.T) {
	in := lab.NewInternet(t)
	in.Registry("registry.k8s.io").Push("pause:3.10.2", lab.Image{Program: lab.Debian(t, busybox, "busybox-static"), Cmd: []string{"sleep", "infinity"}})
	registry := in.Registry("registry.example.com")
	registry.User("someone", "secret")
	registry.Push("weir:test", lab.Image{Program: lab.Weir(t), Files: map[string]string{"/etc/ssl/certs/ca-certificates.crt": temp(t, in.Roots())}})
	registry.Private("weir", "someone")
	registry.Push("dind:1", dindImage(t, in))
	harbor, ca := in.RegistryAt("harbor.example.com", 443, true)
	app := harbor.Push("team/app:1", lab.Image{Layers: []int{3 << 20, 2 << 20}, Seed: 1, Program: busybox, OCI: true})
	hub := in.DockerHub()
	hub.Push("library/debian:12", lab.Image{Layers: []int{2 << 20, 1 << 20}, Seed: 2})
	in.HTTPS("elsewhere.example", false, http.NotFoundHandler())
	elsewhere, _ := in.Host("elsewhere.example")

	nodes := []*lab.Node{in.Node(), in.Node()}
	own := nodes[0].EmptyCgroup()
	for _, n := range nodes {
		n.Run("mount", "--bind", n.Cgroup(), own)
		n.WriteFile("/etc/ssl/certs/company.pem", string(ca))
	}
	c := newCluster(t, nodes[0])
	c.dns()
	c.join(nodes[1])
	for i, n := range nodes {
		c.policies(n, fmt.Sprintf("node-%d", i+1))
	}
	for _, namespace := range []string{"weir", "jobs", "denied"} {
		c.kubectl("create", "namespace", namespace)
		c.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=privileged")
	}
	c.kubectl("-n", "weir", "create", "secret", "docker-registry", "weir-pull", "--docker-server=registry.example.com", "--docker-username=someone", "--docker-password=secret")
	nodes[0].WriteFile("/var/lib/home/company.pem", string(ca))
	c.kubectl("-n", "weir", "create", "configmap", "company", "--from-file=/var/lib/home/company.pem")

	// The policies are enforced: a pod reaches a host, and then it doesn't.
	for _, namespace := range []string{"jobs", "denied"} {
		c.apply(runner(namespace))
		c.running("runner", "-n", namespace)
		c.eventually("a network without policies", func() error { return c.dials(namespace, elsewhere) })
	}
	names := map[uint16][]netip.Addr{53: {nodes[0].Addr()}}
	allowed := maps.Clone(names)
	for _, host := range []string{"index.docker.io", "registry-1.docker.io", "auth.docker.io", "production.cloudflare.docker.com"} {
		v4, _ := in.Host(host)
		allowed[443] = append(allowed[443], v4)
	}
	c.apply(deny("weir", nil), deny("default", nil), deny("denied", names), deny("jobs", allowed))
	for _, namespace := range []string{"jobs", "denied"} {
		c.eventually("the policy of "+namespace, func() error {
			if c.dials(namespace, elsewhere) == nil {
				return errors.New("its pods reach a host")
			}
			return nil
		})
		c.kubectl("-n", namespace, "delete", "pod", "runner", "--wait")
	}

	if out, err := c.node.Output(lab.Tool(t, "helm"), "install", "weir", absolute(t, chart), "--namespace=weir", "--wait", "--timeout=3m",
		"--set=image.repository=registry.example.com/weir", "--set=image.tag=test", "--set=image.pullSecrets[0].name=weir-pull", "--set=extraCAs=company",
		"--set=registries={registry.example.com,harbor.example.com}", "--set=env.WEIR_CGROUP="+own, "--set=store.size=1GiB"); err != nil {
		t.Fatal(err, out)
	}
	c.settled(len(nodes))

	// An image from the company's registry leaves it once.
	harbor.Log.Reset()
	c.apply(deployment("app", "harbor.example.com/team/app:1", len(nodes)))
	c.kubectl("rollout", "status", "deployment/app", "--timeout=2m")
	once(t, harbor, app)

	// Jobs' pods, each with an empty disk, of which the second fetches nothing.
	for job := range 2 {
		c.runs("jobs")
		hub.Log.Reset()
		c.docker("jobs", "pull", "-q", "debian:12")
		if gets := hub.Log.BlobGETs(); (gets == 0) != (job == 1) {
			t.Errorf("job %d: %d blobs were fetched:\n%s", job, gets, hub.Log)
		}
		c.kubectl("-n", "jobs", "delete", "pod", "runner", "--wait")
	}
	c.runs("denied")
	if out, err := c.try(inRunner("denied", "pull", "-q", "debian:12")...); err == nil {
		t.Errorf("a pod that may not reach the registry has its image: %s", out)
	}
}

// once fails the test unless a registry has sent the two first layers of an image
// once, and a range of each that shows each other node that the registry has it. The
// third is the program, which is in an image that the nodes had before.
func once(t *testing.T, registry *lab.Registry, image lab.Pushed) {
	t.Helper()
	size := image.Sizes[0] + image.Sizes[1]
	if sent := registry.Log.BlobBytes(); sent < size || sent > size+size/10 {
		t.Errorf("the registry has sent %d bytes of blobs, the image has %d:\n%s", sent, size, registry.Log)
	}
}

// runs makes a runner's pod in a namespace, and waits until its dockerd answers.
func (c *cluster) runs(namespace string) {
	c.t.Helper()
	c.apply(runner(namespace))
	c.running("runner", "-n", namespace)
	c.eventually("the dockerd in the pod", func() error {
		_, err := c.try(inRunner(namespace, "version")...)
		return err
	})
}

// inRunner is a docker command in a runner's pod, for kubectl.
func inRunner(namespace string, args ...string) []string {
	return append(strings.Fields("-n "+namespace+" exec runner -c runner -- /usr/bin/docker"), args...)
}

// docker runs a docker command in a runner's pod.
func (c *cluster) docker(namespace string, args ...string) {
	c.t.Helper()
	c.kubectl(inRunner(namespace, args...)...)
}
