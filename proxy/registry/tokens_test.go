// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"weir/proxy/store"
	upstreams "weir/proxy/upstream"
)

// hub is a registry whose tokens are to be had from another host, as far as a client
// can tell.
type hub struct {
	*scripted
	*side
	realm  string
	tokens atomic.Pointer[func(http.ResponseWriter, *http.Request) bool] // the token server's fault
	asked  atomic.Int64                                                  // how often /v2/ was
}

func newHub(t *testing.T) *hub {
	u := newUpstream(t)
	h := &hub{scripted: u, realm: strings.Replace(u.srv.URL, "127.0.0.1", "localhost", 1) + "/token"}
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		switch r.URL.Path {
		case "/v2/":
			h.asked.Add(1)
			w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
			w.Header().Set("Www-Authenticate", `Bearer realm="`+h.realm+`",service="hub"`)
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`)
			return true
		case "/token":
			fault := h.tokens.Load()
			return fault != nil && (*fault)(w, r)
		}
		return false
	}
	u.allow("library/p", "Bearer anonymous", "Bearer 1")
	u.allow("team/private", "Bearer 1")
	for _, repo := range []string{"library/p", "team/private"} {
		u.putManifest(repo, "1", docker2, u.put(repo, bytesOf(byteOf(repo), 3000)))
		u.putManifest(repo, "cold", docker2)
	}
	h.side = newSide(t, u, store.Options{})
	for _, repo := range []string{"library/p", "team/private"} {
		for _, path := range []string{"/manifests/1", "/blobs/" + u.put(repo, bytesOf(byteOf(repo), 3000)).String()} {
			if a := h.do("GET", "/v2/"+repo+path, "Bearer 1"); a.StatusCode != 200 {
				t.Fatal(a.Status)
			}
		}
	}
	h.settle()
	return h
}

// break has the token server fail, or with nil be mended.
func (h *hub) breaks(how func(http.ResponseWriter, *http.Request) bool) {
	if how == nil {
		h.tokens.Store(nil)
		return
	}
	h.tokens.Store(&how)
}

// realmOf is where an answer to /v2/ says that tokens are to be had.
func realmOf(t *testing.T, a answer) string {
	t.Helper()
	if a.err != nil || a.StatusCode != http.StatusUnauthorized || !strings.Contains(string(a.body), "UNAUTHORIZED") {
		t.Fatalf("%v %v %q", a.Response, a.err, a.body)
	}
	_, realm, _ := strings.Cut(a.Header.Get("Www-Authenticate"), `realm="`)
	realm, rest, _ := strings.Cut(realm, `"`)
	if !strings.Contains(rest, `service="hub"`) {
		t.Error(a.Header)
	}
	return realm
}

// While a token server fails, clients are sent to weir for tokens, which has what the
// token server says, and else a placeholder for what is public.
func TestTokenServerFails(t *testing.T) {
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			if h.hangs = name == "hangs"; h.hangs {
				h.restart()
			}
			if realm := realmOf(t, h.do("GET", "/v2/", "")); realm != h.realm {
				t.Errorf("while all is well the realm is %s", realm)
			}
			asked := h.asked.Load()
			h.breaks(fault)
			h.h.tokens.lru.Purge()
			h.h.outages.Health = upstreams.NewHealth() // it forgets that it has answered just now
			own := h.up.srv.URL + ownRealm
			if realm := realmOf(t, h.do("GET", "/v2/", "")); realm != own {
				t.Errorf("the realm is %s, want %s", realm, own)
			}
			if n := h.asked.Load() - asked; n > 0 && !h.hangs {
				t.Errorf("the registry was asked %d times what it has said", n)
			}
			if a := h.do("GET", ownRealm+"?service=hub&scope=repository:library/p:pull", ""); a.StatusCode != 200 || !strings.Contains(string(a.body), placeholder) {
				t.Errorf("for what is public: %v %q", a.Response, a.body)
			}
			for _, auth := range []string{"Bearer " + placeholder, ""} {
				if a := h.do("GET", "/v2/library/p/manifests/1", auth); a.StatusCode != 200 {
					t.Errorf("as %q: %s", auth, a.Status)
				}
				if h.hangs { // else a client waits as long as it likes
					continue
				}
				if a := h.do("GET", "/v2/team/private/manifests/1", auth); a.err == nil && a.StatusCode/100 == 2 {
					t.Errorf("as %q, what is private: %s", auth, a.Status)
				}
			}
			if !h.hangs {
				want := map[string]int{"429": 429, "500": 500, "503": 503, "challenge": 403, "empty 403": 403, "page": 200, "cut": 0, "garbage": 502}[name]
				for _, path := range []string{ownRealm + "?scope=repository:team/private:pull", "/v2/library/p/manifests/cold"} {
					auth := ""
					if strings.HasSuffix(path, "cold") {
						auth = "Bearer " + placeholder
						if want == 403 || want == 200 {
							continue // told in another way
						}
					}
					a := h.do("GET", path, auth)
					if got := a.Response; want == 0 && a.err == nil || want != 0 && (got == nil || got.StatusCode != want) {
						t.Errorf("%s: %v %v, want %d", path, got, a.err, want)
					}
				}
			}
			// It is mended: whoever still comes to weir has a real one.
			h.breaks(nil)
			if a := h.do("GET", ownRealm+"?scope=repository:team/private:pull", ""); !bytes.Contains(a.body, []byte("anonymous")) || bytes.Contains(a.body, []byte(placeholder)) {
				t.Errorf("once it is mended: %v %q", a.Response, a.body)
			}
			for realmOf(t, h.do("GET", "/v2/", "")) != h.realm {
				if t.Context().Err() != nil {
					t.Fatal("it is never seen that it is mended")
				}
			}
		})
	}
}

