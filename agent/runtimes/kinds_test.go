// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"weir/agent/procfs"
)

func TestKinds(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range kinds {
		for _, p := range k.programs {
			comm := p[:min(len(p), maxComm)]
			if seen[comm] || p == "" {
				t.Errorf("%s: the program %q is there twice, or the kernel can't tell it from another", k.name, p)
			}
			seen[comm] = true
			if kindOf("x", p) != k || kindOf("x", comm) != k {
				t.Errorf("%q is not found", p)
			}
		}
	}
	for _, other := range []string{"bash", "weir", "containerd-shim", "containerd-shim-runc-v2", "soci", "docker", "nydusd"} {
		if k := kindOf(other); k != nil {
			t.Errorf("%s is a %s", other, k.name)
		}
	}
}

// What an operator names is treated as the kind that it is said to be.
func TestSetPrograms(t *testing.T) {
	t.Cleanup(func() { added = nil })
	if err := SetPrograms([]string{"my-puller=crane", "a-very-long-program-name=buildkitd"}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"my-puller": "crane", "a-very-long-program-name": "buildkitd", "a-very-long-pro": "buildkitd", "crane": "crane"} {
		if k := kindOf(name); k == nil || k.name != want {
			t.Errorf("%s is %+v", name, k)
		}
	}
	if k := kindOf("my-pull"); k != nil {
		t.Errorf("%+v", k)
	}
	if all, guests := Programs(); !slices.Contains(all, "my-puller") || !slices.Contains(all, "dockerd") || !slices.Equal(guests, []string{"nerdctl", "ctr"}) {
		t.Error(all, guests)
	}
	for _, bad := range []string{"", "x", "=crane", "x=", "x=nothing", "/usr/bin/x=crane", "dockerd=crane"} {
		if err := SetPrograms([]string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	if kindOf("my-puller") == nil {
		t.Error("an error has changed something")
	}
}

// The one of the lifecycle's phases that makes an image of its own root file system
// isn't given the CA.
func TestExtenderIsInImage(t *testing.T) {
	for comm, want := range map[string]bool{"extender": true, "creator": false, "lifecycle": false} {
		rt := &Runtime{kind: kindOf(comm, "lifecycle"), Process: procfs.Process{Comm: comm, Parent: 1}}
		if got := inImage(rt, nil); got != want {
			t.Errorf("%s: %v", comm, got)
		}
	}
}

// A program that is called dockerd, and never ends its answer, is not listened to
// for longer than a dockerd needs.
func TestEndlessAnswer(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	var said atomic.Int64
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Api-Version", "1.45")
		if r.URL.Path == "/_ping" {
			return
		}
		_, _ = io.WriteString(w, `{"status":"`)
		for b := bytes.Repeat([]byte("a"), 1<<20); said.Load() < 1<<30; said.Add(1 << 20) {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	rt := &Runtime{Process: procfs.Process{PID: os.Getpid()}, kind: &kind{name: "dockerd", sockets: []string{sock}}}
	if err := askDocker(t.Context(), rt, "198.18.116.1/weir/probe:x"); err == nil || said.Load() > 4*maxAnswers {
		t.Errorf("%d bytes, %v", said.Load(), err)
	}
	if said.Load() == 0 {
		t.Error("it wasn't asked")
	}
}

func TestOwnRoots(t *testing.T) {
	for command, want := range map[string]string{
		"oras pull ghcr.io/a/b:1":                           "",
		"oras pull --ca-file x ghcr.io/a/b:1":               "--ca-file",
		"oras cp --from-ca-file=x ghcr.io/a/b:1 ghcr.io/c":  "--from-ca-file",
		"oras cp --to-ca-file x ghcr.io/a/b:1 ghcr.io/c":    "--to-ca-file",
		"helm pull --kube-ca-file x oci://ghcr.io/a":        "",
		"helm push a.tgz oci://ghcr.io/a --ca-file=x":       "--ca-file",
		"cosign save --registry-cacert x ghcr.io/a":         "--registry-cacert",
		"ctr images pull --local --tlscacert=x ghcr.io/a:1": "--tlscacert",
		"skopeo copy --src-cert-dir x docker://a dir:b":     "",
		"crane pull --ca-file x":                            "",
	} {
		args := strings.Fields(command)
		if got := ownRoots(kindOf(args[0]), args); got != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
}
