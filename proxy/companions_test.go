// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"testing"
)

// Where a registry sends its clients, for tokens and for content, is known to be the
// registry's. Where a web page on the same host links to is not.
func TestCompanions(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v2/":
			w.Header().Set("Www-Authenticate", `Bearer realm="https://auth.example/token",service="registry.test"`)
			w.WriteHeader(http.StatusUnauthorized)
		case "/v2/own/":
			w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="https://registry.test:%d/token",service="registry.test"`, s.dst.Port()))
			w.WriteHeader(http.StatusUnauthorized)
		case "/v2/a/blobs/uploads/":
			http.Redirect(w, r, "https://STORAGE.example:443/up", http.StatusTemporaryRedirect)
		default:
			http.Redirect(w, r, "https://web.example/", http.StatusFound)
		}
	}))
	registry := fmt.Sprintf("registry.test:%d", s.dst.Port())
	c := s.client()
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	for _, path := range []string{"/v2/", "/v2/own/", "/v2/a/blobs/uploads/", "/login"} {
		resp, err := c.Get("https://" + registry + path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	for host, want := range map[string]Companion{
		"auth.example":    {RoleTokenServer, registry},
		"storage.example": {RoleStorage, registry},
		"auth.docker.io":  {RoleTokenServer, "registry-1.docker.io"},
		"web.example":     {}, registry: {},
	} {
		if got, ok := s.proxy.companions.find(host); got != want || ok != (want != Companion{}) {
			t.Errorf("%s: %+v, %v", host, got, ok)
		}
	}
	// As the status shows it.
	s.proxy.unknown.all.Add("auth.example", &unknownHost{Unknown: Unknown{Host: "auth.example"}})
	if all := s.proxy.Unknowns(); len(all) != 1 || all[0].Companion == nil || all[0].Companion.Of != registry {
		t.Errorf("%+v", all)
	}
}

// What one registry says doesn't change what another has said, and is bounded.
func TestCompanionsAreFirstCome(t *testing.T) {
	var c companions
	add := func(host, of string) { c.add(&url.URL{Scheme: "https", Host: host}, RoleStorage, of) }
	add("storage.example", "first.test")
	add("storage.example", "second.test")
	add("auth.docker.io", "second.test")
	for i := range 2 * maxUnknown {
		add(fmt.Sprintf("%d.example", i), "second.test")
	}
	if got, _ := c.find("storage.example"); got.Of != "first.test" {
		t.Error(got)
	}
	if got, _ := c.find("auth.docker.io"); got.Of != "registry-1.docker.io" || got.Role != RoleTokenServer {
		t.Error(got)
	}
	if len(c.all) > maxUnknown {
		t.Errorf("%d are kept", len(c.all))
	}
}