// When all of the outside is silent, a pull that begins with a token waits for that once:
// that the registry doesn't answer is found out beside the token server.
func TestAllSilent(t *testing.T) {
	h := newHub(t)
	h.hangs = true
	h.restart()
	realmOf(t, h.do("GET", "/v2/", ""))
	h.breaks(faults["hangs"])
	h.h.tokens.lru.Purge()
	h.h.outages.Health = upstreams.NewHealth() // it forgets that it has answered just now
	h.mu.Lock()
	h.fault = faults["hangs"]
	h.mu.Unlock()
	if realm := realmOf(t, h.do("GET", "/v2/", "")); realm != h.up.srv.URL+ownRealm {
		t.Errorf("the realm is %s", realm)
	}
	up := Upstream{Host: strings.TrimPrefix(h.up.srv.URL, "https://")}
	for _, way := range []string{up.way(), up.way() + anonymously} {
		if !h.h.outages.Failing(way) {
			t.Errorf("%s is still waited for", way)
		}
	}
	if a := h.do("GET", ownRealm+"?service=hub&scope=repository:library/p:pull", ""); a.StatusCode != 200 || !strings.Contains(string(a.body), placeholder) {
		t.Errorf("the token: %v %q", a.Response, a.body)
	}
	if a := h.do("GET", "/v2/library/p/manifests/1", "Bearer "+placeholder); a.StatusCode != 200 {
		t.Error(a.Status)
	}
}

// Who is sent to weir for a token, because something answers in the registry's stead, is told what
// that says, and not to try again later, if a token for what is public isn't what it wants.
func TestTokenOfNobody(t *testing.T) {
	for name, want := range map[string]int{"challenge": 403, "page": 200, "503": 503} {
		h := newHub(t)
		h.mu.Lock()
		h.fault = faults[name]
		h.mu.Unlock()
		a := h.do("GET", "/v2/", "")
		if a.err != nil || a.StatusCode != http.StatusUnauthorized || !strings.Contains(a.Header.Get("Www-Authenticate"), ownRealm) {
			t.Fatalf("%s: %v %v", name, a.Response, a.err)
		}
		if a := h.do("GET", ownRealm+"?scope=repository:library/p:pull,push", ""); a.StatusCode != want {
			t.Errorf("%s, to push: %v %q", name, a.Response, a.body)
		}
		if a := h.do("GET", ownRealm+"?scope=repository:library/p:pull", ""); a.StatusCode != 200 || !strings.Contains(string(a.body), placeholder) {
			t.Errorf("%s, to pull: %v %q", name, a.Response, a.body)
		}
	}
}

