// SPDX-License-Identifier: Apache-2.0

package twins

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"weir/test/lab"
)

// client is one on a node.
type client struct {
	pull, push func(p *play) error
	// image makes of an image what it pulls, if that is something else.
	image func(*lab.Image)
	// forget removes what was pulled.
	forget func(p *play)
	// restart starts a daemon anew; nil for what is a new process each time.
	restart func()
	// pushesApart says that a new process pushes, though a daemon pulls.
	pushesApart bool
	// node is where it runs: the node, or a box on it.
	node *lab.Node
	box  bool
	// own is for one that does something else than pull and push.
	own map[string]func(p *play) error
}

// tool runs a program with the play's environment.
func (p *play) tool(args ...string) error {
	_, err := p.c.node.Output(append(append([]string{"env", "-C", "/var/lib/home"}, p.env...), args...)...)
	return err
}

// startClients starts all clients.
func (s *side) startClients() {
	t := s.w.t
	t.Helper()
	s.clients = make(map[string]*client)
	auth, _ := json.Marshal(map[string]any{"auths": map[string]any{s.w.corp.Host: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}}})
	s.WriteFile("/var/lib/home/.docker/config.json", string(auth))
	s.WriteFile("/var/lib/home/roots.pem", s.w.Roots())
	s.WriteFile("/var/lib/home/artifact.txt", strings.Repeat("an artifact\n", 10_000))
	crane := s.As(lab.Tool(t, "crane"), "crane")
	oras, regctl, helm, cosign := s.As(lab.Tool(t, "oras"), "oras"), s.As(lab.Tool(t, "regctl"), "regctl"), s.As(lab.Tool(t, "helm"), "helm"), s.As(lab.Tool(t, "cosign"), "cosign")
	ctr := s.As(lab.Tool(t, "ctr"), "ctr")
	s.raw = s.As(os.Args[0], "krane")
	s.Run("sh", "-ec", "cd /var/lib/home; "+crane+" pull ghcr.io/base/base:1 base.tar; "+crane+" pull --format=oci ghcr.io/base/base:1 base; "+
		cosign+" save --dir=cosigned ghcr.io/base/base:1 >/dev/null; "+helm+" create chart >/dev/null; "+helm+" package chart >/dev/null; for p in podman buildah; do $p --storage-driver=vfs --root=/var/lib/$p --runroot=/run/$p pull -q oci:base >/dev/null; done")

	containerd := s.Containerd()
	debianCtr := s.As(lab.Debian(t, "/usr/bin/ctr", "containerd"), "ctr")
	s.containerd("containerd 1.6", s.Node, containerd, debianCtr)
	docker := s.Docker()
	s.docker("dockerd 20.10", s.Node, docker)
	box := s.Box()
	newest := box.NewestContainerd()
	s.containerd("containerd 2.4", box, newest, ctr)
	s.docker("dockerd 29", box, box.NewestDocker())
	older := s.Box()
	s.containerd("containerd 1.7", older, older.OlderContainerd(), debianCtr)
	buildkit := s.BuildKit()
	build := func(p *play, output string) error {
		_, err := buildkit.TryBuild("FROM "+p.ref()+"\nENV A=1\n", "--no-cache", output)
		return err
	}
	s.clients["buildkitd"] = &client{node: s.Node, restart: func() { buildkit.Stop(); buildkit = s.BuildKit() },
		pull:   func(p *play) error { return build(p, "--output=type=oci,dest=/var/lib/home/image.tar") },
		push:   func(p *play) error { return build(p, "--output=type=image,name="+p.at("pushed")+",push=true") },
		forget: func(*play) { s.Run(lab.Tool(t, "buildctl"), "prune", "--all") }}
	for _, name := range []string{"podman", "buildah"} {
		run := func(p *play, args ...string) error {
			return p.tool(append([]string{name, "--storage-driver=vfs", "--root=/var/lib/" + name, "--runroot=/run/" + name}, args...)...)
		}
		id := strings.TrimSpace(s.Run(name, "--storage-driver=vfs", "--root=/var/lib/"+name, "--runroot=/run/"+name, "images", "-q"))
		s.clients[name] = &client{node: s.Node,
			pull:   func(p *play) error { return run(p, "pull", "-q", p.ref()) },
			push:   func(p *play) error { return run(p, "push", "-q", id, "docker://"+p.at("pushed")) },
			forget: func(p *play) { _ = run(p, "rmi", "-f", p.ref()) }}
	}
	at := func(p *play) string { return "/var/lib/home/pulled-" + strings.ReplaceAll(p.repo, "/", "-") }
	tool := func(name string, node *lab.Node, pull, push func(p *play) []string) {
		c := &client{node: node, pull: func(p *play) error { return p.tool(pull(p)...) }, forget: func(p *play) { p.c.node.Run("rm", "-rf", at(p)) }}
		if push != nil {
			c.push = func(p *play) error { return p.tool(push(p)...) }
		}
		s.clients[name] = c
	}
	tool("skopeo", s.Node, func(p *play) []string { return []string{"skopeo", "copy", "-q", "docker://" + p.ref(), "dir:" + at(p)} },
		func(p *play) []string {
			return []string{"skopeo", "copy", "-q", "oci:base", "docker://" + p.at("pushed")}
		})
	cranePull := func(p *play) []string { return []string{crane, "pull", "--format=oci", p.ref(), at(p)} }
	tool("crane", s.Node, cranePull, func(p *play) []string { return []string{crane, "push", "base", p.at("pushed")} })
	s.clients["crane"].own = map[string]func(*play) error{
		"delete": func(p *play) error {
			err := p.tool(crane, "delete", strings.TrimSuffix(p.ref(), ":1")+"@"+p.im.Digest.String())
			return errors.Join(err, wantErr(p.tool(crane, "manifest", p.ref())))
		},
		"copy": func(p *play) error { return p.tool(crane, "copy", p.ref(), p.at("copy")) },
		"push and pull at once": func(p *play) error {
			// It fails when one of them does.
			return p.tool("sh", "-c", fmt.Sprintf(`
(for i in 1 2 3; do %[1]s push base %[2]s || exit 1; %[1]s copy %[3]s %[2]s || exit 1; done) & w=$!
for i in 1 2 3 4 5 6; do %[1]s manifest %[3]s >/dev/null || exit 1; %[1]s pull --format=oci %[3]s %[4]s-$i || exit 1; done
wait $w; r=$?; rm -rf %[4]s-*; exit $r`, crane, p.at("both"), p.ref(), at(p)))
		},
	}
	flushed := s.Box()
	flushed.Run("ip", "addr", "flush", "dev", "lo")
	flushed.WriteFile("/var/lib/home/.docker/config.json", string(auth))
	tool("crane where lo has no address", flushed, cranePull, nil)
	for _, roots := range []string{"", "--ca-file=roots.pem"} {
		name := "oras"
		copied := []string{oras, "copy"}
		pushed := []string{oras, "push"}
		if roots != "" {
			name += " --ca-file"
			copied = append(copied, "--from-ca-file=roots.pem")
			pushed = append(pushed, roots)
		}
		tool(name, s.Node, func(p *play) []string {
			return append(slices.Clone(copied), "--no-tty", p.ref(), "--to-oci-layout", at(p)+":1")
		},
			func(p *play) []string {
				return append(slices.Clone(pushed), "--no-tty", p.at("pushed"), "artifact.txt:text/plain")
			})
	}
	tool("regctl", s.Node, func(p *play) []string { return []string{regctl, "image", "copy", p.ref(), "ocidir://" + at(p) + ":1"} },
		func(p *play) []string {
			return []string{regctl, "image", "copy", "ocidir://base@" + s.baseDigest(), p.at("pushed")}
		})
	chart := func(name string, flags ...string) {
		s.clients[name] = &client{node: s.Node, push: func(p *play) error {
			return p.tool(append([]string{helm, "push", "chart-0.1.0.tgz", "oci://" + p.reg.Host + "/" + p.repo}, flags...)...)
		}, pull: func(p *play) error {
			// A chart has to be there; it is not the agent's node that puts it there.
			return errors.Join(p.tool(append([]string{helm, "push", "chart-0.1.0.tgz", "oci://" + p.reg.Host + "/" + p.repo}, flags...)...),
				p.tool(append([]string{helm, "pull", "oci://" + p.reg.Host + "/" + p.repo + "/chart", "--version=0.1.0", "--destination=/var/lib/home/chart"}, flags...)...))
		}}
	}
	chart("helm")
	chart("helm --ca-file", "--ca-file=roots.pem")
	for name, roots := range map[string][]string{"cosign": nil, "cosign --registry-cacert": {"--registry-cacert=roots.pem"}} {
		cosigned := func(do, dir, ref string) []string {
			return slices.Concat([]string{cosign, do, "--dir=" + dir}, roots, []string{ref})
		}
		tool(name, s.Node,
			func(p *play) []string { return cosigned("save", at(p), p.ref()) },
			func(p *play) []string { return cosigned("load", "cosigned", p.at("pushed")) })
	}
	// It has what it has scanned, and its database, in a cache that is new each time.
	trivy := s.As(lab.Tool(t, "trivy"), "trivy")
	scans := func(p *play, args ...string) []string {
		return append([]string{trivy, "image", "--cache-dir=" + at(p), "--no-progress", "--skip-version-check", "--disable-telemetry"}, args...)
	}
	tool("trivy", s.Node, func(p *play) []string { return scans(p, "--image-src=remote", "--scanners=secret", p.ref()) }, nil)
	tool("trivy --download-db-only", s.Node, func(p *play) []string { return scans(p, "--download-db-only", "--db-repository="+p.ref()) }, nil)
	s.clients["trivy --download-db-only"].image = func(im *lab.Image) { *im = lab.Image{Layers: im.Layers[:1], Seed: im.Seed, TrivyDB: true} }
	s.nerdctl("nerdctl", box, string(auth))
	s.kaniko("kaniko", string(auth))
	// The raw client prints what it was answered.
	rawOp := func(what string) func(p *play) error {
		return func(p *play) error {
			out, err := s.Output(append(append([]string{"env"}, p.env...), s.raw, "raw", what, p.reg.Host, p.repo, p.tag)...)
			p.out += out
			return err
		}
	}
	c := &client{node: s.Node, pull: rawOp("pull"), push: rawOp("push"), own: make(map[string]func(*play) error)}
	for _, what := range []string{"HEAD with Range", "ranges", "Docker's types alone", "Expect: 100-continue", "monolithic POST", "delete", "chunks", "credentials in another field"} {
		c.own[what] = rawOp(what)
	}
	s.clients["raw"] = c
	nodes := make(map[*lab.Node]bool)
	for _, c := range s.clients {
		c.box = c.node != s.Node
		if !nodes[c.node] {
			s.w.caCertificates(c.node)
		}
		nodes[c.node] = true
	}
}

