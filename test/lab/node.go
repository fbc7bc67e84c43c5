// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	enc "encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"weir/agent"
	"weir/agent/admin"
	"weir/agent/runtimes"
)

// Node is a machine in a box, or with [Node.Box] a container in it.
type Node struct {
	*space
	in     *Internet
	number int64
	dir    string // the cgroup's
	boxes  int
	outer  *Node  // that this is a box on; nil for a machine
	addr   string // of a box, as it is seen from outer
}

// ownFiles gives a mount namespace an /etc, /run and /var/lib of its own, with
// the certificates of the lab's internet trusted as those of the world are.
const ownFiles = `
mount --make-rprivate /
mkdir -p %[1]s
cp -a /etc %[1]s/
mount --bind %[1]s/etc /etc
mount -t tmpfs tmpfs /run
mount -t tmpfs -o size=8G tmpfs /var/lib
mount -t tmpfs tmpfs /dev/shm
mkdir -p /var/lib/home
rm -rf /etc/docker /etc/containerd /etc/containers/certs.d /etc/cni
cat %[2]s > /etc/hosts
cat %[3]s >> /etc/ssl/certs/ca-certificates.crt
printf 'nameserver 203.0.113.1\noptions timeout:1 attempts:1\n' > /etc/resolv.conf
ip link set lo up
`

// Node makes a node. It knows the hosts that the internet has by then.
func (in *Internet) Node() *Node {
	t := in.t
	t.Helper()
	cg := newCgroup(t, "node")
	n := &Node{in: in, number: in.nodes.Add(1), dir: cg.Name()}
	n.space = newSpace(t, fmt.Sprintf("node %d", n.number), nil, cg, unix.CLONE_NEWNET|unix.CLONE_NEWNS, n.files()+`
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
`)
	k := n.number
	in.router.Run("ip", "link", "add", fmt.Sprintf("node%d", k), "type", "veth", "peer", "name", "eth0", "netns", n.pid())
	up(in.router, fmt.Sprintf("node%d", k), fmt.Sprintf("10.77.%d.1/24", k), fmt.Sprintf("2001:db8:77:%d::1/64", k))
	up(n.space, "eth0", fmt.Sprintf("10.77.%d.2/24", k), fmt.Sprintf("2001:db8:77:%d::2/64", k))
	n.Run("ip", "route", "add", "default", "via", fmt.Sprintf("10.77.%d.1", k))
	n.Run("ip", "-6", "route", "add", "default", "via", fmt.Sprintf("2001:db8:77:%d::1", k))
	return n
}

// files writes what ownFiles needs and returns its script.
func (n *Node) files() string {
	t := n.in.t
	dir := t.TempDir()
	for name, b := range map[string][]byte{"hosts": []byte(n.in.hostsFile()), "ca.pem": n.in.caPEM()} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return fmt.Sprintf(ownFiles, filepath.Join(dir, "own"), filepath.Join(dir, "hosts"), filepath.Join(dir, "ca.pem"))
}

// Shape limits the rate at which the node gets bytes from the internet and
// from other nodes.
func (n *Node) Shape(mbit int) {
	n.t.Helper()
	shape(n.in.router, fmt.Sprintf("node%d", n.number), mbit)
}

// Unshape takes the limit away.
func (n *Node) Unshape() {
	n.t.Helper()
	n.in.router.Run("tc", "qdisc", "del", "dev", fmt.Sprintf("node%d", n.number), "root")
}

// Owns says whether an address is the node's, or that of a box on it.
func (n *Node) Owns(a netip.Addr) bool {
	k := byte(n.number)
	if a = a.Unmap(); a.Is4() {
		b := a.As4()
		return b[0] == 10 && (b[1] == 77 && b[2] == k || b[1] == 80+2*k || b[1] == 81+2*k)
	}
	return netip.MustParsePrefix(fmt.Sprintf("2001:db8:77:%d::/64", n.number)).Contains(a)
}

