// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"weir/agent/admin"
	"weir/test/lab"
)

// oldContainerdConfig has no config_path, which a containerd before 2.0 reads no certs.d
// without.
const oldContainerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.10.2"
  restrict_oom_score_adj = true # a test's machine may lack CAP_SYS_RESOURCE
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
`

// A containerd that reads no certs.d, was running before weir, and is run by systemd.
// Without restartRuntimes it is passed through, and with it it is restarted, once: pods
// run on, and are served from then on.
//
// The node is no machine of its own, and process 1, through which an agent in a pod finds
// the node's files and systemd, isn't the node's. So the container's program enters the
// node's mount namespace first, and finds them where it is.
func TestChartRestarts(t *testing.T) {
	in := lab.NewInternet(t)
	in.Registry("registry.k8s.io").Push("pause:3.10.2", lab.Image{Program: lab.Debian(t, busybox, "busybox-static"), Cmd: []string{"sleep", "infinity"}})
	registry := in.Registry("registry.example.com")
	registry.Push("weir:test", lab.Image{Program: lab.Weir(t), Files: map[string]string{"/etc/ssl/certs/ca-certificates.crt": temp(t, in.Roots())}})
	registry.Push("team/app:1", lab.Image{Layers: []int{1 << 20}, Seed: 1, Program: busybox, OCI: true})
	next := registry.Push("team/app:2", lab.Image{Layers: []int{2 << 20}, Seed: 2, Program: busybox, OCI: true})
	node := in.Node()
	c := newCluster(t, node)
	node.Systemd()
	c.containerd.Stop()
	node.Run("rm", "-rf", "/var/lib/containerd", "/run/containerd")
	node.WriteFile("/etc/containerd/config.toml", oldContainerdConfig)
	node.WriteFile("/etc/systemd/system/containerd.service", "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nKillMode=process\nDelegate=yes\nExecStart="+lab.Debian(t, "/usr/bin/containerd", "containerd")+"\n")
	node.Run("systemctl", "daemon-reload")
	node.Run("systemctl", "start", "containerd")
	containerd := func() int {
		t.Helper()
		pid, err := strconv.Atoi(strings.TrimSpace(node.Run("systemctl", "show", "-P", "MainPID", "containerd")))
		if err != nil || pid == 0 {
			t.Fatalf("containerd is process %d, %v", pid, err)
		}
		return pid
	}
	was := containerd()
	sleeping := []string{"sleep", "infinity"}
	c.apply(pod("app", object{"image": "registry.example.com/team/app:1", "args": sleeping}, nil)) // its roots are read
	c.running("app")
	state := func() string {
		return c.kubectl("get", "pod", "app", "-o", "jsonpath={.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}")
	}
	app := state()

	c.kubectl("create", "namespace", "weir")
	c.kubectl("label", "namespace", "weir", "pod-security.kubernetes.io/enforce=privileged")
	helm := func(args ...string) {
		t.Helper()
		if out, err := node.Output(append([]string{lab.Tool(t, "helm")}, args...)...); err != nil {
			t.Fatal(err, out)
		}
	}
	helm("install", "weir", absolute(t, chart), "--namespace=weir", "--wait", "--timeout=3m",
		"--set=image.repository=registry.example.com/weir", "--set=image.tag=test", "--set=registries={registry.example.com}",
		"--set=env.WEIR_CGROUP="+node.Cgroup(), "--set=store.size=1GiB", "--set=peers.enabled=false")
	c.eventually("containerd is passed through", func() error {
		s, err := c.status()
		if err != nil {
			return err
		}
		for _, r := range s.Runtimes {
			if r.PID == was && r.Reach == "passthrough" && strings.Contains(r.Step, "restart containerd") {
				return nil
			}
		}
		return fmt.Errorf("%+v", s.Runtimes)
	})
	if containerd() != was {
		t.Fatal("containerd was restarted, and nobody has asked for that")
	}

	helm("upgrade", "weir", absolute(t, chart), "--namespace=weir", "--reuse-values", "--set=restartRuntimes=true", "--wait", "--timeout=3m")
	var volumes, mounts []object
	for i, path := range []string{"/usr", "/usr/bin:/bin", "/usr/lib:/lib", "/usr/lib64:/lib64"} {
		from, to, both := strings.Cut(path, ":")
		if !both {
			to = from
		}
		name := fmt.Sprintf("node%d", i)
		volumes = append(volumes, object{"name": name, "hostPath": object{"path": from}})
		mounts = append(mounts, object{"name": name, "mountPath": to, "readOnly": true})
	}
	enter := []string{"/usr/bin/nsenter", "--mount", "--target", strconv.Itoa(node.Spawn("sleep", "sleep", "infinity").PID()), "--", lab.Weir(t)}
	patch, err := json.Marshal(object{"spec": object{"template": object{"spec": object{"volumes": volumes,
		"containers": []object{{"name": "weir", "command": enter, "volumeMounts": mounts}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	c.kubectl("-n", "weir", "patch", "daemonset", "weir", "--patch="+string(patch))
	intercepted := func() error {
		var s admin.Status
		out, err := node.Output(lab.Weir(t), "status", "--json") // an exec in the container is in the node's files, too
		if err == nil {
			err = json.Unmarshal([]byte(out), &s)
		}
		switch {
		case err != nil:
			return err
		case len(s.Restarts) != 1 || s.Restarts[0].Service != "containerd.service" || !s.Restarts[0].Done:
			return fmt.Errorf("restarts: %+v; %+v", s.Restarts, s.Runtimes)
		}
		for _, r := range s.Runtimes {
			if r.PID == containerd() && r.Reach == "intercepted" {
				return nil
			}
		}
		return fmt.Errorf("%+v", s.Runtimes)
	}
	c.eventually("containerd is intercepted", intercepted)
	t.Logf("containerd is intercepted %.1f s after its agent was told to", time.Since(start).Seconds())
	if took := time.Since(start); took > time.Minute {
		t.Errorf("that took %v", took)
	}
	now := containerd()
	if now == was {
		t.Error("it is the same process")
	}
	c.ready("node-1")
	if got := state(); got != app {
		t.Errorf("the pod is %s, was %s", got, app)
	}
	if out := c.kubectl("exec", "app", "--", "/busybox", "echo", "it runs"); !strings.Contains(out, "it runs") {
		t.Error(out)
	}

	// Pods are served from then on.
	for round := range 2 {
		registry.Log.Reset()
		c.apply(pod("next", object{"image": "registry.example.com/team/app:2", "args": sleeping}, nil))
		c.running("next")
		if gets := registry.Log.BlobGETs(); round == 1 && gets > 0 {
			t.Errorf("%d blobs were fetched:\n%s", gets, registry.Log)
		}
		c.kubectl("delete", "pod", "next", "--wait")
		c.containerd.Remove("registry.example.com/team/app:2", lab.Pushed{})
		c.eventually("the layer is gone", func() error {
			if _, err := node.File("/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256/" + next.Layers[0].Encoded()); err == nil {
				return errors.New("it is there")
			}
			return nil
		})
	}
	// Once.
	c.kubectl("-n", "weir", "delete", "pods", "--all", "--wait")
	c.kubectl("-n", "weir", "rollout", "status", "daemonset/weir", "--timeout=2m")
	c.eventually("containerd is still intercepted", intercepted)
	if again := containerd(); again != now {
		t.Errorf("containerd is process %d, was %d", again, now)
	}
	if out := strings.TrimSpace(node.Run("systemctl", "show", "-P", "NRestarts", "containerd")); out != "0" {
		t.Errorf("systemd has restarted it %s times by itself", out)
	}
}
