// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"net/http"
	"testing"
)

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
