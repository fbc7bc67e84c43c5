// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"weir/agent/admin"
	"weir/proxy/registry"
	"weir/test/lab"
)

const page = "http://127.0.0.1:5050/"

// What a pull got, and from where, as `weir pulls` and the page show it. The
// page is looked at with a browser.
func TestPage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.ghcr.Push("acme/later:1", lab.Image{Layers: []int{1000}, Seed: 3})
	node := w.Node()
	a := node.Agent()
	docker := node.Docker()
	docker.Pull(flyway)
	docker.Remove(flyway)
	docker.Pull(flyway)
	containerd := node.NewestContainerd()
	containerd.Pull(renovate)

	var pulls []registry.Pull
	// A pull ends just after its last byte has gone.
	if err := lab.Eventually(nil, func(context.Context) error {
		err := json.Unmarshal([]byte(node.Run(lab.Weir(t), "pulls", "--json")), &pulls)
		if err == nil && slices.ContainsFunc(pulls, func(p registry.Pull) bool { return p.Ended.IsZero() }) {
			err = fmt.Errorf("some run: %+v", pulls)
		}
		return err
	}); err != nil {
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

	b := node.Browser()
	b.Screen(1200, 1400, "light")
	b.Open(page, `!!document.querySelector("main svg rect.store")`)
	dom := b.Eval("document.documentElement.outerHTML").(string)
	for _, want := range []string{"docker.io/" + flyway, renovate, "intercepted", "dockerd", "not fetched from a registry"} {
		if !strings.Contains(dom, want) {
			t.Errorf("the page has no %q:\n%s", want, dom)
		}
	}
	// The script shows what is new by itself, and says so when it can't.
	containerd.Pull("ghcr.io/acme/later:1")
	b.Until(`document.body.innerText.includes("ghcr.io/acme/later:1")`)
	a.Kill()
	b.Until(`document.body.className == "gone"`)
	a.Start()
	b.Until(`document.body.className == ""`)
	if got := b.Eval(`document.querySelectorAll("nav").length`); got != 0.0 {
		t.Errorf("without peers it offers a cluster: %v", got)
	}
	for _, path := range []string{"", "api/status", "api/pulls", "metrics", "v2/"} {
		if code := node.Run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", "Host: evil.example", page+path); code != "421" {
			t.Errorf("a page that calls itself evil.example, at this address, gets %q with %s", path, code)
		}
	}
	for _, path := range []string{"/page.css", "/page.js", "/api/pulls"} {
		if b, err := a.Get(context.Background(), path); err != nil || len(b) == 0 {
			t.Errorf("%s: %v", path, err)
		}
	}
	if b, err := a.Get(context.Background(), "/../ca/ca.key"); err == nil {
		t.Errorf("%d bytes of a file that is not to be served", len(b))
	}
}

// The whole cluster on one node's page, and as JSON: what each node says of
// itself, added up, and no image's name. On a phone nothing is wider than the
// screen. WEIR_SCREENSHOTS names a directory that pictures go to.
func TestPageOfCluster(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	large := w.hub.Push("acme/large:1", lab.Image{Layers: []int{40 << 20, 10 << 20, 6 << 20}, Seed: 9})
	nodes, agents := cluster(t, w, 3)
	dockers := []*lab.Docker{nodes[0].Docker(), nodes[1].Docker(), nodes[2].Docker()}
	dockers[0].Pull(flyway)
	dockers[1].Pull(flyway)
	dockers[1].Remove(flyway)
	dockers[1].Pull(flyway)
	dockers[2].Pull(renovate)

	var c admin.Cluster
	ask := func(ctx context.Context, ok func() bool) error {
		b, err := agents[0].Get(ctx, "/api/cluster")
		for _, secret := range []string{"flyway/", "renovatebot", "10.11.0", w.flyway.Digest.Encoded()} {
			if bytes.Contains(b, []byte(secret)) {
				t.Errorf("nodes tell each other %q: %s", secret, b)
			}
		}
		c = admin.Cluster{}
		if err = errors.Join(err, json.Unmarshal(b, &c)); err == nil && !ok() {
			err = fmt.Errorf("%s", b)
		}
		return err
	}
	// What peers said is some seconds old.
	if err := lab.Eventually(nil, func(ctx context.Context) error {
		return ask(ctx, func() bool { return len(c.Nodes) == 3 && len(c.Registries) == 2 && c.Pulling == 0 })
	}); err != nil {
		t.Fatal(err)
	}
	var want []registry.Stats
	for _, a := range agents {
		for _, r := range a.Status().Registries {
			if i := slices.IndexFunc(want, func(o registry.Stats) bool { return o.Registry == r.Registry }); i >= 0 {
				want[i].Add(r)
			} else {
				want = append(want, r)
			}
		}
	}
	slices.SortFunc(want, func(a, b registry.Stats) int { return strings.Compare(a.Registry, b.Registry) })
	if !slices.Equal(c.Registries, want) {
		t.Errorf("%+v, want %+v", c.Registries, want)
	}
	if hub := c.Registries[1]; hub.BytesFromPeers < w.flyway.Bytes || hub.BytesFromStore < w.flyway.Bytes || hub.BytesFromUpstream > 2*w.flyway.Bytes {
		t.Errorf("%+v of an image of %d", hub, w.flyway.Bytes)
	}
	if c.Silent != 0 || c.Runtimes < 3 || c.Intercepted < 3 || len(c.History) == 0 {
		t.Errorf("%+v", c)
	}

	// A pull that runs while the page is open.
	b := nodes[0].Browser()
	nodes[0].Shape(4)
	running := make(chan error, 1)
	go func() { running <- dockers[0].TryPull("acme/large:1") }()
	pictures := os.Getenv("WEIR_SCREENSHOTS")
	for _, of := range []struct{ name, url, until string }{
		{"node", page, `!!document.querySelector("progress") && document.body.innerText.includes("acme/large:1")`},
		{"cluster", page + "?cluster", `document.body.innerText.includes("Nodes") && document.querySelectorAll("main table:last-of-type tr").length == 4`},
	} {
		for _, screen := range []struct {
			name, colours string
			width, height int
		}{{"desktop", "light", 1200, 1000}, {"desktop-dark", "dark", 1200, 1000}, {"phone", "light", 360, 780}, {"phone-dark", "dark", 390, 844}} {
			b.Screen(screen.width, screen.height, screen.colours)
			b.Open(of.url, of.until)
			if got := b.Eval("document.documentElement.scrollWidth"); got != float64(screen.width) {
				t.Errorf("%s on a screen of %d pixels is %v wide; too wide are %v", of.url, screen.width, got,
					b.Eval(`[...document.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 200))`))
			}
			// Nothing has a label and no value.
			if got := b.Eval(`[...document.querySelectorAll("td[data-l]")].filter(e => e.offsetHeight && !e.textContent.trim()).map(e => e.dataset.l).join()`); got != "" && screen.width < 600 {
				t.Errorf("%s has nothing to say for %v", of.url, got)
			}
			if background := b.Eval("getComputedStyle(document.body).backgroundColor"); (background == "rgb(255, 255, 255)") != (screen.colours == "light") {
				t.Errorf("in %s colours the background is %v", screen.colours, background)
			}
			if pictures != "" {
				b.Screenshot(filepath.Join(pictures, of.name+"-"+screen.name+".png"))
			}
		}
	}
	if pictures != "" {
		for name, args := range map[string][]string{"status": {"status"}, "pulls": {"pulls"}} {
			if err := os.WriteFile(filepath.Join(pictures, name+".txt"), []byte(nodes[0].Run(append([]string{lab.Weir(t)}, args...)...)), 0o644); err != nil {
				t.Error(err)
			}
		}
	}
	nodes[0].Shape(10_000)
	if err := <-running; err != nil {
		t.Error(err)
	}
	dockers[0].Same("acme/large:1", large)

	// A node that is gone is in the sums no longer; one that hangs keeps none
	// from looking.
	agents[1].Kill()
	agents[2].Signal(syscall.SIGSTOP)
	defer agents[2].Signal(syscall.SIGCONT)
	if err := lab.Eventually(nil, func(ctx context.Context) error {
		return ask(ctx, func() bool {
			return !slices.ContainsFunc(c.Nodes, func(n admin.NodeFigures) bool { return strings.HasPrefix(n.Address, nodes[1].Addr().String()+":") })
		})
	}); err != nil {
		t.Error(err)
	}
}