// nerdctl pulls and pushes by itself, and keeps images in the box's containerd.
func (s *side) nerdctl(name string, box *lab.Node, auth string) {
	box.WriteFile("/var/lib/home/.docker/config.json", auth)
	nerdctl := box.As(lab.Tool(s.w.t, "nerdctl"), "nerdctl")
	box.Run(nerdctl, "pull", "--quiet", "ghcr.io/base/base:1")
	s.clients[name] = &client{node: box,
		pull: func(p *play) error { return p.tool(nerdctl, "pull", "--quiet", p.ref()) },
		push: func(p *play) error {
			return errors.Join(p.tool(nerdctl, "tag", "ghcr.io/base/base:1", p.at("pushed")), p.tool(nerdctl, "push", "--quiet", p.at("pushed")))
		},
		forget: func(p *play) {
			for _, tag := range []string{p.tag, "pushed"} {
				_, _ = box.Output(nerdctl, "rmi", "--force", p.at(tag))
			}
		}}
}

// kaniko's executor builds in the environment of its image: each time over a root
// file system of its own, with the certificates and names of the box.
func (s *side) kaniko(name, auth string) {
	box := s.Box()
	box.WriteFile("/var/lib/home/.docker/config.json", auth)
	run := func(p *play, base string, args ...string) error {
		return p.tool("unshare", "--mount", "--pid", "--fork", "sh", "-ec", fmt.Sprintf(`
r=/var/lib/home/kaniko
mkdir -p $r
mount -t tmpfs tmpfs $r
cd $r
mkdir -p kaniko/ssl/certs kaniko/.docker workspace etc/ssl root tmp proc dev sys var
touch kaniko/executor
mount --bind %s kaniko/executor
cp /etc/ssl/certs/ca-certificates.crt kaniko/ssl/certs/
cp /var/lib/home/.docker/config.json kaniko/.docker/
cp /etc/hosts /etc/resolv.conf /etc/passwd /etc/group /etc/nsswitch.conf etc/
mount --rbind /dev dev
mount --rbind /sys sys
mount -t proc proc proc
printf 'FROM %s\nCOPY Dockerfile /a\n' > workspace/Dockerfile
exec env -i HOME=/root USER=root PATH=/usr/local/bin:/kaniko SSL_CERT_DIR=/kaniko/ssl/certs DOCKER_CONFIG=/kaniko/.docker container=docker \
	/usr/sbin/chroot $r /kaniko/executor --force --context=dir:///workspace %s`, lab.Tool(s.w.t, "executor"), base, strings.Join(args, " ")))
	}
	s.clients[name] = &client{node: box,
		pull: func(p *play) error { return run(p, p.ref(), "--no-push") },
		push: func(p *play) error { return run(p, "ghcr.io/base/base:1", "--destination="+p.at("pushed")) }}
}