// Drop has the network lose what the node sends to an address or a network. What
// it returns mends it.
func (n *Node) Drop(to netip.Prefix) (mend func()) {
	n.t.Helper()
	tables := "iptables"
	if to.Addr().Is6() {
		tables = "ip6tables"
	}
	rule := func(do string) {
		n.t.Helper()
		n.in.router.Run(tables, "-w", do, "FORWARD", "-i", fmt.Sprintf("node%d", n.number), "-d", to.String(), "-j", "DROP")
	}
	rule("-I")
	return func() { rule("-D") }
}

// ForgetFlows has the network lose what is sent over the connections that the
// node has with hosts, as when what tracks connections on the way has forgotten
// them. New ones are not concerned. What it returns ends that, and them.
func (n *Node) ForgetFlows() (end func()) {
	n.t.Helper()
	var add, remove strings.Builder
	forgotten := make(map[string]bool)
	for line := range strings.Lines(n.in.space.Run("ss", "-Htn", "state", "established")) {
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		host, err1 := netip.ParseAddrPort(fields[2])
		from, err2 := netip.ParseAddrPort(fields[3])
		if err1 != nil || err2 != nil || !n.Owns(from.Addr()) {
			continue
		}
		forgotten[from.String()] = true
		tables := "iptables"
		if from.Addr().Is6() {
			tables = "ip6tables"
		}
		for _, way := range [][2]netip.AddrPort{{from, host}, {host, from}} {
			rule := fmt.Sprintf("FORWARD -p tcp -s %s --sport %d -d %s --dport %d -j DROP\n", way[0].Addr(), way[0].Port(), way[1].Addr(), way[1].Port())
			fmt.Fprintf(&add, "%s -w -I %s", tables, rule)
			fmt.Fprintf(&remove, "%s -w -D %s", tables, rule)
		}
	}
	n.in.router.Run("sh", "-ec", add.String()+"true")
	return func() {
		// Else what the node has sent over them would come now.
		n.in.mu.Lock()
		for _, conns := range n.in.conns {
			for c := range conns {
				if forgotten[c.RemoteAddr().String()] {
					reset(c)
				}
			}
		}
		n.in.mu.Unlock()
		n.in.router.Run("sh", "-ec", remove.String()+"true")
	}
}

// ShapeOut limits the rate at which the node sends to the internet and to other
// nodes. What it returns takes the limit away.
func (n *Node) ShapeOut(mbit int) (lift func()) {
	n.t.Helper()
	shape(n.space, "eth0", mbit)
	return func() { n.Run("tc", "qdisc", "del", "dev", "eth0", "root") }
}

// Box makes a network and a mount namespace on the node, as a container with a
// dockerd in it has. A box may have boxes.
func (n *Node) Box() *Node {
	t := n.t
	t.Helper()
	b := &Node{in: n.in, number: n.number, dir: n.dir, outer: n}
	name := fmt.Sprintf("box %d on %s", n.machine().boxes+1, n.name)
	b.space = newSpace(t, name, n.space, n.cgroup, unix.CLONE_NEWNET|unix.CLONE_NEWNS, b.files()+`
sysctl -qw net.ipv4.ip_forward=1
`)
	b.addr = n.Plug(b.holder.Process.Pid)
	return b
}

// machine is the node that a box is on in the end.
func (n *Node) machine() *Node {
	for n.outer != nil {
		n = n.outer
	}
	return n
}

