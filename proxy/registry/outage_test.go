// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
	upstreams "weir/proxy/upstream"
)

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

// faults are the ways in which an upstream gives no answer.
var faults = map[string]func(http.ResponseWriter, *http.Request) bool{
	"429": func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Retry-After", "60")
		w.Header().Set("Ratelimit-Remaining", "0;w=21600")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	},
	"500": func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(500); return true },
	"503": func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(503); return true },
	"challenge": func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Cf-Mitigated", "challenge")
		w.Header().Set("Content-Type", "text/html; charset=UTF-8")
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, "<html>are you human?</html>")
		return true
	},
	"page": func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>log in to this network</html>")
		return true
	},
	"empty 403": func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(http.StatusForbidden); return true },
	"cut":       func(w http.ResponseWriter, r *http.Request) bool { panic(http.ErrAbortHandler) },
	"hangs": func(w http.ResponseWriter, r *http.Request) bool {
		select {
		case <-r.Context().Done():
		case <-time.After(20 * time.Second):
		}
		panic(http.ErrAbortHandler)
	},
	"garbage": func(w http.ResponseWriter, r *http.Request) bool {
		c, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			_, _ = io.WriteString(c, "\x00\x01 what?\r\n\r\n")
			c.Close()
		}
		return true
	},
}

// While the upstream is silent, a right to one repository, or that it is
// public, is still none to what is only in another.
func TestStaleIsOfTheRepository(t *testing.T) {
	u := newUpstream(t)
	u.allow("library/p", "", "Bearer mallory")
	u.allow("team/private", "Bearer alice")
	d := u.put("team/private", bytesOf(3, 5000))
	m, _ := u.putManifest("team/private", "1", docker2, d)
	u.putManifest("library/p", "1", docker2)
	s := newSide(t, u, store.Options{})
	s.do("GET", "/v2/team/private/manifests/1", "Bearer alice")
	s.do("GET", "/v2/team/private/blobs/"+d.String(), "Bearer alice")
	for _, auth := range []string{"", "Bearer mallory"} {
		s.do("GET", "/v2/library/p/manifests/1", auth)
	}
	s.settle()
	if !s.store.Has(d) || !s.store.Has(m) {
		t.Fatal("the test is about what is kept")
	}
	u.mu.Lock()
	u.fault = faults["503"]
	u.mu.Unlock()
	for _, auth := range []string{"", "Bearer mallory"} {
		for _, repo := range []string{"library/p", "team/private"} {
			for _, w := range waysTo(repo, "other", m, d) {
				if a := s.do(w.method, w.path, auth, "Range", w.rng); a.err != nil || a.StatusCode != 503 {
					t.Errorf("%s %s as %q: %v, %v", w.method, w.path, auth, a.Response, a.err)
				}
			}
		}
	}
}

