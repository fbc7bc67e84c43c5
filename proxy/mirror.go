// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// Mirror returns a handler for clients that name weir as a mirror in their
// configuration. They say which registry they mean with ?ns=REGISTRY, as
// containerd does, or with a path that begins with /v2/REGISTRY/. Without
// either it is the one that is called fallback (such as docker.io): dockerd's
// registry-mirrors are for Docker Hub alone, and don't say so.
//
// Only known registries can be meant, and only reading is possible. Clients
// without credentials get what is public; the mirror fetches the token
// that a registry may want for that.
func (p *Proxy) Mirror(e *upstream.Egress, fallback string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m, err := parseMirror(r.URL, fallback)
		if err != nil {
			refuse(w, http.StatusNotFound, "NAME_UNKNOWN", err.Error())
			return
		}
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "a mirror is for reading; push to "+m.registry)
			return
		}
		if m.path == "/v2/" {
			// Whether to log in is for each repository to say.
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Length", "2")
			w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
			_, _ = w.Write([]byte("{}"))
			return
		}
		host, ok := p.opts.Hosts.Named(m.registry)
		if !ok {
			refuse(w, http.StatusNotFound, "NAME_UNKNOWN", fmt.Sprintf("%s is not a registry that weir knows; add it with --registry", m.registry))
			return
		}
		client, _, err := net.SplitHostPort(r.RemoteAddr)
		if err != nil {
			client = "prefetch" // by a Unix socket
		}
		up := registry.Upstream{Host: host, Client: client, Transport: e.Transport(upstream.Target{Host: upstream.ParseHost(host)})}
		out := r.Clone(r.Context())
		out.Host = host
		out.URL.Path, out.URL.RawPath, out.URL.RawQuery = m.path, "", m.query
		p.opts.Registry.ServeAnonymous(&mirrorWriter{ResponseWriter: w, mirrored: m}, out, up)
	})
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
}

// mirrored is what a request to a mirror means.
type mirrored struct {
	registry string // as image references call it
	path     string // at the registry
	query    string
	// How the client named the registry.
	prefix, ns string
}

// parseMirror understands a mirror's URL.
func parseMirror(u *url.URL, fallback string) (m mirrored, err error) {
	path := u.EscapedPath()
	if path == "/v2" {
		path = "/v2/"
	}
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok || strings.Contains(path, "%") || strings.Contains(path, "/../") || strings.Contains(path, "//") {
		return m, fmt.Errorf("%s is not a path of the distribution API", u.Path)
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return m, fmt.Errorf("the query of the URL can't be understood: %w", err)
	}
	m.ns = q.Get("ns")
	q.Del("ns")
	m.query = q.Encode()
	if m.ns == "" {
		// The first component of a repository's name has no dot or colon
		// when it isn't a registry, by the same rule as in references.
		first, repo, more := strings.Cut(rest, "/")
		if more && (strings.ContainsAny(first, ".:") || first == "localhost") {
			m.prefix, rest = first, repo
		}
	}
	switch {
	case m.ns != "":
		m.registry = m.ns
	case m.prefix != "":
		m.registry = m.prefix
	default:
		m.registry = fallback
	}
	if m.registry == registry.DockerHubName {
		rest = official(rest)
	}
	m.path = "/v2/" + rest
	return m, nil
}

// official adds library/ to the name of one of Docker Hub's official images.
func official(rest string) string {
	for _, kind := range []string{"/manifests/", "/blobs/", "/tags/", "/referrers/"} {
		if name, _, ok := strings.Cut(rest, kind); ok && name != "" && !strings.Contains(name, "/") {
			return "library/" + rest
		}
	}
	return rest
}

// mirrorWriter turns links to further pages into ones that mean the same here.
type mirrorWriter struct {
	http.ResponseWriter
	mirrored
}

func (w *mirrorWriter) WriteHeader(code int) {
	if link := w.Header().Get("Link"); strings.HasPrefix(link, "</v2/") {
		target, params, ok := strings.Cut(link[1:], ">")
		if u, err := url.Parse(target); ok && err == nil {
			if w.prefix != "" {
				u.Path = "/v2/" + w.prefix + strings.TrimPrefix(u.Path, "/v2")
			}
			if w.ns != "" {
				q := u.Query()
				q.Set("ns", w.ns)
				u.RawQuery = q.Encode()
			}
			w.Header().Set("Link", "<"+u.String()+">"+params)
		}
	}
	w.ResponseWriter.WriteHeader(code)
}

// Unwrap is for http.ResponseController.
func (w *mirrorWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
