// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/store"
)

func TestBlobIsKeptAndServed(t *testing.T) {
	for _, redirect := range []bool{false, true} {
		u := newUpstream(t)
		u.redirect = redirect
		u.allow("a/b", "Bearer 1")
		want := bytesOf(1, 700_000)
		path := "/v2/a/b/blobs/" + u.put("a/b", want).String()
		s := newSide(t, u, store.Options{})

		cold := []string{"GET " + path}
		if redirect {
			cold = append(cold, "GET /cdn"+path)
		}
		a := s.do("GET", path, "Bearer 1")
		s.want(a, 200, want, cold...)
		if a.ContentLength != int64(len(want)) || a.Header.Get("Docker-Content-Digest") == "" || a.Header.Get("Cache-Status") != "weir; fwd=miss; stored" {
			t.Errorf("%d %v", a.ContentLength, a.Header)
		}
		a = s.do("GET", path, "Bearer 1")
		s.want(a, 200, want)
		if a.ContentLength != int64(len(want)) || a.Header.Get("Cache-Status") != "weir; hit" {
			t.Errorf("%d %v", a.ContentLength, a.Header)
		}
		code := map[bool]int{false: 200, true: 307}[redirect]
		s.want(s.do("HEAD", path, "Bearer 1"), code, []byte{}, "HEAD "+path)
		a = s.do("GET", path, "Bearer 1", "Range", "bytes=699000-")
		s.want(a, 206, want[699_000:])
		if a.Header.Get("Content-Range") != "bytes 699000-699999/700000" {
			t.Error(a.Header)
		}
		s.want(s.do("GET", path, "Bearer 1", "Range", "bytes=700000-"), 416, nil)
		s.want(s.do("GET", path, "Bearer 1", "If-None-Match", a.Header.Get("Etag")), 304, nil)
	}
}

// A client never completes a blob whose bytes aren't the digest's.
func TestWrongBytes(t *testing.T) {
	want := bytesOf(4, 300_000)
	d := digest.FromBytes(want)
	path := "/v2/a/blobs/" + d.String()
	forged := append(bytes.Clone(want[:299_999]), want[299_999]^1)
	for name, script := range map[string]func(w http.ResponseWriter){
		"forged": func(w http.ResponseWriter) { _, _ = w.Write(forged) },
		"forged, of known length": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "300000")
			_, _ = w.Write(forged)
		},
		"short":   func(w http.ResponseWriter) { _, _ = w.Write(want[:200_000]) },
		"long":    func(w http.ResponseWriter) { _, _ = w.Write(append(bytes.Clone(want), "more"...)) },
		"chunked": func(w http.ResponseWriter) { w.(http.Flusher).Flush(); _, _ = w.Write(forged) },
		"cut": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "300000")
			_, _ = w.Write(want[:100_000])
			panic(http.ErrAbortHandler)
		},
		"no bytes": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "300000")
			w.WriteHeader(200)
			panic(http.ErrAbortHandler)
		},
	} {
		for _, o := range []store.Options{{}, {MaxBytes: 1}} { // kept, and streamed without being kept
			t.Run(fmt.Sprint(name, o.MaxBytes), func(t *testing.T) {
				u := newUpstream(t)
				u.fault = func(w http.ResponseWriter, r *http.Request) bool { script(w); return true }
				s := newSide(t, u, o)
				a := s.do("GET", path, "")
				if a.err == nil && a.StatusCode == 200 && a.ContentLength < 0 || a.err == nil && a.StatusCode == 200 && int64(len(a.body)) == a.ContentLength {
					t.Errorf("the client completed %d bytes (%s)", len(a.body), a.Status)
				}
				if s.store.Has(d) {
					t.Error("it was kept")
				}
			})
		}
	}
	u := newUpstream(t)
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		_, _ = w.Write([]byte(`{"schemaVersion":2}`))
		return true
	}
	s := newSide(t, u, store.Options{})
	if a := s.do("GET", "/v2/a/manifests/"+d.String(), ""); a.StatusCode != http.StatusBadGateway {
		t.Errorf("another manifest than asked for: %s %q", a.Status, a.body)
	}
}

// In place of a small blob, such as an image's configuration, the registry sends
// something else. The client is told at once, and has nothing to try again.
func TestWrongSmallBlob(t *testing.T) {
	want := bytesOf(4, 3000)
	u := newUpstream(t)
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", "3000")
		_, _ = w.Write(append(bytes.Clone(want[1:]), want[0]))
		return true
	}
	s := newSide(t, u, store.Options{})
	path := "/v2/a/blobs/" + digest.FromBytes(want).String()
	a := s.do("GET", path, "")
	s.want(a, http.StatusNotFound, nil, "GET "+path)
	if !strings.Contains(string(a.body), "BLOB_UNKNOWN") {
		t.Errorf("%s", a.body)
	}
}

