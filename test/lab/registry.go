// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
)

// Registry is a real registry, behind TLS and a token server.
type Registry struct {
	in, ca  *Internet // the second signs its certificate
	port    int
	Host    string
	Log     *Log
	backend *url.URL // the registry itself, on the internet's loopback
	client  *http.Client
	secret  []byte // of tokens and signed URLs
	cdn     string // host that blobs are redirected to, if any

	mu         sync.Mutex
	users      map[string]string          // password by name
	readers    map[string]map[string]bool // users by private repository
	fault      func(http.ResponseWriter, *http.Request) bool
	tokenFault func(http.ResponseWriter, *http.Request) bool
	front      func(w http.ResponseWriter, r *http.Request, next http.Handler)
	open       http.Handler
	tokens     []string // that were given out
}

// DockerHub makes what docker.io is: a registry, a token server, and a third
// host that blobs are redirected to.
func (in *Internet) DockerHub() *Registry {
	in.t.Helper()
	r := in.newRegistry("registry-1.docker.io")
	r.cdn = "production.cloudflare.docker.com"
	in.Host("docker.io") // dockerd looks it up, and connects there for nothing
	in.HTTPS("auth.docker.io", false, r.Log.logging("auth.docker.io", r.fronted(http.HandlerFunc(r.token))))
	in.HTTPS(r.cdn, false, r.Log.logging(r.cdn, r.fronted(http.HandlerFunc(r.signed))))
	r.serve("https://auth.docker.io/token", "registry.docker.io", "index.docker.io")
	return r
}

// Registry makes a registry that has its token server on the same host.
func (in *Internet) Registry(host string) *Registry {
	in.t.Helper()
	r := in.newRegistry(host)
	r.serve("https://"+host+"/token", host)
	return r
}

// PasswordRegistry makes a registry without a token server: users send their name
// and password with each request, and nothing is public.
func (in *Internet) PasswordRegistry(host string) *Registry {
	in.t.Helper()
	r := in.newRegistry(host)
	r.serve("", host)
	return r
}

// ECR makes a private registry of Amazon ECR: users send their name and password with
// each request, and blobs are redirected to S3.
func (in *Internet) ECR(host string) *Registry {
	in.t.Helper()
	r := in.newRegistry(host)
	r.cdn = "prod-layer-bucket.s3.amazonaws.com"
	in.HTTPS(r.cdn, false, r.Log.logging(r.cdn, http.HandlerFunc(r.signed)))
	r.serve("", host)
	return r
}

// KubernetesBackend is where [Internet.KubernetesRegistry] redirects to.
const KubernetesBackend = "europe-west3-docker.pkg.dev"

// KubernetesRegistry makes what registry.k8s.io is: a host that asks for no token
// and redirects manifests and blobs without a look to a registry at another.
func (in *Internet) KubernetesRegistry() *Registry {
	in.t.Helper()
	r := in.newRegistry("registry.k8s.io")
	const prefix = "/v2/k8s-artifacts-prod/images/"
	in.HTTPS(r.Host, false, r.Log.logging(r.Host, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if r.failing(w, req, &r.fault) {
			return
		}
		if req.URL.Path == "/v2/" {
			w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
			return
		}
		w.Header().Set("Location", "https://"+KubernetesBackend+prefix+strings.TrimPrefix(req.URL.Path, "/v2/"))
		w.WriteHeader(http.StatusTemporaryRedirect)
	})))
	in.HTTPS(KubernetesBackend, false, r.Log.logging(KubernetesBackend, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		req.URL.Path = "/v2/" + strings.TrimPrefix(req.URL.Path, prefix)
		r.open.ServeHTTP(w, req)
	})))
	return r
}

// RegistryAt makes a registry at a port, with its token server there too. With ownCA
// its certificate is of an unknown CA, which is returned as PEM.
func (in *Internet) RegistryAt(host string, port int, ownCA bool) (r *Registry, ca []byte) {
	in.t.Helper()
	r = in.newRegistry(host)
	r.port = port
	if ownCA {
		r.ca = &Internet{t: in.t}
		r.ca.makeCA("a company's CA")
		ca = r.ca.caPEM()
	}
	at := net.JoinHostPort(host, strconv.Itoa(port))
	r.serve("https://"+at+"/token", host)
	return r, ca
}

