// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInstallUninstall(t *testing.T) {
	hosts := []string{"registry-1.docker.io", "ghcr.io", "registry.test:5000", "europe-docker.pkg.dev"}
	for _, noTmpfile := range []bool{false, true} {
		t.Run(fmt.Sprintf("noTmpfile=%v", noTmpfile), func(t *testing.T) {
			ca, dir := newCA(t), t.TempDir()
			build(t, dir, usersTree...)
			before := listing(t, dir)
			r := openDirRoot(t, dir)
			r.noTmpfile = noTmpfile
			ledgerPath := filepath.Join(t.TempDir(), "ledger")
			ledger, err := OpenLedger(ledgerPath)
			if err != nil {
				t.Fatal(err)
			}
			defer ledger.Close()

			if err := ca.Install(r, usual, nil).Undo(r); err != nil || listing(t, dir) != before {
				t.Errorf("after Undo, %v:\n%s\nbefore install:\n%s", err, listing(t, dir), before)
			}
			res := ca.Install(r, usual, hosts)
			if res.System != nil {
				t.Errorf("System: %v", res.System)
			}
			all := append([]string{"docker.io", "198.18.0.2", "registry-1.docker.io:443", "ghcr.io:443", "europe-docker.pkg.dev:443"}, hosts...)
			mustCover(t, res, DockerCertsD, all...)
			mustCover(t, res, ContainerdPairCertsD, all...)
			mustCover(t, res, ContainerdCertsD, "docker.io", "198.18.0.2", "europe-docker.pkg.dev")
			mustNotCover(t, res, ContainerdCertsD, "registry.test:5000", ErrHostsFile)
			mustNotCover(t, res, ContainerdCertsD, "ghcr.io", ErrHides)
			mustNotCover(t, res, ContainersCertsD, "ghcr.io", ErrHides)
			if len(res.CertsD[DockerCertsD]) != len(all) {
				t.Errorf("reports on %v, want %v", res.CertsD[DockerCertsD], all)
			}
			mustHold(t, filepath.Join(dir, "etc/ssl/certs/weir-ca.pem"), ca.PEM())
			for _, h := range all {
				mustHold(t, filepath.Join(dir, DockerCertsD, h, "weir-ca.crt"), ca.PEM())
				mustHold(t, filepath.Join(dir, ContainerdPairCertsD, h, "weir-ca.crt"), ca.PEM())
			}
			for _, f := range append(res.Files, res.Dirs...) {
				if _, err := os.Lstat(filepath.Join(dir, f)); err != nil {
					t.Errorf("reported as made: %v", err)
				}
			}
			installed := listing(t, dir)
			if strings.Contains(installed, asidePrefix) {
				t.Errorf("files aside are left:\n%s", installed)
			}

			if err := ledger.Record("/", res); err != nil {
				t.Fatal(err)
			}
			again := ca.Install(r, usual, hosts)
			if len(again.Files)+len(again.Dirs) != 0 {
				t.Errorf("the second time it made %v and %v", again.Files, again.Dirs)
			}
			if err := again.Undo(r); err != nil {
				t.Error(err)
			}
			if got := listing(t, dir); got != installed {
				t.Errorf("the second time, and its Undo, changed the tree:\n%s\nwas:\n%s", got, installed)
			}

			// What update-ca-certificates does meanwhile, and a crash.
			build(t, dir, "etc/ssl/certs/11223344.0->weir-ca.pem", "etc/ssl/certs/.weir-ca-crashed=half",
				"etc/docker/certs.d/.weir-ca-crashed=half", "etc/docker/certs.d/docker.io/.weir-ca-crashed=half")
			ledger.Close()
			if ledger, err = OpenLedger(ledgerPath); err != nil {
				t.Fatal(err)
			}
			removed, err := Uninstall(r, usual, ledger.Made("/"))
			if err != nil {
				t.Errorf("Uninstall: %v", err)
			}
			if len(removed) != len(res.Files)+len(res.Dirs)+4 {
				t.Errorf("removed %d of %d: %v", len(removed), len(res.Files)+len(res.Dirs)+4, removed)
			}
			if after := listing(t, dir); after != before {
				t.Errorf("after uninstall:\n%s\nbefore install:\n%s", after, before)
			}
			if removed, err := Uninstall(r, usual, ledger.Made("/")); len(removed) != 0 || err != nil {
				t.Errorf("the second time it removed %v, %v", removed, err)
			}
		})
	}
}

// A container that is another node: each node's CA is taken out by itself alone,
// whichever generation of its certificate is there.
func TestUninstallOf(t *testing.T) {
	ca, another, dir := newCA(t), newCA(t), t.TempDir()
	build(t, dir, "etc/ssl/certs/ca-certificates.crt=x")
	r := openDirRoot(t, dir)
	if res := ca.Install(r, usual, nil); res.System != nil {
		t.Fatal(res.System)
	}
	was := listing(t, dir)
	if removed, err := UninstallOf(another.PEM(), r, usual); len(removed) > 0 || err != nil || listing(t, dir) != was {
		t.Errorf("another node removed %v, %v", removed, err)
	}
	if removed, err := UninstallOf(ca.PEM(), r, usual); len(removed) == 0 || err != nil {
		t.Errorf("the node removed %v, %v", removed, err)
	}
	if _, err := UninstallOf([]byte("no certificate"), r, usual); err == nil {
		t.Error("no error for what is no certificate")
	}
}