// A blob that breaks off is continued by Range, and the client doesn't notice.
func TestCutIsResumed(t *testing.T) {
	want := bytesOf(5, 600_000)
	for _, o := range []store.Options{{}, {MaxBytes: 1}} {
		for _, refusal := range []int{0, http.StatusRequestedRangeNotSatisfiable, http.StatusBadRequest} { // of a range without an end
			u := newUpstream(t)
			u.allow("a", "")
			d := u.put("a", want)
			var ranges []string
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				ranges = append(ranges, r.Header.Get("Range"))
				if len(ranges) > 1 {
					if refusal != 0 && r.Header.Get("Range") != "" {
						w.WriteHeader(refusal)
						return true
					}
					return false
				}
				w.Header().Set("Content-Length", "600000")
				_, _ = w.Write(want[:250_000])
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			}
			s := newSide(t, u, o)
			a := s.do("GET", "/v2/a/blobs/"+d.String(), "")
			if a.err != nil || !bytes.Equal(a.body, want) {
				t.Errorf("%d: %d bytes, err %v", refusal, len(a.body), a.err)
			}
			if n := len(ranges); n != map[bool]int{true: 2, false: 3}[refusal == 0] || !strings.HasPrefix(ranges[1], "bytes=2") {
				t.Errorf("%d: ranges asked for: %q", refusal, ranges)
			}
		}
	}
}

// Of a blob that is shorter than was announced the rest isn't asked for again and
// again: the client sees what it would see without.
func TestShorterThanAnnounced(t *testing.T) {
	for _, n := range []int{600_000, 3000} {
		shorterThanAnnounced(t, bytesOf(5, n))
	}
}

func shorterThanAnnounced(t *testing.T, want []byte) {
	for _, o := range []store.Options{{}, {MaxBytes: 1}} {
		u := newUpstream(t)
		u.allow("a", "")
		d := u.put("a", want)
		u.fault = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") != "" {
				return false
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(want)+len(want)/100))
			_, _ = w.Write(want)
			return true
		}
		s := newSide(t, u, o)
		path := "/v2/a/blobs/" + d.String()
		if a := s.do("GET", path, ""); !errors.Is(a.err, io.ErrUnexpectedEOF) || o.MaxBytes == 0 && len(a.body) < len(want)-1 {
			t.Errorf("%d bytes, err %v", len(a.body), a.err)
		}
		if got := u.requests(); !slices.Equal(got, []string{"GET " + path, "GET " + path}) {
			t.Errorf("the upstream was asked %q, want the blob and its rest", got)
		}
	}
}

// A damaged file in the store is noticed and fetched again in mid-answer.
func TestDamagedWhileServed(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	want := bytesOf(6, 1_500_000)
	d := u.put("a", want)
	s := newSide(t, u, store.Options{})
	path := "/v2/a/blobs/" + d.String()
	s.want(s.do("GET", path, ""), 200, want, "GET "+path)
	f, err := os.OpenFile(filepath.Join(s.dir, "blobs", "sha256", d.Encoded()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteAt([]byte("damage"), 1_000_000)
	f.Close()
	s.want(s.do("GET", path, ""), 200, want, "GET "+path)
	s.want(s.do("GET", path, ""), 200, want)
}

// Many clients at once cost the upstream one blob.
func TestTogether(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "")
	want := bytesOf(7, 2_000_000)
	d := u.put("a", want)
	s := newSide(t, u, store.Options{})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			a := s.do("GET", "/v2/a/blobs/"+d.String(), "")
			if a.err != nil || !bytes.Equal(a.body, want) {
				t.Errorf("%d bytes, err %v", len(a.body), a.err)
			}
		})
	}
	wg.Wait()
	gets := 0
	for _, r := range u.requests() {
		if strings.HasPrefix(r, "GET ") {
			gets++
		}
	}
	if gets != 1 {
		t.Errorf("%d GETs", gets)
	}
}

// holdsBack has the upstream stop in the middle of a blob that one client gets:
// begun is closed there, and the rest is sent when rest is closed.
func (u *scripted) holdsBack(auth string, blob []byte) (begun <-chan struct{}, rest chan<- struct{}) {
	there, onward := make(chan struct{}), make(chan struct{})
	var once sync.Once
	u.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") != auth {
			return false
		}
		middle := len(blob) * 2 / 3
		w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
		_, _ = w.Write(blob[:middle])
		w.(http.Flusher).Flush()
		once.Do(func() { close(there) })
		<-onward
		_, _ = w.Write(blob[middle:])
		return true
	}
	return there, onward
}