func wantErr(err error) error {
	if err == nil {
		return errors.New("it is still there")
	}
	return nil
}

var digestRE = regexp.MustCompile(`sha256:[0-9a-f]{64}`)

// baseDigest is the manifest's of what tools push.
func (s *side) baseDigest() string {
	b, err := s.File("/var/lib/home/base/index.json")
	if err != nil {
		s.w.t.Fatal(err)
	}
	return digestRE.FindString(string(b))
}

// at is a name in the play's repository.
func (p *play) at(tag string) string { return strings.TrimSuffix(p.ref(), p.tag) + tag }

func (s *side) docker(name string, node *lab.Node, d *lab.Docker) {
	d.Pull("ghcr.io/base/base:1")
	s.clients[name] = &client{node: node, restart: func() { d.Stop(); d.Start() },
		pull: func(p *play) error {
			err := d.TryPull(p.ref(), p.login()...)
			if err == nil && p.op != "moved tag" {
				d.Same(p.ref(), p.im)
			}
			return err
		},
		push: func(p *play) error { return d.TryPush("ghcr.io/base/base:1", p.at("pushed"), p.login()...) },
		forget: func(p *play) {
			for _, tag := range []string{p.tag, "pushed"} {
				_, _ = node.Output(lab.Debian(s.w.t, "/usr/bin/docker", "docker.io"), "-H", "unix:///run/docker.sock", "rmi", "-f", p.at(tag))
			}
		}}
}

