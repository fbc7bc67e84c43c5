// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestInstallHosts(t *testing.T) {
	const c = "/certs"
	tests := []struct {
		name  string
		tree  []string
		certs string
		host  string
		want  error
		holds string // a file that must be there
		lacks string // a name that must not be made
	}{
		{name: "plain", certs: c, host: "ghcr.io", holds: "certs/ghcr.io/weir-ca.crt"},
		{name: "upper case", certs: c, host: "GHCR.io", holds: "certs/ghcr.io/weir-ca.crt"},
		{name: "port", certs: c, host: "registry.test:5000", holds: "certs/registry.test:5000/weir-ca.crt", lacks: "certs/registry.test_5000_"},
		{name: "port, containerd's spelling", tree: []string{"certs/registry.test_5000_/ca.crt=x"}, certs: c, host: "registry.test:5000",
			holds: "certs/registry.test_5000_/weir-ca.crt"},
		{name: "port, containerd's spelling with hosts.toml", tree: []string{"certs/registry.test_5000_/hosts.toml=x"}, certs: c,
			host: "registry.test:5000", want: ErrHostsFile, lacks: "certs/registry.test:5000"},
		{name: "beside a user's", tree: []string{"certs/ghcr.io/ca.crt=x"}, certs: c, host: "ghcr.io", holds: "certs/ghcr.io/weir-ca.crt"},
		{name: "hosts.toml", tree: []string{"certs/ghcr.io/hosts.toml=x"}, certs: c, host: "ghcr.io", want: ErrHostsFile, lacks: "certs/ghcr.io/weir-ca.crt"},
		{name: "empty hosts.toml", tree: []string{"certs/ghcr.io/hosts.toml="}, certs: c, host: "ghcr.io", holds: "certs/ghcr.io/weir-ca.crt"},
		{name: "_default", tree: []string{"certs/_default/hosts.toml=x"}, certs: c, host: "ghcr.io", want: ErrHides, lacks: "certs/ghcr.io"},
		{name: "_default beside a user's", tree: []string{"certs/_default/hosts.toml=x", "certs/ghcr.io/ca.crt=x"}, certs: c, host: "ghcr.io",
			holds: "certs/ghcr.io/weir-ca.crt"},
		{name: "Docker's for podman", tree: []string{"etc/docker/certs.d/ghcr.io/ca.crt=x"}, certs: ContainersCertsD, host: "ghcr.io",
			want: ErrHides, lacks: "etc/containers/certs.d/ghcr.io"},
		{name: "Docker's for containerd", tree: []string{"etc/docker/certs.d/registry.test_5000_/ca.crt=x"}, certs: ContainerdCertsD,
			host: "registry.test:5000", want: ErrHides, lacks: "etc/containerd/certs.d/registry.test:5000"},
		{name: "Docker's _default for containerd", tree: []string{"etc/docker/certs.d/_default/hosts.toml=x"}, certs: ContainerdCertsD, host: "ghcr.io",
			want: ErrHides, lacks: "etc/containerd/certs.d/ghcr.io"},
		{name: "Docker's, made by weir", tree: []string{"etc/docker/certs.d/ghcr.io/weir-ca.crt="}, certs: ContainersCertsD, host: "ghcr.io",
			holds: "etc/containers/certs.d/ghcr.io/weir-ca.crt"},
		{name: "registry's directory is a file", tree: []string{"certs/ghcr.io=x"}, certs: c, host: "ghcr.io", want: unix.ENOTDIR},
		{name: "certs.d is a file", tree: []string{"certs=x"}, certs: c, host: "ghcr.io", want: unix.ENOTDIR},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ca, dir := newCA(t), t.TempDir()
			build(t, dir, tt.tree...)
			res := ca.Install(openDirRoot(t, dir), Places{System: []string{"/roots"}, CertsD: []string{tt.certs}}, []string{tt.host})
			if tt.want == nil {
				mustCover(t, res, tt.certs, tt.host)
			} else {
				mustNotCover(t, res, tt.certs, tt.host, tt.want)
			}
			if tt.holds != "" {
				mustHold(t, filepath.Join(dir, tt.holds), ca.PEM())
			}
			if tt.lacks != "" {
				if _, err := os.Lstat(filepath.Join(dir, tt.lacks)); err == nil {
					t.Errorf("%s was made", tt.lacks)
				}
			}
		})
	}
	t.Run("not hosts", func(t *testing.T) {
		ca, dir := newCA(t), t.TempDir()
		hosts := []string{"", ".", "..", "../..", "a/b", "_default", "example.com", "ghcr.io:0", "ghcr.io\x00"}
		res := ca.Install(openDirRoot(t, dir), Places{System: []string{"/roots"}, CertsD: []string{c}}, hosts)
		for _, h := range hosts {
			if res.CertsD[c].Covers(h) {
				t.Errorf("%q is covered", h)
			}
		}
		if names, err := os.ReadDir(filepath.Join(dir, c)); err != nil || len(names) != 1 || names[0].Name() != "198.18.0.2" {
			t.Errorf("certs.d has %v, %v", names, err)
		}
	})
}

// What weir made must not stay in the way of what a user makes later.
func TestInstallWithdraws(t *testing.T) {
	ca, dir := newCA(t), t.TempDir()
	r := openDirRoot(t, dir)
	hosts := []string{"ghcr.io", "docker.io"}
	ca.Install(r, usual, hosts)
	build(t, dir, "etc/docker/certs.d/docker.io/ca.crt=users", "etc/containerd/certs.d/_default/hosts.toml=users")
	res := ca.Install(r, usual, hosts)
	mustCover(t, res, DockerCertsD, "docker.io", "ghcr.io")
	mustNotCover(t, res, ContainersCertsD, "docker.io", ErrHides)
	mustCover(t, res, ContainersCertsD, "ghcr.io")
	for _, h := range hosts {
		mustNotCover(t, res, ContainerdCertsD, h, ErrHides)
	}
	names, err := r.ReadDir(ContainerdCertsD)
	if err != nil || !slices.Equal(names, []string{"_default"}) {
		t.Errorf("containerd's directory has %v, %v", names, err)
	}
	if ok, _ := r.Exists(ContainersCertsD + "/docker.io"); ok {
		t.Error("podman's directory still hides Docker's")
	}
}
