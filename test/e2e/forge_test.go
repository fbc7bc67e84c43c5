// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/cgi"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"weir/test/lab"
)

// GitLab, Gitea and the like have a registry and all else on one name. Once that is
// learned, all of it goes through weir for a program that is followed: git's clone and
// push, and what browsers and CI jobs do. Each exchange is as it is without weir, for
// the client and for the server.
func TestForge(t *testing.T) {
	t.Parallel()
	const host = "gitlab.corp.example"
	w := newWorld(t)
	r := w.Registry(host)
	r.Push("team/app:1", lab.Image{Layers: []int{100_000}, Seed: 180})
	repos := t.TempDir()
	git := gitRepository(t, repos)
	site := newForge()
	r.Front(func(rw http.ResponseWriter, req *http.Request, next http.Handler) {
		switch path := req.URL.Path; {
		case path == "/token", strings.HasPrefix(path, "/v2/"):
			next.ServeHTTP(rw, req)
		case strings.HasPrefix(path, "/team/app.git/"):
			git.ServeHTTP(rw, req)
		default:
			site.ServeHTTP(rw, req)
		}
	})
	plain, node := w.Node(), w.Node()
	agent := node.Agent("--program", "git-remote-http=crane")
	docker := node.Docker()
	docker.Pull(host + "/team/app:1")
	learned(t, agent, host)

	direct := node.Run(clientNamed(t, "teapot"), "client", "forge", host)
	before := agent.Status().Connections
	through := node.Run(clientNamed(t, "crane"), "client", "forge", host)
	if through != direct {
		t.Errorf("through weir\n%s\n--- and without\n%s", through, direct)
	}
	now := agent.Status().Connections
	if now.Intercepted == before.Intercepted {
		t.Errorf("nothing was intercepted, so this shows nothing: %+v", now)
	}

	for i, n := range []*lab.Node{plain, node} {
		branch := fmt.Sprintf("branch-%d", i)
		// git reads the bundle alone, unless it is told of the directory.
		out := n.Run("env", "GIT_SSL_CAPATH=/etc/ssl/certs", "sh", "-ec", `
cd /var/lib/home
git clone -q https://`+host+`/team/app.git clone
cd clone
git fsck --full --strict
git checkout -q -b `+branch+`
head -c 5000000 /dev/urandom > large # is sent in chunks
git add large
git -c user.name=test -c user.email=test@example.com commit -q -m large
git push -q origin `+branch+`
git fetch -q
git rev-parse origin/main HEAD
`)
		commits := strings.Fields(out)
		for j, ref := range []string{"main", branch} {
			want, err := exec.Command("git", "-C", filepath.Join(repos, "team/app.git"), "rev-parse", ref).Output()
			if err != nil || len(commits) < 2 || commits[len(commits)-2+j] != strings.TrimSpace(string(want)) {
				t.Errorf("the client has\n%s, the server's %s is %s, %v", out, ref, want, err)
			}
		}
	}
	if s := agent.Status().Connections; s.Intercepted == now.Intercepted || s.Failed > 0 {
		t.Errorf("%+v, before git %+v", s, now)
	}
}

// gitRepository makes a repository team/app.git below a directory, and returns what
// serves it.
func gitRepository(t *testing.T, dir string) http.Handler {
	t.Helper()
	setup := exec.Command("sh", "-ec", `
git init -q --bare --initial-branch=main team/app.git
git -C team/app.git config http.receivepack true
git init -q --initial-branch=main work
head -c 3000000 /dev/urandom > work/file
git -C work add file
git -C work -c user.name=test -c user.email=test@example.com commit -q -m first
git -C work push -q ../team/app.git main
`)
	setup.Dir, setup.Env = dir, append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
	if out, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("making a repository: %v\n%s", err, out)
	}
	backend := &cgi.Handler{Path: "/usr/lib/git-core/git-http-backend", Env: []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_GLOBAL=/dev/null"}}
	return http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body) // CGI has no chunks
		if err != nil {
			rw.WriteHeader(http.StatusBadRequest)
			return
		}
		req.Body, req.ContentLength, req.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
		backend.ServeHTTP(rw, req)
	})
}

// echo is what a server has seen of a request.
type echo struct {
	Method, URI, Host, Body string
	Header, Trailer         http.Header
	Length                  int64
	Encoding                []string
}

const streamSize = 3 << 20