func (s *side) containerd(name string, node *lab.Node, c *lab.Containerd, ctr string) {
	// ctr 2 has the daemon push.
	s.clients[name] = &client{node: node, restart: func() { c.Stop(); c.Start() }, pushesApart: !strings.HasPrefix(name, "containerd 2"),
		pull: func(p *play) error {
			err := c.TryPull(p.ref(), p.login()...)
			if err == nil && p.op != "moved tag" {
				c.Same(p.ref(), p.im)
			}
			return err
		},
		forget: func(p *play) { c.Remove(p.ref(), p.im) }}
	c.Pull("ghcr.io/base/base:1")
	s.clients[name].push = func(p *play) error {
		args := []string{ctr, "-n", "k8s.io", "images", "push"}
		if l := p.login(); l != nil {
			args = append(args, "--user="+strings.Join(l, ":"))
		}
		return p.tool(append(args, p.at("pushed"), "ghcr.io/base/base:1")...)
	}
}

// raw is a client that asks as little or as oddly as it is told, and prints what
// it was answered.
func raw(args []string) error {
	what, r := args[0], &rawClient{host: args[1], repo: args[2], token: make(map[string]string)}
	tag := args[3]
	r.http = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, Proxy: http.ProxyFromEnvironment, DisableCompression: true, ExpectContinueTimeout: 10e9}}
	r.http.Timeout = 100e9
	const all = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json"
	accept := http.Header{"Accept": {all}}
	manifest := func(ref string, h http.Header) (m struct {
		Config    struct{ Digest string }
		Layers    []struct{ Digest string }
		Manifests []struct{ Digest string }
	}, err error) {
		_, b, err := r.do("GET", r.path("manifests/"+ref), h, nil)
		if err == nil {
			_ = json.Unmarshal(b, &m)
		}
		return m, err
	}
	blob := []byte(strings.Repeat("a layer\n", 5000))
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(blob))
	upload := func(h http.Header) error {
		resp, _, err := r.do("POST", r.path("blobs/uploads/"), nil, []byte{})
		if err != nil {
			return err
		}
		loc, err := resp.Location()
		if err != nil {
			return err
		}
		if what == "chunks" {
			for _, c := range [][2]int{{0, 16384}, {16384, len(blob)}} {
				resp, _, err = r.do("PATCH", loc.String(), http.Header{"Content-Range": {fmt.Sprintf("%d-%d", c[0], c[1]-1)}, "Content-Type": {"application/octet-stream"}}, blob[c[0]:c[1]])
				if err != nil {
					return err
				}
				if loc, err = resp.Location(); err != nil {
					return err
				}
			}
			q := loc.Query()
			q.Set("digest", digest)
			loc.RawQuery = q.Encode()
			_, _, err = r.do("PUT", loc.String(), h, []byte{})
			return err
		}
		q := loc.Query()
		q.Set("digest", digest)
		loc.RawQuery = q.Encode()
		_, _, err = r.do("PUT", loc.String(), h, blob)
		return err
	}
	put := func() error {
		m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%[1]q,"size":%[2]d},"layers":[{"mediaType":"application/octet-stream","digest":%[1]q,"size":%[2]d}]}`, digest, len(blob))
		_, _, err := r.do("PUT", r.path("manifests/pushed"), http.Header{"Content-Type": {"application/vnd.oci.image.manifest.v1+json"}}, []byte(m))
		return err
	}
	switch what {
	case "push", "chunks":
		return errors.Join(upload(nil), put())
	case "Expect: 100-continue":
		return errors.Join(upload(http.Header{"Expect": {"100-continue"}}), put())
	case "monolithic POST":
		_, _, err := r.do("POST", r.path("blobs/uploads/?digest="+url.QueryEscape(digest)), http.Header{"Content-Type": {"application/octet-stream"}}, blob)
		return errors.Join(err, put())
	case "delete":
		_, b, err := r.do("GET", r.path("manifests/"+tag), accept, nil)
		if err != nil {
			return err
		}
		d := fmt.Sprintf("sha256:%x", sha256.Sum256(b))
		_, _, err1 := r.do("DELETE", r.path("manifests/"+d), nil, nil)
		_, _, err2 := r.do("GET", r.path("manifests/"+d), accept, nil)
		_, _, err3 := r.do("GET", r.path("manifests/"+tag), accept, nil)
		return errors.Join(err1, err2, err3)
	case "Docker's types alone":
		accept = http.Header{"Accept": {"application/vnd.docker.distribution.manifest.v2+json"}}
	case "credentials in another field":
		r.more = http.Header{"X-Jfrog-Art-Api": {"a key that is some thirty letters"}}
	}
	m, err := manifest(tag, accept)
	if err == nil && len(m.Manifests) > 1 {
		m, err = manifest(m.Manifests[1].Digest, accept)
	}
	if err != nil {
		return err
	}
	digests := []string{m.Config.Digest}
	for _, l := range m.Layers {
		digests = append(digests, l.Digest)
	}
	for _, d := range digests {
		if d == "" {
			continue
		}
		path := r.path("blobs/" + d)
		switch what {
		case "HEAD with Range":
			_, _, err = r.do("HEAD", path, http.Header{"Range": {"bytes=0-99"}}, nil)
		case "ranges":
			for _, rng := range []string{"bytes=100-", "bytes=0-2047", "bytes=-1500", "bytes=99999999-", "bytes=0-1,5-6"} {
				if _, _, e := r.do("GET", path, http.Header{"Range": {rng}}, nil); e != nil {
					err = e
				}
			}
		default:
			_, _, err = r.do("GET", path, nil, nil)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

type rawClient struct {
	host, repo string
	http       *http.Client
	token      map[string]string // by host
	more       http.Header
}

func (r *rawClient) path(rest string) string {
	return "https://" + r.host + "/v2/" + r.repo + "/" + rest
}

var challengeRE = regexp.MustCompile(`(\w+)="([^"]*)"`)

