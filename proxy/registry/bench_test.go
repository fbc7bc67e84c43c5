// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"weir/proxy/store"
)

// discarded is an answer that nobody reads.
type discarded struct{ header http.Header }

func (d *discarded) Header() http.Header         { return d.header }
func (d *discarded) Write(b []byte) (int, error) { return len(b), nil }
func (d *discarded) WriteHeader(int)             {}

// BenchmarkKept answers requests for a manifest by digest and for a small blob, that
// are kept, without a network.
func BenchmarkKept(b *testing.B) {
	u := newUpstream(b)
	u.allow("a", "")
	config := u.put("a", bytesOf(1, 1<<10))
	m, _ := u.putManifest("a", "latest", docker2, config)
	s := newSide(b, u, store.Options{})
	up := Upstream{Host: strings.TrimPrefix(u.srv.URL, "https://"), Client: "10.0.0.1", Transport: u.srv.Client().Transport}
	for _, path := range []string{"/v2/a/manifests/" + m.String(), "/v2/a/blobs/" + config.String()} {
		s.do("GET", path, "")
		b.Run(strings.Split(path, "/")[3], func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r := httptest.NewRequestWithContext(b.Context(), "GET", path, nil)
				r.Host, r.Header["User-Agent"] = up.Host, []string{"containerd/2.4.2"}
				w := &discarded{make(http.Header)}
				s.h.Serve(w, r, up)
				if !strings.HasPrefix(w.header.Get("Cache-Status"), "weir; hit") {
					b.Fatal(w.header)
				}
			}
		})
	}
}
