// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/base64"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Logins are found where `docker login` keeps them, and nowhere for a registry
// that there is none for.
func TestLoggedIn(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	basic := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write("docker-credential-good", `#!/bin/sh
read key
[ "$1" = get ] || exit 2
case "$key" in
helped.example) echo '{"ServerURL":"'"$key"'","Username":"carol","Secret":"s3"}' ;;
token.example) echo '{"Username":"<token>","Secret":"s4"}' ;;
*) echo 'credentials not found in native keychain'; exit 1 ;;
esac
`)
	write("docker-credential-bad", "#!/bin/sh\necho secret-in-a-message; echo secret-in-a-message >&2; exit 1\n")
	none := credentials{}
	for _, tt := range []struct {
		config, host string
		want         credentials
		err          string
	}{
		{"", "a.example", none, ""},
		{`{"auths":{"a.example":{"auth":"` + basic("alice:s:1") + `"}}}`, "a.example", credentials{"alice", "s:1"}, ""},
		{`{"auths":{"https://a.example/v1/":{"auth":"` + basic("alice:s1") + `"}}}`, "a.example", credentials{"alice", "s1"}, ""},
		{`{"auths":{"a.example":{"auth":"` + basic("alice:s1") + `"}}}`, "b.example", none, ""},
		{`{"auths":{"a.example":{"auth":"` + basic("alice:s1") + `"}}}`, "a.example:5000", none, ""},
		{`{"auths":{"https://index.docker.io/v1/":{"auth":"` + basic("bob:s2") + `"}}}`, "docker.io", credentials{"bob", "s2"}, ""},
		{`{"auths":{"a.example":{"auth":"` + basic("00000000-0000-0000-0000-000000000000:") + `","identitytoken":"s5"}}}`, "a.example", credentials{"", "s5"}, ""},
		{`{"credHelpers":{"helped.example":"good","token.example":"good"}}`, "helped.example", credentials{"carol", "s3"}, ""},
		{`{"credHelpers":{"helped.example":"good","token.example":"good"}}`, "token.example", credentials{"", "s4"}, ""},
		{`{"credsStore":"good"}`, "helped.example", credentials{"carol", "s3"}, ""},
		{`{"credsStore":"good","auths":{"other.example":{}}}`, "other.example", none, ""},
		{`{"credsStore":"bad"}`, "a.example", none, "docker-credential-bad"},
		{`{"credsStore":"absent"}`, "a.example", none, "docker-credential-absent"},
		{`{"credsStore":"../bin/sh"}`, "a.example", none, "no name of a credential helper"},
		{`{"auths":{"a.example":{"auth":"!"}}}`, "a.example", none, "docker login a.example"},
		{`{"auths":[]}`, "a.example", none, "config.json"},
	} {
		os.Remove(filepath.Join(dir, "config.json"))
		if tt.config != "" {
			write("config.json", tt.config)
		}
		got, err := loggedIn(t.Context(), tt.host)
		if got == nil {
			got = &none
		}
		if *got != tt.want || (err != nil) != (tt.err != "") {
			t.Errorf("%s: %s: %+v, %v", tt.config, tt.host, *got, err)
		}
		if err != nil && (!strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "secret-in")) {
			t.Errorf("%s: %v", tt.config, err)
		}
	}
}

// A password goes to no address but an https one.
func TestAuthorize(t *testing.T) {
	c := credentials{"alice", "wonderland"}
	for header, want := range map[string]string{
		`Basic realm="x"`: "Basic " + base64.StdEncoding.EncodeToString([]byte("alice:wonderland")),
		`Bearer realm="http://127.0.0.1:1/token",service="a"`: "no https URL",
		`Bearer realm="https://127.0.0.1:1/token"`:            "logging in at 127.0.0.1:1",
		`Negotiate`: "doesn't say how",
	} {
		got, err := c.authorize(t.Context(), http.Header{"Www-Authenticate": {header}}, "a.example")
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) || err != nil && strings.Contains(got, "wonderland") {
			t.Errorf("%s: %q, want %q", header, got, want)
		}
	}
}
