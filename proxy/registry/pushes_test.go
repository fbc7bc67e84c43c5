// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// uploading makes an upstream take uploads, as the distribution registry does.
// refuse may answer instead.
func uploading(u *scripted, refuse func(http.ResponseWriter, *http.Request) bool) {
	var got []byte
	n := 0
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if refuse != nil && refuse(w, r) {
			return true
		}
		body, _ := io.ReadAll(r.Body)
		switch {
		case r.Method == http.MethodPost && r.URL.Query().Get("mount") != "":
			w.WriteHeader(http.StatusCreated)
		case r.Method == http.MethodPost && r.URL.Query().Get("digest") != "" && !strings.Contains(r.URL.Path, "/single/"):
			got = body
			w.WriteHeader(http.StatusCreated)
		case r.Method == http.MethodPost, r.Method == http.MethodPatch:
			if r.Method == http.MethodPost {
				got = nil
			}
			got = append(got, body...)
			n++
			w.Header().Set("Location", fmt.Sprintf("/v2/a/blobs/uploads/session-%d?_state=x", n))
			w.WriteHeader(http.StatusAccepted)
		case r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/uploads/"):
			got = append(got, body...)
			if digest.FromBytes(got).String() != r.URL.Query().Get("digest") {
				w.WriteHeader(http.StatusBadRequest)
				return true
			}
			u.put("a", got)
			w.WriteHeader(http.StatusCreated)
		case r.Method == http.MethodPut:
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(body).String())
			w.WriteHeader(http.StatusCreated)
		default:
			return false
		}
		return true
	}
}

// send sends a request with a body and returns the answer.
func (s *side) send(method, path string, body []byte) answer {
	s.t.Helper()
	req, err := http.NewRequest(method, s.srv.URL+path, bytes.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp, b, err}
}

// left are the files of unfinished uploads.
func (s *side) left() []string {
	names, err := filepath.Glob(filepath.Join(s.dir, "ingest", "*"))
	if err != nil {
		s.t.Fatal(err)
	}
	return names
}

// Every way to push a blob leaves it in the store, and nothing else there.
func TestPush(t *testing.T) {
	content := bytesOf(1, 300_000)
	d := digest.FromBytes(content)
	ways := map[string]func(s *side) answer{
		"in one request": func(s *side) answer {
			return s.send("POST", "/v2/a/blobs/uploads/?digest="+d.String(), content)
		},
		"a post and a put": func(s *side) answer {
			a := s.send("POST", "/v2/a/blobs/uploads/", nil)
			return s.send("PUT", a.Header.Get("Location")+"&digest="+d.String(), content)
		},
		"in chunks": func(s *side) answer {
			a := s.send("POST", "/v2/a/blobs/uploads/", nil)
			a = s.send("PATCH", a.Header.Get("Location"), content[:100_000])
			a = s.send("PATCH", a.Header.Get("Location"), content[100_000:])
			return s.send("PUT", a.Header.Get("Location")+"&digest="+d.String(), nil)
		},
		"the last chunk with the end": func(s *side) answer {
			a := s.send("POST", "/v2/a/blobs/uploads/", nil)
			a = s.send("PATCH", a.Header.Get("Location"), content[:100_000])
			return s.send("PUT", a.Header.Get("Location")+"&digest="+d.String(), content[100_000:])
		},
	}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			u.allow("a", "")
			u.put("a", content)
			s := newSide(t, u, store.Options{})
			uploading(u, nil)
			if a := way(s); a.err != nil || a.StatusCode != 201 {
				t.Fatal(a.Response, a.err)
			}
			if b, err := s.store.Get(d); err != nil {
				t.Error(err)
			} else {
				got, err := io.ReadAll(b.Reader())
				b.Close()
				if err != nil || !bytes.Equal(got, content) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
			if left := s.left(); len(left) > 0 || len(s.h.sessions.all) > 0 {
				t.Error(left, s.h.sessions.all)
			}
			// It needs a right to read, and no blob from the upstream but a range.
			u.requests()
			path := "/v2/a/blobs/" + d.String()
			s.want(s.do("GET", path, ""), 200, content, "GET "+path)
			if a := s.do("GET", path, ""); a.Header.Get("Cache-Status") != "weir; hit" {
				t.Error(a.Header)
			}

			// And once more in vain: it is there already.
			if a := way(s); a.err != nil || a.StatusCode != 201 || len(s.left()) > 0 {
				t.Error(a.Response, a.err, s.left())
			}
		})
	}
}

