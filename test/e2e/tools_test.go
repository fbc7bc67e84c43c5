// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"weir/agent/runtimes"
	"weir/test/lab"
)

// More tools that pull by themselves, from Docker Hub and from ghcr.io: what
// one has pulled, the others get from the node.
func TestMoreTools(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	tool := func(name string) string { return node.As(lab.Tool(t, name), name) }
	regctl, helm, cosign := tool("regctl"), tool("helm"), tool("cosign")
	// The first on the node, with which the CA comes there: regctl may read its
	// roots as it starts, and would be passed through.
	first := node.Spawn("first", node.As(lab.Tool(t, "crane"), "crane"), "registry", "serve", "--address=127.0.0.1:0")
	agent.Runtime(first.PID())
	tick()
	node.Run(regctl, "image", "copy", flyway, "ocidir:///var/lib/home/regctl:1")
	node.Run(regctl, "image", "copy", renovate, "ocidir:///var/lib/home/regctl:2")
	for name, pull := range map[string][]string{
		"regctl": {regctl, "image", "copy", flyway, "ocidir:///var/lib/home/again:1"},
		"cosign": {cosign, "save", "--dir=/var/lib/home/cosign", renovate},
	} {
		w.forget()
		before := agent.Status().Connections.Intercepted
		node.Run(pull...)
		// cosign asks for the manifests of signatures too, which aren't there.
		if n := w.hub.Log.BlobGETs() + w.ghcr.Log.BlobGETs(); n > 0 {
			t.Errorf("%s: %d blobs were fetched", name, n)
		}
		if n := agent.Status().Connections.Intercepted - before; n == 0 {
			t.Errorf("%s was not intercepted", name)
		}
	}
	// A chart.
	node.Run("sh", "-ec", "cd /var/lib/home && "+helm+" create chart && "+helm+" package chart && "+helm+" push chart-0.1.0.tgz oci://ghcr.io/acme && mkdir pulled")
	w.forget()
	node.Run(helm, "pull", "oci://ghcr.io/acme/chart", "--version=0.1.0", "--destination=/var/lib/home/pulled")
	w.nothingFetched(t)
	node.Run("cmp", "/var/lib/home/chart-0.1.0.tgz", "/var/lib/home/pulled/chart-0.1.0.tgz")
}

// tick lets the clock of files go on, which goes by ticks: only then is the CA
// known to have stood before what starts next, which matters for programs that
// may read their roots as they start.
func tick() { time.Sleep(50 * time.Millisecond) }

// nerdctl, which pulls by itself and keeps it in containerd.
func TestNerdctl(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent()
	nerdctl := lab.Tool(t, "nerdctl")
	for i := range 2 {
		box := node.Box()
		c := box.NewestContainerd()
		agent.Runtime(c.PID())
		tick()
		w.forget()
		for _, ref := range []string{flyway, renovate} {
			box.Run(box.As(nerdctl, "nerdctl"), "pull", "--quiet", ref)
		}
		if i > 0 {
			w.nothingFetched(t)
		}
		if out := box.Run(nerdctl, "images", "--digests", "--no-trunc"); !strings.Contains(out, w.flyway.Digest.String()) || !strings.Contains(out, w.renovate.Digest.String()) {
			t.Errorf("%s", out)
		}
		if rt := agent.Runtime(c.PID()); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
	}
}

