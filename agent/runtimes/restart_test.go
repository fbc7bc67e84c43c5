// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"weir/agent/procfs"
	"weir/agent/systemd"
)

// fakeServices are services of which every process is the main one of one.
type fakeServices struct {
	service   systemd.Service
	find      error
	restart   error
	restarted []string
}

func (f *fakeServices) Find(context.Context, int) (systemd.Service, error) { return f.service, f.find }

func (f *fakeServices) Restart(_ context.Context, name string) error {
	f.restarted = append(f.restarted, name)
	return f.restart
}

func newRestarter(t *testing.T, f *fakeServices, file string) *Restarter {
	t.Helper()
	return NewRestarter(f, file, slog.New(slog.DiscardHandler))
}

func runtimeOf(program string) *Runtime {
	return &Runtime{Process: procfs.Process{PID: os.Getpid()}, kind: kindOf(program)}
}

// A runtime is restarted once in a boot, also when the agent is restarted itself.
func TestRestartOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "restarts.json")
	f := &fakeServices{service: systemd.Service{Name: "containerd.service", KeepsOthers: true}}
	r := newRestarter(t, f, file)
	rt := runtimeOf("containerd")
	if s, err := r.Plan(t.Context(), rt); err != nil || s.Name != "containerd.service" {
		t.Fatal(s, err)
	}
	if done, err := r.restart(t.Context(), rt, "because"); !done || err != nil {
		t.Fatal(done, err)
	}
	refused := func(r *Restarter, want string) {
		t.Helper()
		if done, err := r.restart(t.Context(), rt, "because"); done || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, %v, want %q", done, err, want)
		}
	}
	refused(r, "since the machine was booted")
	refused(newRestarter(t, f, file), "since the machine was booted")
	if !slices.Equal(f.restarted, []string{"containerd.service"}) {
		t.Errorf("%q were restarted", f.restarted)
	}
	if all := newRestarter(t, f, file).All(); len(all) != 1 || !all[0].Done || all[0].Reason != "because" || all[0].Runtime != "containerd" || all[0].At.IsZero() {
		t.Errorf("%+v", all)
	}
	// Another service may be, and this one after the next boot.
	f.service.Name = "crio.service"
	if done, err := r.restart(t.Context(), runtimeOf("crio"), "because"); !done {
		t.Error(err)
	}
	f.service.Name = "containerd.service"
	r = newRestarter(t, f, file)
	r.boot = "the next"
	if done, err := r.restart(t.Context(), rt, "because"); !done {
		t.Error(err)
	}
	if len(f.restarted) != 3 || len(r.All()) != 3 {
		t.Errorf("%q, %+v", f.restarted, r.All())
	}
}

