// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"flag"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"weir/test/lab"
)

var update = flag.Bool("update", false, "write deploy/weir.yaml")

const (
	chart    = "../../deploy/chart"
	manifest = "../../deploy/weir.yaml"
)

const manifestHead = `# weir for a cluster without Helm. Made from deploy/chart by ` + "`make manifest`" + `.
#
# Put the name of your image in place of registry.example.com/weir, and make the
# key that the nodes share, once:
#
#   printf '/key/swarm/psk/1.0.0/\n/base16/\n%s\n' "$(openssl rand -hex 32)" > swarm.key
#   kubectl create namespace weir
#   kubectl -n weir create secret generic weir-swarm --from-file=swarm.key
#   kubectl apply -f weir.yaml
---
apiVersion: v1
kind: Namespace
metadata:
  name: weir
  labels:
    pod-security.kubernetes.io/enforce: privileged
`

// sourceRE is what helm says about where an object is from.
var sourceRE = regexp.MustCompile(`(?m)^# Source: .*\n`)

func helmTemplate(t testing.TB, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(lab.Tool(t, "helm"), append([]string{"template", "weir", chart, "--namespace", "weir"}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// The plain manifest is what the chart makes.
func TestManifest(t *testing.T) {
	out, err := helmTemplate(t, "--set=image.repository=registry.example.com/weir", "--set=peers.existingSecret=weir-swarm")
	if err != nil {
		t.Fatal(err, out)
	}
	want := manifestHead + sourceRE.ReplaceAllString(strings.ReplaceAll(out, "managed-by: Helm", "managed-by: kubectl"), "")
	if *update {
		if err := os.WriteFile(manifest, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(manifest); err != nil || string(got) != want {
		t.Errorf("deploy/weir.yaml is not what the chart makes (%v): run make manifest", err)
	}
}

// What can't work is refused, with a message that says what to do.
func TestValues(t *testing.T) {
	image := "--set=image.repository=registry.example.com/weir"
	for _, c := range []struct {
		args []string
		want string // in the output; of an error if it has none of a manifest
	}{
		{nil, "image.repository has to be given"},
		{[]string{image, "--set=podMonitor.enabled=true"}, "needs an admin.host that Prometheus can reach"},
		{[]string{image, "--set=podMonitor.enabled=true", "--set=admin.host=0.0.0.0"}, "kind: PodMonitor"},
		{[]string{image, "--set=admin.host=::1"}, `value: "[::1]:5050"`},
		{[]string{image, "--set=admin.host=0.0.0.0"}, "httpGet: {path: /readyz, port: 5050}"},
		{[]string{image, "--set=registries={a.example.com,b.example.com:5000}"}, `value: "a.example.com,b.example.com:5000"`},
		{[]string{image, "--set=extraCAs=company"}, `configMap: {name: "company"}`},
		{[]string{image, "--set=store.size=large"}, "/store/size"},
		{[]string{image, "--set=peers.port=0"}, "/peers/port"},
		{[]string{image, "--set=env.LD_PRELOAD=x"}, "LD_PRELOAD"},
		{[]string{image, "--set=env.OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318"}, `{name: OTEL_EXPORTER_OTLP_ENDPOINT, value: "http://collector:4318"}`},
		{[]string{image, "--set=stroe.size=1GiB"}, "stroe"},
		{[]string{image, "--kube-version=1.29.0"}, "container.apparmor.security.beta.kubernetes.io/weir: unconfined"},
		{[]string{image, "--kube-version=1.24.0"}, "kubeVersion"},
	} {
		out, err := helmTemplate(t, c.args...)
		if !strings.Contains(out, c.want) {
			t.Errorf("%v gives no %q: %v\n%s", c.args, c.want, err, out)
		}
	}
	out, err := helmTemplate(t, image, "--set=peers.enabled=false")
	if err != nil || strings.Contains(out, "SWARM") || strings.Contains(out, "kind: Secret") {
		t.Errorf("without peers: %v\n%s", err, out)
	}
	// What monitors it is what the chart has in its files.
	if out, err = helmTemplate(t, image, "--set=prometheusRule.enabled=true", "--set=dashboard.enabled=true"); err != nil {
		t.Fatal(err, out)
	}
	for file, indent := range map[string]string{"rules.yaml": "  ", "dashboard.json": "    "} {
		b, err := os.ReadFile(monitoring + "/" + file)
		if err != nil {
			t.Fatal(err)
		}
		whole := indent + strings.ReplaceAll(strings.TrimRight(string(b), "\n"), "\n", "\n"+indent)
		if !strings.Contains(out, whole) {
			t.Errorf("%s is not what is in the chart's objects:\n%s", file, out)
		}
	}
	if out, err := exec.Command(lab.Tool(t, "helm"), "lint", "--strict", chart, image).CombinedOutput(); err != nil {
		t.Errorf("helm lint: %v\n%s", err, out)
	}
}