// kaniko's executor, in the environment of its image: the base comes from Docker
// Hub and is unpacked over the executor's own root file system, certificates and
// all; a step pulls there; and what was built is pushed to another registry. The
// second job gets the base from the node. Nothing of weir's is in the image.
func TestKaniko(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	crane, roots := craneAndRoots(t, w)
	w.hub.Push("acme/base:1", lab.Image{Layers: []int{700_000}, Seed: 71, Program: crane, Files: map[string]string{"/etc/ssl/certs/ca-certificates.crt": roots}})
	node := w.Node()
	agent := node.Agent()
	late := false
	for i := range 2 {
		box := node.Box()
		root := fmt.Sprintf("/var/lib/kaniko%d", i)
		box.Run("sh", "-ec", fmt.Sprintf(`
mkdir -p %[1]s
mount -t tmpfs tmpfs %[1]s
cd %[1]s
mkdir -p kaniko/ssl/certs kaniko/.docker kaniko/files workspace etc/ssl root tmp proc dev sys var
cp %[2]s kaniko/executor
cp /etc/ssl/certs/ca-certificates.crt kaniko/ssl/certs/
cp /etc/hosts /etc/resolv.conf /etc/passwd /etc/group /etc/nsswitch.conf etc/
mount --rbind /dev dev
mount --rbind /sys sys
printf 'FROM acme/base:1\nCOPY Dockerfile /a\nRUN ["/crane", "pull", "%[3]s", "/renovate.tar"]\n' > workspace/Dockerfile
`, root, lab.Tool(t, "executor"), renovate))
		w.forget()
		out := box.Run("unshare", "--mount", "--pid", "--fork", "sh", "-ec", fmt.Sprintf(`
mount -t proc proc %[1]s/proc
exec env -i HOME=/root USER=root PATH=/usr/local/bin:/kaniko SSL_CERT_DIR=/kaniko/ssl/certs DOCKER_CONFIG=/kaniko/.docker container=docker \
	/usr/sbin/chroot %[1]s /kaniko/executor --force --context=dir:///workspace --destination=ghcr.io/acme/kaniko:%[2]d
`, root, i))
		// On a machine that is busy the CA comes too late for a program that reads
		// its roots as it starts: it is passed through.
		late = late || strings.Contains(agent.Log(1<<20), "it may have read its roots as it started")
		if n := w.hub.Log.BlobGETs(); (n == 0) != (i == 1) && !late {
			t.Errorf("job %d: %d blobs were fetched\n%s", i, n, out)
		}
		nothingOfWeirs(t, node, fmt.Sprintf("ghcr.io/acme/kaniko:%d", i), "a", "renovate.tar", "etc/ssl/certs/ca-certificates.crt")
	}
	if s := agent.Status(); s.Connections.Intercepted == 0 && !late || s.Connections.Failed > 0 {
		t.Errorf("%+v", s.Connections)
	}
	seenToBeSteps(t, agent, 2)
}

// buildx with its docker-container driver: the buildkitd is in a container of the
// node's dockerd, with a network of its own, and a fresh one for each job. A step
// of the build pulls too; nothing of weir's is in the image.
func TestBuildx(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	crane, roots := craneAndRoots(t, w)
	w.ghcr.Push("acme/base:1", lab.Image{Layers: []int{700_000}, Seed: 72, Program: crane, Files: map[string]string{"/etc/ssl/certs/ca-certificates.crt": roots}})
	buildkitd := filepath.Join(t.TempDir(), "buildkitd")
	if err := os.Symlink(lab.Tool(t, "buildkitd"), buildkitd); err != nil {
		t.Fatal(err)
	}
	const lib = "/lib/x86_64-linux-gnu/"
	w.hub.Push("moby/buildkit:buildx-stable-1", lab.Image{Seed: 73, Program: buildkitd, Files: map[string]string{
		"/usr/bin/buildctl": lab.Tool(t, "buildctl"), "/etc/ssl/certs/ca-certificates.crt": roots, "/etc/passwd": "/etc/passwd", "/tmp/passwd": "/etc/passwd",
		"/usr/bin/runc": lab.Debian(t, "/usr/sbin/runc", "runc"), lib + "libseccomp.so.2": lib + "libseccomp.so.2",
		lib + "libc.so.6": lib + "libc.so.6", "/lib64/ld-linux-x86-64.so.2": "/lib64/ld-linux-x86-64.so.2"}})
	node := w.Node()
	agent := node.Agent()
	// A privileged container gets all capabilities, of which a test's machine may
	// not have all.
	node.WriteFile("/var/lib/home/runc", `#!/bin/bash
for ((i = 1; i < $#; i++)); do
	j=$((i + 1))
	case ${!i} in
	--bundle) config=${!j}/config.json ;;
	--process) config=${!j} ;;
	*) continue ;;
	esac
	have=,$(setpriv --dump | sed -n 's/^Capability bounding set: //p'),
	for c in $(grep -o '"CAP_[A-Z_]*"' "$config" | sort -u | tr -d '"'); do
		n=${c#CAP_}
		[[ $have = *,${n,,},* ]] || sed -i "s/\"$c\",\?//g; s/,]/]/g" "$config"
	done
done
exec /usr/sbin/runc "$@"
`)
	node.Run("chmod", "+x", "/var/lib/home/runc")
	node.Docker("--add-runtime=lab=/var/lib/home/runc", "--default-runtime=lab")
	buildx := func(args ...string) string {
		t.Helper()
		return node.Run(append([]string{"env", "DOCKER_HOST=unix:///run/docker.sock", lab.Tool(t, "buildx")}, args...)...)
	}
	node.WriteFile("/var/lib/home/build/Dockerfile", fmt.Sprintf("FROM ghcr.io/acme/base:1\nCOPY Dockerfile /a\nRUN [\"/crane\", \"pull\", %q, \"/flyway.tar\"]\n", flyway))
	for i := range 2 {
		name := fmt.Sprintf("job%d", i)
		buildx("create", "--name="+name, "--driver=docker-container", "--driver-opt=network=none,cgroup-parent="+filepath.Base(node.Cgroup()), "--buildkitd-flags=--oci-worker-snapshotter=native --oci-worker-net=host")
		buildx("inspect", "--bootstrap", name)
		var pid int
		if _, err := fmt.Sscan(node.Run("sh", "-ec", outerDocker+"inspect --format '{{.State.Pid}}' buildx_buildkit_"+name+"0"), &pid); err != nil {
			t.Fatal(err)
		}
		node.Plug(pid)
		node.Run("sh", "-ec", fmt.Sprintf("for f in hosts resolv.conf; do cat /etc/$f > /proc/%d/root/etc/$f; done", pid))
		if rt := ofKind(t, agent, "buildkitd"); rt.Reach != "intercepted" {
			t.Errorf("%+v", rt)
		}
		w.forget()
		args := []string{"build", "--builder=" + name, "--progress=plain", fmt.Sprintf("--output=type=image,name=ghcr.io/acme/buildx:%d,push=true", i), "/var/lib/home/build"}
		for _, host := range []string{"index.docker.io", "auth.docker.io", "production.cloudflare.docker.com"} {
			v4, _ := w.Host(host)
			args = append(args, "--add-host="+host+":"+v4.String())
		}
		out := buildx(args...)
		if n := w.ghcr.Log.BlobGETs(); (n == 0) != (i == 1) {
			t.Errorf("job %d: %d blobs were fetched\n%s", i, n, out)
		}
		nothingOfWeirs(t, node, fmt.Sprintf("ghcr.io/acme/buildx:%d", i), "a", "flyway.tar", "etc/ssl/certs/ca-certificates.crt")
		buildx("rm", "--force", name)
	}
	seenToBeSteps(t, agent, 2)
}

