// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"weir/proxy/registry"
	"weir/test/lab"
)

// What a pull got, and from where, as `weir pulls` and the page show it. The
// page is looked at with a browser. WEIR_SCREENSHOTS names a directory that
// pictures of it go to.
func TestPage(t *testing.T) {
	w := newWorld(t)
	node := w.Node()
	a := node.Agent()
	docker := node.Docker()
	docker.Pull(flyway)
	docker.Remove(flyway)
	docker.Pull(flyway)
	containerd := node.NewestContainerd()
	containerd.Pull(renovate)

	var pulls []registry.Pull
	if err := json.Unmarshal([]byte(node.Run(lab.Weir(t), "pulls", "--json")), &pulls); err != nil {
		t.Fatal(err)
	}
	var bytes, store int64
	for _, p := range pulls {
		if p.Registry == "registry-1.docker.io" {
			bytes, store = bytes+p.Bytes, store+p.BytesFromStore
		}
		if p.Failed != 0 || p.Ended.IsZero() || !strings.Contains(p.Client, "pid ") {
			t.Errorf("%+v", p)
		}
	}
	if bytes < 2*w.flyway.Bytes || store < w.flyway.Bytes || store > bytes/2+100_000 {
		t.Errorf("%d bytes, %d of them from the store; the image has %d: %+v", bytes, store, w.flyway.Bytes, pulls)
	}
	if out := node.Run(lab.Weir(t), "pulls"); !strings.Contains(out, "docker.io/"+flyway) || !strings.Contains(out, "done") {
		t.Error(out)
	}

	browser := lab.Debian(t, "/usr/bin/chromium", "chromium")
	look := func(args ...string) string {
		t.Helper()
		out, err := node.Output(append([]string{"sh", "-c", `exec "$0" "$@" 2>/dev/null`, browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
			"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--user-data-dir=" + t.TempDir(), "--timeout=20000"}, append(args, "http://127.0.0.1:5050/")...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	dom := look("--dump-dom", "--virtual-time-budget=6000")
	for _, want := range []string{"docker.io/" + flyway, renovate, "intercepted", "dockerd", "not fetched from a registry", `<rect class="store"`, "</html>"} {
		if !strings.Contains(dom, want) {
			t.Errorf("the page has no %q:\n%s", want, dom)
		}
	}
	if strings.Contains(dom, `class="gone"`) {
		t.Error("the page's script could not reach the agent")
	}
	if dir := os.Getenv("WEIR_SCREENSHOTS"); dir != "" {
		for name, args := range map[string][]string{"wide": {"--window-size=1200,1400"}, "phone": {"--window-size=500,1400"}, "dark": {"--window-size=1200,1400", "--force-dark-mode", "--blink-settings=preferredColorScheme=0"}} {
			look(append(args, "--screenshot="+filepath.Join(dir, name+".png"))...)
		}
	}
	for _, path := range []string{"/page.css", "/page.js", "/api/pulls"} {
		if b, err := a.Get(context.Background(), path); err != nil || len(b) == 0 {
			t.Errorf("%s: %v", path, err)
		}
	}
	if b, err := a.Get(context.Background(), "/../ca/ca.key"); err == nil {
		t.Errorf("%d bytes of a file that is nobody's business", len(b))
	}
}

// An image is prefetched, and pulled without a byte of the registry's.
func TestPrefetch(t *testing.T) {
	w := newWorld(t)
	w.hub.User("alice", "wonderland")
	w.hub.Private("acme/secret", "alice")
	w.hub.Push("acme/secret:1", lab.Image{Layers: []int{700_000}, Seed: 3})
	node := w.Node()
	node.Agent()
	out := node.Run(lab.Weir(t), "prefetch", flyway, renovate)
	for _, want := range []string{"docker.io/" + flyway + "  is there", renovate + "  is there", "####################"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	w.forget()
	docker := node.Docker()
	docker.Pull(flyway)
	docker.Same(flyway, w.flyway)
	docker.Pull(renovate)
	for _, r := range []*lab.Registry{w.hub, w.ghcr} {
		if n := r.Log.BlobGETs(); n > 0 {
			t.Errorf("%s was asked for %d blobs:\n%s", r.Host, n, r.Log)
		}
	}
	// What can't be had is said, and doesn't keep the rest.
	for ref, want := range map[string]string{
		"acme/secret:1":                   "log in",
		"flyway/nothing:1":                "flyway/nothing",
		"registry.nowhere.example/a/b:1":  "is not a registry that weir knows",
		flyway + " --platform=plan9/mips": "there is none for plan9/mips",
	} {
		out, err := node.Output(append([]string{lab.Weir(t), "prefetch", renovate}, strings.Fields(ref)...)...)
		if err == nil || !strings.Contains(out+err.Error(), want) || !strings.Contains(out, renovate+"  is there") {
			t.Errorf("%s: %v\n%s", ref, err, out)
		}
	}
}