// CraneRegistry makes a registry of another implementation: crane's, which
// keeps everything in memory.
func (in *Internet) CraneRegistry(host string) *Registry {
	in.t.Helper()
	r := in.newBackend(host, func(addr string) []string {
		return []string{Tool(in.t, "crane"), "registry", "serve", "--address", addr}
	})
	r.serve("https://"+host+"/token", host)
	return r
}

// newRegistry makes a registry of the distribution project.
func (in *Internet) newRegistry(host string) *Registry {
	in.t.Helper()
	return in.newBackend(host, func(addr string) []string {
		dir := in.t.TempDir()
		conf := filepath.Join(dir, "config.yml")
		err := os.WriteFile(conf, fmt.Appendf(nil, `
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %s}
  delete: {enabled: true}
http: {addr: %q, secret: lab}
`, filepath.Join(dir, "data"), addr), 0o600)
		if err != nil {
			in.t.Fatal(err)
		}
		return []string{Tool(in.t, "registry"), "serve", conf}
	})
}

// newBackend starts a registry whose command listens at an address.
func (in *Internet) newBackend(host string, command func(addr string) []string) *Registry {
	in.t.Helper()
	r := &Registry{in: in, ca: in, port: 443, Host: host, Log: &Log{}, client: in.client(), secret: []byte(host + "'s secret"), users: map[string]string{}, readers: map[string]map[string]bool{}}
	l, err := in.space.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		in.t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	p := in.space.start("registry-"+host, []string{"OTEL_TRACES_EXPORTER=none"}, command(addr)...)
	in.mu.Lock()
	in.all = append(in.all, r)
	in.mu.Unlock()
	r.backend = &url.URL{Scheme: "http", Host: addr}
	proxy := &httputil.ReverseProxy{
		Transport: r.client.Transport,
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.SetURL(r.backend)
			pr.Out.Host = pr.In.Host
			pr.Out.Header.Set("X-Forwarded-Proto", "https")
		},
	}
	r.open = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		req.Header.Del("Authorization")
		proxy.ServeHTTP(w, req)
	})
	p.until("answering", func(ctx context.Context) error {
		resp, err := r.do(ctx, "GET", "/v2/", "", nil)
		if err == nil {
			resp.Body.Close()
		}
		return err
	})
	in.t.Cleanup(r.client.CloseIdleConnections)
	return r
}

// PlainRegistry makes a registry that speaks HTTP without TLS, and asks for no
// token, at a port.
func (in *Internet) PlainRegistry(host string, port int) *Registry {
	in.t.Helper()
	r := in.newRegistry(host)
	proxy := &httputil.ReverseProxy{Transport: r.client.Transport, Rewrite: func(pr *httputil.ProxyRequest) {
		pr.SetURL(r.backend)
		pr.Out.Host = pr.In.Host
	}}
	in.HTTP(host, port, r.Log.logging(host, proxy))
	return r
}

