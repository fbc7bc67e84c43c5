// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"weir/proxy/upstream"
)

// A registry says where its token server is, and that where it redirects to: weir
// asks there itself, and so only where a client that has TLS would come.
func TestTokensOverTLSOnly(t *testing.T) {
	for realm, tt := range map[string]struct {
		redirects []string // one after the other, from where the realm is
		token     bool
	}{
		"https://auth.test/token": {token: true},
		"http://169.254.169.254/": {},
		"https://auth.test/to":    {redirects: []string{"https://other.test/token"}, token: true},
		"https://auth.test/plain": {redirects: []string{"http://169.254.169.254/latest/meta-data"}},
		"https://auth.test/later": {redirects: []string{"https://other.test/", "http://10.0.0.1/"}},
		"https://auth.test/file":  {redirects: []string{"file:///etc/passwd"}},
		"https://auth.test/loop":  {redirects: slices.Repeat([]string{"https://auth.test/loop"}, 20)},
	} {
		left := tt.redirects
		var asked []string
		rt := transport(func(req *http.Request) (*http.Response, error) {
			asked = append(asked, req.URL.Scheme)
			resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(`{"token":"x"}`)), Request: req}
			if len(left) > 0 {
				resp.StatusCode = http.StatusTemporaryRedirect
				resp.Header.Set("Location", left[0])
				left = left[1:]
			}
			return resp, nil
		})
		refusal := &http.Response{Header: http.Header{"Www-Authenticate": {`Bearer realm="` + realm + `",service="x",scope="repository:a/b:pull"`}}}
		got, err := (&anonymous{&Handler{outages: outages{Health: upstream.NewHealth()}}, Upstream{Transport: rt}}).token(t.Context(), refusal)
		if (err == nil) != tt.token || got.value == "x" != tt.token {
			t.Errorf("%s: %+v, %v", realm, got, err)
		}
		if slices.ContainsFunc(asked, func(s string) bool { return s != "https" }) || len(asked) > 10 {
			t.Errorf("%s: asked by %q", realm, asked)
		}
	}
}

// FuzzChallenge asks for a token wherever a registry sends.
func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.test/token",service="registry",scope="repository:a:pull"`, `{"token":"x","expires_in":300}`)
	f.Add(`Bearer realm="http://169.254.169.254/"`, ``)
	f.Add(`Basic realm="x", Bearer realm=`, `{"access_token":"x","expires_in":-1}`)
	f.Fuzz(func(t *testing.T, challenge, answer string) {
		resp := &http.Response{StatusCode: 401, Header: http.Header{"Www-Authenticate": {challenge}}}
		a := &anonymous{&Handler{outages: outages{Health: upstream.NewHealth()}}, Upstream{Host: "registry.test", Transport: transport(func(r *http.Request) (*http.Response, error) {
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