// While a blob arrives for one client, another that may not read it gets the upstream's
// refusal, and at once.
func TestArrivingForAnother(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Bearer alice")
	u.allow("b", "Bearer bob")
	want := bytesOf(8, 300_000)
	d := u.put("a", want)
	begun, refused := u.holdsBack("Bearer alice", want)
	s := newSide(t, u, store.Options{})
	led := make(chan answer)
	go func() { led <- s.do("GET", "/v2/a/blobs/"+d.String(), "Bearer alice") }()
	<-begun
	for auth, path := range map[string]string{"": "/v2/a/blobs/", "Bearer bob": "/v2/a/blobs/", "Bearer bob ": "/v2/b/blobs/"} {
		for _, rng := range []string{"", "bytes=0-9"} {
			if a := s.do("GET", path+d.String(), strings.TrimSpace(auth), "Range", rng); a.err != nil || a.StatusCode != 401 && a.StatusCode != 404 {
				t.Errorf("%s as %q: %v with %d bytes, %v", path, auth, a.Response, len(a.body), a.err)
			}
		}
	}
	close(refused)
	if a := <-led; a.err != nil || !bytes.Equal(a.body, want) {
		t.Errorf("who may read it got %d bytes, %v", len(a.body), a.err)
	}
}

// A client whose way to the registry gives no answer doesn't hold up the others
// who want the same blob.
func TestLeaderHangs(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Bearer slow", "Bearer fast")
	want := bytesOf(8, 300_000)
	path := "/v2/a/blobs/" + u.put("a", want).String()
	begun := make(chan struct{})
	u.fault = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || r.Header.Get("Authorization") != "Bearer slow" {
			return false
		}
		close(begun)
		<-r.Context().Done()
		return true
	}
	s := newSide(t, u, store.Options{})
	s.h.lagTime = 10 * time.Millisecond
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, s.srv.URL+path, nil)
		req.Header.Set("Authorization", "Bearer slow")
		if resp, err := http.DefaultTransport.RoundTrip(req); err == nil {
			resp.Body.Close()
			t.Error("the slow one has an answer")
		}
	}()
	<-begun
	if a := s.do("GET", path, "Bearer fast"); a.err != nil || !bytes.Equal(a.body, want) {
		t.Errorf("%v, %v", a.Response, a.err)
	}
	u.srv.CloseClientConnections()
	<-ended
}

// Whether the registry has a blob, which those ask who push, is for it to say.
func TestLostByRegistry(t *testing.T) {
	u := newUpstream(t)
	u.allow("a", "Basic 1")
	d := u.put("a", bytesOf(1, 1000))
	s := newSide(t, u, store.Options{})
	path := "/v2/a/blobs/" + d.String()
	s.want(s.do("GET", path, "Basic 1"), 200, nil, "GET "+path)
	u.mu.Lock()
	delete(u.blobs["a"], d)
	u.mu.Unlock()
	s.want(s.do("HEAD", path, "Basic 1"), 404, nil, "HEAD "+path)
}

// What isn't kept is asked for as long as its client is there: when that has left,
// the registry is not waited for.
func TestClientLeavesWhatIsNotKept(t *testing.T) {
	for name, header := range map[string]http.Header{
		"no room": {},
		"a page":  {"Content-Type": {"text/html"}},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			u.allow("a", "")
			d := u.put("a", bytesOf(1, 100_000))
			gone := make(chan struct{})
			u.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodGet {
					return false
				}
				maps.Copy(w.Header(), header)
				w.Header().Set("Content-Length", "100000")
				_, _ = w.Write(bytesOf(1, 100_000)[:50_000])
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
				close(gone)
				panic(http.ErrAbortHandler)
			}
			s := newSide(t, u, store.Options{MaxBytes: 50_000})
			ctx, leave := context.WithCancel(t.Context())
			req, _ := http.NewRequestWithContext(ctx, http.MethodGet, s.srv.URL+"/v2/a/blobs/"+d.String(), nil)
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			// So much that what comes next is waited for.
			if _, err := io.ReadFull(resp.Body, make([]byte, 45_000)); err != nil {
				t.Fatal(err)
			}
			leave()
			select {
			case <-gone:
			case <-time.After(10 * time.Second):
				t.Error("the registry is still waited for")
				u.srv.Listener.Close() // or it would be asked again
				u.srv.CloseClientConnections()
			}
		})
	}
}