// several are the ranges that were asked for, if these were several, of an answer that has each as a part, or
// all of the content. weir gives the parts where a registry gives all: to clients it's the same.
func several(ranges string, resp *http.Response, b []byte) (parts []string) {
	specs := strings.Split(strings.TrimPrefix(ranges, "bytes="), ",")
	if len(specs) < 2 || resp.StatusCode/100 != 2 {
		return nil
	}
	_, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	for r := multipart.NewReader(bytes.NewReader(b), params["boundary"]); err == nil && resp.StatusCode == http.StatusPartialContent; {
		part, err := r.NextPart()
		if err != nil {
			return parts
		}
		content, _ := io.ReadAll(part)
		parts = append(parts, part.Header.Get("Content-Range")+" "+string(content))
	}
	for _, spec := range specs {
		var first, last int
		if _, err := fmt.Sscanf(spec, "%d-%d", &first, &last); err != nil || first > last || last >= len(b) {
			return nil
		}
		parts = append(parts, fmt.Sprintf("bytes %d-%d/%d %s", first, last, len(b), b[first:last+1]))
	}
	return parts
}

// do makes a request, gets a token for it if need be, and prints the answer.
func (r *rawClient) do(method, where string, h http.Header, body []byte) (*http.Response, []byte, error) {
	for try := 0; ; try++ {
		var reader io.Reader
		if body != nil {
			reader = strings.NewReader(string(body))
		}
		req, err := http.NewRequest(method, where, reader)
		if err != nil {
			return nil, nil, err
		}
		for _, from := range []http.Header{h, r.more} {
			for k, v := range from {
				req.Header[k] = v
			}
		}
		if t := r.token[req.URL.Host]; t != "" {
			req.Header.Set("Authorization", t)
		}
		req.Header.Set("User-Agent", "raw")
		resp, err := r.http.Do(req)
		if err != nil {
			return nil, nil, err
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		fmt.Print(method, " ", req.URL.Path, " ", h.Get("Range"), " → ")
		if parts := several(h.Get("Range"), resp, b); parts != nil {
			fmt.Printf("%q\n", parts)
			return resp, b, err
		}
		fmt.Print(resp.StatusCode)
		for _, k := range []string{"Content-Type", "Content-Length", "Content-Encoding", "Content-Range", "Docker-Content-Digest", "Www-Authenticate", "Location", "Retry-After"} {
			if v := resp.Header[k]; v != nil {
				fmt.Printf(" %s=%q", k, v)
			}
		}
		sum := fmt.Sprintf("%x", sha256.Sum256(b))
		if resp.StatusCode >= 500 {
			fmt.Printf(" %q", b)
		}
		fmt.Printf(" %d bytes %s\n", len(b), sum)
		if err != nil {
			return nil, nil, err
		}
		if resp.StatusCode != http.StatusUnauthorized || try > 0 {
			if resp.StatusCode >= 500 {
				err = errors.New(resp.Status)
			}
			return resp, b, err
		}
		challenge := resp.Header.Get("Www-Authenticate")
		if strings.HasPrefix(challenge, "Basic") {
			r.token[req.URL.Host] = "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
			continue
		}
		params := make(map[string]string)
		for _, m := range challengeRE.FindAllStringSubmatch(challenge, -1) {
			params[m[1]] = m[2]
		}
		tr, err := r.http.Get(params["realm"] + "?service=" + params["service"] + "&scope=" + url.QueryEscape("repository:"+r.repo+":pull,push"))
		if err != nil {
			return nil, nil, err
		}
		var t struct{ Token string }
		err = json.NewDecoder(tr.Body).Decode(&t)
		tr.Body.Close()
		if err != nil {
			return nil, nil, fmt.Errorf("token: %s %w", tr.Status, err)
		}
		r.token[req.URL.Host] = "Bearer " + t.Token
	}
}
