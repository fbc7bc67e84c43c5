// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/moby/moby/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"weir/agent/procfs"
	"weir/agent/trust"
)

// kind is a container runtime, or a tool that pulls images by itself. Whatever
// else pulls is added here, by one row.
type kind struct {
	name string
	// Programs are the executables' names.
	programs []string
	// oneShot programs end with their pull: there is nothing to restart.
	oneShot bool
	// eager says that it may read its roots before it connects to a registry:
	// its source says so, or it isn't known. Others read them when they
	// verify a registry's answer, as Go programs do by themselves, and so never
	// before the proxy has seen to the CA, however late that is.
	eager bool
	// restarts says that weir restarts it where an operator asked for that, and how
	// its containers outlive that is known.
	restarts bool
	// ask makes a running one pull an image, to see whether it trusts the CA.
	// Nil means that it can't be asked.
	ask func(ctx context.Context, rt *Runtime, image string) error
	// certsD are the directories with a registry's certificates that all of
	// its pulls read each time, so that they count while it runs.
	certsD []string
	// settings are the directories with what a user has given it for a
	// registry: more CAs, and certificates to show there.
	settings []string
	// userSettings are the same of the user who runs it, below that user's
	// directory of settings.
	userSettings []string
	// ownRoots are flags that name a file whose certificates are all that it
	// then trusts.
	ownRoots []string
	// builds says that it runs the steps of a build.
	builds bool
	// sockets are where it listens, when its command line names no other.
	sockets []string
	// contentStore says that it keeps blobs that weir may read, if it is the
	// node's own: containerd.
	contentStore bool
	// guest says that it has a containerd pull for it, which then reads no certsD:
	// while a ctr runs, what trusts the CA by a certs.d alone is not intercepted.
	guest bool
}

