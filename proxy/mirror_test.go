// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/internal/proxytest"
)

func TestParseMirror(t *testing.T) {
	for in, want := range map[string]mirrored{
		"/v2/":                                   {registry: "docker.io", path: "/v2/"},
		"/v2":                                    {registry: "docker.io", path: "/v2/"},
		"/v2/flyway/flyway/manifests/10.11.0":    {registry: "docker.io", path: "/v2/flyway/flyway/manifests/10.11.0"},
		"/v2/alpine/manifests/3.20":              {registry: "docker.io", path: "/v2/library/alpine/manifests/3.20"},
		"/v2/alpine/manifests/3.20?ns=docker.io": {registry: "docker.io", path: "/v2/library/alpine/manifests/3.20", ns: "docker.io"},
		"/v2/library/alpine/blobs/x":             {registry: "docker.io", path: "/v2/library/alpine/blobs/x"},
		"/v2/alpine/tags/list?n=2":               {registry: "docker.io", path: "/v2/library/alpine/tags/list", query: "n=2"},
		"/v2/a/manifests/1?ns=ghcr.io&x=y":       {registry: "ghcr.io", path: "/v2/a/manifests/1", query: "x=y", ns: "ghcr.io"},
		"/v2/ghcr.io/a/b/manifests/1":            {registry: "ghcr.io", path: "/v2/a/b/manifests/1", prefix: "ghcr.io"},
		"/v2/reg.lan:5000/a/manifests/1":         {registry: "reg.lan:5000", path: "/v2/a/manifests/1", prefix: "reg.lan:5000"},
		"/v2/localhost/a/manifests/1":            {registry: "localhost", path: "/v2/a/manifests/1", prefix: "localhost"},
		"/v2/docker.io/alpine/manifests/1":       {registry: "docker.io", path: "/v2/library/alpine/manifests/1", prefix: "docker.io"},
		"/v2/ghcr.io/a/manifests/1?ns=quay.io":   {registry: "quay.io", path: "/v2/ghcr.io/a/manifests/1", ns: "quay.io"},
		"/v2/manifests/manifests/1":              {registry: "docker.io", path: "/v2/library/manifests/manifests/1"},
	} {
		u, err := url.Parse(in)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseMirror(u, "docker.io"); err != nil || got != want {
			t.Errorf("%s:\n %+v, want\n %+v (%v)", in, got, want, err)
		}
	}
	for _, in := range []string{"/", "/v1/", "/v2/a/../b", "/v2/%2e%2e/x", "/v2//a", "/v2/a?%zz"} {
		u, err := url.Parse("http://mirror" + in)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseMirror(u, "docker.io"); err == nil {
			t.Errorf("%s is %+v", in, got)
		}
	}
}

func FuzzMirrorURL(f *testing.F) {
	f.Add("/v2/alpine/manifests/3.20", "ns=docker.io")
	f.Add("/v2/ghcr.io/a/b/manifests/1", "")
	f.Add("/v2/../x", "ns=%zz")
	f.Fuzz(func(t *testing.T, path, query string) {
		m, err := parseMirror(&url.URL{Path: path, RawQuery: query}, "docker.io")
		if err == nil && (m.registry == "" || !strings.HasPrefix(m.path, "/v2/") || strings.Contains(m.query, "ns=") && !strings.Contains(query, "ns")) {
			t.Errorf("%q %q: %+v", path, query, m)
		}
	})
}

// A mirror gives those without credentials what is public, from the
// registry that they mean, once.
func TestMirror(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	blob := bytes.Repeat([]byte("blob"), 1000)
	path := "/v2/team/app/blobs/" + digest.FromBytes(blob).String()
	var log atomic.Pointer[[]string]
	log.Store(&[]string{})
	base := fmt.Sprintf("https://registry.test:%d", s.dst.Port())
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		was := append(*log.Load(), r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("Authorization"))
		log.Store(&was)
		switch {
		case r.URL.Path == "/token":
			fmt.Fprint(w, `{"token":"anonymous"}`)
		case r.Header.Get("Authorization") != "Bearer anonymous":
			w.Header().Set("Www-Authenticate", `Bearer realm="`+base+`/token",service="test",scope="repository:team/app:pull"`)
			w.WriteHeader(http.StatusUnauthorized)
		case r.URL.Path == path:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
		case strings.HasSuffix(r.URL.Path, "/tags/list"):
			w.Header().Set("Link", `</v2/team/app/tags/list?last=b&n=2>; rel="next"`)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	resolveBy(t, proxytest.NameServer(t, &atomic.Int64{}, "127.0.0.1"))
	name := strings.TrimPrefix(base, "https://")
	mirror := httptest.NewServer(s.proxy.Mirror(s.egress, name))
	defer mirror.Close()
	do := func(method, path string) (*http.Response, string) {
		t.Helper()
		req, _ := http.NewRequest(method, mirror.URL+path, nil)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(b)
	}
	if resp, _ := do("GET", "/v2/"); resp.StatusCode != 200 || len(*log.Load()) != 0 {
		t.Error(resp.Status, *log.Load())
	}
	for _, p := range []string{path, path + "?ns=" + name, "/v2/" + name + strings.TrimPrefix(path, "/v2")} {
		if resp, b := do("GET", p); resp.StatusCode != 200 || b != string(blob) {
			t.Errorf("%s: %s, %d bytes", p, resp.Status, len(b))
		}
	}
	want := []string{"GET " + path + " ", "GET /token?scope=repository%3Ateam%2Fapp%3Apull&service=test ", "GET " + path + " Bearer anonymous"}
	if fmt.Sprint(*log.Load()) != fmt.Sprint(want) {
		t.Errorf("the registry was asked %q", *log.Load())
	}
	for p, link := range map[string]string{
		"/v2/team/app/tags/list?n=2":            `</v2/team/app/tags/list?last=b&n=2>; rel="next"`,
		"/v2/" + name + "/team/app/tags/list":   `</v2/` + name + `/team/app/tags/list?last=b&n=2>; rel="next"`,
		"/v2/team/app/tags/list?n=2&ns=" + name: `</v2/team/app/tags/list?last=b&n=2&ns=` + url.QueryEscape(name) + `>; rel="next"`,
	} {
		if resp, _ := do("GET", p); resp.Header.Get("Link") != link {
			t.Errorf("%s: %q", p, resp.Header.Get("Link"))
		}
	}
	for p, code := range map[string]int{"/v2/x/manifests/1?ns=evil.test": 404, "/v2/evil.test/x/manifests/1": 404, "/elsewhere": 404, "/v2/x/manifests/none": 404} {
		if resp, b := do("GET", p); resp.StatusCode != code || p != "/v2/x/manifests/none" && !strings.Contains(b, "NAME_UNKNOWN") {
			t.Errorf("%s: %s %s", p, resp.Status, b)
		}
	}
	if resp, _ := do("PUT", "/v2/team/app/manifests/1"); resp.StatusCode != http.StatusMethodNotAllowed {
		t.Error(resp.Status)
	}
}