// Plug gives a container that has no network one, as a pod has: its network
// namespace is linked to the node and the internet. It returns its address.
func (n *Node) Plug(pid int) (addr string) {
	n.t.Helper()
	m := n.machine()
	m.boxes++
	dev := fmt.Sprintf("box%d", m.boxes)
	net := fmt.Sprintf("10.%d.%d.", 80+2*int(m.number)+m.boxes>>8, m.boxes&0xff) // up to 511 each
	inside := func(args ...string) {
		n.t.Helper()
		n.Run(append([]string{"nsenter", "-t", fmt.Sprint(pid), "-n", "ip"}, args...)...)
	}
	n.Run("ip", "link", "add", dev, "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(pid))
	n.Run("ip", "link", "set", dev, "up")
	n.Run("ip", "addr", "add", net+"1/24", "dev", dev)
	inside("link", "set", "lo", "up")
	inside("link", "set", "eth0", "up")
	inside("addr", "add", net+"2/24", "dev", "eth0")
	inside("route", "add", "default", "via", net+"1")
	for b := n; b.outer != nil; b = b.outer {
		b.outer.Run("ip", "route", "add", net+"0/24", "via", b.addr)
	}
	n.in.router.Run("ip", "route", "add", net+"0/24", "via", fmt.Sprintf("10.77.%d.2", m.number))
	return net + "2"
}

// Bridge makes a bridge br0 with a network of its own, as Docker has one, and
// returns the first half of the network's addresses, as in "10.201.". The first
// address is the bridge's.
func (n *Node) Bridge() string {
	n.t.Helper()
	net := fmt.Sprintf("10.%d.", 200+n.number)
	// Without an address of its own it would take that of a port, which comes and
	// goes, and be another one to those that know it.
	n.Run("sh", "-ec", "ip link add br0 address 02:00:00:00:00:01 type bridge; ip addr add "+net+"0.1/16 dev br0; ip link set br0 up")
	n.in.router.Run("ip", "route", "add", net+"0.0/16", "via", fmt.Sprintf("10.77.%d.2", n.number))
	return net
}

// Spawn starts a program that runs until it is stopped.
func (n *Node) Spawn(name string, args ...string) *Process {
	n.t.Helper()
	return n.start(name, nil, args...)
}

// End ends a node or a box, with its network and its files. What runs there has
// to be stopped before, or goes on without a network.
func (n *Node) End() {
	n.t.Helper()
	_ = n.holder.Process.Kill()
	_ = n.holder.Wait()
}

// pids are the node's processes, but for those in PID namespaces of their own.
func (n *Node) pids() (pids []int) {
	n.t.Helper()
	if err := filepath.WalkDir(n.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() != "cgroup.procs" {
			return err
		}
		b, err := os.ReadFile(path)
		for pid := range strings.FieldsSeq(string(b)) {
			if n, _ := strconv.Atoi(pid); n > 0 { // 0 is in another PID namespace
				pids = append(pids, n)
			}
		}
		return err
	}); err != nil {
		n.t.Fatal(err)
	}
	return pids
}

// Cgroup is the node's cgroup2 directory, in which all its processes are.
func (n *Node) Cgroup() string { return n.dir }

// Cgroups makes the node's cgroup in all hierarchies, as a kubelet wants it
// where there are some of cgroup v1.
func (n *Node) Cgroups() {
	n.t.Helper()
	mounts, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	for _, m := range mounts {
		dir := filepath.Join(filepath.Dir(m), filepath.Base(n.dir))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			n.t.Fatal(err)
		}
		// A cpuset has to be told what is in it.
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			if b, err := os.ReadFile(filepath.Join(filepath.Dir(m), f)); err == nil {
				_ = os.WriteFile(filepath.Join(dir, f), b, 0o644)
			}
		}
	}
}

// EmptyCgroup is a cgroup of the node in which no process is: an agent for it
// redirects nothing.
func (n *Node) EmptyCgroup() string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "empty")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	return dir
}

// File returns the content of a file in the box, or an error.
func (n *Node) File(path string) ([]byte, error) { return os.ReadFile(n.root(path)) }

