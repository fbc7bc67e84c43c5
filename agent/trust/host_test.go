// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/x509"
	"strings"
	"testing"
)

func FuzzParseEndpoint(f *testing.F) {
	for _, s := range append([]string{"a", "[::1]:5000", "::1", "1.2.3.4:5", "A.b:65535", "a..b", "[", ":"}, testHosts...) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := parseEndpoint(s)
		if err != nil {
			return
		}
		for _, name := range []string{e.dir(), e.containerdDir()} {
			if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > 255+8 {
				t.Errorf("%q gives the directory %q", s, name)
			}
		}
		again, err := parseEndpoint(e.dir())
		if err != nil || again != e {
			t.Errorf("%q is %+v, but its directory %q is %+v (%v)", s, e, e.dir(), again, err)
		}
		if e.name != "" {
			u := x509.Certificate{DNSNames: []string{e.name}}
			if err := u.VerifyHostname(e.subject()); err != nil {
				t.Errorf("%q: %v", s, err)
			}
		}
	})
}