// kinds are all that weir knows. dockerd has no certsD: its classic pulls read
// /etc/docker/certs.d each time, but the BuildKit inside the same process reads
// it at start (20.10 to 24) or keeps what it has read for as long as the
// repository is in use (25 and later), and a connection doesn't say which of
// the two it comes from.
//
// kaniko reads its roots as it starts (pkg/util/transport_util.go). The strace
// of podman, buildah, skopeo, crane, oras, ko and syft shows none read before the
// first connection.
//
// ownRoots: ctr (cmd/ctr/commands/resolver.go, resolverDefaultTLS), oras
// (cmd/oras/internal/option/remote.go, tlsConfig), helm (internal/tlsutil/tls.go,
// NewTLSConfig; pkg/registry/client.go), cosign (cmd/cosign/cli/options/registry.go,
// getTLSConfig). What the others are given is added to the system's roots:
// containers/image (pkg/tlsclientconfig, SetupCertificates), buildkitd
// (util/resolver/resolver.go, loadTLSConfig), kaniko (pkg/util/transport_util.go),
// regctl (internal/reghttp/http.go, makeRootPool), trivy
// (pkg/flag/global_flags.go, loadRootCAs, as it starts), nerdctl (containerd's
// hosts.go, updateTLSConfigFromHost).
//
// Snapshotters that pull by themselves, later than containerd and without it:
// soci-snapshotter (service/resolver/registry.go and client.go) and
// stargz-snapshotter (service/resolver/registry.go; cri.go with config_path, which
// is containerd's hosts.go) have the system's roots, which they read when they
// verify a registry, as Go's net/http does, and can't be asked to pull. ko
// (pkg/publish/default.go), pack and the lifecycle (imgutil, remote/remote.go) have
// go-containerregistry's transport; the lifecycle has kaniko
// built in, which reads the roots as it starts. grype and syft (stereoscope,
// pkg/image/oci/registry_provider.go) have net/http's, and add what their settings
// name. When pack and grype read theirs first was not seen.
//
// Not here: nydusd, whose OpenSSL reads the bundle alone (storage/Cargo.toml:
// reqwest with native-tls), where weir adds nothing; docker, docker-buildx and
// docker-compose, which get some KB of manifests, run at each step of a job, and
// would have the CA put into each container that has them; flux and its controllers
// (source-controller and others), which get some KB, in read-only root file systems,
// and keep connections to the cluster's API for hours.
var kinds = []*kind{
	{name: "dockerd", programs: []string{"dockerd"}, restarts: true, ask: askDocker, builds: true,
		settings:     []string{trust.DockerCertsD},
		userSettings: []string{trust.UserDockerCertsD},
		sockets:      []string{"/run/docker.sock", "/var/run/docker.sock"}},
	{name: "containerd", programs: []string{"containerd"}, restarts: true, ask: askCRI, contentStore: true,
		certsD:  []string{trust.ContainerdCertsD, trust.ContainerdPairCertsD},
		sockets: []string{"/run/containerd/containerd.sock", "/var/run/docker/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock"}},
	{name: "cri-o", programs: []string{"crio"}, restarts: true, ask: askCRI,
		certsD:   []string{trust.ContainersCertsD},
		settings: containersSettings, userSettings: containersUserSettings,
		sockets: []string{"/run/crio/crio.sock"}},
	{name: "buildkitd", programs: []string{"buildkitd"}, builds: true},
	{name: "podman", programs: []string{"podman"}, oneShot: true, builds: true, settings: containersSettings, userSettings: containersUserSettings},
	{name: "buildah", programs: []string{"buildah"}, oneShot: true, builds: true, settings: containersSettings, userSettings: containersUserSettings},
	{name: "skopeo", programs: []string{"skopeo"}, oneShot: true, settings: containersSettings, userSettings: containersUserSettings},
	{name: "nerdctl", programs: []string{"nerdctl"}, oneShot: true, eager: true, guest: true,
		settings:     []string{trust.ContainerdCertsD, trust.DockerCertsD},
		userSettings: []string{trust.UserContainerdCertsD, trust.UserDockerCertsD}},
	{name: "ctr", programs: []string{"ctr"}, oneShot: true, guest: true, ownRoots: []string{"--tlscacert"}},
	{name: "crane", programs: []string{"crane", "gcrane", "krane"}, oneShot: true},
	{name: "oras", programs: []string{"oras"}, oneShot: true, ownRoots: []string{"--ca-file", "--from-ca-file", "--to-ca-file"}},
	{name: "regctl", programs: []string{"regctl", "regsync"}, oneShot: true, eager: true},
	{name: "kaniko", programs: []string{"executor"}, oneShot: true, eager: true, builds: true},
	{name: "helm", programs: []string{"helm"}, oneShot: true, eager: true, ownRoots: []string{"--ca-file"}},
	{name: "cosign", programs: []string{"cosign"}, oneShot: true, eager: true, ownRoots: []string{"--registry-cacert"}},
	{name: "trivy", programs: []string{"trivy"}, oneShot: true, eager: true},
	{name: "soci-snapshotter", programs: []string{"soci-snapshotter-grpc"}},
	{name: "stargz-snapshotter", programs: []string{"containerd-stargz-grpc"}},
	{name: "ko", programs: []string{"ko"}, oneShot: true},
	{name: "pack", programs: []string{"pack"}, oneShot: true, eager: true},
	{name: lifecycle, programs: []string{"lifecycle"}, oneShot: true, eager: true},
	{name: "grype", programs: []string{"grype"}, oneShot: true, eager: true},
	{name: "syft", programs: []string{"syft"}, oneShot: true},
}

// lifecycle is that of Cloud Native Buildpacks, whose phases are links to one file.
const lifecycle = "lifecycle"

// added are the kinds of programs that an operator has named, by the program. It is
// set before anything is looked for.
var added map[string]*kind

// SetPrograms has more executables treated as those of a kind, each PROGRAM=KIND.
// It is called before anything else here, if at all.
func SetPrograms(more []string) error {
	all := make(map[string]*kind)
	for _, m := range more {
		program, name, ok := strings.Cut(m, "=")
		if !ok || program == "" || strings.Contains(program, "/") {
			return fmt.Errorf("%q is not NAME=KIND, such as my-puller=crane", m)
		}
		i := slices.IndexFunc(kinds, func(k *kind) bool { return k.name == name })
		if i < 0 {
			return fmt.Errorf("%q: there is no kind %q, but %s", m, name, strings.Join(kindNames(), ", "))
		}
		if k := kindOf(program); k != nil && added[program] == nil {
			return fmt.Errorf("%q: that is known as %s", m, k.name)
		}
		all[program] = kinds[i]
	}
	added = all
	return nil
}

func kindNames() (names []string) {
	for _, k := range kinds {
		names = append(names, k.name)
	}
	return names
}

// What containers/image reads: containers-certs.d(5).
var (
	containersSettings     = []string{trust.ContainersCertsD, trust.DockerCertsD}
	containersUserSettings = []string{trust.UserContainersCertsD}
)