// ReadDir returns the names in a directory of the box, or an error.
func (n *Node) ReadDir(path string) (names []string, err error) {
	entries, err := os.ReadDir(n.root(path))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// WriteFile writes a file in the box.
func (n *Node) WriteFile(path, content string) {
	n.t.Helper()
	err := errors.Join(os.MkdirAll(filepath.Dir(n.root(path)), 0o755), os.WriteFile(n.root(path), []byte(content), 0o644))
	if err != nil {
		n.t.Fatal(err)
	}
}

// Listing is every file below a directory of the box, with its content's kind.
func (n *Node) Listing(dir string) (names []string) {
	n.t.Helper()
	root := n.root(dir)
	err := filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		if err == nil {
			names = append(names, fmt.Sprintf("%s %s", strings.TrimPrefix(path, root), e.Type()))
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return names
}

// Programs are weir's eBPF programs that processes of the node have open.
func (n *Node) Programs() (ids []ebpf.ProgramID) {
	n.t.Helper()
	for _, pid := range n.pids() {
		for _, id := range kernelIDs(pid, "prog_id") {
			if name := programName(ebpf.ProgramID(id)); strings.HasPrefix(name, "weir_") {
				ids = append(ids, ebpf.ProgramID(id))
			}
		}
	}
	return ids
}

// Unloaded waits until the kernel has freed programs: it does so a grace period
// after their last use.
func Unloaded(ids []ebpf.ProgramID) error {
	return Eventually(nil, func(context.Context) error {
		for _, id := range ids {
			if name := programName(id); name != "" {
				return fmt.Errorf("the program %s is still loaded", name)
			}
		}
		return nil
	})
}

// programName is the name of a loaded program, or empty.
func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// Agent is weir's agent on a node.
type Agent struct {
	*Process
	node *Node
	http http.Client
	args []string
	// Env is its environment, "KEY=value" each, when it starts again.
	Env []string
}

// Stored waits until nothing is on its way to the store, nor there in part.
func (a *Agent) Stored() {
	a.t.Helper()
	a.until("storing all that has come", func(context.Context) error {
		if s := a.Status().Store; s.Running > 0 || s.Partial > 0 {
			return fmt.Errorf("not all is stored: %+v", s)
		}
		return nil
	})
}

// Agent starts the agent and waits until it is ready.
func (n *Node) Agent(args ...string) *Agent {
	n.t.Helper()
	a := &Agent{node: n}
	a.http.Transport = &http.Transport{DialContext: n.Dial}
	n.t.Cleanup(a.http.CloseIdleConnections)
	a.args = append([]string{Weir(n.t), "agent", "--cgroup", n.dir, "--log-level", "debug"}, args...)
	a.Start()
	ready, err := a.Holdings(context.Background())
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { a.leaves(ready) })
	return a
}

// Start starts the agent again.
func (a *Agent) Start() {
	a.node.t.Helper()
	a.Process = a.node.start("weir", a.Env, a.args...)
	p := a.Process
	a.node.t.Cleanup(func() {
		// Whatever a test is about: no log has a secret in it, and no page; nor
		// has a log a data race.
		log := p.Log(64 << 20)
		said := map[string]string{"log": log}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		for _, path := range []string{"/", "/?cluster", "/api/status", "/api/pulls", "/api/cluster", "/metrics"} {
			if b, err := a.Get(ctx, path); err == nil { // it may have ended
				said[path] = string(b)
			}
		}
		for what, text := range said {
			for _, secret := range leaked(text, a.node.in.secrets()) {
				a.node.t.Errorf("weir's %s has %q, a token or a password", what, secret)
			}
		}
		if i := strings.Index(log, "WARNING: DATA RACE"); i >= 0 {
			a.node.t.Errorf("weir's log has a data race:\n%.4000s", log[i:])
		}
	})
	a.until("getting ready", func(ctx context.Context) error {
		select {
		case <-p.done:
			return errors.New("it has ended; another one may be running") // which would answer
		default:
		}
		_, err := a.Get(ctx, "/readyz")
		return err
	})
}

// Upgrade stops the agent, and starts another version of it.
func (a *Agent) Upgrade(program string) {
	a.node.t.Helper()
	a.Stop()
	a.args[0] = program
	a.Start()
}

// leaked returns those secrets that a log has. There may be thousands: all that
// end alike are looked for at the same time.
func leaked(log string, secrets []string) (found []string) {
	const end = 8
	byEnd := make(map[string][]string)
	for _, s := range secrets {
		if len(s) < end {
			if strings.Contains(log, s) {
				found = append(found, s)
			}
			continue
		}
		byEnd[s[len(s)-end:]] = append(byEnd[s[len(s)-end:]], s)
	}
	for i := end; i <= len(log); i++ {
		for _, s := range byEnd[log[i-end:i]] {
			if strings.HasSuffix(log[:i], s) {
				found = append(found, s)
			}
		}
	}
	return found
}

// Get gets a page of the admin address.
func (a *Agent) Get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+agent.DefaultAdmin+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", path, resp.Status)
	}
	return b, err
}

