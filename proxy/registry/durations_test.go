// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"maps"
	"net/http"
	"strings"
	"testing"

	"weir/proxy/store"
)

// How long clients waited is recorded once for each tag, blob and pull, by where
// what they got came from.
func TestDurations(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	u.allow("team/app", "")
	d := u.put("team/app", bytesOf(1, 200_000))
	u.putManifest("team/app", "v1", docker2, d)
	for _, s.client = range []string{"first", "second"} {
		s.do("HEAD", "/v2/team/app/manifests/v1", "")
		s.do("HEAD", "/v2/team/app/manifests/none", "")
		s.do("GET", "/v2/team/app/blobs/"+d.String(), "")
	}
	s.client = "without a blob"
	s.do("GET", "/v2/team/app/manifests/v1", "")
	s.eventually(func(all []Pull) bool {
		for _, p := range all {
			if p.Ended.IsZero() {
				return false
			}
		}
		return true
	})
	s.h.pulls.close() // they have not paused for long enough
	want := map[string]uint64{
		"weir_resolve_duration_seconds upstream": 3,
		"weir_blob_first_byte_seconds upstream":  1, "weir_blob_first_byte_seconds store": 1,
		"weir_pull_duration_seconds upstream": 1, "weir_pull_duration_seconds store": 1,
	}
	for range 2 { // and only once
		got := make(map[string]uint64)
		families, err := s.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				got[f.GetName()+" "+m.GetLabel()[0].GetValue()] = m.GetHistogram().GetSampleCount()
				if sum := m.GetHistogram().GetSampleSum(); sum <= 0 || sum > 60 {
					t.Errorf("%s: %v seconds", f.GetName(), sum)
				}
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
		s.h.pulls.close()
	}
}

// Answers of the registry that say that it limits the rate, or fails, are counted,
// also those that no client sees.
func TestUpstreamErrorsAreCounted(t *testing.T) {
	u := newUpstream(t)
	s := newSide(t, u, store.Options{})
	u.allow("team/app", "")
	u.putManifest("team/app", "v1", docker2)
	s.do("GET", "/v2/team/app/manifests/v1", "")
	s.settle()
	u.requests()
	count := func() (limited, failed, no int64) {
		st := s.h.Stats()[0]
		return st.RateLimited, st.ServerErrors, st.Errors
	}
	fails := func(code int) {
		t.Helper()
		u.mu.Lock()
		u.fault = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(code); return true }
		u.mu.Unlock()
		if a := s.do("HEAD", "/v2/team/app/manifests/v1", ""); a.StatusCode != 200 || !strings.Contains(a.Header.Get("Cache-Status"), "stale-if-error") {
			t.Errorf("%s %v", a.Status, a.Header)
		}
		s.settle()
	}
	if limited, failed, no := count(); limited+failed+no != 0 {
		t.Errorf("%d, %d, %d before", limited, failed, no)
	}
	fails(http.StatusTooManyRequests)
	limited, failed, no := count()
	if asked := u.requests(); limited == 0 || int(limited) != len(asked) || failed+no != 0 {
		t.Errorf("429 is counted as %d, %d, %d, of %q", limited, failed, no, asked)
	}
	fails(http.StatusServiceUnavailable)
	l, failed, no := count()
	if asked := u.requests(); l != limited || failed == 0 || int(failed) != len(asked) || no != 0 {
		t.Errorf("503 is counted as %d, %d, %d, of %q", l-limited, failed, no, asked)
	}
}
