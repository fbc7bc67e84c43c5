// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"io"
	"net/http"
	"testing"
)

// BenchmarkBody reads a blob as the store does.
func BenchmarkBody(b *testing.B) {
	w := newWorld(b)
	blob, buf := make([]byte, 64<<20), make([]byte, 64<<10)
	s := w.serve("127.0.0.1", 0, w.ca, func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write(blob) })
	tr := w.egress.Transport(s.target())
	b.SetBytes(int64(len(blob)))
	for b.Loop() {
		req, _ := http.NewRequestWithContext(b.Context(), "GET", s.target().url(), nil)
		resp, err := tr.RoundTrip(req)
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{resp.Body}, buf)
		if err != nil || n != int64(len(blob)) {
			b.Fatal(n, err)
		}
		resp.Body.Close()
	}
}

// BenchmarkRequest asks a registry that has a connection.
func BenchmarkRequest(b *testing.B) {
	w := newWorld(b)
	s := w.serve("127.0.0.1", 0, w.ca, func(http.ResponseWriter, *http.Request) {})
	tr := w.egress.Transport(s.target())
	b.ReportAllocs()
	for b.Loop() {
		req, _ := http.NewRequestWithContext(b.Context(), "GET", s.target().url(), nil)
		resp, err := tr.RoundTrip(req)
		if err != nil {
			b.Fatal(err)
		}
		resp.Body.Close()
	}
}