// Status is what `weir status --json` prints.
func (a *Agent) Status() (s admin.Status) {
	a.node.t.Helper()
	out := a.node.Run(Weir(a.node.t), "status", "--json")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		a.node.t.Fatalf("status: %v\n%s", err, out)
	}
	return s
}

// AskStatus is Status without the start of a program for it.
func (a *Agent) AskStatus(ctx context.Context) (s admin.Status, err error) {
	page, err := a.Get(ctx, "/api/status")
	if err == nil {
		err = json.Unmarshal(page, &s)
	}
	return s, err
}

// Runtime waits until the status of a process is no longer "starting" or being
// proven, and returns it.
func (a *Agent) Runtime(pid int) (rt runtimes.Status) {
	a.node.t.Helper()
	a.until(fmt.Sprintf("settling how process %d is treated", pid), func(context.Context) error {
		s := a.Status()
		i := slices.IndexFunc(s.Runtimes, func(r runtimes.Status) bool { return r.PID == pid })
		if i < 0 {
			return fmt.Errorf("process %d is not in the status: %+v", pid, s.Runtimes)
		}
		if rt = s.Runtimes[i]; rt.Reach == runtimes.ReachStarting || strings.HasPrefix(rt.Step, "wait") {
			return fmt.Errorf("it is %s (%s)", rt.Reach, rt.Reason)
		}
		return nil
	})
	return rt
}

// Docker is a dockerd.
type Docker struct {
	*Process
	node *Node
	API  *client.Client
	Env  []string // more of its environment, from its next start on
	args []string
}

// Docker starts Debian's dockerd, with an untouched configuration but for what
// only concerns running containers, and with the given flags.
func (n *Node) Docker(flags ...string) *Docker {
	n.t.Helper()
	if !n.has("/run/containerd/containerd.sock") {
		n.Containerd() // dockerd would start one, which ends with it only when all goes well
	}
	return n.dockerd(Debian(n.t, "/usr/sbin/dockerd", "docker.io"), flags...)
}

// NewestDocker starts the newest dockerd, with its containerd image store.
func (n *Node) NewestDocker() *Docker {
	n.t.Helper()
	if !n.has("/run/containerd/containerd.sock") {
		n.NewestContainerd()
	}
	return n.dockerd(n.link("dockerd"))
}

func (n *Node) has(path string) bool {
	_, err := os.Stat(n.root(path))
	return err == nil
}

// link gives a built tool the name that it has when it is installed.
func (n *Node) link(name string) string {
	n.t.Helper()
	return n.As(Tool(n.t, name), name)
}

// As gives a program another name, by which weir knows it or doesn't, and
// returns its path.
func (n *Node) As(program, name string) string {
	n.t.Helper()
	path := filepath.Join(n.t.TempDir(), name)
	if os.Link(program, path) != nil {
		if err := copyFile(program, path); err != nil {
			n.t.Fatal(err)
		}
	}
	return path
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

func (n *Node) dockerd(path string, flags ...string) *Docker {
	n.t.Helper()
	d := &Docker{node: n, args: []string{path, "--bridge=none", "--iptables=false", "--ip6tables=false", "--containerd=/run/containerd/containerd.sock"}}
	d.args = append(d.args, flags...)
	c, err := client.New(client.WithHost("unix:///run/docker.sock"), client.WithDialContext(func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.root("/run/docker.sock"))
	}))
	if err != nil {
		n.t.Fatal(err)
	}
	d.API = c
	n.t.Cleanup(func() { c.Close() })
	d.Start()
	return d
}

