// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"

	"weir/proxy/store"
)

// cuts has the registry send no more than the first bytes of a blob to each request, as long
// as it is to break off, and counts what it sends. A range it answers by part, if that isn't nil.
type cuts struct {
	mu    sync.Mutex
	after int // bytes; 0 is no bound
	part  func(w http.ResponseWriter, r *http.Request) bool
	sent  int64
	asked []string // ranges
}

func (c *cuts) fault(content []byte, w http.ResponseWriter, r *http.Request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	rng := r.Header.Get("Range")
	c.asked = append(c.asked, rng)
	if rng != "" && c.part != nil && c.part(w, r) {
		return true
	}
	if c.after == 0 || rng != "" {
		c.sent += int64(len(content))
		if at := parseRanges(rng); at != nil {
			c.sent -= at[0].From
		}
		return false
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(content)))
	_, _ = w.Write(content[:c.after])
	panic(http.ErrAbortHandler)
}

// A pull that broke off costs the next client only what is missing, whatever the registry
// answers to a range, and after a restart too.
func TestPullGoesOn(t *testing.T) {
	content := bytesOf(60, 4<<20)
	const cut = 3 << 20
	rest := fmt.Sprintf("bytes=%d-%d", cut, len(content)-1)
	for _, tt := range []struct {
		name   string
		part   func(w http.ResponseWriter, r *http.Request) bool
		ranges []string // that are asked for
		broken bool     // the pull fails, and the next one is served
	}{
		{name: "the rest", ranges: []string{rest}},
		{name: "range ignored", ranges: []string{rest}, part: func(_ http.ResponseWriter, r *http.Request) bool { r.Header.Del("Range"); return false }},
		{name: "416", ranges: []string{rest, ""}, part: func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(416); return true }},
		{name: "400", ranges: []string{rest, ""}, part: func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(400); return true }},
		{name: "another size", ranges: []string{rest, ""}, part: func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", cut, len(content)-1, len(content)+1))
			w.Header().Set("Content-Length", strconv.Itoa(len(content)-cut))
			w.WriteHeader(206)
			_, _ = w.Write(content[cut:])
			return true
		}},
		{name: "other bytes", broken: true, ranges: []string{rest}, part: func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", cut, len(content)-1, len(content)))
			w.Header().Set("Content-Length", strconv.Itoa(len(content)-cut))
			w.WriteHeader(206)
			_, _ = w.Write(content[:len(content)-cut])
			return true
		}},
	} {
		for _, redirect := range []bool{false, true} {
			t.Run(fmt.Sprint(tt.name, redirect), func(t *testing.T) {
				u := newUpstream(t)
				u.redirect = redirect
				u.allow("a", "Bearer 1", "Bearer 2")
				path := "/v2/a/blobs/" + u.put("a", content).String()
				s := newSide(t, u, store.Options{MaxBytes: 100 << 20})
				c := &cuts{after: cut, part: func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(503); return true }}
				u.fault = func(w http.ResponseWriter, r *http.Request) bool {
					own := parsePath(r.URL.Path).kind == blob
					if redirect == own || own && r.Header.Get("Authorization") == "Bearer 3" || strings.HasPrefix(r.URL.Path, "/v2/b/") {
						return false
					}
					return c.fault(content, w, r)
				}
				if a := s.do("GET", path, "Bearer 1"); a.err == nil {
					t.Fatal("it did not break off")
				}
				eventually(t, "it has ended", func() bool { return s.store.Stats().Running == 0 })
				if p := s.store.Stats().Partial; p != cut {
					t.Fatalf("%d bytes are there", p)
				}
				// Who may not read it is given nothing of it, nor is another repository.
				u.requests()
				c.mu.Lock()
				c.after, c.part, c.asked, c.sent = 0, tt.part, nil, 0
				c.mu.Unlock()
				if a := s.do("GET", path, "Bearer 3"); a.StatusCode != 401 || len(a.body) > 100 {
					t.Errorf("%s, %d bytes to one who may not read it", a.Status, len(a.body))
				}
				if a := s.do("GET", "/v2/b/blobs/"+path[len("/v2/a/blobs/"):], "Bearer 1"); a.StatusCode != 401 {
					t.Errorf("%s to one who asks elsewhere", a.Status)
				}
				a := s.do("GET", path, "Bearer 2")
				ranges := tt.ranges
				if tt.broken && a.err == nil { // it was given nothing before they were seen to be wrong
					ranges = append(ranges, "")
				}
				if (a.err != nil) != (tt.broken && len(ranges) == 1) || a.err == nil && (a.StatusCode != 200 || !bytes.Equal(a.body, content)) {
					t.Errorf("%s, %d bytes, %v, the content's: %v", a.Status, len(a.body), a.err, bytes.Equal(a.body, content))
				}
				c.mu.Lock()
				if fmt.Sprint(c.asked) != fmt.Sprint(ranges) {
					t.Errorf("asked for %q, want %q", c.asked, ranges)
				}
				if tt.name == "the rest" && c.sent != int64(len(content)-cut) {
					t.Errorf("the registry has sent %d bytes", c.sent)
				}
				c.part = nil
				c.mu.Unlock()
				if a := s.do("GET", path, "Bearer 2"); a.err != nil || !bytes.Equal(a.body, content) {
					t.Errorf("then %s, %d bytes, %v", a.Status, len(a.body), a.err)
				}
				eventually(t, "it has ended", func() bool { return s.store.Stats().Running == 0 })
				if st := s.store.Stats(); st.Blobs != 1 || st.Partial != 0 {
					t.Errorf("%+v", st)
				}
			})
		}
	}
}