// A token server at the registry's own host is asked by way of weir anyway.
func TestOwnTokenServerFails(t *testing.T) {
	h := newHub(t)
	h.realm = h.up.srv.URL + "/token"
	if realm := realmOf(t, h.do("GET", "/v2/", "")); realm != h.realm {
		t.Fatal(realm)
	}
	const scope = "/token?service=hub&scope=repository:library/p:pull"
	if a := h.do("GET", scope, "Basic YWxpY2U6"); !bytes.Contains(a.body, []byte(`"anonymous"`)) {
		t.Errorf("%v %q", a.Response, a.body)
	}
	h.breaks(faults["503"])
	if a := h.do("GET", scope, "Basic YWxpY2U6"); !bytes.Contains(a.body, []byte(placeholder)) {
		t.Errorf("%v %q", a.Response, a.body)
	}
	if a := h.do("GET", "/token?scope=repository:team/private:pull", "Basic YWxpY2U6"); a.StatusCode != 503 {
		t.Errorf("%v %q", a.Response, a.body)
	}
}

// Many clients that want the same public tag at once cost a question, and a registry
// that wants to be asked less isn't asked in weir's own name for a while.
func TestAskedTogether(t *testing.T) {
	h := newHub(t)
	fault := h.fault
	begun := h.h.Stats()[0].Requests
	held := make(chan struct{})
	h.mu.Lock()
	h.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodHead {
			<-held
		}
		return fault(w, r)
	}
	h.mu.Unlock()
	h.requests()
	const byTag = "/v2/library/p/manifests/1"
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if a := h.do("GET", byTag, ""); a.err != nil || a.StatusCode != 200 {
				t.Errorf("%v %v", a.Response, a.err)
			}
		})
	}
	for h.h.Stats()[0].Requests < begun+20 {
		runtime.Gosched()
	}
	close(held)
	wg.Wait()
	if log := h.requests(); len(log) > 3 {
		t.Errorf("20 clients cost %q", log)
	}
	h.mu.Lock()
	h.fault = func(w http.ResponseWriter, r *http.Request) bool {
		return r.Header.Get("Authorization") == "Bearer anonymous" && faults["429"](w, r) || fault(w, r)
	}
	h.mu.Unlock()
	if a := h.do("GET", byTag, ""); a.StatusCode != 200 || !strings.Contains(a.Header.Get("Cache-Status"), "stale") {
		t.Errorf("%v %v", a.Response, a.err)
	}
	h.requests()
	h.want(h.do("GET", byTag, ""), 401, nil, "HEAD "+byTag, "GET "+byTag) // its own request
}

// Who begins without a name and a password at a registry that wants them is told so
// while the registry gives no answer, and may then have a right that is remembered.
func TestLoginDuringOutage(t *testing.T) {
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			const alice = "Basic YWxpY2U6eA=="
			u := newUpstream(t)
			u.allow("a", alice)
			blob := bytesOf(1, 1000)
			layer := u.put("a", blob)
			_, m := u.putManifest("a", "1", docker2, layer)
			wants := func(w http.ResponseWriter, r *http.Request) bool {
				if r.Header.Get("Authorization") != "" {
					return false
				}
				w.Header().Set("Www-Authenticate", `Basic realm="corp"`)
				w.WriteHeader(http.StatusUnauthorized)
				_, _ = fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`)
				return true
			}
			u.fault = wants
			s := newSide(t, u, store.Options{})
			byTag, byDigest := "/v2/a/manifests/1", "/v2/a/blobs/"+layer.String()
			for range 2 {
				for _, path := range []string{byTag, byDigest} {
					if a := s.do("GET", path, ""); a.StatusCode != 401 || !bytes.Contains(a.body, []byte("UNAUTHORIZED")) {
						t.Errorf("%s: %s %q", path, a.Status, a.body)
					}
					if a := s.do("GET", path, alice); a.StatusCode != 200 {
						t.Fatal(a.Status)
					}
				}
			}
			if name == "hangs" {
				s.h.outages.first, s.h.outages.again = 200*time.Millisecond, 10*time.Millisecond
			}
			u.mu.Lock()
			u.fault = fault
			u.mu.Unlock()
			for path, want := range map[string][]byte{byTag: m, byDigest: blob} {
				if a := s.do("GET", path, ""); a.err != nil || a.StatusCode != 401 || a.Header.Get("Www-Authenticate") != `Basic realm="corp"` {
					t.Errorf("%s without: %v %v", path, a.Response, a.err)
				}
				if a := s.do("GET", path, alice); a.err != nil || a.StatusCode != 200 || !bytes.Equal(a.body, want) {
					t.Errorf("%s as alice: %v %v", path, a.Response, a.err)
				}
			}
		})
	}
}
