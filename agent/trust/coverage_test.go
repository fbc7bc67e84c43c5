// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker/config"
)

// coverageHosts are those that tests of Coverage ask for.
var coverageHosts = []string{"registry-1.docker.io", "ghcr.io", "registry.test:5000"}

// containerd is a containerd that looks through one directory.
var containerd = CertsD{Dirs: []string{"/certs"}, HostsFiles: true}

func TestCoverage(t *testing.T) {
	const ours = "$CA" // replaced by the CA's certificate
	for _, tt := range []struct {
		name   string
		tree   []string
		certsD CertsD
		want   map[string]error // where it is not covered; others are
	}{
		{name: "as installed"},
		{name: "server", tree: []string{`certs/docker.io/hosts.toml=server = "https://ghcr.io"`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "host", tree: []string{`certs/docker.io/hosts.toml=[host."https://ghcr.io"]`}, want: map[string]error{"ghcr.io": ErrLeads, "registry-1.docker.io": ErrLeads}},
		{name: "without a scheme, in upper case, with a port", tree: []string{`certs/quay.io/hosts.toml=server = "GHCR.IO:443"`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "another port", tree: []string{`certs/quay.io/hosts.toml=server = "https://ghcr.io:8443/v2"`}},
		{name: "with a trailing dot and a user", tree: []string{`certs/quay.io/hosts.toml=server = "https://a:b@ghcr.io./v2"`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "in full-width letters", tree: []string{`certs/quay.io/hosts.toml=server = "https://ｇｈｃｒ.io"`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "a registry of a flag", tree: []string{`certs/ghcr.io/hosts.toml=server = "https://registry.test:5000"`}, want: map[string]error{"registry.test:5000": ErrLeads}},
		{name: "a registry that weir doesn't know", tree: []string{"certs/corp.test_5000_/hosts.toml=[host.\"http://x\"]\n[host.\"https://ghcr.io\"]"}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "several hosts", tree: []string{"certs/corp.test/hosts.toml=server = \"https://registry-1.docker.io\"\n[host.\"https://mirror.test\"]\n[host.\"https://ghcr.io\"]\n  capabilities = [\"pull\"]"},
			want: map[string]error{"ghcr.io": ErrLeads, "registry-1.docker.io": ErrLeads}},
		{name: "_default", tree: []string{`certs/_default/hosts.toml=server = "https://ghcr.io"`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "Docker's directory too", certsD: CertsD{Dirs: []string{"/certs"}, Also: []string{"/docker", "/none"}, HostsFiles: true},
			tree: []string{`docker/corp.test/hosts.toml=server = "https://ghcr.io"`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "its own without the CA", tree: []string{`certs/ghcr.io/hosts.toml=[host."https://mirror.test"]`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "its own with the port without the CA", tree: []string{`certs/ghcr.io_443_/hosts.toml=[host."https://mirror.test"]`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "its own, which leads away", tree: []string{`certs/ghcr.io/hosts.toml=server = "https://mirror.test"`}},
		{name: "its own with the CA", tree: []string{"certs/ghcr.io/hosts.toml=ca = [\"other.pem\", \"/etc/weir.pem\"]", "certs/ghcr.io/other.pem=x", "etc/weir.pem=" + ours}},
		{name: "with the CA for the server alone", tree: []string{"certs/ghcr.io/hosts.toml=server = \"https://registry-1.docker.io\"\nca = \"own.pem\"\n[host.\"https://registry.test:5000\"]", "certs/ghcr.io/own.pem=" + ours},
			want: map[string]error{"registry.test:5000": ErrLeads}},
		{name: "with the CA for the host", tree: []string{"certs/corp.test/hosts.toml=server = \"https://corp.test\"\n[host.\"https://ghcr.io\"]\nca = \"own.pem\"", "certs/corp.test/own.pem=" + ours}},
		{name: "with a CA that is another's", tree: []string{"certs/corp.test/hosts.toml=server = \"https://ghcr.io\"\nca = \"none.pem\""}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "without verification", tree: []string{"certs/corp.test/hosts.toml=server = \"https://ghcr.io\"\nskip_verify = true"}},
		{name: "with what older ones don't accept", tree: []string{"certs/ghcr.io/hosts.toml=capabilities = [\"referrers\"]\nca = \"own.pem\"", "certs/ghcr.io/own.pem=" + ours}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "empty", tree: []string{"certs/ghcr.io/hosts.toml="}},
		{name: "no TOML", tree: []string{"certs/corp.test/hosts.toml=server ="}, want: map[string]error{"ghcr.io": ErrUnreadable, "registry-1.docker.io": ErrUnreadable, "registry.test:5000": ErrUnreadable}},
		{name: "no hosts.toml to containerd", tree: []string{`certs/corp.test/hosts.toml=capabilities = ["fly"]`}, want: map[string]error{"ghcr.io": ErrUnreadable, "registry-1.docker.io": ErrUnreadable, "registry.test:5000": ErrUnreadable}},
		{name: "a directory", tree: []string{"certs/corp.test/hosts.toml/x=x"}, want: map[string]error{"ghcr.io": ErrUnreadable, "registry-1.docker.io": ErrUnreadable, "registry.test:5000": ErrUnreadable}},
		{name: "a link that leads nowhere", tree: []string{"certs/corp.test/hosts.toml->none", "certs/link->none"}},
		{name: "a link out of the root", tree: []string{"certs/corp.test->/elsewhere", `elsewhere/hosts.toml=server = "https://ghcr.io"`}, want: map[string]error{"ghcr.io": ErrLeads}},
		{name: "removed", tree: []string{"certs/ghcr.io/weir-ca.crt=x"}, want: map[string]error{"ghcr.io": ErrNoCA}},
		{name: "by the port removed", tree: []string{"certs/ghcr.io:443/weir-ca.crt=x"}, want: map[string]error{"ghcr.io": ErrNoCA}},
		{name: "by Docker Hub's name removed", tree: []string{"certs/docker.io/weir-ca.crt=x"}, want: map[string]error{"registry-1.docker.io": ErrNoCA}},
		{name: "hidden", tree: []string{"certs/registry.test_5000_/ca.crt=x"}, want: map[string]error{"registry.test:5000": ErrNoCA}},
		{name: "hidden by another directory", certsD: CertsD{Dirs: []string{"/first", "/certs"}, HostsFiles: true}, tree: []string{"first/_default/x=x"},
			want: map[string]error{"ghcr.io": ErrNoCA, "registry-1.docker.io": ErrNoCA, "registry.test:5000": ErrNoCA}},

		{name: "containers/image", certsD: CertsD{Dirs: []string{"/home", "/certs"}}, tree: []string{"certs/_default/hosts.toml=x", `certs/corp.test/hosts.toml=server = "https://ghcr.io"`}},
		{name: "containers/image, with a user's", certsD: CertsD{Dirs: []string{"/home", "/certs"}}, tree: []string{"home/ghcr.io/x=x"}, want: map[string]error{"ghcr.io": ErrNoCA}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ca, dir := newCA(t), t.TempDir()
			r := openDirRoot(t, dir)
			ca.Install(r, Places{System: []string{"/roots"}, CertsD: []string{"/certs"}}, coverageHosts)
			for i, f := range tt.tree {
				if name, _, ok := strings.Cut(f, "="); ok {
					_ = os.Remove(filepath.Join(dir, name))
				}
				tt.tree[i] = strings.ReplaceAll(f, ours, string(ca.PEM()))
			}
			build(t, dir, tt.tree...)
			if tt.certsD.Dirs == nil {
				tt.certsD = containerd
			}
			cov := ca.Coverage(r, tt.certsD, coverageHosts)
			for _, h := range coverageHosts {
				if want := tt.want[h]; !errors.Is(cov[h], want) {
					t.Errorf("%s: %v, want %v", h, cov[h], want)
				}
			}
			if tt.certsD.HostsFiles && tt.certsD.Also == nil && len(tt.certsD.Dirs) == 1 {
				agreesWithContainerd(t, ca, dir, cov)
			}
		})
	}
}

// What a _default says of the registry itself holds for all that have no
// directory of their own.
func TestCoverageOfDefault(t *testing.T) {
	ca, dir := newCA(t), t.TempDir()
	build(t, dir, "certs/_default/hosts.toml=[host.\"https://mirror.test\"]")
	r := openDirRoot(t, dir)
	if cov := ca.Coverage(r, containerd, coverageHosts); !errors.Is(cov["ghcr.io"], ErrNoCA) {
		t.Error(cov)
	}
	build(t, dir, "certs/own.pem="+string(ca.PEM()))
	if err := os.WriteFile(filepath.Join(dir, "certs/_default/hosts.toml"), []byte(`ca = "../own.pem"`), 0o600); err != nil {
		t.Fatal(err)
	}
	cov := ca.Coverage(r, containerd, coverageHosts)
	for _, h := range coverageHosts {
		if cov[h] != nil {
			t.Error(cov)
		}
	}
	agreesWithContainerd(t, ca, dir, cov)
}

// agreesWithContainerd fails the test if containerd itself, with what is below
// dir, would ask a host that is covered without trusting the CA there.
func agreesWithContainerd(t *testing.T, ca *CA, dir string, cov Coverage) {
	t.Helper()
	hosts := config.ConfigureHosts(t.Context(), config.HostOptions{HostDir: config.HostDirFromRoot(filepath.Join(dir, "certs"))})
	for _, image := range []string{"docker.io", "registry-1.docker.io", "registry-1.docker.io:443", "ghcr.io", "ghcr.io:443", "registry.test:5000", "quay.io", "corp.test", "corp.test:5000", "x.test"} {
		all, err := hosts(image)
		if err != nil {
			continue // no pull at all
		}
		for _, h := range all {
			host, err := hostOf(h.Host)
			if err != nil || !cov.Covers(host) {
				continue
			}
			tr, ok := h.Client.Transport.(*http.Transport)
			if !ok || tr.TLSClientConfig.InsecureSkipVerify {
				continue // plain HTTP will do
			}
			leaf, err := ca.Leaf(host)
			if err != nil {
				t.Fatal(err)
			}
			err = errors.New("the system's roots alone")
			if tr.TLSClientConfig.RootCAs != nil {
				_, err = leaf.Leaf.Verify(x509.VerifyOptions{Roots: tr.TLSClientConfig.RootCAs, DNSName: strings.Split(host, ":")[0]})
			}
			if err != nil {
				t.Errorf("%s is covered, but for images of %s containerd has %v", host, image, err)
			}
		}
	}
}

// FuzzCoverage holds what weir makes of a hosts.toml against what containerd
// makes of it.
func FuzzCoverage(f *testing.F) {
	for _, s := range []string{
		`server = "https://ghcr.io"`, `server = "ghcr.io"`, `server = "httpghcr.io"`, `server = "http://registry-1.docker.io:443"`,
		"[host.\"https://ghcr.io:443/v2/x\"]\n  skip_verify = true\n[host.\"registry.test:5000\"]\n  ca = \"../own.pem\"",
		"ca = [\"../own.pem\"]\ncapabilities = [\"Pull\", \"resolve\"]\n[header]\n  x = [\"a\", \"b\"]",
		"host = {\"https://ghcr.io\" = {ca = \"/x\"}}", "host.\"https://ghcr.io\".client = [[\"a\", \"b\"]]", "server =", "Server = \"GHCR.IO.\"", "dial_timeout = \"1s\"\nclient = \"x\"",
	} {
		f.Add([]byte(s), "corp.test")
		f.Add([]byte(s), "ghcr.io")
		f.Add([]byte(s), "docker.io")
	}
	f.Add([]byte(`[host."https://ghcr.io"]`), "_default")
	f.Add([]byte(`server = "https://ghcr.io"`), "corp.test_5000_")
	ca, dir := newCA(f), f.TempDir()
	r := openDirRoot(f, dir)
	ca.Install(r, Places{System: []string{"/roots"}, CertsD: []string{"/certs"}}, coverageHosts)
	build(f, dir, "certs/own.pem="+string(ca.PEM()))
	f.Fuzz(func(t *testing.T, b []byte, name string) {
		if name == "" || name == "." || name == ".." || len(name) > 200 || strings.ContainsAny(name, "/\x00") {
			return
		}
		of := filepath.Join(dir, "certs", name)
		hosts := filepath.Join(of, hostsFile)
		if err := errors.Join(os.MkdirAll(of, 0o700), os.WriteFile(hosts, b, 0o600)); err != nil {
			return // own.pem, or no name for a file
		}
		agreesWithContainerd(t, ca, dir, ca.Coverage(r, containerd, coverageHosts))
		if err := os.Remove(hosts); err != nil {
			t.Fatal(err)
		}
		_ = os.Remove(of) // unless weir's is there
	})
}

// Of one look no more is read than there can be in earnest.
func TestCoverageIsBounded(t *testing.T) {
	ca, dir := newCA(t), t.TempDir()
	r := openDirRoot(t, dir)
	ca.Install(r, Places{System: []string{"/roots"}, CertsD: []string{"/certs"}}, coverageHosts)
	build(t, dir, "certs/corp.test/hosts.toml=# "+strings.Repeat("x", maxHostsFile))
	if cov := ca.Coverage(r, containerd, coverageHosts); !errors.Is(cov["ghcr.io"], ErrTooLarge) || !errors.Is(cov["ghcr.io"], ErrUnreadable) {
		t.Error(cov)
	}
	if err := os.RemoveAll(filepath.Join(dir, "certs/corp.test")); err != nil {
		t.Fatal(err)
	}
	for i := range maxDirs {
		if err := os.Mkdir(filepath.Join(dir, fmt.Sprintf("certs/%d.test", i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if cov := ca.Coverage(r, containerd, coverageHosts); !errors.Is(cov["ghcr.io"], ErrTooLarge) {
		t.Error(cov)
	}
}

// BenchmarkCoverage is what a connection of a runtime that trusts the CA by its
// certs.d costs more.
func BenchmarkCoverage(b *testing.B) {
	ca, dir := newCA(b), b.TempDir()
	r := openDirRoot(b, dir)
	var hosts []string
	for i := range 20 {
		hosts = append(hosts, fmt.Sprintf("r%d.ghcr.io", i))
	}
	ca.Install(r, Places{System: []string{"/roots"}, CertsD: []string{"/certs"}}, hosts)
	for b.Loop() {
		if cov := ca.Coverage(r, containerd, hosts[:1]); cov[hosts[0]] != nil {
			b.Fatal(cov)
		}
	}
}
