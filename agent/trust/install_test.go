// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv("WEIR_TEST_DIAL"); addr != "" {
		os.Exit(dialAsRuntime(addr))
	}
	os.Exit(m.Run())
}

// dialAsRuntime is a Go program like a container runtime: chrooted, with the
// system's roots of that tree.
func dialAsRuntime(addr string) int {
	conn, err := net.Dial("tcp", addr)
	if err == nil {
		err = syscall.Chroot(os.Getenv("WEIR_TEST_ROOT"))
	}
	if err == nil {
		err = tls.Client(conn, &tls.Config{ServerName: os.Getenv("WEIR_TEST_NAME")}).Handshake()
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// usual are the usual places, but for a process that has roots in /ca.pem.
var usual = func() Places {
	p := UsualPlaces()
	p.Bundles = []string{"/ca.pem"}
	return p
}()

// usersTree is what a host may look like: settings of a user everywhere.
var usersTree = []string{
	"etc/ssl/certs/ca-certificates.crt=bundle", "etc/ssl/certs/mine.pem=mine", "etc/ssl/certs/0a1b2c3d.0->mine.pem",
	"etc/docker/daemon.json={}",
	"etc/docker/certs.d/ghcr.io/ca.crt=users", "etc/docker/certs.d/ghcr.io/client.key=users",
	"etc/containerd/config.toml=", "etc/containerd/certs.d/registry.test:5000/hosts.toml=server = 'x'",
	"usr/bin/dockerd=elf",
}

func mustCover(t *testing.T, res Result, dir string, hosts ...string) {
	t.Helper()
	for _, h := range hosts {
		if !res.CertsD[dir].Covers(h) {
			t.Errorf("%s: %s is not covered: %v", dir, h, res.CertsD[dir][h])
		}
	}
}

func mustNotCover(t *testing.T, res Result, dir, host string, why error) {
	t.Helper()
	if err := res.CertsD[dir][host]; !errors.Is(err, why) || res.CertsD[dir].Covers(host) {
		t.Errorf("%s: %s: error %v, want %v", dir, host, err, why)
	}
}

func mustHold(t *testing.T, name string, want []byte) {
	t.Helper()
	fi, err := os.Lstat(name)
	if err != nil {
		t.Error(err)
		return
	}
	if fi.Mode() != 0o644 {
		t.Errorf("%s: mode %v", name, fi.Mode())
	}
	if b, err := os.ReadFile(name); err != nil || !bytes.Equal(b, want) {
		t.Errorf("%s holds %q, %v", name, b, err)
	}
}

// An image with a bundle of roots and nothing else: all directories are made,
// and without a ledger those that are weir's own beyond doubt go.
func TestInstallIntoBareRoot(t *testing.T) {
	ca, dir := newCA(t), t.TempDir()
	build(t, dir, "ca.pem=x")
	r := openDirRoot(t, dir)
	res := ca.Install(r, usual, []string{"ghcr.io", "192.0.2.7:5000"})
	if res.System != nil {
		t.Errorf("System: %v", res.System)
	}
	for _, d := range usual.CertsD {
		mustCover(t, res, d, "ghcr.io", "192.0.2.7:5000", "198.18.0.2")
	}
	if err := exec.Command("test", "-d", filepath.Join(dir, "/etc/pki")).Run(); err == nil {
		t.Error("a second system directory was made")
	}
	if _, err := Uninstall(r, usual, nil); err != nil {
		t.Errorf("Uninstall: %v", err)
	}
	got := strings.Fields(listing(t, dir))
	for _, f := range got {
		if strings.Contains(f, "weir") || strings.Contains(f, "certs.d:") || strings.Contains(f, "ghcr") {
			t.Errorf("left %s", f)
		}
	}
}

// weir's CA is never the only root that a process has.
func TestInstallBesideRoots(t *testing.T) {
	for _, tt := range []struct {
		name, environ string
		tree          []string
		in            string // where the CA then is; empty for nowhere
	}{
		{name: "Debian", tree: []string{"etc/ssl/certs/ca-certificates.crt=x"}, in: "etc/ssl/certs"},
		{name: "Alpine", tree: []string{"etc/ssl/certs/ca-certificates.crt=x", "etc/ssl/cert.pem->certs/ca-certificates.crt"}, in: "etc/ssl/certs"},
		{name: "Alpine's bundle alone", tree: []string{"etc/ssl/cert.pem=x"}, in: "etc/ssl/certs"},
		{name: "Fedora", tree: []string{"etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem=x", "etc/pki/tls/certs/ca-bundle.crt->../../ca-trust/extracted/pem/tls-ca-bundle.pem",
			"etc/ssl/certs->../pki/tls/certs"}, in: "etc/pki/tls/certs"},
		{name: "SUSE", tree: []string{"etc/ssl/ca-bundle.pem->../../var/lib/ca-certificates/ca-bundle.pem", "var/lib/ca-certificates/ca-bundle.pem=x",
			"etc/ssl/certs->../../var/lib/ca-certificates/pem", "var/lib/ca-certificates/pem/"}, in: "var/lib/ca-certificates/pem"},
		{name: "one root", tree: []string{"etc/ssl/certs/company.pem=x"}, in: "etc/ssl/certs"},
		{name: "a mounted secret", tree: []string{"etc/ssl/certs/company.pem->..data/company.pem", "etc/ssl/certs/..data->..1", "etc/ssl/certs/..1/company.pem=x"}, in: "etc/ssl/certs"},
		{name: "SSL_CERT_DIR", environ: "SSL_CERT_DIR=/kaniko/ssl/certs", tree: []string{"kaniko/ssl/certs/ca-certificates.crt=x"}, in: "kaniko/ssl/certs"},
		{name: "SSL_CERT_DIR of which one is there", environ: "SSL_CERT_DIR=rel:/no:/yes", tree: []string{"yes/a.pem=x"}, in: "yes"},
		{name: "SSL_CERT_FILE", environ: "SSL_CERT_FILE=/ca.pem", tree: []string{"ca.pem=x"}, in: "etc/ssl/certs"},

		{name: "nothing"},
		{name: "an empty directory", tree: []string{"etc/ssl/certs/"}},
		{name: "an empty bundle", tree: []string{"etc/ssl/certs/", "etc/ssl/cert.pem="}},
		{name: "a bundle that is a directory", tree: []string{"etc/ssl/cert.pem/"}},
		{name: "a bundle that leads nowhere", tree: []string{"etc/ssl/cert.pem->/no"}},
		{name: "only weir's", tree: []string{"etc/ssl/certs/0c3a2d19.0->weir-ca.pem", "etc/ssl/certs/.weir-ca-A=half"}},
		{name: "SSL_CERT_FILE that isn't there", environ: "SSL_CERT_FILE=/no", tree: []string{"etc/ssl/cert.pem=x", "etc/ssl/certs/"}},
		{name: "SSL_CERT_DIR without roots", environ: "SSL_CERT_DIR=/empty", tree: []string{"empty/", "etc/ssl/certs/a.pem=x"}},
		{name: "a relative SSL_CERT_DIR", environ: "SSL_CERT_DIR=certs", tree: []string{"etc/ssl/certs/ca-certificates.crt=x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ca, dir := newCA(t), t.TempDir()
			build(t, dir, tt.tree...)
			before := listing(t, dir)
			r := openDirRoot(t, dir)
			places, err := SystemPlaces([]string{"PATH=/bin", tt.environ})
			if err != nil {
				t.Fatal(err)
			}
			res := ca.Install(r, places, nil)
			if tt.in == "" {
				if res.System == nil || listing(t, dir) != before {
					t.Errorf("%v\n%s\nbefore:\n%s", res.System, listing(t, dir), before)
				}
				return
			}
			if res.System != nil {
				t.Fatal(res.System)
			}
			mustHold(t, filepath.Join(dir, tt.in, systemFile), ca.PEM())
			// What it has put there isn't taken for another's roots.
			if again := ca.Install(r, places, nil); again.System != nil || len(again.Files) > 0 {
				t.Errorf("again: %+v", again)
			}
		})
	}
}

// Only directories of the owners that are named are written to; what is there
// counts whoever has it.
func TestInstallOwners(t *testing.T) {
	needRoot(t)
	ca, dir := newCA(t), t.TempDir()
	build(t, dir, "etc/ssl/certs/a.pem=x", "etc/pki/tls/certs/")
	r := openDirRoot(t, dir)
	places, _ := SystemPlaces(nil)
	places.Owners = func(uid uint32) bool { return uid == 1000 }
	if res := ca.Install(r, places, nil); !errors.Is(res.System, ErrOthers) || len(res.Files) > 0 {
		t.Errorf("%+v", res)
	}
	if err := os.Chown(filepath.Join(dir, "etc/pki/tls/certs"), 1000, 1000); err != nil {
		t.Fatal(err)
	}
	if res := ca.Install(r, places, nil); res.System != nil || !slices.Equal(res.Files, []string{"/etc/pki/tls/certs/weir-ca.pem"}) {
		t.Errorf("%+v", res)
	}
	places.Owners = func(uint32) bool { return false }
	if res := ca.Install(r, places, nil); res.System != nil || len(res.Files) > 0 {
		t.Errorf("it is there, and %+v", res)
	}
	// None is made for them.
	if err := os.RemoveAll(filepath.Join(dir, "etc")); err != nil {
		t.Fatal(err)
	}
	build(t, dir, "etc/ssl/cert.pem=x")
	if res := ca.Install(r, places, nil); !errors.Is(res.System, ErrOthers) || len(res.Dirs) > 0 {
		t.Errorf("%+v", res)
	}
}

// Links that a hostile container has planted where weir writes.
func TestInstallHostileLinks(t *testing.T) {
	for _, target := range []string{"OUTSIDE", "../../../../../../../../../../OUTSIDE", "/proc/self/root/OUTSIDE", "/proc/1/cwd", "loop"} {
		for _, link := range []string{"etc", "etc/ssl", "etc/ssl/certs", "etc/docker", "etc/docker/certs.d", "etc/docker/certs.d/ghcr.io",
			"etc/ssl/certs/weir-ca.pem", "etc/docker/certs.d/ghcr.io/weir-ca.crt"} {
			t.Run(link+"->"+target, func(t *testing.T) {
				base := t.TempDir()
				build(t, base, "outside/certs/", "outside/ghcr.io/", "root/ca.pem=x")
				out := filepath.Join(base, "outside")
				build(t, base, "root/"+link+"->"+strings.Replace(target, "/OUTSIDE", out, 1))
				before := listing(t, out)
				ca, r := newCA(t), openDirRoot(t, filepath.Join(base, "root"))
				within(t, "Install", func() { ca.Install(r, usual, []string{"ghcr.io"}) })
				within(t, "Uninstall", func() { Uninstall(r, usual, nil) })
				if after := listing(t, out); after != before {
					t.Errorf("outside was changed:\n%s\nbefore:\n%s", after, before)
				}
			})
		}
	}
	t.Run("links within work", func(t *testing.T) {
		ca, dir := newCA(t), t.TempDir()
		build(t, dir, "ca.pem=x", "etc/pki/tls/certs/", "etc/ssl/certs->../pki/tls/certs", "etc/docker/certs.d->/srv/certs", "srv/certs/")
		before := listing(t, dir)
		r := openDirRoot(t, dir)
		res := ca.Install(r, Places{System: usual.System, Bundles: usual.Bundles, CertsD: []string{DockerCertsD}}, []string{"ghcr.io"})
		if res.System != nil {
			t.Errorf("System: %v", res.System)
		}
		mustCover(t, res, DockerCertsD, "ghcr.io")
		mustHold(t, filepath.Join(dir, "etc/pki/tls/certs/weir-ca.pem"), ca.PEM())
		mustHold(t, filepath.Join(dir, "srv/certs/ghcr.io/weir-ca.crt"), ca.PEM())
		if _, err := Uninstall(r, usual, nil); err != nil {
			t.Error(err)
		}
		if after := listing(t, dir); after != before {
			t.Errorf("after uninstall:\n%s\nbefore install:\n%s", after, before)
		}
	})
}

// Things that aren't weir's under the names of weir's files.
func TestInstallLeavesForeign(t *testing.T) {
	needRoot(t)
	put := map[string]func(name string) error{
		"text":   func(n string) error { return os.WriteFile(n, []byte("mine"), 0o644) },
		"fifo":   func(n string) error { return unix.Mkfifo(n, 0o666) },
		"device": func(n string) error { return unix.Mknod(n, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) },
		"dir":    func(n string) error { return os.Mkdir(n, 0o755) },
		"link":   func(n string) error { return os.Symlink("/etc/passwd", n) },
		"huge":   func(n string) error { os.WriteFile(n, nil, 0o644); return os.Truncate(n, 1<<40) },
		"cert": func(n string) error {
			out, err := exec.Command("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
				"-subj", "/CN=my weir node CA", "-keyout", os.DevNull, "-out", n).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		},
	}
	for name, f := range put {
		t.Run(name, func(t *testing.T) {
			ca, dir := newCA(t), t.TempDir()
			build(t, dir, "ca.pem=x", "etc/ssl/certs/", "etc/docker/certs.d/ghcr.io/")
			for _, n := range []string{"etc/ssl/certs/weir-ca.pem", "etc/docker/certs.d/ghcr.io/weir-ca.crt"} {
				if err := f(filepath.Join(dir, n)); err != nil {
					t.Fatal(err)
				}
			}
			before := listing(t, dir)
			r := openDirRoot(t, dir)
			within(t, "Install", func() {
				res := ca.Install(r, Places{System: usual.System, Bundles: usual.Bundles, CertsD: []string{DockerCertsD}}, []string{"ghcr.io"})
				if !errors.Is(res.System, ErrForeign) {
					t.Errorf("System: %v", res.System)
				}
				mustNotCover(t, res, DockerCertsD, "ghcr.io", ErrForeign)
			})
			within(t, "Uninstall", func() {
				if _, err := Uninstall(r, usual, nil); err != nil {
					t.Errorf("Uninstall: %v", err)
				}
			})
			if after := listing(t, dir); after != before {
				t.Errorf("changed:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

func TestInstallReplacesGenerations(t *testing.T) {
	caDir, dir := t.TempDir(), t.TempDir()
	first := openCA(t, caDir, testHosts, testProbes)
	second := openCA(t, caDir, append([]string{"quay.io"}, testHosts...), testProbes)
	build(t, dir, "ca.pem=x")
	r := openDirRoot(t, dir)
	p := Places{System: usual.System, Bundles: usual.Bundles, CertsD: []string{DockerCertsD}}
	first.Install(r, p, []string{"ghcr.io", "docker.io"})
	// What a power failure leaves.
	if err := os.Truncate(filepath.Join(dir, "etc/ssl/certs/weir-ca.pem"), 0); err != nil {
		t.Fatal(err)
	}
	before := listing(t, dir)
	res := second.Install(r, p, []string{"ghcr.io", "docker.io"})
	if res.System != nil {
		t.Errorf("System: %v", res.System)
	}
	mustCover(t, res, DockerCertsD, "ghcr.io", "docker.io", "198.18.0.2")
	for _, f := range []string{"etc/ssl/certs/weir-ca.pem", "etc/docker/certs.d/ghcr.io/weir-ca.crt",
		"etc/docker/certs.d/docker.io/weir-ca.crt", "etc/docker/certs.d/198.18.0.2/weir-ca.crt"} {
		mustHold(t, filepath.Join(dir, f), second.PEM())
		if !slices.Contains(res.Files, "/"+f) {
			t.Errorf("%s is not reported as replaced: %v", f, res.Files)
		}
	}
	if a, b := strings.Count(listing(t, dir), "\n"), strings.Count(before, "\n"); a != b {
		t.Errorf("there were %d names, there are %d", b, a)
	}
}

func TestInstallReadOnly(t *testing.T) {
	needRoot(t)
	ca, dir := newCA(t), t.TempDir()
	build(t, dir, "ca.pem=x", "etc/ssl/certs/", "etc/pki/tls/certs/", "etc/docker/certs.d/")
	ro := filepath.Join(dir, "etc/ssl/certs")
	bind := func(p string) {
		if err := unix.Mount(p, p, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(p, unix.MNT_DETACH) })
		if err := unix.Mount("", p, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
	}
	bind(ro)
	p := Places{System: usual.System, Bundles: usual.Bundles, CertsD: []string{DockerCertsD}}
	if res := ca.Install(openDirRoot(t, dir), p, []string{"ghcr.io"}); res.System != nil {
		t.Errorf("the second directory was not taken: %v", res.System)
	}
	bind(dir)
	before := listing(t, dir)
	r := openDirRoot(t, dir)
	res := ca.Install(r, Places{System: []string{"/etc/ssl/certs"}, Bundles: usual.Bundles, CertsD: []string{DockerCertsD, ContainersCertsD}}, []string{"docker.io"})
	for what, err := range map[string]error{"System": res.System, "docker": res.CertsD[DockerCertsD]["docker.io"], "containers": res.CertsD[ContainersCertsD]["docker.io"]} {
		if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "mount a writable directory") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := Uninstall(r, usual, nil); !errors.Is(err, unix.EROFS) {
		t.Errorf("Uninstall: %v", err)
	}
	if after := listing(t, dir); after != before {
		t.Errorf("changed:\n%s\nbefore:\n%s", after, before)
	}
}

// A registry's directory on a mount of its own can't share the file.
func TestInstallAcrossMounts(t *testing.T) {
	needRoot(t)
	for _, noTmpfile := range []bool{false, true} {
		ca, dir := newCA(t), t.TempDir()
		build(t, dir, "ca.pem=x", "etc/ssl/certs/", "etc/docker/certs.d/ghcr.io/")
		for _, p := range []string{"etc/ssl/certs", "etc/docker/certs.d/ghcr.io"} {
			p = filepath.Join(dir, p)
			if err := unix.Mount("none", p, "tmpfs", 0, "size=1m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Unmount(p, unix.MNT_DETACH) })
		}
		r := openDirRoot(t, dir)
		r.noTmpfile = noTmpfile
		res := ca.Install(r, Places{System: usual.System, Bundles: usual.Bundles, CertsD: []string{DockerCertsD}}, []string{"docker.io", "ghcr.io"})
		if res.System != nil {
			t.Errorf("System: %v", res.System)
		}
		mustCover(t, res, DockerCertsD, "docker.io", "ghcr.io")
		mustHold(t, filepath.Join(dir, "etc/ssl/certs/weir-ca.pem"), ca.PEM())
		mustHold(t, filepath.Join(dir, "etc/docker/certs.d/ghcr.io/weir-ca.crt"), ca.PEM())
		if l := listing(t, dir); strings.Contains(l, asidePrefix) {
			t.Errorf("files aside are left:\n%s", l)
		}
	}
}

func TestInstallNoSpace(t *testing.T) {
	needRoot(t)
	ca, dir := newCA(t), t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=8k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	build(t, dir, "ca.pem=x", "etc/docker/certs.d/", "etc/ssl/certs/", "filler="+strings.Repeat("x", 4096))
	before := listing(t, dir)
	res := ca.Install(openDirRoot(t, dir), Places{System: usual.System, Bundles: usual.Bundles, CertsD: []string{DockerCertsD}}, []string{"docker.io"})
	if !errors.Is(res.System, unix.ENOSPC) {
		t.Errorf("System: %v", res.System)
	}
	mustNotCover(t, res, DockerCertsD, "docker.io", unix.ENOSPC)
	if after := listing(t, dir); after != before {
		t.Errorf("left:\n%s\nbefore:\n%s", after, before)
	}
}

// Two installations at once, of two generations, under the eyes of a reader:
// it never sees a part of a certificate.
func TestInstallConcurrently(t *testing.T) {
	caDir := t.TempDir()
	cas := []*CA{openCA(t, caDir, testHosts, testProbes), openCA(t, caDir, append([]string{"quay.io"}, testHosts...), testProbes)}
	for _, noTmpfile := range []bool{false, true} {
		t.Run(fmt.Sprintf("noTmpfile=%v", noTmpfile), func(t *testing.T) {
			dir := t.TempDir()
			build(t, dir, "ca.pem=x")
			r := openDirRoot(t, dir)
			r.noTmpfile = noTmpfile
			stop := make(chan struct{})
			var readers sync.WaitGroup
			var seen int
			readers.Go(func() {
				for {
					for _, d := range []string{"etc/ssl/certs", "etc/docker/certs.d/ghcr.io", "etc/docker/certs.d/docker.io"} {
						names, _ := os.ReadDir(filepath.Join(dir, d))
						for _, n := range names {
							if d != "etc/ssl/certs" && filepath.Ext(n.Name()) != ".crt" {
								continue
							}
							b, err := os.ReadFile(filepath.Join(dir, d, n.Name()))
							if err != nil {
								continue // renamed since
							}
							seen++
							if !bytes.Equal(b, cas[0].PEM()) && !bytes.Equal(b, cas[1].PEM()) {
								t.Errorf("%s/%s: saw %q", d, n.Name(), b)
								return
							}
						}
					}
					select {
					case <-stop:
						return
					default:
					}
				}
			})
			p := Places{System: usual.System, Bundles: usual.Bundles, CertsD: []string{DockerCertsD}}
			for range 50 {
				var wg sync.WaitGroup
				for i := range 4 {
					wg.Go(func() {
						res := cas[i%2].Install(r, p, []string{"ghcr.io", "docker.io"})
						if res.System != nil {
							t.Errorf("System: %v", res.System)
						}
						mustCover(t, res, DockerCertsD, "ghcr.io", "docker.io", "198.18.0.2")
					})
				}
				wg.Wait()
				if l := listing(t, dir); strings.Contains(l, asidePrefix) {
					t.Fatalf("files aside are left:\n%s", l)
				}
				if _, err := Uninstall(r, p, nil); err != nil {
					t.Fatal(err)
				}
			}
			close(stop)
			readers.Wait()
			if seen == 0 {
				t.Error("the reader saw no file at all")
			}
		})
	}
}

// The proof of the pudding: Go programs and OpenSSL with the tree as their root.
func TestInstalledIsTrusted(t *testing.T) {
	needRoot(t)
	ca, dir := newCA(t), t.TempDir()
	build(t, dir, "etc/ssl/cert.pem=x", "opt/bundle.pem=x")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.Close()
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(10 * time.Second))
				s := tls.Server(c, &tls.Config{GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
					if h.ServerName == "" {
						return ca.Leaf("198.18.0.1")
					}
					return ca.Leaf(h.ServerName)
				}})
				if s.Handshake() == nil {
					io.Copy(io.Discard, s)
				}
			})
		}
	})
	dial := func(name string, env ...string) error {
		t.Helper()
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append([]string{"WEIR_TEST_DIAL=" + l.Addr().String(), "WEIR_TEST_ROOT=" + dir, "WEIR_TEST_NAME=" + name}, env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	r := openDirRoot(t, dir)
	if err := dial("ghcr.io"); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Fatalf("before the installation: %v", err)
	}
	env := []string{"SSL_CERT_DIR=/opt/certs", "SSL_CERT_FILE=/opt/bundle.pem"}
	for _, e := range [][]string{nil, env} {
		places, err := SystemPlaces(e)
		if err != nil {
			t.Fatal(err)
		}
		if res := ca.Install(r, places, nil); res.System != nil {
			t.Fatal(res.System)
		}
		for _, name := range []string{"ghcr.io", "auth.docker.io", "198.18.0.1"} {
			if err := dial(name, e...); err != nil {
				t.Errorf("%s with %v: %v", name, e, err)
			}
		}
	}
	if _, err := Uninstall(r, Places{System: append([]string{"/opt/certs"}, usual.System...)}, nil); err != nil {
		t.Fatal(err)
	}
	for _, e := range [][]string{nil, env} {
		if err := dial("ghcr.io", e...); err == nil {
			t.Errorf("after the removal it is trusted, with %v", e)
		}
	}
}

// Installing runs whenever a runtime starts, most often with nothing to do.
func BenchmarkInstallAgain(b *testing.B) {
	ca, dir := newCA(b), b.TempDir()
	build(b, dir, "ca.pem=x", "etc/docker/certs.d/ghcr.io/ca.crt=x")
	r := openDirRoot(b, dir)
	var hosts []string
	for i := range 20 {
		hosts = append(hosts, fmt.Sprintf("r%d.pkg.dev", i))
	}
	for _, p := range []struct {
		name   string
		places Places
	}{{"system", Places{System: usual.System, Bundles: usual.Bundles}}, {"docker", Places{System: usual.System, Bundles: usual.Bundles, CertsD: []string{DockerCertsD}}}, {"all", usual}} {
		ca.Install(r, p.places, hosts)
		b.Run(p.name, func(b *testing.B) {
			for b.Loop() {
				if res := ca.Install(r, p.places, hosts); len(res.Files) > 0 || res.System != nil {
					b.Fatalf("made %v, %v", res.Files, res.System)
				}
			}
		})
	}
}
