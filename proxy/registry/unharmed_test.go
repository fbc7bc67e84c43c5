// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// A client whose way to the registry gives no answer doesn't hold up the others
// who want the same blob.
func TestLeaderHangs(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Bearer slow", "Bearer fast")
	want := bytesOf(8, 300_000)
	path := "/v2/a/blobs/" + u.put("a", want).String()
	begun := make(chan struct{})
	u.fault = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || r.Header.Get("Authorization") != "Bearer slow" {
			return false
		}
		close(begun)
		<-r.Context().Done()
		return true
	}
	s := newSide(t, u, store.Options{})
	s.h.lagTime = 10 * time.Millisecond
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, s.srv.URL+path, nil)
		req.Header.Set("Authorization", "Bearer slow")
		if resp, err := http.DefaultTransport.RoundTrip(req); err == nil {
			resp.Body.Close()
			t.Error("the slow one has an answer")
		}
	}()
	<-begun
	if a := s.do("GET", path, "Bearer fast"); a.err != nil || !bytes.Equal(a.body, want) {
		t.Errorf("%v, %v", a.Response, a.err)
	}
	u.srv.CloseClientConnections()
	<-ended
}

// That a registry fails a HEAD, which was weir's and not the client's, is not
// the client's answer.
func TestOwnHeadFails(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Bearer 1")
	_, body := u.putManifest("a", "v1", docker2)
	u.fault = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodHead {
			panic(http.ErrAbortHandler)
		}
		return false
	}
	s := newSide(t, u, store.Options{})
	for i := range 3 {
		s.later.Add(int64(2 * DefaultRightsTTL)) // so that nothing can be served without
		s.settle()
		if a := s.do("GET", "/v2/a/manifests/v1", "Bearer 1"); a.err != nil || !bytes.Equal(a.body, body) {
			t.Errorf("%d: %v %v", i, a.Response, a.err)
		}
	}
}

// Answers whose bytes are encoded though that wasn't asked for, or for HEAD too.
func TestEncoded(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	d, body := u.putManifest("a", "v1", docker2)
	blob := bytes.Repeat([]byte("config "), 1000)
	path := "/v2/a/blobs/" + u.put("a", blob).String()
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		content := body
		w.Header().Set("Content-Type", docker2)
		if strings.Contains(r.URL.Path, "/blobs/") {
			content = blob
			w.Header().Set("Content-Type", "application/octet-stream")
		} else {
			w.Header().Set("Docker-Content-Digest", d.String())
		}
		w.Header().Set("Content-Encoding", "gzip")
		if r.Method == http.MethodGet {
			zw := gzip.NewWriter(w)
			_, _ = zw.Write(content)
			zw.Close()
		}
		return true
	}
	s := newSide(t, u, store.Options{})
	for i := range 3 {
		for path, want := range map[string][]byte{"/v2/a/manifests/v1": body, path: blob} {
			resp, err := http.Get(s.srv.URL + path) // which decodes, as Docker does
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d: %s: %s, %d bytes, %v", i, path, resp.Status, len(got), err)
			}
		}
	}
}

// Whether the registry has a blob, which those ask who push, is for it to say.
func TestLostByRegistry(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Basic 1")
	d := u.put("a", bytesOf(1, 1000))
	s := newSide(t, u, store.Options{})
	path := "/v2/a/blobs/" + d.String()
	s.want(s.do("GET", path, "Basic 1"), 200, nil, "GET "+path)
	u.mu.Lock()
	delete(u.blobs["a"], d)
	u.mu.Unlock()
	s.want(s.do("HEAD", path, "Basic 1"), 404, nil, "HEAD "+path)
}

// A signed manifest of schema 1 isn't what its digest is of.
func TestSchema1(t *testing.T) {
	payload := "{\n   \"schemaVersion\": 1,\n   \"name\": \"a\"\n}"
	signed := strings.TrimSuffix(payload, "\n}") + ",\n   \"signatures\": []\n}"
	d := digest.FromString(payload)
	u := newUpstream(t)
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
		w.Header().Set("Docker-Content-Digest", d.String())
		_, _ = io.WriteString(w, signed)
		return true
	}
	s := newSide(t, u, store.Options{})
	for _, ref := range []string{"v1", d.String(), "v1"} {
		if a := s.do("GET", "/v2/a/manifests/"+ref, ""); a.err != nil || a.StatusCode != 200 || string(a.body) != signed {
			t.Errorf("%s: %v %v", ref, a.Response, a.err)
		}
	}
}

// The head of an answer comes when the registry's has come, and not with the
// first byte: clients wait less for the one than for the other.
func TestHeadFirst(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	want := bytesOf(8, 300_000)
	path := "/v2/a/blobs/" + u.put("a", want).String()
	headed := make(chan struct{})
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(want)))
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		select {
		case <-headed:
		case <-r.Context().Done():
			return true
		}
		_, _ = w.Write(want)
		return true
	}
	s := newSide(t, u, store.Options{})
	resp, err := http.Get(s.srv.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	close(headed)
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// What the registry doesn't say isn't guessed.
func TestNoContentType(t *testing.T) {
	u := newUpstream(t)
	u.fault = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header()["Content-Type"] = nil
		_, _ = io.WriteString(w, `{"schemaVersion":2}`)
		return true
	}
	s := newSide(t, u, store.Options{})
	if ct, ok := s.do("GET", "/v2/a/manifests/v1", "").Header["Content-Type"]; ok {
		t.Errorf("%q was added", ct)
	}
}

// What isn't kept is asked for as long as its client is there: when that has left,
// the registry is not waited for.
func TestClientLeavesWhatIsNotKept(t *testing.T) {
	for name, header := range map[string]http.Header{
		"no room": {},
		"a page":  {"Content-Type": {"text/html"}},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			u.allow("a", "")
			d := u.put("a", bytesOf(1, 100_000))
			gone := make(chan struct{})
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodGet {
					return false
				}
				maps.Copy(w.Header(), header)
				w.Header().Set("Content-Length", "100000")
				_, _ = w.Write(bytesOf(1, 100_000)[:50_000])
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
				close(gone)
				panic(http.ErrAbortHandler)
			}
			s := newSide(t, u, store.Options{MaxBytes: 50_000})
			ctx, leave := context.WithCancel(t.Context())
			req, _ := http.NewRequestWithContext(ctx, http.MethodGet, s.srv.URL+"/v2/a/blobs/"+d.String(), nil)
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			// So much that what comes next is waited for.
			if _, err := io.ReadFull(resp.Body, make([]byte, 45_000)); err != nil {
				t.Fatal(err)
			}
			leave()
			select {
			case <-gone:
			case <-time.After(10 * time.Second):
				t.Error("the registry is still waited for")
				u.srv.Listener.Close() // or it would be asked again
				u.srv.CloseClientConnections()
			}
		})
	}
}