// OwnCA makes a registry whose certificate is of a CA that no node trusts, and
// that wants to see a certificate of the same CA. It returns that CA, and such
// a certificate with its key, as PEM.
func (in *Internet) OwnCA(host string) (r *Registry, ca, cert, key []byte) {
	in.t.Helper()
	own := &Internet{t: in.t}
	own.makeCA("a company's CA")
	r = in.newRegistry(host)
	proxy := &httputil.ReverseProxy{Transport: r.client.Transport, Rewrite: func(pr *httputil.ProxyRequest) {
		pr.SetURL(r.backend)
		pr.Out.Host = pr.In.Host
		pr.Out.Header.Set("X-Forwarded-Proto", "https")
	}}
	pool := x509.NewCertPool()
	pool.AddCert(own.ca)
	leaf := own.certificate(host)
	for _, l := range in.listen(host, 443) {
		srv := &http.Server{
			Handler:      r.Log.logging(host, proxy),
			TLSConfig:    &tls.Config{Certificates: []tls.Certificate{leaf}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool},
			TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
			ErrorLog:     log.New(io.Discard, "", 0),
		}
		go func() { _ = srv.ServeTLS(l, "", "") }()
		in.t.Cleanup(func() { srv.Close() })
	}
	client := own.certificate("client")
	der, err := x509.MarshalPKCS8PrivateKey(client.PrivateKey)
	if err != nil {
		in.t.Fatal(err)
	}
	return r, own.caPEM(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: client.Certificate[0]}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// serve puts the registry behind TLS and a token server, if it has a realm, also
// under other names.
func (r *Registry) serve(realm, service string, also ...string) {
	r.in.t.Helper()
	h := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/token" {
			r.token(w, req)
			return
		}
		if r.failing(w, req, &r.fault) {
			return
		}
		repo := repository(req.URL.Path)
		user, ok := r.verify(strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer "), repo)
		if realm == "" {
			user, ok = r.login(req.BasicAuth())
			ok = ok && user != ""
		}
		if !ok || repo != "" && !r.mayRead(repo, user) {
			scope := ""
			if repo != "" {
				scope = fmt.Sprintf(`,scope="repository:%s:pull"`, repo)
			}
			w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
			challenge := fmt.Sprintf(`Bearer realm="%s",service="%s"%s`, realm, service, scope)
			if realm == "" {
				challenge = fmt.Sprintf("Basic realm=%q", service)
			}
			w.Header().Set("Www-Authenticate", challenge)
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = w.Write([]byte(`{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`))
			return
		}
		if r.cdn != "" && strings.Contains(req.URL.Path, "/blobs/sha256:") && req.Method == http.MethodGet {
			w.Header().Set("Location", "https://"+r.cdn+req.URL.Path+"?sig="+r.sign(req.URL.Path))
			w.WriteHeader(http.StatusTemporaryRedirect)
			return
		}
		r.open.ServeHTTP(w, req)
	})
	for _, host := range append([]string{r.Host}, also...) {
		r.in.https(host, r.port, r.ca.certificate(host), false, r.Log.logging(host, r.fronted(h)))
	}
}

// Front has a function answer all requests to the registry, its token server and
// where it keeps its blobs. next is what would have answered; [Registry.Open]
// answers without asking for credentials. It is set before requests come.
func (r *Registry) Front(f func(w http.ResponseWriter, r *http.Request, next http.Handler)) {
	r.front = f
}

// Open is the registry without a token server and redirects.
func (r *Registry) Open() http.Handler { return r.open }

func (r *Registry) fronted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if r.front == nil {
			h.ServeHTTP(w, req)
			return
		}
		r.front(w, req, h)
	})
}

// Fault has a function answer requests to the registry and to where it keeps
// its blobs; it returns false for those it leaves alone. Nil ends that.
func (r *Registry) Fault(f func(http.ResponseWriter, *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = f
}

// FaultTokens has a function answer requests for tokens in the same way.
func (r *Registry) FaultTokens(f func(http.ResponseWriter, *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tokenFault = f
}

// failing says whether a fault, which there may be, has answered a request.
func (r *Registry) failing(w http.ResponseWriter, req *http.Request, fault *func(http.ResponseWriter, *http.Request) bool) bool {
	r.mu.Lock()
	f := *fault
	r.mu.Unlock()
	return f != nil && f(w, req)
}

// Secrets are the users' passwords and the tokens that were given out: they
// must not be written down.
func (r *Registry) Secrets() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := slices.Clone(r.tokens)
	for name, password := range r.users {
		all = append(all, password, base64([]byte(name+":"+password)))
	}
	return all
}

// User makes a user known.
func (r *Registry) User(name, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.users[name] = password
}

// Private makes a repository one that only the given users may read.
func (r *Registry) Private(repo string, users ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.readers[repo] = map[string]bool{}
	for _, u := range users {
		r.readers[repo][u] = true
	}
}

func (r *Registry) mayRead(repo, user string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	readers, private := r.readers[repo]
	return !private || readers[user]
}

func repository(path string) string {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return ""
	}
	for _, sep := range []string{"/manifests/", "/blobs/", "/tags/"} {
		if i := strings.LastIndex(rest, sep); i > 0 {
			return rest[:i]
		}
	}
	return ""
}

