// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"testing"
	"time"
)

// A registry is found after any number of other hosts.
func TestRecognisedAfterMany(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	}))
	for i := range maxUnknown {
		host := fmt.Sprintf("%d.test", i)
		s.proxy.unknown.all.Add(host, &unknownHost{Unknown: Unknown{Host: host, LastSeen: time.Now()}, asked: make(map[string]asked)})
	}
	learned := make(chan string, 1)
	s.change(func(f *Flow) { f.Learn = func(host string, _ bool) error { learned <- host; return nil } })
	s.issuer("new.test")
	select {
	case <-learned:
	case <-time.After(10 * time.Second):
		t.Error("it is not learned")
	}
	if n := len(s.proxy.Unknowns()); n > maxUnknown {
		t.Errorf("%d hosts are remembered", n)
	}
}

// A host that speaks the distribution API is recognised as a registry.
func TestRecognised(t *testing.T) {
	for name, tt := range map[string]struct {
		h  http.HandlerFunc
		is bool
	}{
		"a registry": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
		}, true},
		"with a login": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Www-Authenticate", `Bearer realm="https://x/token",service="x"`)
			w.WriteHeader(401)
		}, true},
		"another login": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
		}, false},
		"something else":  {func(w http.ResponseWriter, r *http.Request) {}, false},
		"something empty": {func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			asked := make(chan struct{}, 1)
			s.serveTLS(l, &tls.Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/v2/" && r.UserAgent() == "weir" {
					tt.h(w, r)
					asked <- struct{}{}
				}
			}))
			s.issuer("new.test")
			s.issuer("new.test")
			if err := eventually(func() error {
				if u := s.proxy.Unknowns(); len(u) != 1 || u[0].Connections != 2 || u[0].Registry != tt.is || !tt.is && name == "something empty" && u[0].Problem == "" {
					return fmt.Errorf("%+v", u)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
}
