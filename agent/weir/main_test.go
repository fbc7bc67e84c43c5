// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"weir/agent/admin"
	"weir/agent/doctor"
	"weir/agent/runtimes"
	"weir/bpf"
	"weir/proxy"
	"weir/proxy/registry"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv("WEIR_TEST_LISTEN"); addr != "" {
		listen(addr)
	}
	if os.Getenv("WEIR_TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// listen takes connections and says nothing, until it is killed.
func listen(addr string) {
	l, err := net.Listen("tcp", addr)
	for err == nil {
		var c net.Conn
		if c, err = l.Accept(); err == nil {
			c.Close()
		}
	}
	os.Exit(1)
}

// binary is this test's binary where any user may run it.
func binary(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "weir")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "weir")
	b, err := os.ReadFile(os.Args[0])
	if err = errors.Join(err, os.Chmod(dir, 0o755), os.WriteFile(path, b, 0o755)); err != nil {
		t.Fatal(err)
	}
	return path
}

// weir runs the command and returns its exit code and what it printed.
func weir(t *testing.T, attr *syscall.SysProcAttr, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command(binary(t), args...)
	cmd.Env = append(append(os.Environ(), "WEIR_TEST_MAIN=1"), env...)
	cmd.SysProcAttr = attr
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// Each mistake gets an error of one line that says what to do.
func TestMistakes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dirs := []string{"--data-dir", filepath.Join(dir, "data"), "--run-dir", filepath.Join(dir, "run")}
	agentWith := func(args ...string) []string { return append(append([]string{"agent"}, dirs...), args...) }
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	broken := filepath.Join(dir, "broken")
	if err := os.MkdirAll(filepath.Join(broken, "ca"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(broken, "ca", "ca.key"), []byte("not a key"), 0o600); err != nil {
		t.Fatal(err)
	}

	for name, tt := range map[string]struct {
		attr *syscall.SysProcAttr
		env  []string
		args []string
		code int
		want []string // in the message
	}{
		"unknown command":     {args: []string{"frobnicate"}, code: 2, want: []string{"frobnicate", "--help"}},
		"unknown flag":        {args: []string{"agent", "--frobnicate"}, code: 2, want: []string{"--frobnicate", "weir agent --help"}},
		"stray argument":      {args: []string{"status", "now"}, code: 2, want: []string{`"now"`}},
		"not root":            {attr: nobody, args: agentWith(), code: 1, want: []string{"root", "sudo"}},
		"uninstall, not root": {attr: nobody, args: []string{"uninstall"}, code: 1, want: []string{"root", "sudo"}},
		"not a cgroup":        {args: agentWith("--cgroup", dir, "--admin", "127.0.0.1:0"), code: 1, want: []string{dir, "cgroup2", "--cgroup"}},
		"no such cgroup":      {args: agentWith("--cgroup", "/nowhere", "--admin", "127.0.0.1:0"), code: 1, want: []string{"/nowhere", "--cgroup"}},
		"port taken":          {args: agentWith("--admin", l.Addr().String()), code: 1, want: []string{l.Addr().String(), "in use", "--admin"}},
		"no CA file":          {args: agentWith("--registry", "a.test=/nowhere.pem"), code: 1, want: []string{"/nowhere.pem", "a.test"}},
		"not a CA file":       {args: agentWith("--registry", "a.test=/etc/passwd"), code: 1, want: []string{"/etc/passwd", "PEM"}},
		"empty registry":      {args: agentWith("--registry", "="), code: 1, want: []string{"--registry"}},
		"broken key":          {args: []string{"agent", "--data-dir", broken, "--run-dir", filepath.Join(dir, "run")}, code: 1, want: []string{"ca.key"}},
		"port number":         {args: agentWith("--ports", "70000"), code: 2, want: []string{"--ports", "70000"}},
		"store size":          {args: agentWith("--store-size", "many"), code: 2, want: []string{"--store-size", "20GiB"}},
		"log level":           {args: agentWith("--log-level", "loud"), code: 2, want: []string{"loud", "debug"}},
		"log format":          {args: agentWith("--log-format", "xml"), code: 2, want: []string{"xml", "json"}},
		"environment":         {env: []string{"WEIR_STORE_SIZE=lots"}, args: agentWith(), code: 2, want: []string{"lots"}},
		"environment, typed":  {env: []string{"WEIR_PORTS=x"}, args: agentWith(), code: 2, want: []string{"WEIR_PORTS"}},
		"no agent":            {args: []string{"status", "--admin", "127.0.0.1:1"}, code: 1, want: []string{"127.0.0.1:1", "weir agent"}},
		"no image":            {args: []string{"prefetch"}, code: 2, want: []string{"debian:12"}},
		"not an image":        {args: []string{"prefetch", "Not/An:Image:"}, code: 2, want: []string{"Not/An:Image:"}},
		"not a platform":      {args: []string{"prefetch", "--platform", "arm64", "debian"}, code: 2, want: []string{"arm64", "linux/arm64"}},
		"prefetch, no agent":  {args: []string{"prefetch", "--run-dir", dir, "debian:12"}, code: 1, want: []string{dir, "weir agent", "debian:12"}},
		"pulls, no agent":     {args: []string{"pulls", "--admin", "127.0.0.1:1"}, code: 1, want: []string{"127.0.0.1:1", "weir agent"}},
		"admin":               {args: []string{"status", "--admin", "nonsense"}, code: 2, want: []string{"--admin"}},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := weir(t, tt.attr, tt.env, tt.args...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			message, _, _ := strings.Cut(stderr, "\n")
			for _, w := range tt.want {
				if !strings.Contains(stderr, w) {
					t.Errorf("%q doesn't say %q", stderr, w)
				}
			}
			if !strings.HasPrefix(message, "weir: ") || strings.Count(stderr, "\n") > 2 {
				t.Errorf("not one line: %q", stderr)
			}
		})
	}
}