// stream is content that is the same each time.
func stream(seed byte) []byte {
	b := make([]byte, streamSize)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// newForge is what a forge serves beside git and its registry.
func newForge() http.Handler {
	polled, release := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/refused", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Www-Authenticate", `Basic realm="GitLab"`)
		rw.WriteHeader(http.StatusUnauthorized) // without a look at the body
	})
	mux.HandleFunc("/page", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header()["Set-Cookie"] = []string{"_session=a; HttpOnly; Secure", "b=c; Path=/"}
		rw.Header().Set("Content-Encoding", "gzip")
		rw.Header().Set("Content-Security-Policy", "default-src 'self'")
		rw.Header().Set("Etag", `W/"1"`)
		z := gzip.NewWriter(rw)
		fmt.Fprint(z, strings.Repeat("<p>hello</p>\n", 10_000))
		z.Close()
	})
	mux.HandleFunc("/untyped", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header()["Content-Type"] = nil
		fmt.Fprint(rw, "<html>")
	})
	mux.HandleFunc("/artifact", func(rw http.ResponseWriter, req *http.Request) {
		rw.Header().Set("Etag", `"artifact"`)
		http.ServeContent(rw, req, "artifact.zip", time.Unix(1_700_000_000, 0), bytes.NewReader(stream(1)))
	})
	mux.HandleFunc("/login", func(rw http.ResponseWriter, req *http.Request) {
		http.Redirect(rw, req, "/users/sign_in?a=b", http.StatusFound)
	})
	mux.HandleFunc("/nothing", func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/early", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Link", "</style.css>; rel=preload")
		rw.WriteHeader(http.StatusEarlyHints)
		fmt.Fprint(rw, "late")
	})
	mux.HandleFunc("/trailers", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Trailer", "Checksum")
		fmt.Fprint(rw, "body")
		rw.Header().Set("Checksum", "0123")
	})
	mux.HandleFunc("/cut", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Length", "1000")
		fmt.Fprint(rw, "short")
		_ = http.NewResponseController(rw).Flush()
		panic(http.ErrAbortHandler)
	})
	// Two long polls: one answers with its header at once, one with nothing.
	mux.HandleFunc("/poll", func(rw http.ResponseWriter, req *http.Request) {
		if req.URL.RawQuery == "stream" {
			rw.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprint(rw, "data: 1\n\n")
			_ = http.NewResponseController(rw).Flush()
		}
		select {
		case polled <- struct{}{}:
		case <-req.Context().Done():
			return
		}
		select {
		case <-release:
		case <-req.Context().Done():
			return
		}
		fmt.Fprint(rw, "data: 2\n\n")
	})
	mux.HandleFunc("/release", func(_ http.ResponseWriter, req *http.Request) {
		select {
		case <-polled:
			release <- struct{}{}
		case <-req.Context().Done():
		}
	})
	// Both sides send at the same time; the server ends with what it has got.
	mux.HandleFunc("/cable", func(rw http.ResponseWriter, req *http.Request) {
		c, rest, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n\r\nhello", req.Header.Get("Sec-Websocket-Key"))
		sent := make(chan struct{})
		go func() { _, _ = c.Write(stream(2)); close(sent) }()
		h := sha256.New()
		_, _ = io.CopyN(h, rest, streamSize)
		<-sent
		_, _ = c.Write(h.Sum(nil))
	})
	mux.HandleFunc("/", func(rw http.ResponseWriter, req *http.Request) {
		e := echo{Method: req.Method, URI: req.RequestURI, Host: req.Host, Header: req.Header, Length: req.ContentLength, Encoding: req.TransferEncoding}
		h := sha256.New()
		n, err := io.Copy(h, req.Body)
		e.Body, e.Trailer = fmt.Sprintf("%d bytes, %x, %v", n, h.Sum(nil), err), req.Trailer
		rw.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(rw).Encode(e)
	})
	// ServeMux would redirect what isn't a clean path.
	return http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		h, pattern := mux.Handler(&http.Request{Method: "GET", Host: req.Host, URL: &url.URL{Path: req.URL.Path}})
		if pattern == "" || strings.Contains(req.URL.Path, "//") || strings.Contains(req.URL.Path, "..") {
			h, _ = mux.Handler(&http.Request{Method: "GET", Host: req.Host, URL: &url.URL{Path: "/"}})
		}
		h.ServeHTTP(rw, req)
	})
}

