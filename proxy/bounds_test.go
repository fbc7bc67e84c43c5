// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// Whoever has a registry of its own, without TLS, chooses its name. A name that
// can't be one isn't kept anywhere.
func TestLongHostIsNoRegistry(t *testing.T) {
	for n, registry := range map[int]bool{maxName: true, maxName + 7: false, 60_000: false} {
		h := peek(strings.NewReader("GET /v2/ HTTP/1.1\r\nHost: " + strings.Repeat("a", n) + "\r\n\r\n"))
		if h.protocol != plainHTTP || (h.registry != "") != registry {
			t.Errorf("a name of %d bytes: protocol %v, registry %.20q", n, h.protocol, h.registry)
		}
	}
}

// What a client sends before its request's body is held until the answer has been
// read: it has a bound, and what registries take has room in it.
func TestRequestHeadIsBounded(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, len(r.Header.Get("X")))
	}), MaxHeaderBytes: 2 << 20}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	for _, tt := range []struct{ size, status int }{
		{100_000, http.StatusOK},
		{200_000, http.StatusRequestHeaderFieldsTooLarge},
	} {
		c := s.dial()
		r := bufio.NewReader(c)
		for i, size := range []int{1, tt.size} { // the first has another bound
			go func() {
				_, _ = io.WriteString(c, fmt.Sprintf("GET /v2/ HTTP/1.1\r\nHost: a.test\r\nX: %s\r\n\r\n", strings.Repeat("x", size)))
			}()
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := []int{http.StatusOK, tt.status}[i]
			b, err := io.ReadAll(resp.Body)
			if resp.StatusCode != want || want == http.StatusOK && (err != nil || string(b) != fmt.Sprint(size)) {
				t.Errorf("a field of %d bytes: %s, %q, %v", size, resp.Status, b, err)
			}
		}
	}
}
