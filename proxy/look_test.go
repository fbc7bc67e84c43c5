// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/tls"
	"testing"
)

// What has to be heard as a whole, or in a tunnel, comes here from its next connection
// on; what is no registry's doesn't.
func TestLookWants(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	l.Close()
	hello := clientHello(t, &tls.Config{ServerName: "web.test", NextProtos: []string{"h2"}})
	for name, c := range map[string]struct {
		said string
		want bool
	}{
		"a hello":                      {string(hello), false},
		"half a hello":                 {string(hello[:len(hello)/2]), true},
		"a hello less a byte":          {string(hello[:len(hello)-1]), true},
		"its first byte":               {string(hello[:1]), true},
		"a tunnel":                     {"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n", true},
		"a plain registry":             {"GET /v2/ HTTP/1.1\r\nHost: a.test:5001\r\n\r\n", true},
		"a web page":                   {"GET / HTTP/1.1\r\nHost: a.test:5001\r\n\r\n", false},
		"half a request":               {"GET /v2/ HTTP/1.1\r\nHo", false},
		"another protocol":             {"SSH-2.0-x\r\n", false},
		"a whole record, but no hello": {"\x16\x03\x01\x00\x02xx", false},
		"":                             {"", false},
	} {
		wanted := false
		s.proxy.Look(t.Context(), Flow{Dst: s.dst, Egress: s.egress, Want: func() { wanted = true }}, []byte(c.said))
		if wanted != c.want {
			t.Errorf("%s: %v", name, wanted)
		}
	}
}