// A push that fails keeps nothing, wherever it fails.
func TestPushFails(t *testing.T) {
	content := bytesOf(2, 50_000)
	d := digest.FromBytes(content)
	for _, fails := range []string{"POST", "PATCH", "PUT", "never sent", "other bytes", "cut"} {
		t.Run(fails, func(t *testing.T) {
			u := newUpstream(t)
			s := newSide(t, u, store.Options{})
			uploading(u, func(w http.ResponseWriter, r *http.Request) bool {
				if fails == "cut" && r.Method == "PATCH" {
					_, _ = io.CopyN(io.Discard, r.Body, 100)
					panic(http.ErrAbortHandler)
				}
				if r.Method == fails {
					w.WriteHeader(http.StatusForbidden)
				}
				return r.Method == fails
			})
			a := s.send("POST", "/v2/a/blobs/uploads/", nil)
			body := content
			if fails == "other bytes" {
				body = bytes.Repeat([]byte{1}, len(content))
			}
			at := a.Header.Get("Location")
			if at == "" {
				at = "/v2/a/blobs/uploads/none?_state=x"
			}
			if a = s.send("PATCH", at, body); a.err == nil && a.Header.Get("Location") != "" {
				at = a.Header.Get("Location")
			}
			if fails != "never sent" {
				a = s.send("PUT", at+"&digest="+d.String(), nil)
			}
			if a.err == nil && a.StatusCode == 201 && fails != "POST" { // the upstream of this test takes a PUT without one
				t.Error("it did not fail")
			}
			if fails == "never sent" {
				if len(s.left()) != 1 {
					t.Errorf("%q", s.left())
				}
				s.restart() // gives it up
			}
			// The client has its answer before the handler has tidied up.
			for end := time.Now().Add(10 * time.Second); (len(s.left()) > 0 || s.store.Stats().Bytes != 0) && time.Now().Before(end); {
				time.Sleep(5 * time.Millisecond)
			}
			if s.store.Has(d) || len(s.left()) > 0 || len(s.h.sessions.all) > 0 || s.store.Stats().Bytes != 0 {
				t.Errorf("kept %v, left %q, sessions %v, %+v", s.store.Has(d), s.left(), s.h.sessions.all, s.store.Stats())
			}
		})
	}
}

// A pushed manifest is served, and its tag known.
func TestPushManifest(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	s := newSide(t, u, store.Options{})
	d, body := u.putManifest("a", "1", docker2)
	uploading(u, nil)
	path := "/v2/a/manifests/1"
	s.want(s.send("PUT", path, body), 201, nil, "PUT "+path)
	u.fault = nil
	s.want(s.do("GET", path, "", "Accept", docker2), 200, body, "HEAD "+path)
	s.want(s.do("GET", "/v2/a/manifests/"+d.String(), "", "Accept", docker2), 200, body)
	// One that was refused isn't.
	u.fault = func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(400); return true }
	other := bytes.Replace(body, []byte("{"), []byte("{ "), 1)
	s.send("PUT", path, other)
	if s.store.Has(digest.FromBytes(other)) {
		t.Error("kept")
	}
}

// That a registry says that it has mounted a blob is not enough to be given it: it
// has to show a part of it.
func TestMount(t *testing.T) {
	u := newUpstream(t)
	u.allow("from", "")
	u.allow("to", "")
	content := bytesOf(3, 1000)
	d := u.put("from", content)
	u.putManifest("to", "1", docker2)
	s := newSide(t, u, store.Options{})
	s.do("GET", "/v2/from/blobs/"+d.String(), "")
	uploading(u, nil)
	s.do("GET", "/v2/to/manifests/1", "") // a right
	u.requests()
	path, blob := "/v2/to/blobs/uploads/?mount="+d.String()+"&from=from", "/v2/to/blobs/"+d.String()
	s.want(s.send("POST", path, nil), 201, nil, "POST /v2/to/blobs/uploads/")
	s.want(s.do("GET", blob, ""), 404, nil, "GET "+blob)
	u.put("to", content)
	s.want(s.do("GET", blob, ""), 200, content, "GET "+blob)
	s.want(s.do("GET", blob, ""), 200, content)
}

// Pushes that are begun and never ended are bounded.
func TestManyPushes(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	uploading(u, nil)
	for range maxSessions + 20 {
		a := s.send("POST", "/v2/a/blobs/uploads/", nil)
		s.send("PATCH", a.Header.Get("Location"), []byte("x"))
	}
	if n := len(s.h.sessions.all); n > maxSessions {
		t.Errorf("%d sessions", n)
	}
	if files, _ := os.ReadDir(filepath.Join(s.dir, "ingest")); len(files) > maxSessions {
		t.Errorf("%d files", len(files))
	}
}

// The registry says where a push goes on, and that is remembered for as long as the
// push may rest: not if it is as long as a registry can make it.
func TestLongLocation(t *testing.T) {
	for n, kept := range map[int]int{1000: 1, 100_000: 0} {
		u := newUpstream(t)
		u.fault = func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Location", "/v2/a/blobs/uploads/"+strings.Repeat("x", n))
			w.WriteHeader(http.StatusAccepted)
			return true
		}
		s := newSide(t, u, store.Options{})
		if a := s.send("POST", "/v2/a/blobs/uploads/", nil); a.err != nil || a.StatusCode != http.StatusAccepted || len(a.Header.Get("Location")) < n {
			t.Errorf("%d: %v, %v", n, a.Response, a.err)
		}
		if got := len(s.h.sessions.all); got != kept {
			t.Errorf("a location of %d bytes: %d pushes are expected to go on, want %d", n, got, kept)
		}
	}
}

// Tokens for anonymous clients are kept, and whoever has a registry gives them: no
// more of one than a registry would take.
func TestLongToken(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Bearer 1")
	u.putManifest("a", "v1", docker2)
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/token" {
			return false
		}
		fmt.Fprintf(w, `{"token":%q}`, strings.Repeat("x", 1_000_000))
		return true
	}
	s := newSide(t, u, store.Options{})
	s.want(s.do("GET", "/v2/a/manifests/v1", "Bearer 1"), 200, nil, "GET /v2/a/manifests/v1")
	s.settle()
	for _, v := range s.h.tokens.lru.Values() {
		t.Errorf("a token of %d bytes is kept", len(v.value))
	}
}
