// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"crypto/tls"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// Whoever has a registry of its own, without TLS, chooses its name. A name that
// can't be one isn't kept anywhere.
func TestLongHostIsNoRegistry(t *testing.T) {
	for n, registry := range map[int]bool{maxName: true, maxName + 7: false, 60_000: false} {
		h := peek(strings.NewReader("GET /v2/ HTTP/1.1\r\nHost: " + strings.Repeat("a", n) + "\r\n\r\n"))
		if h.protocol != plainHTTP || (h.registry != "") != registry {
			t.Errorf("a name of %d bytes: protocol %v, registry %.20q", n, h.protocol, h.registry)
		}
	}
}

// clientHello returns the first bytes of a real client.
func clientHello(t testing.TB, conf *tls.Config) []byte {
	rec := &recorder{r: iotest.ErrReader(io.EOF)}
	var out bytes.Buffer
	_ = tls.Client(&tee{rec, &out}, conf).Handshake()
	return out.Bytes()
}

type tee struct {
	*recorder
	out *bytes.Buffer
}

func (t *tee) Write(p []byte) (int, error) { return t.out.Write(p) }

// split cuts a ClientHello into TLS records of n bytes.
func split(hello []byte, n int) (out []byte) {
	for body := hello[5:]; len(body) > 0; {
		k := min(n, len(body))
		out = append(out, hello[0], hello[1], hello[2], byte(k>>8), byte(k))
		out = append(out, body[:k]...)
		body = body[k:]
	}
	return out
}

func TestPeek(t *testing.T) {
	conf := &tls.Config{ServerName: "Registry.Test"}
	h := clientHello(t, conf)
	h2 := clientHello(t, &tls.Config{ServerName: "a.test", NextProtos: []string{"h2"}})
	for name, tt := range map[string]struct {
		in   []byte
		want hello
	}{
		"TLS":            {h, hello{protocol: tlsHello, host: "registry.test", http1: true}},
		"TLS in records": {split(h, 7), hello{protocol: tlsHello, host: "registry.test", http1: true}},
		"h2":             {h2, hello{protocol: tlsHello, host: "a.test"}},
		"half":           {h[:len(h)/2], hello{}},
		"nothing":        {nil, hello{}},
		"HTTP":           {[]byte("GET /v2/ HTTP/1.1\r\nHost: Reg.test:5000\r\n\r\nbody"), hello{protocol: plainHTTP, host: "reg.test"}},
		"HTTP no host":   {[]byte("GET /v2/ HTTP/1.0\r\n\r\n"), hello{protocol: plainHTTP}},
		"HTTP half":      {[]byte("GET /v2/ HTTP/1.1\r\nHo"), hello{}},
		"CONNECT":        {[]byte("CONNECT Reg.test:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic eA==\r\n\r\n"), hello{protocol: plainHTTP, connect: "reg.test", spelled: "Reg.test"}},
		"CONNECT, body":  {[]byte("CONNECT reg.test:443 HTTP/1.1\r\nContent-Length: 4\r\n\r\n"), hello{protocol: plainHTTP}},
		"CONNECT, half":  {[]byte("CONNECT reg.test:443 HTTP/1.1\r\nHost:"), hello{}},
		"h2 preface":     {[]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), hello{protocol: plainHTTP}},
		"other":          {[]byte("SSH-2.0-x\r\n"), hello{}},
		"long name":      {clientHello(t, &tls.Config{ServerName: strings.Repeat("a.", maxName/2) + "gcr.io"}), hello{}},
	} {
		for how, r := range map[string]io.Reader{"at once": bytes.NewReader(tt.in), "by bytes": iotest.OneByteReader(bytes.NewReader(tt.in))} {
			got := peek(r)
			if got.protocol != tt.want.protocol || got.host != tt.want.host || got.http1 != tt.want.http1 || got.connect != tt.want.connect {
				t.Errorf("%s %s: %d %q %v %q", name, how, got.protocol, got.host, got.http1, got.connect)
			}
			if !bytes.HasPrefix(tt.in, got.bytes) {
				t.Errorf("%s %s: what is replayed is not what was said", name, how)
			}
		}
	}
}

// Who says more than its CONNECT before it is answered has the proxy hear it.
func TestPeekEarly(t *testing.T) {
	if got := peek(strings.NewReader("CONNECT reg.test:443 HTTP/1.1\r\n\r\nmore")); got.protocol != plainHTTP || got.connect != "" {
		t.Errorf("%+v", got)
	}
}

// Who never comes to the end of a beginning is listened to for 64 KiB.
func TestPeekIsBounded(t *testing.T) {
	for name, begin := range map[string]string{
		"a header":             "GET /v2/ HTTP/1.1\r\nX: ",
		"headers":              "GET /v2/ HTTP/1.1\r\nHost: a.test\r\n",
		"a method":             "G",
		"a TLS handshake":      "\x16\x03\x01\x40\x00\x01\x00\xff\xff\x03\x03",
		"a longer one than is": "\x16\x03\x01\x40\x00\x01\xff\xff\xff\x03\x03",
	} {
		again := strings.Repeat("a: b\r\n", 1<<16)
		in := &io.LimitedReader{R: io.MultiReader(strings.NewReader(begin), strings.NewReader(again)), N: 1 << 20}
		got := peek(in)
		if read := 1<<20 - in.N; got.protocol != opaque || read > 64<<10 || read != int64(len(got.bytes)) {
			t.Errorf("%s: taken for %v after %d bytes, of which %d are passed on", name, got.protocol, read, len(got.bytes))
		}
	}
}

func FuzzPeek(f *testing.F) {
	h := clientHello(f, &tls.Config{ServerName: "registry.test"})
	f.Add(h)
	f.Add(split(h, 1))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	f.Add([]byte("\x16\x03\x01\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got := peek(bytes.NewReader(b))
		if !bytes.HasPrefix(b, got.bytes) {
			t.Error("what is replayed is not what was said")
		}
		if got.protocol != opaque && len(got.bytes) == 0 {
			t.Error("understood out of nothing")
		}
	})
}
