// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

// Who may get what, by which credentials and through which repository.
func TestRights(t *testing.T) {
	u := newUpstream(t)
	u.allow("team/private", "Bearer alice")
	u.allow("team/other", "Bearer bob")
	u.allow("library/public", "", "Bearer alice", "Bearer bob")
	shared := bytesOf(2, 10_000)
	d := u.put("team/private", shared)
	u.put("library/public", shared)
	secret := u.put("team/private", bytesOf(3, 5000))
	s := newSide(t, u, store.Options{})
	path := func(repo string, d digest.Digest) string { return "/v2/" + repo + "/blobs/" + d.String() }

	s.want(s.do("GET", path("team/private", d), "Bearer alice"), 200, shared, "GET "+path("team/private", d))
	s.want(s.do("GET", path("team/private", secret), "Bearer alice"), 200, nil, "GET "+path("team/private", secret))

	unauthorized := []byte(`{"errors":[{"code":"UNAUTHORIZED"}]}`)
	for _, auth := range []string{"", "Bearer bob", "Bearer alicE"} {
		for _, method := range []string{"GET", "HEAD"} {
			// The upstream's own refusal, though the blob is here.
			a := s.do(method, path("team/private", d), auth)
			if a.StatusCode != 401 || a.Header.Get("Www-Authenticate") == "" || method == "GET" && !bytes.Equal(a.body, unauthorized) {
				t.Errorf("%s as %q: %s %q", method, auth, a.Status, a.body)
			}
		}
		if a := s.do("GET", path("team/private", d), auth, "Range", "bytes=0-9"); a.StatusCode != 401 {
			t.Errorf("range as %q: %s", auth, a.Status)
		}
	}
	u.requests()

	// A right to one repository is none to what is only in another.
	s.want(s.do("GET", path("team/other", secret), "Bearer bob"), 404, nil, "GET "+path("team/other", secret))
	s.want(s.do("GET", path("library/public", secret), ""), 404, nil, "GET "+path("library/public", secret))
	// A manifest that names it doesn't make it the repository's content.
	m, _ := u.putManifest("team/other", "trap", docker2, secret)
	s.want(s.do("GET", "/v2/team/other/manifests/"+m.String(), "Bearer bob"), 200, nil, "GET /v2/team/other/manifests/"+m.String())
	s.want(s.do("GET", path("team/other", secret), "Bearer bob"), 404, nil, "GET "+path("team/other", secret))

	// What is in a public repository too costs one question, once.
	s.want(s.do("GET", path("library/public", d), ""), 200, shared, "GET "+path("library/public", d))
	s.want(s.do("GET", path("library/public", d), ""), 200, shared)
	s.want(s.do("GET", path("library/public", d), "Bearer bob"), 200, shared, "GET "+path("library/public", d))

	// A refusal takes the right away at once.
	u.allow("team/private")
	s.want(s.do("GET", "/v2/team/private/manifests/none", "Bearer alice"), 401, nil, "GET /v2/team/private/manifests/none")
	s.want(s.do("GET", path("team/private", d), "Bearer alice"), 401, nil, "GET "+path("team/private", d))
	// And gives it back when the upstream does.
	u.allow("team/private", "Bearer alice")
	s.want(s.do("GET", path("team/private", d), "Bearer alice"), 200, shared, "GET "+path("team/private", d))
	s.want(s.do("GET", path("team/private", d), "Bearer alice"), 200, shared)
}

// The ways in which content is asked for.
type ask struct{ method, path, rng string }

func waysTo(repo, tag string, m digest.Digest, layer digest.Digest) []ask {
	byTag, byDigest, blob := "/v2/"+repo+"/manifests/"+tag, "/v2/"+repo+"/manifests/"+m.String(), "/v2/"+repo+"/blobs/"+layer.String()
	return []ask{
		{"HEAD", byTag, ""}, {"GET", byTag, ""}, {"HEAD", byDigest, ""}, {"GET", byDigest, ""},
		{"HEAD", blob, ""}, {"GET", blob, ""}, {"GET", blob, "bytes=100-199"}, {"GET", blob, "bytes=-50"},
	}
}