// An image is prefetched, and pulled without a byte of the registry's.
func TestPrefetch(t *testing.T) {
	t.Parallel()
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
	// By a socket that is root's; the address for status and metrics is no way in.
	if out, err := node.Output("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:5050/v2/flyway/flyway/manifests/10.11.0"); err != nil || out != "404" {
		t.Errorf("%v: %s", err, out)
	}
	if out := node.Run("stat", "-c", "%U %a", "/run/weir/prefetch.sock"); strings.TrimSpace(out) != "root 600" {
		t.Errorf("the socket is %s", out)
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
	// With the user's login a private image too, by what is in the file itself
	// or by a helper. It is served to no other client for that.
	w.hub.Push("acme/secret:2", lab.Image{Layers: []int{600_000}, Seed: 4})
	login := func(password string) string {
		return `{"auths":{"https://index.docker.io/v1/":{"auth":"` + base64.StdEncoding.EncodeToString([]byte("alice:"+password)) + `"}}}`
	}
	node.WriteFile("/var/lib/home/.docker/config.json", login("wonderland"))
	node.Run(lab.Weir(t), "prefetch", "acme/secret:1")
	node.WriteFile("/var/lib/home/bin/docker-credential-lab", "#!/bin/sh\necho '{\"Username\":\"alice\",\"Secret\":\"wonderland\"}'\n")
	node.Run("chmod", "+x", "/var/lib/home/bin/docker-credential-lab")
	node.WriteFile("/var/lib/home/.docker/config.json", `{"credHelpers":{"docker.io":"lab"}}`)
	node.Run("env", "PATH=/var/lib/home/bin:/usr/bin:/bin", lab.Weir(t), "prefetch", "acme/secret:2")
	w.forget()
	for _, ref := range []string{"acme/secret:1", "acme/secret:2"} {
		for who, login := range map[string][]string{"anonymous": nil, "another": {"mallory", "guess"}} {
			if docker.TryPull(ref, login...) == nil {
				t.Errorf("%s got %s, which was prefetched for alice", who, ref)
			}
		}
		docker.Pull(ref, "alice", "wonderland")
	}
	if n := w.hub.Log.BlobGETs(); n > 0 {
		t.Errorf("%d blobs were fetched:\n%s", n, w.hub.Log)
	}
	node.WriteFile("/var/lib/home/.docker/config.json", login("guess"))
	if out, err := node.Output(lab.Weir(t), "prefetch", "acme/secret:1"); err == nil || !strings.Contains(out, "logging in at") || strings.Contains(out, "guess") {
		t.Errorf("with a wrong password: %v\n%s", err, out)
	}
	node.Run("rm", "/var/lib/home/.docker/config.json")
	// What can't be had is said, and doesn't keep the rest.
	for ref, want := range map[string]string{
		"acme/secret:1":                   "docker login docker.io",
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