// Start starts dockerd again.
func (d *Docker) Start() {
	d.node.t.Helper()
	d.Process = d.node.start("dockerd", d.Env, d.args...)
	d.until("answering", func(ctx context.Context) error {
		_, err := d.API.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true})
		return err
	})
}

// TryPull pulls an image, with a user's name and password if given.
func (d *Docker) TryPull(ref string, login ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*waitTime)
	defer cancel()
	var o client.ImagePullOptions
	if len(login) == 2 {
		auth, err := json.Marshal(registry.AuthConfig{Username: login[0], Password: login[1]})
		if err != nil {
			return err
		}
		o.RegistryAuth = base64(auth)
	}
	resp, err := d.API.ImagePull(ctx, ref, o)
	if err != nil {
		return err
	}
	return resp.Wait(ctx)
}

// Pull pulls an image, which must succeed.
func (d *Docker) Pull(ref string, login ...string) {
	d.node.t.Helper()
	if err := d.TryPull(ref, login...); err != nil {
		d.node.t.Fatalf("docker pull %s: %v\n--- log of dockerd\n%s", ref, err, d.Log(3<<10))
	}
}

// Remove removes an image.
func (d *Docker) Remove(ref string) {
	d.node.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitTime)
	defer cancel()
	if _, err := d.API.ImageRemove(ctx, ref, client.ImageRemoveOptions{Force: true, PruneChildren: true}); err != nil {
		d.node.t.Fatalf("docker rmi %s: %v", ref, err)
	}
}

// TryPush gives an image, which dockerd has under another name, a name, and
// pushes it to that name's registry, with a user's name and password if given.
func (d *Docker) TryPush(from, ref string, login ...string) error {
	d.node.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*waitTime)
	defer cancel()
	if _, err := d.API.ImageTag(ctx, client.ImageTagOptions{Source: from, Target: ref}); err != nil {
		d.node.t.Fatalf("docker tag %s %s: %v", from, ref, err)
	}
	auth := []byte("{}")
	if len(login) == 2 {
		var err error
		if auth, err = json.Marshal(registry.AuthConfig{Username: login[0], Password: login[1]}); err != nil {
			return err
		}
	}
	resp, err := d.API.ImagePush(ctx, ref, client.ImagePushOptions{RegistryAuth: base64(auth)})
	if err == nil {
		err = resp.Wait(ctx)
	}
	return err
}

// Push is TryPush, which must succeed.
func (d *Docker) Push(from, ref string) {
	d.node.t.Helper()
	if err := d.TryPush(from, ref); err != nil {
		d.node.t.Fatalf("docker push %s: %v\n--- log of dockerd\n%s", ref, err, d.Log(3<<10))
	}
}

// Build builds a Dockerfile with BuildKit, with flags of `docker build`, and
// returns what that prints.
func (d *Docker) Build(dockerfile string, flags ...string) string {
	d.node.t.Helper()
	const dir = "/var/lib/home/build"
	d.node.WriteFile(dir+"/Dockerfile", dockerfile)
	args := []string{"env", "DOCKER_BUILDKIT=1", "DOCKER_HOST=unix:///run/docker.sock", Debian(d.node.t, "/usr/bin/docker", "docker.io"), "build", "--progress=plain"}
	return d.node.Run(append(append(args, flags...), dir)...)
}

// Same fails the test unless dockerd has the image as it was pushed: its id is
// the digest of the configuration, which has those of the layers' contents.
func (d *Docker) Same(ref string, p Pushed) {
	d.node.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitTime)
	defer cancel()
	img, err := d.API.ImageInspect(ctx, ref)
	if err != nil {
		d.node.t.Fatal(err)
	}
	var layers []string
	for _, l := range p.DiffIDs {
		layers = append(layers, l.String())
	}
	if id := img.ID; id != p.Config.String() && id != p.Digest.String() && id != p.Manifest.String() || !slices.Equal(img.RootFS.Layers, layers) {
		d.node.t.Errorf("%s has the id %s and the layers %v; pushed were %s and %v", ref, id, img.RootFS.Layers, p.Config, layers)
	}
}

// BuildKit is a buildkitd by itself.
type BuildKit struct {
	*Process
	node *Node
}