// ownRoots returns the flag on a command line that names all the roots which a
// program of a kind trusts, empty if there is none.
func ownRoots(k *kind, args []string) string {
	for _, arg := range args {
		if flag, _, _ := strings.Cut(arg, "="); slices.Contains(k.ownRoots, flag) {
			return flag
		}
	}
	return ""
}

// Programs are all executables' names, for the kernel side, and guests those of them
// that have a runtime pull for them.
func Programs() (names, guests []string) {
	add := func(k *kind, programs ...string) {
		names = append(names, programs...)
		if k.guest {
			guests = append(guests, programs...)
		}
	}
	for _, k := range kinds {
		add(k, k.programs...)
	}
	for program, k := range added {
		add(k, program)
	}
	return names, guests
}

// maxComm is what the kernel keeps of a process's name: TASK_COMM_LEN, less a byte.
const maxComm = 15

// kindOf returns the kind that an executable belongs to, which is called by one of
// the names, each as it is or as the kernel keeps it.
func kindOf(names ...string) *kind {
	is := func(program, name string) bool {
		return program == name || len(name) == maxComm && strings.HasPrefix(program, name)
	}
	for _, k := range kinds {
		for _, n := range names {
			if slices.ContainsFunc(k.programs, func(p string) bool { return is(p, n) }) {
				return k
			}
		}
	}
	for program, k := range added {
		if slices.ContainsFunc(names, func(n string) bool { return is(program, n) }) {
			return k
		}
	}
	return nil
}

// socketsOf returns where a runtime may be listening: what its command line
// says, then the usual places.
func socketsOf(rt *Runtime) []string {
	var found []string
	args := procfs.Strings(rt.PID, "cmdline")
	for i, arg := range args {
		flag, value, joined := strings.Cut(arg, "=")
		switch flag {
		case "-a", "--address", "-H", "--host", "--listen", "-address":
		default:
			continue
		}
		if !joined && i+1 < len(args) {
			value = args[i+1]
		}
		value = strings.TrimPrefix(value, "unix://")
		if strings.HasPrefix(value, "/") {
			found = append(found, value)
		}
	}
	return append(found, rt.kind.sockets...)
}

// maxAnswers bounds what a runtime says to one question, which is some KiB. In a
// pod it may be any program, and what reads its JSON reads it to the end.
const maxAnswers = 16 << 20

// boundedConn is a connection of which so many bytes are read.
type boundedConn struct {
	net.Conn
	left int
}

func (c *boundedConn) Read(b []byte) (int, error) {
	if c.left <= 0 {
		return 0, fmt.Errorf("it answers with more than %d bytes", maxAnswers)
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

// dialRuntime connects to a runtime's API, inside its root file system.
func dialRuntime(ctx context.Context, rt *Runtime) (net.Conn, error) {
	root, err := trust.OpenRoot(rt.PID)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var last error
	for _, path := range socketsOf(rt) {
		c, err := root.DialUnix(ctx, path)
		if err == nil {
			return &boundedConn{c, maxAnswers}, nil
		}
		last = err
	}
	return nil, fmt.Errorf("connecting to %s (process %d): %w", rt.kind.name, rt.PID, last)
}

// dialGRPC returns a connection to a runtime's gRPC API.
func dialGRPC(rt *Runtime) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+rt.kind.name,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dialRuntime(ctx, rt) }))
}

// newDockerClient returns a client of a dockerd's API.
func newDockerClient(rt *Runtime) (*client.Client, error) {
	return client.New(client.WithHost("unix:///run/docker.sock"),
		client.WithDialContext(func(ctx context.Context, _, _ string) (net.Conn, error) { return dialRuntime(ctx, rt) }))
}

// askDocker makes dockerd pull an image, through the Docker Engine API.
func askDocker(ctx context.Context, rt *Runtime, image string) error {
	c, err := newDockerClient(rt)
	if err != nil {
		return err
	}
	defer c.Close()
	pull, err := c.ImagePull(ctx, image, client.ImagePullOptions{})
	if err != nil {
		return err
	}
	return pull.Wait(ctx)
}

// askCRI makes a runtime pull an image, through the Kubernetes CRI.
func askCRI(ctx context.Context, rt *Runtime, image string) error {
	c, err := dialGRPC(rt)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = cri.NewImageServiceClient(c).PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}})
	return err
}
