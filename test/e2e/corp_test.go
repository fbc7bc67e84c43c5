// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"testing"

	"weir/agent/registries"
	"weir/test/lab"
)

// A company's registries, whose CAs are in the bundle of roots or in a certs.d, at a port
// of their own or at 443. Each is used by one runtime first: that pull passes through, and
// that runtime's next job is served. Nothing names them to weir.
func TestCompanysCA(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	type row struct {
		runtime, host string
		port          int
		certsD        bool // else the bundle has the CA
		*lab.Registry
		ca []byte
		im lab.Pushed
	}
	rows := []*row{
		{runtime: "dockerd", host: "harbor.corp", port: 443, certsD: true}, // while it is passed through for all
		{runtime: "dockerd", host: "registry.corp", port: 8443},
		{runtime: "containerd", host: "registry.corp.example", port: 8443},
		{runtime: "containerd", host: "harbor.corp.example", port: 8443, certsD: true},
		{runtime: "dind", host: "dind.corp.example", port: 443},
		{runtime: "dind", host: "ci.corp.example", port: 8443, certsD: true},
		{runtime: "buildkitd", host: "build.corp.example", port: 8443},
	}
	const local = "/var/lib/home/local/"
	bundled := map[string]string{local + "lab.crt": w.CA()}
	inCertsD := make(map[string]string)
	for i, r := range rows {
		r.Registry, r.ca = w.RegistryAt(r.host, r.port, true)
		r.im = r.Push("team/app:1", lab.Image{Layers: []int{1 << 20, 100_000}, Seed: uint64(150 + i)})
		if r.port != 443 {
			r.host = fmt.Sprintf("%s:%d", r.host, r.port)
		}
		if !r.certsD {
			bundled[local+r.Host+".crt"] = string(r.ca)
			continue
		}
		for _, dir := range []string{"/etc/docker/certs.d/", certsD + "/"} {
			inCertsD[dir+r.host+"/ca.crt"] = string(r.ca)
		}
	}
	write := func(n *lab.Node, files map[string]string) {
		t.Helper()
		for path, content := range files {
			n.WriteFile(path, content)
		}
	}
	node := w.Node()
	write(node, bundled)
	write(node, inCertsD)
	node.Run("sh", "-ec", "mkdir -p /var/lib/home/hooks; update-ca-certificates --localcertsdir "+local+" --hooksdir /var/lib/home/hooks")
	node.WriteFile("/etc/containerd/config.toml", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \""+certsD+"\"\n")
	containerd := node.Containerd()
	docker := node.Docker()
	containerd.Pull(renovate) // their roots are read
	docker.Pull(renovate)
	agent := node.Agent()
	if rt := agent.Runtime(docker.PID()); rt.Reach != "passthrough" {
		t.Fatalf("%+v", rt)
	}
	if rt := agent.Runtime(containerd.PID()); rt.Reach != "intercepted" {
		t.Fatalf("%+v", rt)
	}
	box := func() *lab.Node { // its /etc has the node's bundle
		b := node.Box()
		write(b, inCertsD)
		return b
	}
	builds := func(ref string) { box().BuildKit().Build("FROM " + ref + "\nCOPY Dockerfile /d\n") }
	for _, r := range rows {
		t.Run(r.runtime+" "+r.host, func(t *testing.T) {
			ref := r.host + "/team/app:1"
			by := r.runtime
			switch r.runtime {
			case "dockerd":
				docker.Pull(ref)
				docker.Same(ref, r.im)
				docker.Remove(ref)
			case "containerd":
				containerd.Pull(ref)
				containerd.Same(ref, r.im)
			case "dind":
				by = "dockerd"
				dind := box().Docker()
				dind.Pull(ref)
				dind.Same(ref, r.im)
				if r.certsD { // a pod's word is not enough
					by = "containerd"
					containerd.Pull(ref)
				}
			case "buildkitd":
				builds(ref)
			}
			fetched(t, r.Registry)
			if got := learned(t, agent, r.host); got.State != registries.StateLearned || got.By != by {
				t.Errorf("%+v, not by %s", got, by)
			}
			switch r.runtime {
			case "dockerd":
				docker.Stop()
				docker.Start()
			case "containerd":
				if err := lab.Eventually(agent.Ended(), func(context.Context) error {
					if rt := agent.Runtime(containerd.PID()); len(rt.Except) > 0 {
						return fmt.Errorf("%+v", rt)
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
				containerd.Remove(ref, r.im)
			}
			// What a pull that passed through has got isn't kept: the first job that is
			// intercepted has it kept.
			for range 2 {
				r.Log.Reset()
				switch r.runtime {
				case "dockerd":
					docker.Pull(ref)
					docker.Same(ref, r.im)
					docker.Remove(ref)
				case "containerd":
					containerd.Pull(ref)
					containerd.Same(ref, r.im)
					containerd.Remove(ref, r.im)
				case "dind":
					dind := box().Docker()
					dind.Pull(ref)
					dind.Same(ref, r.im)
				case "buildkitd":
					builds(ref)
				}
			}
			if n := r.Log.BlobGETs(); n > 0 {
				t.Errorf("%d blobs were fetched:\n%s", n, r.Log)
			}
		})
	}
	if s := agent.Status(); s.Connections.Failed > 0 {
		t.Errorf("%+v", s.Connections)
	}
}

// A private registry of Amazon ECR is known from the start: a cold pull is kept, and the
// next is served to who has the password, and to nobody else.
func TestECR(t *testing.T) {
	t.Parallel()
	const host = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
	const ref = host + "/team/app:1"
	w := newWorld(t)
	ecr := w.ECR(host)
	ecr.User("AWS", "eyJwYXlsb2FkIjoi")
	im := ecr.Push("team/app:1", lab.Image{Layers: []int{2 << 20, 100_000}, Seed: 170})
	login := []string{"AWS", "eyJwYXlsb2FkIjoi"}
	node := w.Node()
	agent := node.Agent()
	docker, containerd := node.Docker(), node.Box().Containerd()
	docker.Pull(ref, login...)
	docker.Same(ref, im)
	docker.Remove(ref)
	fetched(t, ecr)
	ecr.Log.Reset()
	docker.Pull(ref, login...)
	docker.Same(ref, im)
	docker.Remove(ref)
	containerd.Pull(ref, login...)
	containerd.Same(ref, im)
	if n := ecr.Log.BlobGETs(); n > 0 {
		t.Errorf("%d blobs were fetched:\n%s", n, ecr.Log)
	}
	other := node.Box().Docker()
	for who, login := range map[string][]string{"nobody": nil, "a wrong password": {"AWS", "expired"}} {
		if docker.TryPull(ref, login...) == nil || other.TryPull(ref, login...) == nil {
			t.Errorf("%s has pulled it", who)
		}
	}
	if s := agent.Status(); len(s.UnknownHosts) > 0 || len(s.Registries) != 1 || s.Registries[0].Registry != host {
		t.Errorf("%+v, %+v", s.Registries, s.UnknownHosts)
	}
	if all := knownTo(t.Context(), t, agent); len(all) > 0 {
		t.Errorf("it was learned: %+v", all)
	}
}
