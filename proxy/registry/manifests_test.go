// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

func TestManifests(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	d, body := u.putManifest("a", "v1", docker2)
	s := newSide(t, u, store.Options{})
	byTag, byDigest := "/v2/a/manifests/v1", "/v2/a/manifests/"+d.String()

	a := s.do("GET", byTag, "", "Accept", docker2)
	s.want(a, 200, body, "GET "+byTag)
	// From now on the tag costs a HEAD, and the digest nothing.
	for range 2 {
		a = s.do("GET", byTag, "", "Accept", docker2)
		s.want(a, 200, body, "HEAD "+byTag)
		if a.Header.Get("Content-Type") != docker2 || a.Header.Get("Docker-Content-Digest") != d.String() || a.ContentLength != int64(len(body)) {
			t.Error(a.Header)
		}
	}
	a = s.do("GET", byDigest, "", "Accept", docker2+", */*;q=0.1")
	s.want(a, 200, body)
	if a.Header.Get("Content-Type") != docker2 {
		t.Error(a.Header)
	}
	s.want(s.do("HEAD", byDigest, ""), 200, []byte{})
	s.want(s.do("HEAD", byTag, ""), 200, []byte{}, "HEAD "+byTag)
	// A client that doesn't take this type gets the upstream's answer.
	s.want(s.do("GET", byDigest, "", "Accept", "application/vnd.oci.image.index.v1+json"), 200, body, "GET "+byDigest)

	// A moved tag is seen at once.
	_, body2 := u.putManifest("a", "v1", docker2, digest.FromString("new"))
	s.want(s.do("GET", byTag, "", "Accept", docker2), 200, body2, "HEAD "+byTag, "GET "+byTag)
	s.want(s.do("GET", byTag, "", "Accept", docker2), 200, body2, "HEAD "+byTag)
}

func TestManifestCompressed(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	d, body := u.putManifest("a", "v1", docker2)
	var z bytes.Buffer
	zw := gzip.NewWriter(&z)
	_, _ = zw.Write(body)
	zw.Close()
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || r.Header.Get("Accept-Encoding") != "gzip" {
			return false
		}
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Content-Type", docker2)
		w.Header().Set("Docker-Content-Digest", d.String())
		_, _ = w.Write(z.Bytes())
		return true
	}
	s := newSide(t, u, store.Options{})
	path := "/v2/a/manifests/" + d.String()
	a := s.do("GET", path, "", "Accept-Encoding", "gzip")
	s.want(a, 200, z.Bytes(), "GET "+path)
	s.want(s.do("GET", path, ""), 200, body)
}

func FuzzMediaType(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"manifests":[]}`))
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"a/b","config":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if mt := mediaTypeOf(b); strings.ContainsAny(mt, "\r\n") {
			t.Errorf("%q", mt)
		}
	})
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

// A manifest that is announced to be longer than those that are kept passes as it
// comes: clients that take none of that length refuse it by its head.
func TestManifestTooLong(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	come := make(chan struct{})
	u.fault = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", docker2)
		w.Header().Set("Content-Length", strconv.Itoa(maxManifest+1))
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		<-come
		_, _ = w.Write(bytes.Repeat([]byte(" "), maxManifest+1))
		return true
	}
	s := newSide(t, u, store.Options{})
	resp, err := http.Get(s.srv.URL + "/v2/a/manifests/1")
	close(come)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); n != maxManifest+1 || err != nil {
		t.Errorf("%d bytes, err %v", n, err)
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

// A registry that redirects its manifests as well as its blobs, without a look, and
// knows nothing itself: what its tags are is learned from where it redirects to, and
// outlives it and that.
func TestManifestsRedirected(t *testing.T) {
	u := newUpstream(t)
	u.allow("pause", "Bearer anonymous", "Bearer 1")
	content := bytesOf(3, 5000)
	layer := u.put("pause", content)
	m, body := u.putManifest("pause", "3.10", docker2, layer)
	redirects := func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/cdn/") && strings.Contains(r.URL.Path, "/manifests/") {
			w.Header().Set("Docker-Content-Digest", m.String())
		}
		if !strings.HasPrefix(r.URL.Path, "/v2/pause/") {
			return false
		}
		w.Header().Set("Location", strings.Replace(u.srv.URL, "127.0.0.1", "localhost", 1)+"/cdn"+r.URL.Path)
		w.WriteHeader(http.StatusTemporaryRedirect)
		return true
	}
	u.fault = redirects
	s := newSide(t, u, store.Options{})
	byTag, byDigest, blob := "/v2/pause/manifests/3.10", "/v2/pause/manifests/"+m.String(), "/v2/pause/blobs/"+layer.String()
	s.want(s.do("HEAD", byTag, "", "Accept", docker2), 200, []byte{}, "HEAD "+byTag, "HEAD /cdn"+byTag)
	s.want(s.do("GET", byTag, "", "Accept", docker2), 200, body, "GET "+byTag, "GET /cdn"+byTag)
	s.want(s.do("GET", byTag, "", "Accept", docker2), 200, body, "HEAD "+byTag, "HEAD /cdn"+byTag)
	s.want(s.do("GET", byDigest, "", "Accept", docker2), 200, body)
	s.want(s.do("GET", blob, ""), 200, content, "GET "+blob, "GET /cdn"+blob)
	s.settle()
	for name, fault := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"down": faults["503"],
		"its back end is down": func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasPrefix(r.URL.Path, "/cdn/") {
				return faults["503"](w, r)
			}
			return redirects(w, r)
		},
	} {
		u.mu.Lock()
		u.fault = fault
		u.mu.Unlock()
		for path, want := range map[string][]byte{byTag: body, byDigest: body, blob: content} {
			if a := s.do("GET", path, "Bearer another"); a.err != nil || a.StatusCode != 200 || !bytes.Equal(a.body, want) {
				t.Errorf("%s: %s: %v, %v", name, path, a.Response, a.err)
			}
		}
	}
	// What it redirects to is refused there: the redirect is the client's to follow.
	u.mu.Lock()
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/cdn/") {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return redirects(w, r)
	}
	u.mu.Unlock()
	for _, method := range []string{"GET", "HEAD"} {
		if a := s.do(method, byTag, "", "Accept", docker2); a.StatusCode != http.StatusTemporaryRedirect || a.Header.Get("Location") == "" {
			t.Errorf("%s: %s %v", method, a.Status, a.Header)
		}
	}
}
