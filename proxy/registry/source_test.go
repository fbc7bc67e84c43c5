// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"weir/proxy/store"
)

// What a registry says in a Cache-Status of its own is passed through, and counts
// for nothing: neither in the pulls, nor for clients that ask where an answer came
// from.
func TestCacheStatusOfTheRegistry(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	u.allow("a", "")
	body := bytesOf(1, 100_000)
	d := u.put("a", body)
	u.fault = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Cache-Status", "weir; hit")
		return false
	}
	path := "/v2/a/blobs/" + d.String()
	part := s.do("GET", path, "", "Range", "bytes=50000-") // it isn't kept, and passes through
	if got := part.Header.Values("Cache-Status"); part.err != nil || len(part.body) != 50_000 || len(got) != 1 || got[0] != "weir; hit" {
		t.Errorf("%v, %d bytes, %q", part.err, len(part.body), got)
	}
	s.eventually(func(all []Pull) bool { return !all[0].Ended.IsZero() })
	if p := s.h.Pulls()[0]; p.BytesFromUpstream != 50_000 || p.BytesFromStore != 0 {
		t.Errorf("%+v", p)
	}

	host := strings.TrimPrefix(u.srv.URL, "https://")
	for _, c := range []struct {
		ranges   string
		upstream bool
		members  string
	}{
		{"bytes=50000-", true, "weir; hit, weir; fwd=miss"},
		{"", true, "weir; fwd=miss; stored"},
		{"", false, "weir; hit"},
		{"bytes=50000-", false, "weir; hit"},
	} {
		r, w := httptest.NewRequest("GET", path, nil), httptest.NewRecorder()
		if r.Host = host; c.ranges != "" {
			r.Header.Set("Range", c.ranges)
		}
		s.h.ServeAnonymous(w, r, Upstream{Host: host, Transport: u.srv.Client().Transport})
		got := w.Result().Header
		if members := strings.Join(got.Values("Cache-Status"), ", "); FromUpstream(got) != c.upstream || members != c.members || !bytes.HasSuffix(body, w.Body.Bytes()) {
			t.Errorf("range %q: from upstream %v, %q, %d bytes; want %v, %q", c.ranges, FromUpstream(got), members, w.Body.Len(), c.upstream, c.members)
		}
	}
}