// After a restart that has failed, or of which it isn't known how it ended, nothing is
// restarted, in later boots neither, until a person has looked.
func TestNoRestartAfterFailure(t *testing.T) {
	dir := t.TempDir()
	f := &fakeServices{service: systemd.Service{Name: "containerd.service", KeepsOthers: true}, restart: errors.New("it does not start")}
	file := filepath.Join(dir, "failed.json")
	if done, err := newRestarter(t, f, file).restart(t.Context(), runtimeOf("containerd"), "because"); done || err == nil {
		t.Fatal(done, err)
	}
	f.restart = nil
	interrupted := filepath.Join(dir, "interrupted.json")
	if err := os.WriteFile(interrupted, []byte(`[{"service":"docker.service","boot":"before","at":"2026-01-01T00:00:00Z"}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(dir, "garbage.json")
	if err := os.WriteFile(garbage, []byte("["), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{file: "it does not start", interrupted: "the agent ended meanwhile", garbage: "it isn't known"} {
		r := newRestarter(t, f, file)
		r.boot = "the next"
		done, err := r.restart(t.Context(), runtimeOf("crio"), "because")
		if done || err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%v, %v, want %q and the file's name", done, err, want)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if done, err := newRestarter(t, f, file).restart(t.Context(), runtimeOf("crio"), "because"); !done {
			t.Errorf("after a person has removed the file: %v", err)
		}
	}
	if len(f.restarted) != 4 {
		t.Errorf("%q were restarted", f.restarted)
	}
	// What can't be noted is not done.
	if done, err := newRestarter(t, f, filepath.Join(dir, "none", "x.json")).restart(t.Context(), runtimeOf("crio"), "because"); done || err == nil || len(f.restarted) != 4 {
		t.Errorf("%v, %v, %q", done, err, f.restarted)
	}
}

// What would end more than the runtime is left as it is.
func TestNoRestart(t *testing.T) {
	keeping := systemd.Service{Name: "x.service", KeepsOthers: true}
	along := systemd.Service{Name: "x.service", KeepsOthers: true, Along: []string{"docker.service"}}
	for _, c := range []struct {
		program string
		service systemd.Service
		find    error
		want    string
	}{
		{"containerd", keeping, nil, ""},
		{"containerd", systemd.Service{Name: "x.service"}, nil, "KillMode"},
		{"containerd", along, nil, "docker.service would be restarted"},
		{"containerd", keeping, errors.New("it is a part of k3s.service"), "k3s"},
		{"crio", systemd.Service{Name: "x.service"}, nil, ""},
		{"crio", along, nil, "docker.service would be restarted"},
		{"buildkitd", keeping, nil, "restarts no buildkitd"},
		{"dockerd", keeping, nil, "asking it for its containers"}, // no dockerd answers
	} {
		rt := runtimeOf(c.program)
		f := &fakeServices{service: c.service, find: c.find}
		_, err := newRestarter(t, f, filepath.Join(t.TempDir(), "restarts.json")).Plan(t.Context(), rt)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.program, err, c.want)
		}
		if len(f.restarted) > 0 {
			t.Errorf("%s was restarted", c.program)
		}
	}
}

// A dockerd is restarted if its containers outlive that, or it runs none, and no build.
func TestRestartDocker(t *testing.T) {
	for _, c := range []struct {
		info    string
		service systemd.Service
		child   bool
		want    string
	}{
		{`{"ContainersRunning":0}`, systemd.Service{}, false, ""},
		{`{"ContainersRunning":2}`, systemd.Service{KeepsOthers: true}, false, "2 containers, and has no live-restore"},
		{`{"ContainersPaused":1}`, systemd.Service{KeepsOthers: true}, false, "1 containers"},
		{`{"ContainersRunning":2,"LiveRestoreEnabled":true}`, systemd.Service{KeepsOthers: true}, false, ""},
		{`{"ContainersRunning":2,"LiveRestoreEnabled":true}`, systemd.Service{Name: "docker.service"}, false, "docker.service, whose KillMode"},
		{`no`, systemd.Service{}, false, "asking it"},
		{`{"ContainersRunning":0}`, systemd.Service{}, true, "sleep"},
	} {
		rt := fakeDocker(t, c.info)
		if c.child {
			cmd := exec.Command("sleep", "1000")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		}
		if err := keepsContainers(t.Context(), rt, c.service); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s, %+v: %v, want %q", c.info, c.service, err, c.want)
		}
	}
}

// fakeDocker is a dockerd whose API says info of itself.
func fakeDocker(t *testing.T, info string) *Runtime {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Api-Version", "1.45")
		if strings.HasSuffix(r.URL.Path, "/info") {
			_, _ = io.WriteString(w, info)
		}
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	return &Runtime{Process: procfs.Process{PID: os.Getpid()}, kind: &kind{name: "dockerd", sockets: []string{sock}}}
}

// What a pod runs, and what ends by itself, is not restarted, nor said to need it.
func TestRestartIsOfNode(t *testing.T) {
	f := &fakeServices{service: systemd.Service{Name: "x.service", KeepsOthers: true}}
	rs := &Runtimes{o: Options{Restarter: newRestarter(t, f, filepath.Join(t.TempDir(), "restarts.json")), Log: slog.New(slog.DiscardHandler)}}
	for _, c := range []struct {
		program       string
		onNode, helps bool
		ended         bool
	}{{"containerd", false, false, false}, {"crane", true, false, false}, {"containerd", true, true, true}} {
		rt := runtimeOf(c.program)
		rt.onNode, rt.reach = c.onNode, ReachPassthrough
		var end context.CancelFunc
		rt.ctx, end = context.WithCancel(t.Context())
		if c.ended {
			end()
		}
		rs.restartLater(rt, "because")
		rs.wg.Wait()
		end()
		if rt.restartHelps != c.helps || len(f.restarted) > 0 {
			t.Errorf("%+v: %v, %q were restarted", c, rt.restartHelps, f.restarted)
		}
	}
}