// Two users, two private repositories and a public one that share their
// layers: each gets what the upstream gives them, and nothing else, however it
// is asked for; what is withdrawn is refused within the configured time.
func TestRightsTable(t *testing.T) {
	u := newUpstream(t)
	shared := bytesOf(4, 5000)
	repos := map[string][]string{
		"alice/a":   {"Bearer alice"},
		"bob/b":     {"Bearer bob"},
		"library/p": {"Bearer alice", "Bearer bob", "Bearer anonymous"},
	}
	ways := map[string][]ask{}
	own := map[string]digest.Digest{}
	for repo, readers := range repos {
		u.allow(repo, readers...)
		layer := u.put(repo, shared)
		own[repo] = u.put(repo, bytesOf(byteOf(repo), 4000))
		m, _ := u.putManifest(repo, "1", docker2, layer, own[repo])
		ways[repo] = append(waysTo(repo, "1", m, layer), waysTo(repo, "1", m, own[repo])...)
	}
	s := newSide(t, u, store.Options{})
	who := []string{"Bearer alice", "Bearer bob", "Bearer anonymous", "", "Basic YWxpY2U6"}
	check := func(phase string) {
		t.Helper()
		for repo := range repos {
			for _, auth := range who {
				for _, w := range ways[repo] {
					a := s.do(w.method, w.path, auth, "Range", w.rng)
					if a.err != nil {
						t.Fatal(a.err)
					}
					may := u.readers[repo][auth]
					got := a.StatusCode == 200 || a.StatusCode == 206
					if auth == "" && u.readers[repo]["Bearer anonymous"] { // once that is known, it needs no token
						may = got
					}
					if got != may {
						t.Errorf("%s: %s %s %s as %q: %s", phase, w.method, w.path, w.rng, auth, a.Status)
					}
					if !may && (a.StatusCode != 401 || a.Header.Get("Www-Authenticate") == "") {
						t.Errorf("%s: %s %s as %q: %s %v", phase, w.method, w.path, auth, a.Status, a.Header)
					}
				}
				// What is only in one repository isn't in another.
				for other := range repos {
					if a := s.do("GET", "/v2/"+repo+"/blobs/"+own[other].String(), auth); other != repo && a.StatusCode == 200 {
						t.Errorf("%s: %q got a blob of %s through %s", phase, auth, other, repo)
					}
				}
			}
		}
	}
	check("cold")
	check("warm")
	s.settle()
	s.restart()
	check("restarted")
	// What is withdrawn is refused once the grant's time is over. Blobs are asked
	// for first: for a tag the upstream is asked each time, and its refusal ends
	// the grant too.
	u.allow("alice/a")
	u.allow("library/p", "Bearer bob")
	s.later.Add(int64(DefaultRightsTTL))
	for _, all := range ways {
		slices.Reverse(all)
	}
	check("withdrawn")
	// And at once where it is known already.
	u.allow("bob/b")
	s.do("HEAD", "/v2/bob/b/manifests/none", "Bearer bob")
	check("heard")
	if s.store.Stats().Blobs < 7 {
		t.Errorf("%+v: the test was about what is kept", s.store.Stats())
	}
}

func byteOf(s string) uint64 { return uint64(s[0]) }

// What a DELETE that passes takes away is gone at once.
func TestDelete(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	layer := u.put("a", bytesOf(1, 1000))
	s := newSide(t, u, store.Options{})
	path := "/v2/a/blobs/" + layer.String()
	s.want(s.do("GET", path, ""), 200, nil, "GET "+path)
	s.want(s.do("GET", path, ""), 200, nil)
	s.want(s.do("DELETE", path, ""), 202, nil, "DELETE "+path)
	delete(u.blobs["a"], layer)
	s.want(s.do("GET", path, ""), 404, nil, "GET "+path)
}

// A registry without TLS: whoever answers at an address gets to say what is in
// its repositories, but not to have what it only names.
func TestPlain(t *testing.T) {
	content := bytesOf(1, 50_000)
	u := newUpstream(t)
	u.allow("a", "")
	layer := u.put("a", content)
	m, body := u.putManifest("a", "1", docker2, layer)
	s := newSide(t, u, store.Options{})
	s.want(s.do("GET", "/v2/a/blobs/"+layer.String(), ""), 200, content, "GET /v2/a/blobs/"+layer.String())
	s.want(s.do("GET", "/v2/a/manifests/"+m.String(), ""), 200, body, "GET /v2/a/manifests/"+m.String())

	ask := func(addr, method, path string, header ...string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(method, path, nil)
		r.Host = "registry.lan:5000"
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		s.h.Serve(w, r, Upstream{Host: "registry.lan:5000", Plain: addr, Transport: http.DefaultTransport})
		return w
	}
	// A liar has whatever is asked for, and sends something else.
	var lies int
	liar := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lies++
		w.Header().Set("Docker-Content-Digest", r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:])
		if strings.HasSuffix(r.URL.Path, "/1") {
			w.Header().Set("Docker-Content-Digest", m.String())
			w.Header().Set("Content-Type", docker2)
		}
		_, _ = io.WriteString(w, "lies")
	}))
	defer liar.Close()
	for _, path := range []string{"/v2/a/manifests/" + m.String(), "/v2/a/manifests/1", "/v2/a/blobs/" + layer.String()} {
		for _, method := range []string{"HEAD", "GET", "GET"} {
			func() {
				defer func() { _ = recover() }() // a broken connection
				if w := ask(strings.TrimPrefix(liar.URL, "http://"), method, path); bytes.Equal(w.Body.Bytes(), content) || bytes.Equal(w.Body.Bytes(), body) {
					t.Errorf("%s %s: the liar's client got what it must not have", method, path)
				}
			}()
		}
	}
	if lies < 6 {
		t.Errorf("the liar was asked %d times", lies)
	}
	// An honest one sends it once, and is asked no more.
	var gets int
	honest := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "registry.lan:5000" {
			t.Errorf("Host is %q", r.Host)
		}
		if r.Method == "GET" {
			gets++
		}
		u.ServeHTTP(w, r)
	}))
	defer honest.Close()
	addr := strings.TrimPrefix(honest.URL, "http://")
	for range 3 {
		if w := ask(addr, "GET", "/v2/a/blobs/"+layer.String()); !bytes.Equal(w.Body.Bytes(), content) {
			t.Errorf("%d, %d bytes", w.Code, w.Body.Len())
		}
		if w := ask(addr, "GET", "/v2/a/manifests/1"); !bytes.Equal(w.Body.Bytes(), body) {
			t.Errorf("%d, %q", w.Code, w.Body)
		}
		if w := ask(addr, "GET", "/v2/a/blobs/"+layer.String(), "Range", "bytes=10-19"); !bytes.Equal(w.Body.Bytes(), content[10:20]) {
			t.Errorf("%d, %d bytes", w.Code, w.Body.Len())
		}
	}
	if gets != 2 {
		t.Errorf("the registry had to send %d things, want a blob and a manifest", gets)
	}
	// What it says doesn't hold for another address of the same name.
	if w := ask("127.0.0.1:1", "GET", "/v2/a/manifests/1"); w.Code != http.StatusBadGateway {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if w := ask("127.0.0.1:1", "GET", "/v2/a/blobs/"+layer.String()); w.Code != http.StatusBadGateway {
		t.Errorf("%d", w.Code)
	}
}

// Whoever makes a network of its own can be at the address of a registry without
// TLS that others use, and grant itself what it likes: it learns nothing of
// what the others' registry has, neither its blobs nor what its tags are.
func TestPlainElsewhere(t *testing.T) {
	const auth = "Basic bWFsbG9yeTp4"
	u := newUpstream(t)
	u.allow("a", "Basic YWxpY2U6eA==")
	layer := u.put("a", bytesOf(1, 50_000))
	m, body := u.putManifest("a", "1", docker2, layer)
	s := newSide(t, u, store.Options{})
	lan := httptest.NewServer(u)
	defer lan.Close()
	addr := strings.TrimPrefix(lan.URL, "http://")
	ask := func(network string, rt http.RoundTripper, auth, path string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", path, nil)
		r.Host = "registry.lan:5000"
		r.Header.Set("Authorization", auth)
		s.h.Serve(w, r, Upstream{Host: "registry.lan:5000", Plain: addr, NetworkID: network, Transport: rt})
		return w
	}
	paths := []string{"/v2/a/manifests/1", "/v2/a/manifests/" + m.String(), "/v2/a/blobs/" + layer.String()}
	for _, path := range paths {
		if w := ask("", http.DefaultTransport, "Basic YWxpY2U6eA==", path); w.Code != 200 {
			t.Fatalf("%s: %d", path, w.Code)
		}
	}
	// It grants a manifest of its own, and is silent otherwise.
	own := []byte(`{"schemaVersion":2,"mediaType":"` + docker2 + `","layers":[]}`)
	mine := "/v2/a/manifests/" + digest.FromBytes(own).String()
	forged := transport(func(r *http.Request) (*http.Response, error) {
		resp := &http.Response{StatusCode: 503, Header: http.Header{}, Body: http.NoBody, Request: r}
		if r.URL.Path == mine {
			resp.StatusCode, resp.Body, resp.ContentLength = 200, io.NopCloser(bytes.NewReader(own)), int64(len(own))
		}
		return resp, nil
	})
	if w := ask("pod", forged, auth, mine); w.Code != 200 {
		t.Fatal(w.Code)
	}
	for _, path := range paths {
		if w := ask("pod", forged, auth, path); w.Code == 200 || bytes.Contains(w.Body.Bytes(), body) {
			t.Errorf("%s: %d with %d bytes, of what is kept of another registry", path, w.Code, w.Body.Len())
		}
	}
	// To people both are one.
	if n := len(s.h.Stats()); n != 1 {
		t.Errorf("%+v", s.h.Stats())
	}
}

// What a registry refuses to one client changes nothing for others: neither an
// expired token nor one for which nothing is there ends what is public, or what is
// known of tags and content. That it isn't public any more weir finds out by itself.
func TestRefusalIsOfOneClient(t *testing.T) {
	u := newUpstream(t)
	content := bytesOf(3, 5000)
	layer := u.put("library/p", content)
	m, body := u.putManifest("library/p", "1", docker2, layer)
	u.allow("library/p", "Bearer 1", "Bearer anonymous")
	s := newSide(t, u, store.Options{})
	byTag, byDigest, blob := "/v2/library/p/manifests/1", "/v2/library/p/manifests/"+m.String(), "/v2/library/p/blobs/"+layer.String()
	for _, path := range []string{byTag, blob} {
		if a := s.do("GET", path, "Bearer 1"); a.StatusCode != 200 {
			t.Fatal(a.Status)
		}
	}
	s.settle()
	down := func(is bool) {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.fault = nil
		if is {
			u.fault = faults["503"]
		}
	}
	// served says whether an anonymous client gets the image in an outage.
	served := func() bool {
		down(true)
		defer down(false)
		n := 0
		for path, want := range map[string][]byte{byTag: body, byDigest: body, blob: content} {
			if a := s.do("GET", path, ""); a.StatusCode == 200 && bytes.Equal(a.body, want) {
				n++
			}
		}
		if n != 0 && n != 3 {
			t.Errorf("%d of 3 are served", n)
		}
		return n == 3
	}
	refuse := func(auth string) {
		for _, path := range []string{byTag, byDigest, blob, "/v2/library/p/manifests/none"} {
			for _, method := range []string{"HEAD", "GET"} {
				s.do(method, path, auth)
			}
		}
		s.settle()
	}
	// A registry that has nothing for a token that it doesn't know.
	u.mu.Lock()
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Bearer nothing" {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		return false
	}
	u.mu.Unlock()
	refuse("Bearer nothing")
	refuse("Bearer expired")
	if !served() {
		t.Error("a refusal to one client took it from all")
	}
	s.later.Add(int64(2 * time.Minute)) // it is asked again by now
	refuse("Bearer expired")
	if !served() {
		t.Error("it isn't public although it is")
	}
	// A tag that is gone for all clients is forgotten, and the rest is not.
	_, _ = u.putManifest("library/p", "2", docker2)
	s.do("GET", "/v2/library/p/manifests/2", "Bearer 1")
	u.mu.Lock()
	delete(u.tags, "library/p:2")
	u.mu.Unlock()
	s.later.Add(int64(2 * time.Minute))
	s.do("HEAD", "/v2/library/p/manifests/2", "Bearer 1")
	s.settle()
	down(true)
	if a := s.do("GET", "/v2/library/p/manifests/2", ""); a.StatusCode != 503 {
		t.Errorf("a tag that was deleted: %s", a.Status)
	}
	if !served() {
		t.Error("a tag that was deleted took the others with it")
	}
	// And when it is private.
	u.allow("library/p", "Bearer 1")
	s.later.Add(int64(2 * time.Minute))
	refuse("Bearer expired")
	if served() {
		t.Error("it is public although it isn't")
	}
}

// Credentials in whichever field, in the query, or in the request's target, are a
// client's own.
func TestCredentialsInAnyForm(t *testing.T) {
	for _, form := range []struct {
		name          string
		header, query string
	}{
		{"Artifactory", "X-JFrog-Art-Api", ""}, {"GitLab", "Private-Token", ""}, {"Cloudflare", "CF-Access-Client-Secret", ""},
		{"identity token", "X-Registry-Auth", ""}, {"query", "", "access_token"},
	} {
		t.Run(form.name, func(t *testing.T) {
			u := newUpstream(t)
			content := bytesOf(3, 5000)
			layer := u.put("a", content)
			u.putManifest("a", "1", docker2, layer)
			u.allow("a", "")
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if form.header != "" && r.Header.Get(form.header) == "key" || form.query != "" && r.URL.Query().Get(form.query) == "key" {
					return false
				}
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			s := newSide(t, u, store.Options{})
			paths := []string{"/v2/a/manifests/1", "/v2/a/blobs/" + layer.String()}
			ask := func(path, key string) int {
				var header []string
				if form.header != "" && key != "" {
					header = []string{form.header, key}
				} else if key != "" {
					path += "?" + form.query + "=" + key
				}
				a := s.do("GET", path, "", header...)
				if a.err != nil {
					t.Fatal(a.err)
				}
				return a.StatusCode
			}
			for range 2 {
				for _, path := range paths {
					for key, want := range map[string]int{"key": 200, "wrong": 401, "": 401} {
						if got := ask(path, key); got != want {
							t.Errorf("%s with %q: %d", path, key, got)
						}
					}
				}
				s.settle()
				s.restart()
			}
			u.mu.Lock()
			u.fault = faults["503"]
			u.mu.Unlock()
			for _, path := range paths {
				for _, key := range []string{"wrong", ""} {
					if got := ask(path, key); got != 503 {
						t.Errorf("in an outage %s with %q: %d", path, key, got)
					}
				}
			}
		})
	}
}

// raw sends the bytes of a request as they are, and returns the answer and the
// connection.
func (s *side) raw(request string) (*http.Response, net.Conn) {
	s.t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(s.srv.URL, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, request); err != nil {
		s.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		s.t.Fatalf("%.60q: %v", request, err)
	}
	return resp, c
}

// A registry that takes what it should not look at, or what weir doesn't send on,
// for a credential: no client gets by weir what it refuses to the same request.
func TestOddCredentials(t *testing.T) {
	for name, form := range map[string]struct {
		right  func(*http.Request) bool
		client string   // fields and body of who may read
		others []string // of those who may not
	}{
		"a body": {
			func(r *http.Request) bool { b, _ := io.ReadAll(r.Body); return string(b) == "key" },
			"Content-Length: 3\r\n\r\nkey",
			[]string{"\r\n", "Content-Length: 3\r\n\r\nbad", "Transfer-Encoding: chunked\r\n\r\n3\r\nbad\r\n0\r\n\r\n"},
		},
		"the last of several fields": {
			func(r *http.Request) bool { v := r.Header["Authorization"]; return len(v) > 1 && v[len(v)-1] == "key" },
			"Authorization: x\r\nAuthorization: key\r\n\r\n",
			[]string{"Authorization: x\r\n\r\n", "Authorization: key\r\nAuthorization: x\r\n\r\n", "Authorization: x\r\nAuthorization: bad\r\n\r\n", "Authorization: x, key\r\n\r\n"},
		},
		"a field that is for a proxy": {
			func(r *http.Request) bool {
				return r.Header.Get("Proxy-Authorization") == "" && r.Header.Get("X-Key") == "key"
			},
			"X-Key: key\r\n\r\n",
			[]string{"\r\n", "Proxy-Authorization: key\r\n\r\n"},
		},
		"whom the request was forwarded for": {
			func(r *http.Request) bool { return r.Header.Get("X-Forwarded-For") == "10.0.0.1" },
			"X-Forwarded-For: 10.0.0.1\r\n\r\n",
			[]string{"\r\n", "X-Forwarded-For: 10.0.0.1, 10.0.0.2\r\n\r\n"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			content := bytesOf(3, 5000)
			layer := u.put("a", content)
			m, manifest := u.putManifest("a", "1", docker2, layer)
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				r.Header.Del("User-Agent")
				if form.right(r) {
					r.Header.Del("Authorization")
					return false
				}
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			u.allow("a", "")
			s := newSide(t, u, store.Options{})
			for path, want := range map[string][]byte{"/v2/a/manifests/1": manifest, "/v2/a/manifests/" + m.String(): manifest, "/v2/a/blobs/" + layer.String(): content} {
				line := "GET " + path + " HTTP/1.1\r\nHost: a.test\r\n"
				for range 3 {
					resp, _ := s.raw(line + form.client)
					if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || !bytes.Equal(b, want) {
						t.Errorf("%s of who may read: %s, %d bytes, %v", path, resp.Status, len(b), err)
					}
					for _, other := range form.others {
						if resp, _ := s.raw(line + other); resp.StatusCode != http.StatusUnauthorized {
							t.Errorf("%s with %q: %s", path, other, resp.Status)
						}
					}
				}
				s.settle()
			}
		})
	}
}