// A public image that is kept is to be had while the upstream is not, for as
// long as is configured, and after a restart too. A private one only as long
// as the right is remembered; what isn't kept is the upstream's failure.
func TestStaleIfError(t *testing.T) {
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			u.allow("library/p", "Bearer anonymous", "Bearer 1")
			u.allow("team/private", "Bearer 1")
			type image struct {
				repo         string
				m, layer     digest.Digest
				body, config []byte
			}
			images := map[string]image{}
			s := newSide(t, u, store.Options{})
			pull := func(repo, auth string) (codes []int) {
				im := images[repo]
				for _, w := range waysTo(repo, "1", im.m, im.layer) {
					a := s.do(w.method, w.path, auth, "Range", w.rng)
					if a.err != nil {
						t.Fatal(a.err)
					}
					codes = append(codes, a.StatusCode)
					if a.StatusCode == 200 && w.method == "GET" {
						want := im.body
						if strings.Contains(w.path, "/blobs/") {
							want = im.config
						}
						if !bytes.Equal(a.body, want) {
							t.Errorf("%s: wrong bytes", w.path)
						}
					}
				}
				return codes
			}
			s.hangs = name == "hangs"
			ok := []int{200, 200, 200, 200, 200, 200, 206, 206}
			for _, repo := range []string{"library/p", "team/private", "library/cold"} {
				im := image{repo: repo, config: bytesOf(byteOf(repo), 3000)}
				im.layer = u.put(repo, im.config)
				im.m, im.body = u.putManifest(repo, "1", docker2, im.layer)
				images[repo] = im
			}
			for _, repo := range []string{"library/p", "team/private"} {
				if got := pull(repo, "Bearer 1"); fmt.Sprint(got) != fmt.Sprint(ok) {
					t.Fatalf("%s: %v", repo, got)
				}
			}
			s.settle()
			// A client begins without a token, just before.
			if a := s.do("GET", "/v2/library/p/blobs/"+images["library/p"].layer.String(), ""); a.StatusCode != 200 {
				t.Fatal(a.Status)
			}
			u.mu.Lock()
			u.fault = fault
			u.mu.Unlock()
			if s.hangs {
				s.restart()
			}
			for range 2 {
				for _, auth := range []string{"Bearer another", "", "Bearer 1"} {
					if got := pull("library/p", auth); fmt.Sprint(got) != fmt.Sprint(ok) {
						t.Errorf("as %q: %v", auth, got)
					}
				}
				a := s.do("GET", "/v2/library/p/manifests/1", "")
				if a.Header.Get("Age") == "" || !strings.Contains(a.Header.Get("Cache-Status"), "stale-if-error") {
					t.Error(a.Header)
				}
				if a := s.do("GET", "/v2/", ""); a.StatusCode != 401 || !strings.Contains(a.Header.Get("Www-Authenticate"), ownRealm) {
					t.Errorf("%s %v", a.Status, a.Header)
				}
				if got := s.h.Stats(); got[0].Stale == 0 {
					t.Errorf("%+v", got)
				}
				s.restart()
			}
			if name == "hangs" {
				return // without an answer of ours a client waits as long as it likes
			}
			for _, a := range []answer{
				s.do("GET", "/v2/team/private/manifests/1", ""),
				s.do("GET", "/v2/team/private/blobs/"+images["team/private"].layer.String(), "Bearer 2"),
				s.do("GET", "/v2/library/cold/manifests/1", ""),
				s.do("GET", "/v2/library/cold/blobs/"+images["library/cold"].layer.String(), ""),
			} {
				if name == "page" && a.err != nil {
					continue // it isn't the blob, and its end doesn't come
				}
				if name == "cut" { // as it is without weir, so that the client tries again
					if !errors.Is(a.err, io.EOF) {
						t.Errorf("%v, %v", a.Response, a.err)
					}
					continue
				}
				if a.err != nil {
					t.Fatal(a.err)
				}
				if want := map[string]int{"429": 429, "500": 500, "503": 503, "garbage": 502, "challenge": 403, "empty 403": 403, "page": 200}[name]; a.StatusCode != want {
					t.Errorf("%s: %s, want %d", a.Request.URL, a.Status, want)
				}
				if name == "429" && (a.Header.Get("Retry-After") != "60" || a.Header.Get("Ratelimit-Remaining") == "") {
					t.Error(a.Header)
				}
			}
			// Not forever.
			s.later.Add(int64(time.Hour))
			if a := s.do("GET", "/v2/library/p/manifests/1", ""); a.err == nil && a.StatusCode == 200 && bytes.Equal(a.body, images["library/p"].body) {
				t.Error("an answer of an hour ago was served")
			}
			// And back to the rule when it is up again.
			u.mu.Lock()
			u.fault = nil
			u.mu.Unlock()
			if a := s.do("GET", "/v2/library/p/manifests/1", "Bearer another"); a.StatusCode != 401 {
				t.Error(a.Status)
			}
		})
	}
}

