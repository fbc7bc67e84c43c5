// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"weir/agent/internal/agenttest"
	"weir/agent/procfs"
	"weir/agent/trust"
)

func TestConfigPath(t *testing.T) {
	var got []string
	for _, m := range configPathRE.FindAllSubmatch([]byte(`
version = 2
# config_path = "/commented"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
  config_path='/other'
x_config_path = "/no"
`), -1) {
		got = append(got, string(m[1]))
	}
	if !slices.Equal(got, []string{"/etc/containerd/certs.d", "/other"}) {
		t.Errorf("%q", got)
	}
}

// What may have read its roots before the CA came isn't taken to trust it.
func TestMayHaveRead(t *testing.T) {
	agenttest.Root(t)
	dir := t.TempDir()
	root, err := trust.OpenRootDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	now := procfs.SinceBoot()
	for _, c := range []struct {
		kind  *kind
		since time.Duration // after its exec
		known bool
		dir   string
		may   bool
	}{
		{kindOf("crane"), time.Second, true, "", false},
		{kindOf("executor"), time.Second, true, "", true},
		{kindOf("executor"), -time.Second, true, "", false},
		{kindOf("executor"), -time.Second, false, "", true},
		{kindOf("skopeo"), time.Second, true, "", false},
		{kindOf("skopeo"), time.Second, true, trust.DockerCertsD + "/example.com", true},
		{kindOf("skopeo"), -time.Second, true, trust.DockerCertsD + "/example.com", false},
	} {
		if c.dir != "" {
			if err := os.MkdirAll(filepath.Join(dir, c.dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		rt := &Runtime{kind: c.kind}
		if c.known {
			rt.execed = now - time.Minute
		}
		since := time.Now().Add(c.since - (procfs.SinceBoot() - now) - time.Minute)
		if may := mayHaveRead(rt, root, since); may != c.may {
			t.Errorf("%s, CA %s after its exec (known: %v), settings %q: %v", c.kind.name, c.since, c.known, c.dir, may)
		}
	}
}
