// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/test/lab"
)

// A registry that claims to have what is private elsewhere, in each way in which a
// registry can claim something. It has a good certificate, or no TLS, or is one
// that redirects every path without a look. What it claims it doesn't have, and so
// its clients get nothing of it out of weir: neither dockerd nor containerd nor a
// client of its own, whether it asks for a layer, the configuration or the
// manifest.
func TestLiar(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hub.User("alice", "wonderland")
	w.hub.Private("acme/secret", "alice")
	secret := w.hub.Push("acme/secret:1", lab.Image{Layers: []int{700_000}, Seed: 3})
	sizes := map[digest.Digest]int64{secret.Layers[0]: secret.Sizes[0], secret.Config: secret.Bytes - secret.Sizes[0]}
	own, _ := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": docker2,
		"config": map[string]any{"mediaType": "application/vnd.docker.container.image.v1+json", "digest": secret.Config, "size": sizes[secret.Config]},
		"layers": []any{map[string]any{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "digest": secret.Layers[0], "size": sizes[secret.Layers[0]]}},
	})
	// lies are what it sends instead of a digest's bytes: as many.
	lies := func(rw http.ResponseWriter, r *http.Request, d string) {
		size, ok := sizes[digest.Digest(d)]
		if !ok {
			size = 600
		}
		rw.Header().Set("Docker-Content-Digest", d)
		http.ServeContent(rw, r, "", time.Time{}, io.NewSectionReader(endless{}, 0, size))
	}
	ways := map[string]http.HandlerFunc{
		"has it": func(rw http.ResponseWriter, r *http.Request) { lies(rw, r, lastOf(r.URL.Path)) },
		"says so by HEAD": func(rw http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				rw.Header().Set("Content-Length", fmt.Sprint(sizes[digest.Digest(lastOf(r.URL.Path))]))
				rw.Header().Set("Docker-Content-Digest", lastOf(r.URL.Path))
				return
			}
			rw.WriteHeader(http.StatusNotFound)
		},
		"without ranges": func(rw http.ResponseWriter, r *http.Request) {
			r.Header.Del("Range")
			lies(rw, r, lastOf(r.URL.Path))
		},
		"redirects to itself": func(rw http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, "/cdn") {
				lies(rw, r, lastOf(r.URL.Path))
				return
			}
			http.Redirect(rw, r, "/cdn"+r.URL.Path, http.StatusTemporaryRedirect)
		},
		"redirects to the owner": func(rw http.ResponseWriter, r *http.Request) {
			http.Redirect(rw, r, "https://registry-1.docker.io/v2/acme/secret/blobs/"+lastOf(r.URL.Path), http.StatusTemporaryRedirect)
		},
		"redirects to nothing": func(rw http.ResponseWriter, r *http.Request) {
			http.Redirect(rw, r, "https://other.example/nothing", http.StatusTemporaryRedirect)
		},
		"a page for all": func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/login" {
				rw.Header().Set("Content-Type", "text/html")
				_, _ = io.WriteString(rw, "<html>log in</html>")
				return
			}
			http.Redirect(rw, r, "/login", http.StatusFound)
		},
	}
	var way atomic.Pointer[http.HandlerFunc]
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v2/":
		case strings.HasPrefix(r.URL.Path, "/v2/acme/lists/manifests/"):
			rw.Header().Set("Content-Type", docker2)
			rw.Header().Set("Docker-Content-Digest", digest.FromBytes(own).String())
			rw.Header().Set("Content-Length", fmt.Sprint(len(own)))
			if r.Method == http.MethodGet {
				_, _ = rw.Write(own)
			}
		case strings.HasSuffix(r.URL.Path, "/manifests/1"):
			rw.Header().Set("Content-Type", docker2)
			rw.Header().Set("Docker-Content-Digest", secret.Digest.String())
			lies(rw, r, secret.Digest.String())
		default:
			(*way.Load())(rw, r)
		}
	})
	w.HTTPS("evil.example", false, h)
	w.HTTPS("registry.k8s.io", false, h)
	w.HTTP("evil.lan", 5000, h)

	node := w.Node()
	agent := node.Agent("--registry", "evil.example")
	node.Docker().Pull("acme/secret:1", "alice", "wonderland")
	docker, containerd := node.Box().Docker("--insecure-registry=evil.lan:5000"), node.Box().Containerd()
	agent.Runtime(containerd.PID())
	crane := clientNamed(t, "crane")
	for name, f := range ways {
		way.Store(&f)
		for _, host := range []string{"evil.example", "registry.k8s.io", "http://evil.lan:5000"} {
			for path, kind := range map[digest.Digest]string{secret.Layers[0]: "blobs", secret.Config: "blobs", secret.Digest: "manifests"} {
				for _, kind := range []string{kind, "blobs"} {
					out, _ := node.Output(crane, "client", "raw", host, "acme/x", kind, path.String())
					if strings.Contains(out, "schemaVersion") || strings.Contains(out, "rootfs") || strings.Contains(out, "\x1f\x8b") {
						t.Errorf("%s: %s gave %s %s:\n%.300q", name, host, kind, path, out)
					}
				}
			}
			if host == "registry.k8s.io" && name != "has it" {
				continue // dockerd and containerd once more are enough
			}
			host = strings.TrimPrefix(host, "http://")
			for _, ref := range []string{host + "/acme/lists:1", host + "/acme/secret:1", host + "/acme/secret@" + secret.Digest.String()} {
				if docker.TryPull(ref) == nil {
					t.Errorf("%s: docker has got %s", name, ref)
				}
				if !strings.HasPrefix(host, "evil.lan") && containerd.TryPull(ref) == nil {
					t.Errorf("%s: containerd has got %s", name, ref)
				}
			}
		}
	}
	if s := agent.Status(); s.Connections.Intercepted < 50 {
		t.Errorf("%+v: the test was about what is intercepted", s.Connections)
	}
}

const docker2 = "application/vnd.docker.distribution.manifest.v2+json"

// endless are bytes that are in no image.
type endless struct{}

func (endless) ReadAt(p []byte, _ int64) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

func lastOf(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }
