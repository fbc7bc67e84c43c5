// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"weir/proxy/registry"
)

// credentials are what `docker login` has kept for a registry. Without a name
// the secret is an identity token (distribution, "OAuth2 token authentication").
type credentials struct{ name, secret string }

// dockerConfig is Docker's config.json, as far as it is about logins.
type dockerConfig struct {
	Auths map[string]struct {
		Auth          string // base64 of name:password
		IdentityToken string
	}
	CredHelpers map[string]string
	CredsStore  string
}

// hubKey is how `docker login` names Docker Hub.
const hubKey = "https://index.docker.io/v1/"

// helperTime is how long a credential helper may take. One may ask a cloud.
const helperTime = 30 * time.Second

// loggedIn returns the credentials that the user who runs this has for a
// registry, as `docker login` keeps them, or nil when there are none.
func loggedIn(ctx context.Context, host string) (*credentials, error) {
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, nil // a user without a home has no logins
		}
		dir = filepath.Join(home, ".docker")
	}
	file := filepath.Join(dir, "config.json")
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var conf dockerConfig
	if err == nil {
		err = json.Unmarshal(b, &conf)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the logins in %s: %w", file, err)
	}
	keys := []string{host, "https://" + host, "https://" + host + "/v1/", "https://" + host + "/v2/"}
	if host == registry.DockerHubName {
		keys = append(keys, hubKey, "index.docker.io")
	}
	for _, key := range keys {
		helper := conf.CredHelpers[key]
		if a, ok := conf.Auths[key]; helper == "" && conf.CredsStore != "" && (ok || key == hubKey || key == host) {
			helper = conf.CredsStore
		} else if helper == "" && ok {
			switch name, password, err := decodeAuth(a.Auth); {
			case a.IdentityToken != "":
				return &credentials{secret: a.IdentityToken}, nil
			case err != nil:
				return nil, fmt.Errorf("the login for %s in %s can't be read; `docker login %[1]s` makes it anew", key, file)
			case name != "":
				return &credentials{name, password}, nil
			}
		}
		if helper != "" {
			if c, err := askHelper(ctx, helper, key); c != nil || err != nil {
				return c, err
			}
		}
	}
	return nil, nil
}

func decodeAuth(s string) (name, password string, err error) {
	b, err := base64.StdEncoding.DecodeString(s)
	name, password, _ = strings.Cut(string(b), ":")
	return name, password, err
}

// askHelper asks a credential helper (docker-credential-helpers' protocol:
// "get", the key on standard input, JSON on standard output).
func askHelper(ctx context.Context, helper, key string) (*credentials, error) {
	program := "docker-credential-" + helper
	if strings.ContainsAny(helper, "/\\") {
		return nil, fmt.Errorf("%q is no name of a credential helper", helper)
	}
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "get")
	cmd.Stdin = strings.NewReader(key)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		if bytes.Contains(out, []byte("credentials not found")) {
			return nil, nil
		}
		// What it prints may have a secret in it.
		return nil, fmt.Errorf("asking %s for the login for %s: %w", program, key, err)
	}
	var got struct{ Username, Secret string }
	if err := json.Unmarshal(out, &got); err != nil {
		return nil, fmt.Errorf("%s doesn't answer in JSON", program)
	}
	switch {
	case got.Secret == "":
		return nil, nil
	case got.Username == "<token>":
		return &credentials{secret: got.Secret}, nil
	}
	return &credentials{got.Username, got.Secret}, nil
}

// authorize makes the Authorization header that a registry's refusal asks for.
// Credentials go to the registry's token server and nowhere else; the agent and
// the registry get the token.
func (c credentials) authorize(ctx context.Context, refusal http.Header, host string) (string, error) {
	for _, challenge := range auth.ParseAuthHeader(refusal) {
		switch challenge.Scheme {
		case auth.BasicAuth:
			if c.name != "" {
				return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.name+":"+c.secret)), nil
			}
		case auth.BearerAuth:
			o, err := auth.GenerateTokenOptions(ctx, host, c.name, c.secret, challenge)
			if err != nil {
				return "", err
			}
			realm, err := url.Parse(o.Realm)
			if err != nil || realm.Scheme != "https" {
				return "", fmt.Errorf("%s wants the password sent to %q, which is no https URL", host, o.Realm)
			}
			token, err := c.token(ctx, o)
			if err != nil {
				return "", fmt.Errorf("logging in at %s: %w", realm.Host, err)
			}
			return "Bearer " + token, nil
		}
	}
	return "", fmt.Errorf("%s doesn't say how to log in", host)
}

func (c credentials) token(ctx context.Context, o auth.TokenOptions) (string, error) {
	client := &http.Client{Timeout: helperTime, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	headers := http.Header{"User-Agent": {"weir"}}
	if c.name == "" {
		t, err := auth.FetchTokenWithOAuth(ctx, client, headers, "weir", o)
		if err != nil {
			return "", err
		}
		return t.AccessToken, nil
	}
	t, err := auth.FetchToken(ctx, client, headers, o)
	if err != nil {
		return "", err
	}
	if t.Token == "" {
		return t.AccessToken, nil
	}
	return t.Token, nil
}