// forge does what a forge's clients do, and prints all that it sees.
func forge(host string) error {
	c := http.Client{Timeout: time.Minute,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport:     &http.Transport{DisableCompression: true, ExpectContinueTimeout: 30 * time.Second}}
	ask := func(method, target string, body io.Reader, header ...string) (*http.Response, error) {
		ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, h textproto.MIMEHeader) error { fmt.Println(code, h); return nil },
		})
		req, err := http.NewRequestWithContext(ctx, method, "https://"+host+"/", body)
		if err != nil {
			return nil, err
		}
		req.URL.Opaque = target // as it is
		for i := 0; i < len(header); i += 2 {
			req.Header.Add(header[i], header[i+1])
		}
		if req.Header.Get("Trailer") != "" {
			req.Header.Del("Trailer")
			req.Trailer = http.Header{"Checksum": {"0123"}}
		}
		fmt.Println("---", method, target)
		return c.Do(req)
	}
	show := func(resp *http.Response, err error) {
		if err != nil {
			fmt.Println("no answer:", errors.Unwrap(err))
			return
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		resp.Header.Del("Date")
		head, _ := json.Marshal(resp.Header)
		fmt.Println(resp.Proto, resp.Status, resp.ContentLength, resp.TransferEncoding, resp.Close, string(head))
		if len(b) > 4096 {
			b = fmt.Appendf(nil, "%d bytes, %x", len(b), sha256.Sum256(b))
		}
		fmt.Printf("%q %v %v\n", b, resp.Trailer, err)
	}
	chunked := func(seed byte) io.Reader { return io.MultiReader(bytes.NewReader(stream(seed))) } // of no known length
	for _, target := range []string{"/page", "/untyped", "/artifact", "/login", "/nothing", "/early", "/trailers", "/cut", "/a%2Fb//c/../d/?x=1;y=%zz&&z", "/api/v4/projects/team%2Fapp?a=b+c"} {
		show(ask("GET", target, nil))
	}
	show(ask("HEAD", "/artifact", nil))
	show(ask("GET", "/artifact", nil, "Range", "bytes=10-19"))
	show(ask("GET", "/artifact", nil, "If-None-Match", `"artifact"`))
	show(ask("GET", "/api/headers", nil, "Authorization", "Bearer a", "Private-Token", "b", "Cookie", "c=d", "X-Forwarded-For", "10.0.0.1", "Accept-Encoding", "gzip, br", "Te", "trailers", "X-A", "1", "X-A", "2"))
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"} {
		show(ask(method, "/api/things", strings.NewReader("body"), "Content-Type", "text/plain"))
	}
	show(ask("POST", "/api/empty", nil))
	show(ask("POST", "/upload/known", bytes.NewReader(stream(3)), "Expect", "100-continue"))
	show(ask("POST", "/upload/chunked", chunked(4), "Expect", "100-continue", "Content-Encoding", "gzip"))
	show(ask("PUT", "/upload/trailer", chunked(5), "Trailer", "Checksum"))
	show(ask("POST", "/refused", chunked(6), "Expect", "100-continue"))

	// Of a stream, what comes before is seen before.
	resp, err := ask("GET", "/poll?stream", nil)
	if err != nil {
		return err
	}
	first := make([]byte, len("data: 1\n\n"))
	_, err = io.ReadFull(resp.Body, first)
	fmt.Printf("%q %v\n", first, err)
	show(ask("POST", "/release", nil))
	show(resp, nil)
	type answer struct {
		*http.Response
		error
	}
	polled := make(chan answer)
	fmt.Println("--- a long poll")
	go func() {
		resp, err := c.Get("https://" + host + "/poll")
		polled <- answer{resp, err}
	}()
	show(ask("POST", "/release", nil))
	a := <-polled
	show(a.Response, a.error)

	conn, err := tls.Dial("tcp", host+":443", &tls.Config{NextProtos: []string{"http/1.1"}})
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /cable HTTP/1.1\r\nHost: %s\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: abc\r\nSec-WebSocket-Version: 13\r\n\r\n", host)
	br := bufio.NewReader(conn)
	resp, err = http.ReadResponse(br, nil)
	if err != nil {
		return err
	}
	resp.Header.Del("Date")
	fmt.Println("--- cable", resp.Status, resp.Header)
	go func() { _, _ = conn.Write(stream(7)) }()
	got, err := io.ReadAll(br)
	fmt.Printf("%d bytes, %x, %v; %x of mine\n", len(got), sha256.Sum256(got), err, got[max(0, len(got)-sha256.Size):])
	return nil
}