func (r *Registry) sign(what string) string {
	m := hmac.New(sha256.New, r.secret)
	m.Write([]byte(what))
	return hex.EncodeToString(m.Sum(nil))
}

// token is the token server: anonymous users get tokens too, for what is
// public. A token is "user|scopes|nonce|signature".
func (r *Registry) token(w http.ResponseWriter, req *http.Request) {
	if r.failing(w, req, &r.tokenFault) {
		return
	}
	user, password, given := req.BasicAuth()
	if err := req.ParseForm(); err == nil && req.PostForm.Get("username") != "" {
		user, password, given = req.PostForm.Get("username"), req.PostForm.Get("password"), true
	}
	user, ok := r.login(user, password, given)
	if !ok {
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = w.Write([]byte(`{"details":"incorrect username or password"}`))
		return
	}
	var repos []string
	for _, scope := range req.Form["scope"] {
		for s := range strings.FieldsSeq(scope) {
			if p := strings.Split(s, ":"); len(p) == 3 && p[0] == "repository" && r.mayRead(p[1], user) {
				repos = append(repos, p[1])
			}
		}
	}
	claim := fmt.Sprintf("%s|%s|%x", user, strings.Join(repos, ","), rand.Uint64())
	token := hex.EncodeToString([]byte(claim)) + "." + r.sign(claim)
	r.mu.Lock()
	r.tokens = append(r.tokens, token)
	r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 300})
}

// login says whether a name and password, if they are given, are a user's.
func (r *Registry) login(name, password string, given bool) (user string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	want, known := r.users[name]
	return name, !given || known && want == password
}

func (r *Registry) verify(token, repo string) (user string, ok bool) {
	enc, sig, found := strings.Cut(token, ".")
	claim, err := hex.DecodeString(enc)
	if !found || err != nil || !hmac.Equal([]byte(sig), []byte(r.sign(string(claim)))) {
		return "", false
	}
	parts := strings.Split(string(claim), "|")
	if repo == "" {
		return parts[0], true
	}
	for _, granted := range strings.Split(parts[1], ",") {
		if granted == repo {
			return parts[0], true
		}
	}
	return parts[0], false
}