// seenToBeSteps fails the test unless programs that ran in a step of a build were
// left alone for that.
func seenToBeSteps(t *testing.T, a *lab.Agent, want int) {
	t.Helper()
	n := 0
	for line := range strings.Lines(a.Log(1 << 20)) {
		if !strings.Contains(line, `runtime=crane`) {
			continue
		}
		if n++; !strings.Contains(line, "an image's that is being made") {
			t.Errorf("not left alone for that: %s", line)
		}
	}
	if n < want {
		t.Errorf("%d cranes were seen, want %d", n, want)
	}
}

// ofKind waits until a runtime of a kind is in the status, and is settled.
func ofKind(t *testing.T, a *lab.Agent, kind string) runtimes.Status {
	t.Helper()
	var pid int
	if err := lab.Eventually(nil, func(context.Context) error {
		s := a.Status()
		i := slices.IndexFunc(s.Runtimes, func(r runtimes.Status) bool { return r.Kind == kind })
		if i < 0 {
			return fmt.Errorf("no %s is in the status: %+v", kind, s.Runtimes)
		}
		pid = s.Runtimes[i].PID
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return a.Runtime(pid)
}

// craneAndRoots are files for images: a crane, and the roots that it needs.
func craneAndRoots(t *testing.T, w *world) (crane, roots string) {
	t.Helper()
	crane, roots = filepath.Join(t.TempDir(), "crane"), filepath.Join(t.TempDir(), "roots.pem")
	if err := errors.Join(os.Symlink(lab.Tool(t, "crane"), crane), os.WriteFile(roots, []byte(w.Roots()), 0o644)); err != nil {
		t.Fatal(err)
	}
	return crane, roots
}

// nothingOfWeirs fails the test when an image has a file of weir's, or not those
// that it should have.
func nothingOfWeirs(t *testing.T, node *lab.Node, image string, want ...string) {
	t.Helper()
	files := strings.Fields(node.Run("sh", "-ec", lab.Tool(t, "crane")+" export "+image+" - | tar -t"))
	for _, f := range want {
		if !slices.ContainsFunc(files, func(g string) bool { return strings.TrimPrefix(g, "/") == f }) {
			t.Errorf("%s has no %s, but %q", image, f, files)
		}
	}
	for _, f := range files {
		if strings.Contains(f, "weir") {
			t.Errorf("%s has %s", image, f)
		}
	}
}

// Programs that are known by names which the kernel cuts off, those that came to the
// table by what their source says, and one that an operator has named. What they are
// here is crane, with whose library most of them pull: what is seen is that the name
// is found, and intercepted.
func TestPrograms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.Node()
	agent := node.Agent("--program=our-own-image-puller=crane")
	crane := lab.Tool(t, "crane")
	first := node.Spawn("first", node.As(crane, "crane"), "registry", "serve", "--address=127.0.0.1:0")
	agent.Runtime(first.PID())
	tick()
	node.Run(node.As(crane, "crane"), "pull", flyway, "/var/lib/home/cold.tar")
	for _, name := range []string{"soci-snapshotter-grpc", "containerd-stargz-grpc", "ko", "pack", "lifecycle", "grype", "syft", "our-own-image-puller"} {
		w.forget()
		before := agent.Status().Connections.Intercepted
		node.Run(node.As(crane, name), "pull", flyway, "/var/lib/home/warm.tar")
		if n := w.hub.Log.BlobGETs(); n > 0 || agent.Status().Connections.Intercepted == before {
			t.Errorf("%s: %d blobs were fetched, %+v", name, n, agent.Status().Connections)
		}
	}
	if s := agent.Status(); len(s.OtherPrograms) > 0 {
		t.Errorf("%+v", s.OtherPrograms)
	}
	// One that isn't known works as without weir, and is shown.
	before := agent.Status().Connections
	node.Run(node.As(crane, "a-puller-that-nobody-knows"), "pull", flyway, "/var/lib/home/direct.tar")
	if err := lab.Eventually(agent.Ended(), func(context.Context) error {
		if s := agent.Status(); len(s.OtherPrograms) != 1 || s.OtherPrograms[0].Program != "a-puller-that-nobody-knows" || !slices.Equal(s.OtherPrograms[0].Registries, []string{"index.docker.io"}) {
			return fmt.Errorf("%+v", s.OtherPrograms)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if now := agent.Status().Connections; now != before {
		t.Errorf("%+v, before %+v", now, before)
	}
	out := node.Run(lab.Weir(t), "status")
	for _, want := range []string{"a-puller-that-nobody-knows", "token server of docker.io"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

// ko, with a base from another registry than it pushes to: the same image as without
// weir, and the second job's base comes from the node.
func TestKo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hub.Push("acme/base:1", lab.Image{Layers: []int{700_000, 200_000}, Seed: 74, OCI: true})
	goroot, err := exec.Command("go", "env", "GOROOT", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	roots := strings.Fields(string(goroot))
	build := func(node *lab.Node, repo string) string {
		t.Helper()
		node.WriteFile("/var/lib/home/ko/go.mod", "module example.com/app\n\ngo 1.26\n")
		node.WriteFile("/var/lib/home/ko/main.go", "package main\n\nfunc main() {}\n")
		out := node.Run("env", "-C", "/var/lib/home/ko", "PATH="+roots[0]+"/bin:/usr/bin:/bin", "GOCACHE="+roots[1], "GOTOOLCHAIN=local", "GOPROXY=off", "GOFLAGS=-trimpath", "CGO_ENABLED=0",
			"KO_DOCKER_REPO="+repo, "KO_DEFAULTBASEIMAGE=docker.io/acme/base:1",
			node.As(lab.Tool(t, "ko"), "ko"), "build", "--bare", "--sbom=none", ".")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		_, digest, ok := strings.Cut(lines[len(lines)-1], "@")
		if !ok {
			t.Fatalf("ko prints no digest:\n%s", out)
		}
		return digest
	}
	want := build(w.Node(), "ghcr.io/acme/without")
	node := w.Node()
	agent := node.Agent()
	for job := range 2 {
		w.forget()
		if got := build(node, fmt.Sprintf("ghcr.io/acme/with%d", job)); got != want {
			t.Errorf("job %d has made %s, without weir it is %s", job, got, want)
		}
		if gets := w.hub.Log.BlobGETs(); (gets == 0) != (job == 1) {
			t.Errorf("job %d: %d blobs were fetched:\n%s", job, gets, w.hub.Log)
		}
	}
	if s := agent.Status(); s.Connections.Intercepted == 0 || s.Connections.Failed > 0 {
		t.Errorf("%+v", s.Connections)
	}
}

// docker compose, whose images dockerd pulls, and the images of a build buildx copies
// from one registry to another: the same as without weir, also if an operator has
// buildx treated as a client that pulls.
func TestComposeAndImagetools(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	bare, node := w.Node(), w.Node()
	agent := node.Agent("--program=docker-buildx=crane")
	docker := node.Docker()
	node.WriteFile("/var/lib/home/compose.yaml", "services:\n  one: {image: "+flyway+"}\n  two: {image: "+renovate+"}\n")
	compose := func() {
		t.Helper()
		node.Run("env", "DOCKER_HOST=unix:///run/docker.sock", lab.Tool(t, "docker-compose"), "-f", "/var/lib/home/compose.yaml", "pull", "--quiet")
		docker.Same(flyway, w.flyway)
		docker.Same(renovate, w.renovate)
	}
	w.forget()
	compose()
	fetched(t, w.hub)
	docker.Remove(flyway)
	docker.Remove(renovate)
	w.forget()
	compose()
	w.nothingFetched(t)

	copied := func(n *lab.Node, name, to string) string {
		t.Helper()
		buildx := n.As(lab.Tool(t, "buildx"), name)
		n.Run(buildx, "imagetools", "create", "--tag", "ghcr.io/acme/"+to+":1", "docker.io/"+flyway)
		return n.Run(buildx, "imagetools", "inspect", "--raw", "ghcr.io/acme/"+to+":1")
	}
	want := copied(bare, "docker-buildx", "without")
	for i, name := range []string{"docker-buildx", "docker-buildx", "buildx"} {
		w.forget()
		before := agent.Status().Connections.Intercepted
		if got := copied(node, name, fmt.Sprintf("with%d", i)); got != want {
			t.Errorf("%s has copied\n%s\nand without weir\n%s", name, got, want)
		}
		known := name == "docker-buildx"
		if gets := w.hub.Log.BlobGETs(); (gets == 0) != known {
			t.Errorf("%s, known: %v: %d blobs were fetched:\n%s", name, known, gets, w.hub.Log)
		}
		if now := agent.Status().Connections; now.Intercepted > before != known || now.Failed > 0 {
			t.Errorf("%s, known: %v: %+v", name, known, now)
		}
	}
}

// trivy, with its database, an OCI artifact, from where it looks for that first: it
// finds in an image what it finds without weir, and what one job has got, the next,
// whose cache is empty too, gets from the node.
func TestTrivy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mirror := w.Registry("mirror.gcr.io")
	mirror.Push("aquasec/trivy-db:2", lab.Image{Layers: []int{2 << 20}, Seed: 75, TrivyDB: true})
	w.ghcr.Push("acme/app:1", lab.Image{Layers: []int{700_000}, Seed: 76, Index: true, Program: lab.Tool(t, "crane")})
	found := func(node *lab.Node, job string) (modules []string, db string) {
		t.Helper()
		trivy, dir := node.As(lab.Tool(t, "trivy"), "trivy"), "/var/lib/home/"+job
		scan := func(args ...string) {
			t.Helper()
			node.Run(append([]string{trivy, "image", "--cache-dir=" + dir, "--no-progress", "--skip-version-check", "--disable-telemetry"}, args...)...)
		}
		scan("--download-db-only")
		scan("--image-src=remote", "--format=cyclonedx", "--output="+dir+"/found.json", "ghcr.io/acme/app:1")
		b, err := node.File(dir + "/found.json")
		if err != nil {
			t.Fatal(err)
		}
		var bom struct{ Components []struct{ PURL string } }
		if err := json.Unmarshal(b, &bom); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		for _, c := range bom.Components {
			modules = append(modules, c.PURL)
		}
		slices.Sort(modules)
		return modules, strings.Fields(node.Run("sha256sum", dir+"/db/trivy.db"))[0]
	}
	want, wantDB := found(w.Node(), "without")
	if !slices.ContainsFunc(want, func(s string) bool { return strings.Contains(s, "golang.org/x/sync") }) {
		t.Errorf("without weir it finds %q", want)
	}
	node := w.Node()
	agent := node.Agent()
	// The first on the node, with which the CA comes there: trivy may read its roots as
	// it starts, and would be passed through.
	first := node.Spawn("first", node.As(lab.Tool(t, "crane"), "crane"), "registry", "serve", "--address=127.0.0.1:0")
	agent.Runtime(first.PID())
	tick()
	for job := range 2 {
		w.forget()
		mirror.Log.Reset()
		got, db := found(node, fmt.Sprintf("job%d", job))
		if !slices.Equal(got, want) || db != wantDB {
			t.Errorf("job %d has found %q in the image, and without weir it is %q; its database is %s, and without weir %s", job, got, want, db, wantDB)
		}
		for _, r := range []*lab.Registry{mirror, w.ghcr} {
			if gets := r.Log.BlobGETs(); (gets == 0) != (job == 1) {
				t.Errorf("job %d: %d blobs were fetched from %s:\n%s", job, gets, r.Host, r.Log)
			}
		}
	}
	if s := agent.Status(); s.Connections.Intercepted == 0 || s.Connections.Failed > 0 {
		t.Errorf("%+v", s.Connections)
	}
}