// A client that was given the placeholder in an outage gets what is public when the
// registry is back and wants to see a token, and nothing else: it is one without
// credentials. It is only given to who wants to pull what is public.
func TestPlaceholder(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	var ways []ask
	for _, repo := range []string{"library/p", "team/private"} {
		layer := u.put(repo, bytesOf(byteOf(repo), 3000))
		m, _ := u.putManifest(repo, "1", docker2, layer)
		ways = append(ways, waysTo(repo, "1", m, layer)...)
		ways = append(ways, waysTo(repo, "1", m, u.put(repo, bytesOf(1+byteOf(repo), 3000)))[4:]...) // not kept
		u.allow(repo, "Bearer 1")
	}
	u.allow("library/p", "Bearer 1", "Bearer anonymous")
	s.do("GET", "/v2/library/p/manifests/1", "Bearer 1")
	s.do("GET", "/v2/team/private/manifests/1", "Bearer 1")
	s.settle()
	u.mu.Lock()
	u.fault = faults["503"]
	u.mu.Unlock()
	if a := s.do("GET", "/v2/", ""); a.StatusCode != 401 || !strings.Contains(a.Header.Get("Www-Authenticate"), ownRealm) {
		t.Fatalf("%s %v", a.Status, a.Header)
	}
	for scope, want := range map[string]bool{
		"?scope=repository:library/p:pull":                                           true,
		"?service=x&scope=repository:library/p:pull&scope=repository:library/p:pull": true,
		"?scope=repository:library/p:pull,push":                                      false,
		"?scope=repository:library/p:*":                                              false,
		"?scope=repository:team/private:pull":                                        false,
		"?scope=repository:library/p:pull+repository:team/private:pull":              false,
		"?scope=repository:library/p:pull&scope=repository:team/private:pull":        false,
		"?scope=registry:catalog:*":                                                  false,
		"?service=x":                                                                 false,
		"?scope=":                                                                    false,
		"?scope=repository:Library/P:pull":                                           false,
		"?scope=repository:library/p/../../team/private:pull&scope=repository:library/p:pull": false,
	} {
		a := s.do("GET", ownRealm+scope, "")
		if got := a.StatusCode == 200 && strings.Contains(string(a.body), placeholder); got != want {
			t.Errorf("%s: %s %q", scope, a.Status, a.body)
		}
	}
	u.mu.Lock()
	u.fault = nil
	u.mu.Unlock()
	for _, w := range ways {
		a := s.do(w.method, w.path, "Bearer "+placeholder, "Range", w.rng)
		if a.err != nil {
			t.Fatal(a.err)
		}
		may := strings.HasPrefix(w.path, "/v2/library/p/")
		if got := a.StatusCode/100 == 2; got != may || !may && a.StatusCode != 401 {
			t.Errorf("%s %s: %s", w.method, w.path, a.Status)
		}
	}
}

// That an upstream has just failed doesn't shorten its time to say that clients
// have to log in: those who believe that they need not can't have what is theirs.
func TestSlowAfterOutage(t *testing.T) {
	u := newUpstream(t)
	u.allow("library/p", "")
	u.putManifest("library/p", "1", docker2)
	s := newSide(t, u, store.Options{})
	s.do("GET", "/v2/library/p/manifests/1", "")
	s.h.outages.Failed(Upstream{Host: strings.TrimPrefix(u.srv.URL, "https://")}.way())
	if a := s.do("GET", "/v2/", ""); a.StatusCode != 202 {
		t.Errorf("%s %q", a.Status, a.body)
	}
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
	forged := transportFunc(func(r *http.Request) (*http.Response, error) {
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

// FuzzChallenge asks for a token wherever a registry sends.
func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.test/token",service="registry",scope="repository:a:pull"`, `{"token":"x","expires_in":300}`)
	f.Add(`Bearer realm="http://169.254.169.254/"`, ``)
	f.Add(`Basic realm="x", Bearer realm=`, `{"access_token":"x","expires_in":-1}`)
	f.Fuzz(func(t *testing.T, challenge, answer string) {
		resp := &http.Response{StatusCode: 401, Header: http.Header{"Www-Authenticate": {challenge}}}
		a := &anonymous{&Handler{outages: outages{Health: upstreams.NewHealth()}}, Upstream{Host: "registry.test", Transport: transportFunc(func(r *http.Request) (*http.Response, error) {
			if r.URL.Scheme != "https" || r.Header.Get("Authorization") != "" {
				t.Errorf("asks %s, with credentials %q", r.URL, r.Header.Get("Authorization"))
			}
			return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(answer)), Request: r}, nil
		})}}
		got, err := a.token(t.Context(), resp)
		if err == nil && (got.value == "" || got.expires.After(time.Now().Add(time.Hour))) {
			t.Errorf("%+v", got)
		}
	})
}

type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

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
