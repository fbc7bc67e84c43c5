// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

const (
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	acceptsAll  = ociIndex + ", " + ociManifest + ", " + docker2 + ", application/vnd.docker.distribution.manifest.list.v2+json"
)

// image is what a tag is: an index, and the manifest in it for some platform.
type image struct {
	index, manifest digest.Digest
	bodies          map[digest.Digest][]byte
}

// heads are the ways in which what a registry says of a tag isn't what it gives. They
// return whether they have answered.
var heads = map[string]func(w http.ResponseWriter, r *http.Request, im image) bool{
	"no lie":            func(http.ResponseWriter, *http.Request, image) bool { return false },
	"HEAD: 405":         onHead(func(w http.ResponseWriter, _ image) { w.WriteHeader(http.StatusMethodNotAllowed) }),
	"HEAD: 404":         onHead(func(w http.ResponseWriter, _ image) { w.WriteHeader(http.StatusNotFound) }),
	"HEAD: empty 403":   onHead(func(w http.ResponseWriter, _ image) { w.WriteHeader(http.StatusForbidden) }),
	"HEAD: 403, a page": onHead(func(w http.ResponseWriter, _ image) { says(w, "text/html", "", 9); w.WriteHeader(http.StatusForbidden) }),
	"HEAD: 403": onHead(func(w http.ResponseWriter, _ image) {
		says(w, "application/json", "", 9)
		w.WriteHeader(http.StatusForbidden)
	}),
	"HEAD: no digest": onHead(func(w http.ResponseWriter, im image) { says(w, ociIndex, "", len(im.bodies[im.index])) }),
	"HEAD: another length": onHead(func(w http.ResponseWriter, im image) {
		says(w, ociIndex, im.index, 7)
	}),
	"HEAD: a digest that there isn't": onHead(func(w http.ResponseWriter, im image) {
		says(w, ociIndex, digest.FromString("nothing"), len(im.bodies[im.index]))
	}),
	"HEAD: the manifest of a platform": onHead(func(w http.ResponseWriter, im image) {
		says(w, ociManifest, im.manifest, len(im.bodies[im.manifest]))
	}),
	"GET: the digest of the manifest of a platform": func(w http.ResponseWriter, r *http.Request, im image) bool {
		if r.Method == http.MethodGet {
			says(w, ociIndex, im.manifest, len(im.bodies[im.index]))
			_, _ = w.Write(im.bodies[im.index])
		}
		return r.Method == http.MethodGet
	},
	"by what is accepted": func(w http.ResponseWriter, r *http.Request, im image) bool {
		d, mediaType := im.index, ociIndex
		if !strings.Contains(r.Header.Get("Accept"), ociIndex) {
			d, mediaType = im.manifest, ociManifest
		}
		says(w, mediaType, d, len(im.bodies[d]))
		if r.Method == http.MethodGet {
			_, _ = w.Write(im.bodies[d])
		}
		return true
	},
}

func onHead(answer func(http.ResponseWriter, image)) func(http.ResponseWriter, *http.Request, image) bool {
	return func(w http.ResponseWriter, r *http.Request, im image) bool {
		if r.Method == http.MethodHead {
			answer(w, im)
		}
		return r.Method == http.MethodHead
	}
}

func says(w http.ResponseWriter, mediaType string, d digest.Digest, length int) {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", fmt.Sprint(length))
	if d != "" {
		w.Header().Set("Docker-Content-Digest", d.String())
	}
}

