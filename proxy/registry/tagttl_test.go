// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"strings"
	"testing"
	"time"

	"weir/proxy/store"
)

func TestParseTagTTL(t *testing.T) {
	ttl, err := ParseTagTTL([]string{"5m", "docker.io=0s", "Registry.Corp:5000=1h"})
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]time.Duration{"ghcr.io": 5 * time.Minute, DockerHub: 0, dockerHubIndex: 0, "registry.corp:5000": time.Hour} {
		if got := ttl.of(Upstream{Host: host}); got != want {
			t.Errorf("%s: %v", host, got)
		}
	}
	if (TagTTL)(nil).of(Upstream{Host: "ghcr.io"}) != 0 {
		t.Error("the default isn't to ask")
	}
	for _, bad := range []string{"", "5", "-1m", "=5m", "ghcr.io=", "ghcr.io=x"} {
		if _, err := ParseTagTTL([]string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// For as long, a tag is what it was, for clients whose right is known, and no others.
func TestTagTTL(t *testing.T) {
	u := newUpstream(t)
	u.allow("team/private", "Bearer alice", "Bearer bob")
	_, old := u.putManifest("team/private", "1", docker2)
	s := newSide(t, u, store.Options{})
	host := strings.TrimPrefix(u.srv.URL, "https://")
	s.h.tagTTL = TagTTL{"": time.Hour, host: time.Minute}
	const byTag = "/v2/team/private/manifests/1"
	s.want(s.do("GET", byTag, "Bearer alice"), 200, old, "GET "+byTag)
	_, moved := u.putManifest("team/private", "1", docker2, u.put("team/private", bytesOf(1, 100)))
	a := s.do("GET", byTag, "Bearer alice")
	s.want(a, 200, old)
	if a.Header.Get("Age") == "" {
		t.Error(a.Header)
	}
	s.want(s.do("HEAD", byTag, "Bearer alice"), 200, []byte{})
	s.want(s.do("GET", byTag, "Bearer mallory"), 401, nil, "HEAD "+byTag, "GET "+byTag)
	s.want(s.do("GET", byTag, "Bearer alice", "If-None-Match", `"x"`), 200, moved, "GET "+byTag)
	_, again := u.putManifest("team/private", "1", docker2, u.put("team/private", bytesOf(2, 100)))
	s.want(s.do("GET", byTag, "Bearer bob"), 200, again, "HEAD "+byTag, "GET "+byTag) // whose right isn't known
	s.later.Add(int64(time.Minute))
	_, last := u.putManifest("team/private", "1", docker2, u.put("team/private", bytesOf(3, 100)))
	s.want(s.do("GET", byTag, "Bearer alice"), 200, last, "HEAD "+byTag, "GET "+byTag)
}