// BuildKit starts the newest buildkitd with no configuration.
func (n *Node) BuildKit() *BuildKit {
	n.t.Helper()
	b := &BuildKit{node: n}
	b.Process = n.start("buildkitd", nil, n.link("buildkitd"), "--containerd-worker=false", "--root=/var/lib/buildkit")
	b.until("answering", func(context.Context) error {
		out, err := n.Output(Tool(n.t, "buildctl"), "debug", "workers")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return b
}

// Build builds a Dockerfile, with flags of `buildctl build`, which must succeed,
// and returns what that prints.
func (b *BuildKit) Build(dockerfile string, flags ...string) string {
	b.node.t.Helper()
	out, err := b.TryBuild(dockerfile, flags...)
	if err != nil {
		b.node.t.Fatal(err)
	}
	return out
}

// TryBuild is Build, which may fail.
func (b *BuildKit) TryBuild(dockerfile string, flags ...string) (string, error) {
	b.node.t.Helper()
	const dir = "/var/lib/home/build"
	b.node.WriteFile(dir+"/Dockerfile", dockerfile)
	args := []string{Tool(b.node.t, "buildctl"), "build", "--progress=plain", "--frontend=dockerfile.v0", "--local=context=" + dir, "--local=dockerfile=" + dir}
	return b.node.Output(append(args, flags...)...)
}

// Containerd is a containerd with its CRI.
type Containerd struct {
	*Process
	node   *Node
	conn   *grpc.ClientConn
	images cri.ImageServiceClient
	args   []string
	root   string   // of what it has
	Env    []string // more of its environment, from its next start on
}

// Containerd starts Debian's containerd with no configuration.
func (n *Node) Containerd() *Containerd {
	n.t.Helper()
	return n.containerd(Debian(n.t, "/usr/bin/containerd", "containerd"))
}

// NewestContainerd starts the newest containerd with no configuration.
func (n *Node) NewestContainerd() *Containerd {
	n.t.Helper()
	// It takes the first shim in its PATH.
	shim, containerd := n.link("containerd-shim-runc-v2"), n.link("containerd")
	return n.containerd(containerd, "PATH="+filepath.Dir(shim)+":/usr/sbin:/usr/bin:/sbin:/bin")
}

// Convert makes of an image at a registry one whose layers can be read in parts, as
// "estargz" or "zstdchunked" has them, and pushes it. The node has the newest containerd.
func (n *Node) Convert(how, from, to string) {
	n.t.Helper()
	ctr := Tool(n.t, "ctr")
	n.Run(ctr, "images", "pull", "--local", from)
	n.Run(Tool(n.t, "containerd-stargz-grpc"), "convert", how, from, to)
	n.Run(ctr, "images", "push", to)
}

// PodmanPartly pulls an image with podman, which fetches the parts of layers in
// zstd:chunked that it has no file of, into a store of a name, and returns what is in
// the image's files.
func (n *Node) PodmanPartly(image, store string) string {
	n.t.Helper()
	n.WriteFile("/var/lib/home/storage.conf", fmt.Sprintf(`[storage]
driver = "overlay"
graphroot = "/var/lib/%[1]s"
runroot = "/run/%[1]s"
[storage.options]
pull_options = {enable_partial_images = "true"}
`, store))
	return n.Run("sh", "-ec", "export PODMAN_IGNORE_CGROUPSV1_WARNING=1 CONTAINERS_STORAGE_CONF=/var/lib/home/storage.conf; podman pull -q "+image+"; cd $(podman image mount "+image+"); sha256sum *; cd /; podman image umount --all >/dev/null")
}

// OlderContainerd starts the newest containerd of the 1.7 line with no
// configuration.
func (n *Node) OlderContainerd() *Containerd {
	n.t.Helper()
	return n.containerd(n.As(Tool(n.t, "containerd-1.7"), "containerd"))
}

// K3s is where k3s has what its containerd is given and has.
const K3s = "/var/lib/rancher/k3s/agent"

// K3sContainerd starts the newest containerd as k3s does, with the configuration at
// etc/containerd/config.toml below [K3s].
func (n *Node) K3sContainerd() *Containerd {
	n.t.Helper()
	shim, containerd := n.link("containerd-shim-runc-v2"), n.link("containerd")
	const state, root = "/run/k3s/containerd", K3s + "/containerd"
	c := n.containerdAt(state+"/containerd.sock", root, "PATH="+filepath.Dir(shim)+":/usr/sbin:/usr/bin:/sbin:/bin")
	c.args = []string{containerd, "-c", K3s + "/etc/containerd/config.toml", "-a", state + "/containerd.sock", "--state", state, "--root", root}
	c.Start()
	return c
}

func (n *Node) containerd(path string, env ...string) *Containerd {
	n.t.Helper()
	c := n.containerdAt("/run/containerd/containerd.sock", "/var/lib/containerd", env...)
	c.args = []string{path}
	c.Start()
	return c
}

// containerdAt is a containerd that will listen at a socket.
func (n *Node) containerdAt(socket, root string, env ...string) *Containerd {
	n.t.Helper()
	c := &Containerd{node: n, root: root, Env: env}
	conn, err := grpc.NewClient("passthrough:///containerd", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.root(socket))
		}))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	c.conn, c.images = conn, cri.NewImageServiceClient(conn)
	return c
}

// Start starts containerd again.
func (c *Containerd) Start() {
	c.node.t.Helper()
	c.Process = c.node.start("containerd", c.Env, c.args...)
	c.until("answering", func(ctx context.Context) error {
		_, err := c.images.ListImages(ctx, &cri.ListImagesRequest{})
		return err
	})
}

// TryPull pulls an image as the kubelet does, with a user's name and password
// if given.
func (c *Containerd) TryPull(ref string, login ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*waitTime)
	defer cancel()
	req := &cri.PullImageRequest{Image: &cri.ImageSpec{Image: familiar(ref)}}
	if len(login) == 2 {
		req.Auth = &cri.AuthConfig{Username: login[0], Password: login[1]}
	}
	_, err := c.images.PullImage(ctx, req)
	return err
}

// Pull pulls an image, which must succeed.
func (c *Containerd) Pull(ref string, login ...string) {
	c.node.t.Helper()
	if err := c.TryPull(ref, login...); err != nil {
		c.node.t.Fatalf("pulling %s through CRI: %v\n--- log of containerd\n%s", ref, err, c.Log(3<<10))
	}
}

// Remove removes an image, and waits until its layers are gone.
func (c *Containerd) Remove(ref string, p Pushed) {
	c.node.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitTime)
	defer cancel()
	if _, err := c.images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: familiar(ref)}}); err != nil && !errdefs.IsNotFound(err) {
		c.node.t.Fatalf("removing %s through CRI: %v", ref, err)
	}
	c.until("collecting garbage", func(context.Context) error {
		for _, l := range p.Layers {
			if _, err := c.node.File(filepath.Join(c.root, "io.containerd.content.v1.content/blobs/sha256", l.Encoded())); err == nil {
				return fmt.Errorf("the layer %s is still there", l)
			}
		}
		return nil
	})
}

// Same fails the test unless containerd has the image as it was pushed.
func (c *Containerd) Same(ref string, p Pushed) {
	c.node.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitTime)
	defer cancel()
	st, err := c.images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: familiar(ref)}})
	if err != nil || st.Image == nil {
		c.node.t.Fatalf("%s is not there: %v", ref, err)
	}
	if st.Image.Id != p.Config.String() {
		c.node.t.Errorf("%s is %s; pushed was %s", ref, st.Image.Id, p.Config)
	}
}

// familiar is an image's full name.
func familiar(ref string) string {
	n, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ref
	}
	return n.String()
}

// Addr is the node's own address on the internet.
func (n *Node) Addr() netip.Addr { return netip.MustParseAddr(fmt.Sprintf("10.77.%d.2", n.number)) }

func base64(b []byte) string { return enc.URLEncoding.EncodeToString(b) }