// taken has an address in use, where there is nothing but loopback.
const taken = `ip link set lo up
WEIR_TEST_LISTEN={taken} {weir} & listener=$!; trap "kill $listener" EXIT
until (: < /dev/tcp/127.0.0.1/9999) 2>/dev/null; do kill -0 $listener; done
`

// The doctor names each thing that keeps weir from working, or from working
// well, and what to do. {dir}, {weir} and {cgroup} stand for the test's.
func TestDoctor(t *testing.T) {
	cgroup, future, weir := foreignProgram(t), futureCA(t), binary(t)
	for name, tt := range map[string]struct {
		run  string // a shell script
		code int
		want []string
	}{
		"all well": {"{weir} doctor {flags}", 0, []string{"weir can work on this node"}},
		"json":     {"{weir} doctor {flags} --json", 0, []string{`[{"what":"privileges"}`}},
		"not root": {"setpriv --reuid 65534 --regid 65534 --clear-groups {weir} doctor", 1, []string{"FAIL  privileges: not root", "sudo"}},
		"a capability": {"setpriv --bounding-set=-sys_ptrace,-fowner --inh-caps=-all {weir} doctor {flags}", 1,
			[]string{"the capability SYS_PTRACE is missing", "--cap-add=SYS_PTRACE", "FOWNER", "(2)"}},
		"not cgroup2": {"{weir} doctor {flags} --cgroup /sys/fs", 1, []string{"FAIL  kernel: /sys/fs is not a cgroup2"}},
		"another's program": {"{weir} doctor {flags} --cgroup {cgroup}", 1,
			[]string{"FAIL  kernel: attaching", "not_weir is attached there or above, without BPF_F_ALLOW_MULTI", "warn  other eBPF programs: not_weir"}},
		"PID namespace":  {"unshare --pid --fork --mount-proc {weir} doctor {flags}", 1, []string{"weir sees only its own container's processes", "--pid=host"}},
		"no directory":   {"{weir} doctor {flags} --data-dir /etc/passwd/x", 1, []string{"FAIL  --data-dir /etc/passwd/x: ", "not a directory"}},
		"read-only":      {"mount -t tmpfs -o ro tmpfs {dir}; {weir} doctor {flags}", 1, []string{"FAIL  --data-dir", "read-only file system"}},
		"full":           {"mount -t tmpfs -o size=4m tmpfs {dir}; head -c 4000k /dev/zero > {dir}/x; {weir} doctor {flags}", 0, []string{"warn  --data-dir", "MiB are free", "free some space"}},
		"no inodes":      {"mount -t tmpfs -o nr_inodes=200 tmpfs {dir}; cd {dir}; touch $(seq 199); {weir} doctor {flags}", 0, []string{"warn  --data-dir", "inodes are free, of 200"}},
		"container's":    {"mount -t tmpfs tmpfs {dir}; cd {dir}; mkdir l u w m; mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m; {weir} doctor {flags} --data-dir {dir}/m", 0, []string{"it is in a container's own file system"}},
		"clock":          {"mkdir {dir}/ca; cp {future} {dir}/ca/ca.crt; {weir} doctor {flags}", 0, []string{"warn  clock", "but weir's CA is valid from 2099-", "NTP"}},
		"admin":          {"{weir} doctor --data-dir {dir} --run-dir {dir} --admin {taken}", 1, []string{"the address is in use by something that is not weir"}},
		"hanging":        {"echo 77 > {dir}/agent.pid; flock {dir}/agent.pid {weir} doctor {flags}", 1, []string{"FAIL  the agent: process 77 runs but doesn't answer"}},
		"two agents":     {`cd {dir}; mkfifo none; echo 'read < none' > agent; (exec -a weir bash agent) & one=$!; (exec -a weir bash agent) & until [ "$(tr '\0' ' ' < /proc/$one/cmdline)$(tr '\0' ' ' < /proc/$!/cmdline)" = "weir agent weir agent " ]; do :; done; {weir} doctor {flags}; code=$?; kill $one $!; exit $code`, 0, []string{"warn  the agent: there are 2 in this network namespace"}},
		"swarm key":      {"echo x > {dir}/key; {weir} doctor {flags} --swarm-key {dir}/key", 1, []string{"FAIL  --swarm-key", "is no swarm key"}},
		"open swarm key": {`printf '/key/swarm/psk/1.0.0/\n/base16/\n%064d\n' 7 > {dir}/key; {weir} doctor {flags} --swarm-key {dir}/key --peer-listen 127.0.0.1:0`, 0, []string{"warn  --swarm-key", "others than root may read it (mode 0644)", "chmod 600"}},
		"peers' port":    {`printf '/key/swarm/psk/1.0.0/\n/base16/\n%064d\n' 7 > {dir}/key; {weir} doctor {flags} --swarm-key {dir}/key --peer-listen {taken}`, 1, []string{"FAIL  --peer-listen"}},
		"a registry":     {"{weir} doctor {flags} --registry {taken}", 0, []string{"warn  registries: not reachable from here: registry-1.docker.io, ghcr.io, quay.io, registry.k8s.io, {taken} ("}},
		"no CA":          {"{weir} doctor {flags} --registry a.test=/nowhere.pem", 1, []string{"FAIL  registries: reading the CA", "/nowhere.pem"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			fill := strings.NewReplacer("{weir}", weir, "{flags}", "--data-dir {dir} --run-dir {dir} --admin 127.0.0.1:0 ", "{cgroup}", cgroup, "{future}", future, "{taken}", "127.0.0.1:9999").Replace
			script := strings.ReplaceAll(fill(tt.run), "{dir}", dir)
			cmd := exec.Command("unshare", "--mount", "--net", "bash", "-c", fill(taken)+script)
			cmd.Env = append(os.Environ(), "WEIR_TEST_MAIN=1")
			out, _ := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != tt.code {
				t.Errorf("exit code %d, want %d\n%s", code, tt.code, out)
			}
			for _, w := range tt.want {
				if !strings.Contains(string(out), fill(w)) {
					t.Errorf("%q is not in\n%s", fill(w), out)
				}
			}
		})
	}
}

