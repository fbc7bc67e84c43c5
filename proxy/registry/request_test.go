// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

func TestParsePath(t *testing.T) {
	d := digest.FromString("x")
	for path, want := range map[string]target{
		"/v2/library/alpine/manifests/3.20":            {kind: manifest, repo: "library/alpine", tag: "3.20"},
		"/v2/a/manifests/" + d.String():                {kind: manifest, repo: "a", digest: d},
		"/v2/a/b-c/d__e/blobs/" + d.String():           {kind: blob, repo: "a/b-c/d__e", digest: d},
		"/v2/blobs/manifests/manifests/latest":         {kind: manifest, repo: "blobs/manifests", tag: "latest"},
		"/v2/a/manifests/b/blobs/" + d.String():        {kind: blob, repo: "a/manifests/b", digest: d},
		"/v2/a/blobs/uploads/":                         {kind: uploads, repo: "a"},
		"/v2/a/blobs/uploads":                          {kind: uploads, repo: "a"},
		"/v2/a/blobs/uploads/1-2":                      {},
		"/v2":                                          {},
		"/v2/a/blobs/latest":                           {},
		"/v2/":                                         {kind: base},
		"/v2/a/manifests/":                             {},
		"/v2/A/manifests/x":                            {},
		"/v2/../a/manifests/x":                         {},
		"/v2//manifests/x":                             {},
		"/v2/a/manifests/.x":                           {},
		"/v2/a/manifests/" + strings.Repeat("x", 129):  {},
		"/v2/" + strings.Repeat("x", 256) + "/blobs/x": {},
		"/v2/a/blobs/sha256:zz":                        {},
		"/v2/a%2fb/manifests/x":                        {},
		"/v1/a/manifests/x":                            {},
		"/v2/a/manifests/x/y":                          {},
	} {
		if got := parsePath(path); got != want {
			t.Errorf("%s: %+v, want %+v", path, got, want)
		}
	}
}

// What a mirror has is kept, where it is told which registry's image it is asked for:
// what it has of one registry is not what it has of another, nor what it gives when
// none is named. A query that says more is passed on.
func TestMirrorOf(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	u.allow("of-quay/a", "")
	hub, quay := bytesOf(1, 2000), bytesOf(2, 2000)
	ofHub, ofQuay := "/v2/a/blobs/"+u.put("a", hub).String(), "/v2/a/blobs/"+u.put("of-quay/a", quay).String()
	_, manifest := u.putManifest("a", "1", docker2)
	u.putManifest("of-quay/a", "1", docker2)
	u.fault = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("ns") == "quay.io:443" {
			r.URL.Path = strings.Replace(r.URL.Path, "/v2/", "/v2/of-quay/", 1)
		}
		return false
	}
	s := newSide(t, u, store.Options{})
	for _, c := range []struct {
		path string
		code int
		body []byte
		asks bool
	}{
		{ofHub + "?ns=docker.io", 200, hub, true},
		{ofHub + "?ns=docker.io", 200, hub, false},
		{"/v2/a/manifests/1?ns=docker.io", 200, manifest, true},
		{ofHub + "?ns=quay.io%3A443", 404, nil, true},
		{ofQuay + "?ns=quay.io%3A443", 200, quay, true},
		{ofQuay + "?ns=quay.io%3A443", 200, quay, false},
		{ofQuay + "?ns=docker.io", 404, nil, true},
		{ofQuay, 404, nil, true},
		{ofHub + "?ns=docker.io&token=x", 200, hub, true},
		{ofHub + "?ns=docker.io&token=x", 200, hub, true},
		{ofHub + "?ns=docker.io/a", 200, hub, true},
		{ofHub + "?ns=docker.io/a", 200, hub, true},
	} {
		a := s.do("GET", c.path, "")
		if a.err != nil || a.StatusCode != c.code || c.body != nil && !bytes.Equal(a.body, c.body) {
			t.Errorf("%s: %v, %v, %d bytes", c.path, a.err, a.Status, len(a.body))
		}
		s.settle()
		if asked := u.requests(); (len(asked) > 0) != c.asks {
			t.Errorf("%s: the registry was asked %q", c.path, asked)
		}
	}
}

func FuzzOfMirror(f *testing.F) {
	f.Add("ns=docker.io")
	f.Add("ns=registry.example.com%3A5000&x")
	f.Fuzz(func(t *testing.T, query string) {
		name := repositoryName("a", query)
		repo, rest, ofMirror := strings.Cut(name, "?")
		values, err := url.ParseQuery(query)
		if repo != "a" || ofMirror && (rest != query || err != nil || len(values) != 1 || len(values["ns"]) != 1) {
			t.Errorf("%q: %q, %v", query, name, err)
		}
	})
}

func FuzzParsePath(f *testing.F) {
	f.Add("/v2/library/alpine/manifests/3.20")
	f.Add("/v2/a/blobs/" + digest.FromString("x").String())
	f.Add("/v2/manifests/blobs/manifests/blobs/x")
	f.Fuzz(func(t *testing.T, path string) {
		got := parsePath(path)
		switch got.kind {
		case blob:
			if path != "/v2/"+got.repo+"/blobs/"+got.digest.String() || got.digest.Validate() != nil {
				t.Errorf("%q: %+v", path, got)
			}
		case manifest:
			ref := got.tag
			if ref == "" {
				ref = got.digest.String()
			}
			if path != "/v2/"+got.repo+"/manifests/"+ref {
				t.Errorf("%q: %+v", path, got)
			}
		}
	})
}

// FuzzAccepts compares what a client accepts with what a manifest is.
func FuzzAccepts(f *testing.F) {
	f.Add("application/vnd.oci.image.index.v1+json, */*;q=0.1", []byte(`{"schemaVersion":2,"manifests":[]}`))
	f.Add("application/*", []byte(`{"schemaVersion":2,"config":{},"layers":[]}`))
	f.Add("", []byte(`{"schemaVersion":2,"mediaType":"a\r\nb"}`))
	f.Fuzz(func(t *testing.T, accept string, manifest []byte) {
		mt := mediaTypeOf(manifest)
		r := &http.Request{Header: http.Header{"Accept": {accept}}}
		if mt != "" && !accepts(&http.Request{}, mt) {
			t.Errorf("%q isn't accepted by who accepts everything", mt)
		}
		_ = accepts(r, mt)
	})
}