// Whatever a registry says to HEAD, and to whom, a tag is what it is without weir, for
// those who begin with GET and those who begin with HEAD: again and again, when it has
// moved, while a tag isn't asked for, and when the registry is down.
func TestHeadsThatDiffer(t *testing.T) {
	const byTag, auth = "/v2/a/manifests/1", "Bearer 1"
	for name, lie := range heads {
		for _, begins := range []string{"GET", "HEAD"} {
			t.Run(name+", "+begins+" first", func(t *testing.T) {
				u := newUpstream(t)
				u.allow("a", auth, "Bearer anonymous")
				var im image
				push := func(what string) {
					im = image{bodies: make(map[digest.Digest][]byte)}
					var body []byte
					im.manifest, body = u.putManifest("a", "other", ociManifest, digest.FromString(what))
					im.bodies[im.manifest] = body
					im.index, body = u.putManifest("a", "1", ociIndex, im.manifest)
					im.bodies[im.index] = body
				}
				push("before")
				u.fault = func(w http.ResponseWriter, r *http.Request) bool {
					return r.URL.Path == byTag && r.Header.Get("Authorization") != "" && lie(w, r, im)
				}
				s := newSide(t, u, store.Options{})
				direct := func(method, path, accept string) answer {
					req, _ := http.NewRequest(method, u.srv.URL+path, nil)
					req.Header.Set("Authorization", auth)
					req.Header.Set("Accept", accept)
					resp, err := u.srv.Client().Do(req)
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close()
					b, err := io.ReadAll(resp.Body)
					return answer{resp, b, err}
				}
				same := func(when, method, path, accept string) {
					t.Helper()
					want, got := direct(method, path, accept), s.do(method, path, auth, "Accept", accept)
					if got.err != nil || got.StatusCode != want.StatusCode || !bytes.Equal(got.body, want.body) {
						t.Fatalf("%s: %s of %s: %v %v %q, want %s %q", when, method, path, got.Response, got.err, got.body, want.Status, want.body)
					}
					for _, field := range []string{"Content-Type", "Docker-Content-Digest", "Content-Length"} {
						lies := strings.HasPrefix(name, "GET") && field == "Docker-Content-Digest" // what is kept has its own
						if got.Header.Get(field) != want.Header.Get(field) && want.StatusCode == 200 && !lies && (method == "HEAD" || field != "Docker-Content-Digest" || want.Header.Get(field) != "") {
							t.Fatalf("%s: %s of %s: %s %q, want %q", when, method, path, field, got.Header.Get(field), want.Header.Get(field))
						}
					}
				}
				pull := func(when string) {
					t.Helper()
					get := func() { t.Helper(); same(when, "GET", byTag, acceptsAll) }
					head := func() {
						t.Helper()
						same(when, "HEAD", byTag, acceptsAll)
						if d := direct("HEAD", byTag, acceptsAll).Header.Get("Docker-Content-Digest"); d != "" {
							same(when, "GET", "/v2/a/manifests/"+d, acceptsAll)
						}
					}
					if begins == "HEAD" {
						head()
					}
					get()
					head()
					same(when, "GET", "/v2/a/manifests/"+im.manifest.String(), acceptsAll) // that of its platform
					same(when, "GET", byTag, ociManifest+", "+docker2)                     // an old client
					same(when, "HEAD", byTag, ociManifest+", "+docker2)
					get()
				}
				for _, when := range []string{"at first", "again", "when all is stored"} {
					pull(when)
					s.settle() // it is public now
				}
				push("after")
				pull("when it has moved")
				pull("when it has moved, again")
				s.later.Add(int64(time.Minute))
				s.h.tagTTL = TagTTL{"": time.Hour}
				same("with --tag-ttl", "GET", byTag, acceptsAll)
				same("with --tag-ttl", "GET", byTag, ociManifest)
				s.h.tagTTL = nil
				want := direct("GET", byTag, acceptsAll)
				u.mu.Lock()
				u.fault = faults["503"]
				u.mu.Unlock()
				if got := s.do("GET", byTag, auth, "Accept", acceptsAll); got.StatusCode == 200 && !bytes.Equal(got.body, want.body) || got.StatusCode != 200 && !strings.HasPrefix(name, "GET") {
					t.Errorf("when the registry is down: %s %q", got.Status, got.body)
				}
			})
		}
	}
}
