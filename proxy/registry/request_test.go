// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
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

func FuzzRangeStart(f *testing.F) {
	for _, s := range []string{"", "bytes=0-", "bytes=5-9", "bytes=-5", "bytes=1-2,4-5", "lines=1-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, _ := rangeStart(s); n < 0 {
			t.Error(n)
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
