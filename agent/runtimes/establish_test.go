// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
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

// In a certs.d that isn't read, no registry has a directory at any time: who else reads there
// may have found it, and would fail when it is taken away.
func TestProveCertsD(t *testing.T) {
	agenttest.Root(t)
	for _, reads := range []bool{false, true} {
		dir := t.TempDir()
		root, err := trust.OpenRootDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		ca, err := trust.OpenCA(t.TempDir(), []string{"ghcr.io"}, Probes)
		if err != nil {
			t.Fatal(err)
		}
		ledger, err := trust.OpenLedger(filepath.Join(t.TempDir(), "ledger"))
		if err != nil {
			t.Fatal(err)
		}
		defer ledger.Close()
		rs := New(t.Context(), Options{CA: ca, Ledger: ledger, Registries: func() []string { return []string{"ghcr.io"} }, RunDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
		there := func() (names []string) {
			all, err := filepath.Glob(filepath.Join(dir, trust.ContainerdCertsD, "*"))
			if err != nil {
				t.Error(err)
			}
			for _, n := range all {
				names = append(names, filepath.Base(n))
			}
			return names
		}
		self, err := procfs.Read(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		rt := &Runtime{Process: self, probes: make(map[netip.Addr]*probe), ctx: t.Context(), settled: make(chan struct{})}
		var asked []string
		rt.kind = &kind{name: "puller", certsD: []string{trust.ContainerdCertsD}, ask: func(context.Context, *Runtime, string) error {
			asked = there()
			var verdict error
			if !reads {
				verdict = errDistrusts
			}
			p, err := rs.probeOf(rt.PID, probeCertsD)
			p.is(verdict)
			return err
		}}
		rs.mu.Lock()
		rs.all[rt.PID] = rt
		rs.mu.Unlock()
		_, read, _, err := rs.proveCertsD(rt, root, "")
		if !slices.Equal(asked, []string{probeCertsD.String()}) {
			t.Errorf("while it was asked there was %q", asked)
		}
		left, _ := os.ReadDir(dir)
		switch {
		case !reads && (!errors.Is(err, errDistrusts) || len(left) > 0):
			t.Errorf("%v; %v is left", err, left)
		case reads && (err != nil || read != trust.ContainerdCertsD || !slices.Contains(there(), "ghcr.io")):
			t.Errorf("%v, reads %q; there is %q", err, read, there())
		}
	}
}