// futureCA makes a certificate that is valid from 2099 on.
func futureCA(t *testing.T) (file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	from := time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: from.AddDate(1, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// foreignProgram makes a cgroup that has a program which lets no other one
// beside it.
func foreignProgram(t *testing.T) (cgroup string) {
	t.Helper()
	root, err := bpf.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	if cgroup, err = os.MkdirTemp(root, "weir-test-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(cgroup) })
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "not_weir", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect,
		License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	o := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect}
	if err := link.RawAttachProgram(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = link.RawDetachProgram(link.RawDetachProgramOptions{Target: o.Target, Program: p, Attach: o.Attach})
		p.Close()
	})
	return cgroup
}

func TestPrintStatus(t *testing.T) {
	var out bytes.Buffer
	err := printStatus(&out, admin.Status{
		Version: "v1", PID: 7, Started: time.Now(),
		Runtimes: []runtimes.Status{
			{Kind: "dockerd", PID: 1, Reach: runtimes.ReachIntercepted, Trust: "because"},
			{Kind: "containerd", PID: 2, Reach: runtimes.ReachPassthrough, Reason: "it was there before", Step: "restart it", Except: map[string]string{"quay.io": "a hosts.toml decides"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"dockerd", "because", "passthrough", "it was there before", "restart it", "quay.io", "none was asked"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
}

// What belongs to a registry is said to.
func TestStatusNamesCompanions(t *testing.T) {
	var b bytes.Buffer
	if err := printStatus(&b, admin.Status{UnknownHosts: []proxy.Unknown{
		{Host: "auth.docker.io", Companion: &proxy.Companion{Role: proxy.RoleTokenServer, Of: registry.DockerHub}},
		{Host: "web.example"}}}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`auth\.docker\.io +0 +token server of docker\.io\n`, `web\.example +0 +not known as a registry\n`} {
		if !regexp.MustCompile(want).MatchString(b.String()) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
}

// What a pod names, or answers, is text in a terminal, and nothing else.
func TestStatusIsPlain(t *testing.T) {
	const evil = "a\x1b[2J\x1b]0;b\a\nall is well\r\u202e\t"
	var b bytes.Buffer
	err := printStatus(&b, admin.Status{
		Runtimes:      []runtimes.Status{{Kind: "containerd", Reason: evil, Step: evil, Except: map[string]string{evil: evil}}},
		Registries:    []registry.Stats{{Registry: evil}},
		OtherPrograms: []runtimes.Other{{Program: evil, Registries: []string{evil}}},
		UnknownHosts:  []proxy.Unknown{{Host: evil, Registry: true}, {Host: evil, Problem: evil}, {Host: evil, Companion: &proxy.Companion{Role: evil, Of: evil}}},
	})
	if err = errors.Join(err, printPulls(&b, []registry.Pull{{Registry: evil, Repository: evil, Reference: evil, Client: evil}})); err != nil {
		t.Fatal(err)
	}
	printFindings(&b, []doctor.Finding{{What: evil}, {What: evil, Problem: evil, Step: evil, Warning: true}, {What: evil, Problem: evil}})
	for _, r := range b.String() {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("%q is printed", r)
		}
	}
	for line := range strings.Lines(b.String()) {
		if strings.HasPrefix(line, "all is well") {
			t.Errorf("it makes a line of its own: %s", b.String())
		}
	}
}
