// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"weir/proxy/store"
)

// raw sends the bytes of a request as they are, and returns the answer and the
// connection.
func (s *side) raw(request string) (*http.Response, net.Conn) {
	s.t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(s.srv.URL, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, request); err != nil {
		s.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		s.t.Fatalf("%.60q: %v", request, err)
	}
	return resp, c
}

// A registry that takes what it should not look at, or what weir doesn't send on,
// for a credential: no client gets by weir what it refuses to the same request.
func TestOddCredentials(t *testing.T) {
	for name, form := range map[string]struct {
		right  func(*http.Request) bool
		client string   // fields and body of who may read
		others []string // of those who may not
	}{
		"a body": {
			func(r *http.Request) bool { b, _ := io.ReadAll(r.Body); return string(b) == "key" },
			"Content-Length: 3\r\n\r\nkey",
			[]string{"\r\n", "Content-Length: 3\r\n\r\nbad", "Transfer-Encoding: chunked\r\n\r\n3\r\nbad\r\n0\r\n\r\n"},
		},
		"the last of several fields": {
			func(r *http.Request) bool { v := r.Header["Authorization"]; return len(v) > 1 && v[len(v)-1] == "key" },
			"Authorization: x\r\nAuthorization: key\r\n\r\n",
			[]string{"Authorization: x\r\n\r\n", "Authorization: key\r\nAuthorization: x\r\n\r\n", "Authorization: x\r\nAuthorization: bad\r\n\r\n", "Authorization: x, key\r\n\r\n"},
		},
		"a field that is for a proxy": {
			func(r *http.Request) bool {
				return r.Header.Get("Proxy-Authorization") == "" && r.Header.Get("X-Key") == "key"
			},
			"X-Key: key\r\n\r\n",
			[]string{"\r\n", "Proxy-Authorization: key\r\n\r\n"},
		},
		"whom the request was forwarded for": {
			func(r *http.Request) bool { return r.Header.Get("X-Forwarded-For") == "10.0.0.1" },
			"X-Forwarded-For: 10.0.0.1\r\n\r\n",
			[]string{"\r\n", "X-Forwarded-For: 10.0.0.1, 10.0.0.2\r\n\r\n"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			content := bytesOf(3, 5000)
			layer := u.put("a", content)
			m, manifest := u.putManifest("a", "1", docker2, layer)
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				r.Header.Del("User-Agent")
				if form.right(r) {
					r.Header.Del("Authorization")
					return false
				}
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			u.allow("a", "")
			s := newSide(t, u, store.Options{})
			for path, want := range map[string][]byte{"/v2/a/manifests/1": manifest, "/v2/a/manifests/" + m.String(): manifest, "/v2/a/blobs/" + layer.String(): content} {
				line := "GET " + path + " HTTP/1.1\r\nHost: a.test\r\n"
				for range 3 {
					resp, _ := s.raw(line + form.client)
					if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || !bytes.Equal(b, want) {
						t.Errorf("%s of who may read: %s, %d bytes, %v", path, resp.Status, len(b), err)
					}
					for _, other := range form.others {
						if resp, _ := s.raw(line + other); resp.StatusCode != http.StatusUnauthorized {
							t.Errorf("%s with %q: %s", path, other, resp.Status)
						}
					}
				}
				s.settle()
			}
		})
	}
}

// switching answers a request by changing the protocol to one that echoes.
func switching(w http.ResponseWriter, _ *http.Request) bool {
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	_, _ = io.Copy(c, rw)
	return true
}

// A connection that changes its protocol is passed on, as without weir.
func TestUpgrade(t *testing.T) {
	u := newUpstream(t)
	u.fault = switching
	s := newSide(t, u, store.Options{})
	resp, c := s.raw("GET /v2/a/tags/list HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp.Status)
	}
	if err := echoes(c); err != nil {
		t.Error(err)
	}
}

// A registry that changes the protocol unasked holds no request
// of its clients: what it sends would have no end, nor end with its client's leaving.
func TestUpgradeByItself(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	kept := u.put("a", bytesOf(3, 5000))
	s := newSide(t, u, store.Options{})
	s.want(s.do("GET", "/v2/a/blobs/"+kept.String(), ""), 200, nil, "GET /v2/a/blobs/"+kept.String())
	s.later.Add(int64(2 * DefaultRightsTTL))
	u.fault = switching
	for _, path := range []string{"/v2/a/blobs/" + kept.String(), "/v2/a/blobs/sha256:" + strings.Repeat("0", 64), "/v2/a/manifests/1", "/v2/a/tags/list", "/v2/"} {
		for _, method := range []string{"GET", "HEAD"} {
			if a := s.do(method, path, ""); a.err != nil || a.StatusCode != http.StatusBadGateway {
				t.Errorf("%s %s: %v, %v", method, path, a.Response, a.err)
			}
		}
	}
}

func echoes(c net.Conn) error {
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	b := make([]byte, 5)
	_, err := io.ReadFull(c, b)
	if err == nil && string(b) != "hello" {
		err = fmt.Errorf("%q comes back", b)
	}
	return err
}