// signed is the host that blobs are redirected to.
func (r *Registry) signed(w http.ResponseWriter, req *http.Request) {
	if r.failing(w, req, &r.fault) {
		return
	}
	if req.URL.Query().Get("sig") != r.sign(req.URL.Path) || req.Header.Get("Authorization") != "" {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	resp, err := r.do(req.Context(), req.Method, req.URL.Path, req.Header.Get("Range"), nil)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for _, h := range []string{"Content-Type", "Content-Length", "Content-Range", "Accept-Ranges", "Etag"} {
		if v := resp.Header.Get(h); v != "" {
			w.Header().Set(h, v)
		}
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body)
}

func (r *Registry) do(ctx context.Context, method, path, rng string, body []byte) (*http.Response, error) {
	u := r.backend.JoinPath("/")
	rel, err := url.Parse(path)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, u.ResolveReference(rel).String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if rng != "" {
		req.Header.Set("Range", rng)
	}
	return r.client.Do(req)
}

// Image is what to push.
type Image struct {
	// Layers are the sizes of their content in bytes. It can't be compressed.
	Layers []int
	// Seed makes the layers different from those of other seeds.
	Seed uint64
	// OCI makes it OCI media types instead of Docker's.
	OCI bool
	// Padded puts the content behind the end of the layer's archive, where it is
	// carried and verified but not unpacked: for images that would be too large
	// for many nodes on one machine.
	Padded bool
	// Program is a static program of this machine that the image runs, if any,
	// as "/" and its name.
	Program string
	Cmd     []string
	// Files are more files, by their path in the image.
	Files map[string]string
	// Index puts it into an index, beside one for another platform.
	Index bool
	// Foreign is a host that the first layer is at, as "/" and its digest, instead
	// of in the image's repository. The registry has it in the repository "foreign".
	Foreign string
	// Annotation is the size of an annotation in the manifest.
	Annotation int
	// TrivyDB makes it an OCI artifact that trivy takes for its database: one layer,
	// with the content as that database's file.
	TrivyDB bool
}

// Pushed is an image as a registry has it.
type Pushed struct {
	Ref      string        // name without the registry
	Digest   digest.Digest // of what the tag names
	Manifest digest.Digest // of this machine's platform
	Config   digest.Digest
	Layers   []digest.Digest
	Sizes    []int64 // of the layers
	DiffIDs  []digest.Digest
	Bytes    int64 // of config and layers
}

// Push makes an image and puts it into the registry, as "name:tag".
func (r *Registry) Push(ref string, im Image) Pushed {
	t := r.in.t
	t.Helper()
	repo, tag, _ := strings.Cut(ref, ":")
	types := map[string]string{
		"config": "application/vnd.docker.container.image.v1+json", "layer": "application/vnd.docker.image.rootfs.diff.tar.gzip",
		"manifest": "application/vnd.docker.distribution.manifest.v2+json", "index": "application/vnd.docker.distribution.manifest.list.v2+json",
	}
	if im.OCI || im.TrivyDB {
		types = map[string]string{
			"config": "application/vnd.oci.image.config.v1+json", "layer": "application/vnd.oci.image.layer.v1.tar+gzip",
			"manifest": "application/vnd.oci.image.manifest.v1+json", "index": "application/vnd.oci.image.index.v1+json",
		}
	}
	if im.TrivyDB {
		types["config"], types["layer"] = "application/vnd.oci.empty.v1+json", "application/vnd.aquasec.trivy.db.layer.v1.tar+gzip"
	}
	p := Pushed{Ref: ref}
	type descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      digest.Digest     `json:"digest"`
		Size        int64             `json:"size"`
		Platform    any               `json:"platform,omitempty"`
		URLs        []string          `json:"urls,omitempty"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	put := func(kind string, b []byte) descriptor {
		d := descriptor{MediaType: types[kind], Digest: digest.FromBytes(b), Size: int64(len(b))}
		if kind == "config" || kind == "layer" {
			r.upload(repo, d.Digest, b)
			p.Bytes += d.Size
		}
		return d
	}
	var layers []descriptor
	for i := range im.Layers {
		layer, diff := makeLayer(im, i)
		var d descriptor
		if i == 0 && im.Foreign != "" {
			d = descriptor{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: digest.FromBytes(layer), Size: int64(len(layer))}
			d.URLs = []string{"https://" + im.Foreign + "/" + d.Digest.String()}
			r.upload("foreign", d.Digest, layer)
		} else {
			d = put("layer", layer)
		}
		if im.TrivyDB {
			d.Annotations = map[string]string{"org.opencontainers.image.title": "db.tar.gz"}
		}
		layers = append(layers, d)
		p.Layers, p.Sizes, p.DiffIDs = append(p.Layers, d.Digest), append(p.Sizes, d.Size), append(p.DiffIDs, diff)
	}
	run := map[string]any{"Cmd": []string{"/nothing"}}
	if im.Program != "" {
		run = map[string]any{"Entrypoint": []string{"/" + filepath.Base(im.Program)}, "Cmd": im.Cmd}
		layer, diff := packFiles(t, im)
		d := put("layer", layer)
		layers = append(layers, d)
		p.Layers, p.Sizes, p.DiffIDs = append(p.Layers, d.Digest), append(p.Sizes, d.Size), append(p.DiffIDs, diff)
	}
	config, _ := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "created": "2020-01-01T00:00:00Z", "config": run,
		"rootfs": map[string]any{"type": "layers", "diff_ids": p.DiffIDs}, "history": history(len(p.Layers)),
	})
	if im.TrivyDB {
		config = []byte("{}")
	}
	c := put("config", config)
	p.Config = c.Digest
	content := map[string]any{"schemaVersion": 2, "mediaType": types["manifest"], "config": c, "layers": layers}
	if im.TrivyDB {
		content["artifactType"] = "application/vnd.aquasec.trivy.config.v1+json"
	}
	if im.Annotation > 0 {
		content["annotations"] = map[string]string{"large": strings.Repeat("x", im.Annotation)}
	}
	manifest, _ := json.Marshal(content)
	p.Manifest = digest.FromBytes(manifest)
	p.Digest = p.Manifest
	if !im.Index {
		r.putManifest(repo, tag, types["manifest"], manifest)
		return p
	}
	r.putManifest(repo, p.Manifest.String(), types["manifest"], manifest)
	mine := put("manifest", manifest)
	mine.Platform = map[string]string{"architecture": runtime.GOARCH, "os": "linux"}
	other, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": types["manifest"], "config": c, "layers": layers[:1]})
	r.putManifest(repo, digest.FromBytes(other).String(), types["manifest"], other)
	theirs := put("manifest", other)
	theirs.Platform = map[string]string{"architecture": "s390x", "os": "linux"}
	index, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": types["index"], "manifests": []descriptor{theirs, mine}})
	r.putManifest(repo, tag, types["index"], index)
	p.Digest = digest.FromBytes(index)
	return p
}

func history(n int) (h []map[string]string) {
	for range n {
		h = append(h, map[string]string{"created": "2020-01-01T00:00:00Z", "created_by": "lab"})
	}
	return h
}

// makeLayer makes one of an image's Layers: with a file of random content, or with
// an empty file and the content behind it.
func makeLayer(im Image, i int) (layer []byte, diffID digest.Digest) {
	seed := im.Seed<<8 + uint64(i)
	content := make([]byte, im.Layers[i])
	_, _ = rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, seed))).Read(content)
	var plain, packed bytes.Buffer
	tw := tar.NewWriter(&plain)
	h := &tar.Header{Name: fmt.Sprintf("file-%d", seed), Mode: 0o644, Size: int64(len(content))}
	if im.TrivyDB {
		const about = `{"Version":2}`
		_ = tw.WriteHeader(&tar.Header{Name: "metadata.json", Mode: 0o644, Size: int64(len(about))})
		_, _ = io.WriteString(tw, about)
		h.Name = "trivy.db"
	}
	if im.Padded {
		h.Size = 0
	}
	_ = tw.WriteHeader(h)
	if !im.Padded {
		_, _ = tw.Write(content)
	}
	tw.Close()
	if im.Padded {
		plain.Write(content)
	}
	gz, _ := gzip.NewWriterLevel(&packed, gzip.NoCompression)
	_, _ = gz.Write(plain.Bytes())
	gz.Close()
	return packed.Bytes(), digest.FromBytes(plain.Bytes())
}

// packFiles makes a layer with an image's program and files.
func packFiles(t testing.TB, im Image) (layer []byte, diffID digest.Digest) {
	t.Helper()
	var plain, packed bytes.Buffer
	tw := tar.NewWriter(&plain)
	files := maps.Clone(im.Files)
	if files == nil {
		files = make(map[string]string)
	}
	files["/"+filepath.Base(im.Program)] = im.Program
	for _, name := range slices.Sorted(maps.Keys(files)) {
		b, err := os.ReadFile(files[name])
		if err != nil {
			t.Fatal(err)
		}
		_ = tw.WriteHeader(&tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: 0o755, Size: int64(len(b))})
		_, _ = tw.Write(b)
	}
	tw.Close()
	gz, _ := gzip.NewWriterLevel(&packed, gzip.NoCompression)
	_, _ = gz.Write(plain.Bytes())
	gz.Close()
	return packed.Bytes(), digest.FromBytes(plain.Bytes())
}

func (r *Registry) upload(repo string, d digest.Digest, b []byte) {
	t := r.in.t
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*waitTime)
	defer cancel()
	resp, err := r.do(ctx, "POST", "/v2/"+repo+"/blobs/uploads/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	loc, err := resp.Location()
	if err != nil {
		t.Fatal(err)
	}
	q := loc.Query()
	q.Set("digest", d.String())
	loc.RawQuery = q.Encode()
	if resp, err = r.do(ctx, "PUT", loc.RequestURI(), "", b); err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("uploading %s to %s/%s: %s", d, r.Host, repo, resp.Status)
	}
}

func (r *Registry) putManifest(repo, ref, mediaType string, b []byte) {
	t := r.in.t
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "PUT", r.backend.JoinPath("/v2/", repo, "manifests", ref).String(), bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		msg, _ := io.ReadAll(resp.Body)
		t.Fatalf("putting the manifest %s into %s/%s: %s %s", ref, r.Host, repo, resp.Status, msg)
	}
}
