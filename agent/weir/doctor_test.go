// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"weir/bpf"
)

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
