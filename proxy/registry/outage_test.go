// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

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
