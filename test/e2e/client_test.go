// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"weir/test/lab"
)

// A test's own client is this binary under another name: that of a tool that
// pulls images, which weir follows, or one that it doesn't.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "client" {
		if err := client(os.Args[2], os.Args[3:]); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Tests wait more than they compute.
	if err := flag.Set("test.parallel", strconv.Itoa(max(6, runtime.GOMAXPROCS(0)))); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// clientNamed installs the client under a name and returns its path.
func clientNamed(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	b, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.WriteFile(path, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func client(what string, args []string) error {
	switch what {
	case "get": // URL, and the protocol that is expected
		tr := &http.Transport{ForceAttemptHTTP2: true}
		if args[1] == "HTTP/1.1" {
			tr.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
		}
		c := http.Client{Timeout: 20 * time.Second, Transport: tr}
		resp, err := c.Get(args[0])
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.Proto != args[1] {
			return fmt.Errorf("%s instead of %s: %w", resp.Proto, args[1], err)
		}
		issuer := ""
		if resp.TLS != nil {
			issuer = resp.TLS.PeerCertificates[0].Issuer.CommonName
		}
		fmt.Printf("%s, certificate of %q\n", b, issuer)
	case "websocket": // host
		c, err := tls.Dial("tcp", args[0]+":443", &tls.Config{NextProtos: []string{"http/1.1"}})
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Fprintf(c, "GET /ws HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", args[0])
		r := bufio.NewReader(c)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
			return fmt.Errorf("no upgrade: %v, %w", resp, err)
		}
		return echoes(c, r)
	case "forge": // host
		return forge(args[0])
	case "server-first": // host:port
		c, err := net.Dial("tcp", args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		r := bufio.NewReader(c)
		if line, err := r.ReadString('\n'); err != nil || line != "220 ready\n" {
			return fmt.Errorf("greeting %q: %w", line, err)
		}
		return echoes(c, r)
	case "dials": // host:port, how many
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		var g errgroup.Group
		g.SetLimit(50)
		for range n {
			g.Go(func() error {
				c, err := net.Dial("tcp", args[0])
				if err != nil {
					return err
				}
				defer c.Close()
				_, werr := fmt.Fprintln(c, "hello")
				if line, err := bufio.NewReader(c).ReadString('\n'); line != "220 ready\n" {
					return fmt.Errorf("greeting %q: %w", line, errors.Join(err, werr))
				}
				return nil
			})
		}
		return g.Wait()
	case "peer": // host:port; where the program believes to be connected to
		c, err := net.Dial("tcp", args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Println(c.RemoteAddr())
	case "each": // URLs, one after the other, each verified with the system's roots
		for _, url := range args {
			c := http.Client{Timeout: time.Minute, Transport: &http.Transport{}}
			resp, err := c.Get(url)
			if err != nil {
				return err
			}
			resp.Body.Close()
		}
	case "eager": // URL; verified with the roots of the program's start
		roots, err := x509.SystemCertPool()
		if err != nil {
			return err
		}
		c := http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
		resp, err := c.Get(args[0])
		if err != nil {
			return err
		}
		resp.Body.Close()
	case "flood": // address, how many connections; keeps them
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		for range n {
			c, err := net.DialTimeout("tcp", args[0], 20*time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			_, _ = c.Write([]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")) // half a ClientHello
			time.Sleep(time.Millisecond)                                           // the bound counts what was accepted
		}
		fmt.Println("flooded")
		_, _ = os.Stdin.Read(make([]byte, 1))
		time.Sleep(time.Hour)
	case "stall": // how many connections
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		return stall(n)
	case "hostile": // host
		return hostile(args[0] + ":443")
	case "pull": // registry, repository, tag
		return pull(args[0], args[1], args[2])
	case "fetch": // registry, repository, digest
		return fetch(args[0], args[1], args[2])
	case "push": // registry, repository, bytes
		size, err := strconv.ParseInt(args[2], 10, 64)
		if err != nil {
			return err
		}
		return push(args[0], args[1], size)
	case "liar": // KEYFILE KIND PEER DIGEST=SIZE...
		return lie(args[0], args[1], args[2], args[3:])
	case "fallback": // FILE, and another scenario; with its own roots to fall back on
		pem, err := os.ReadFile(args[0])
		if err != nil {
			return err
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		x509.SetFallbackRoots(roots)
		return client(args[1], args[2:])
	case "pinned": // FILE, and another scenario; it trusts what the file has alone
		pem, err := os.ReadFile(args[0])
		if err != nil {
			return err
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		http.DefaultTransport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: roots}
		return client(args[1], args[2:])
	case "connected": // how, host, and what to ask for
		return connected(args[0], args[1], args[2:])
	case "stay": // until it is killed
		time.Sleep(time.Hour)
	case "raw": // registry, repository, "blobs" or "manifests", reference; without credentials
		c := http.Client{Timeout: 20 * time.Second}
		base := args[0]
		if !strings.Contains(base, "://") {
			base = "https://" + base
		}
		resp, err := c.Get(base + "/v2/" + args[1] + "/" + args[2] + "/" + args[3])
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		issuer := ""
		if resp.TLS != nil {
			issuer = resp.TLS.PeerCertificates[0].Issuer.CommonName
		}
		fmt.Println(resp.Status, resp.Header.Get("Www-Authenticate"), string(b), issuer)
		return err
	default:
		return fmt.Errorf("no scenario %q", what)
	}
	return nil
}

func echoes(w io.Writer, r io.Reader) error {
	msg := bytes.Repeat([]byte("echo"), 10_000)
	go func() { _, _ = w.Write(msg) }()
	got := make([]byte, len(msg))
	if _, err := io.ReadFull(r, got); err != nil {
		return err
	}
	if !bytes.Equal(got, msg) {
		return fmt.Errorf("other bytes came back")
	}
	return nil
}

// stall asks a plain registry of its own for n manifests at once, each of which
// stops ten bytes before its end.
func stall(n int) error {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	var own net.IP // which isn't loopback's
	for _, a := range addrs {
		if ip := a.(*net.IPNet).IP; ip.IsGlobalUnicast() && ip.To4() != nil {
			own = ip
		}
	}
	l, err := net.Listen("tcp", net.JoinHostPort(own.String(), "5000"))
	if err != nil {
		return err
	}
	var stopped sync.WaitGroup
	stopped.Add(n)
	var asked sync.Map // by path: a request can come again, over another connection
	manifest := bytes.Repeat([]byte(" "), 4<<20-10)
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Header().Set("Content-Length", strconv.Itoa(len(manifest)+10))
			if r.Method == http.MethodHead { // whose answer ends with its head
				return
			}
			_, _ = w.Write(manifest)
			_ = http.NewResponseController(w).Flush()
			if _, again := asked.LoadOrStore(r.URL.Path, true); !again {
				stopped.Done()
			}
			<-r.Context().Done()
		}))
	}()
	for i := range n {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 20*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Fprintf(c, "GET /v2/x/manifests/%d HTTP/1.1\r\nHost: %s\r\nAccept: */*\r\n\r\n", i, l.Addr())
		go func() { _, _ = io.Copy(io.Discard, c) }()
	}
	stopped.Wait()
	fmt.Println("stalled")
	time.Sleep(time.Hour)
	return nil
}

// hostile opens many connections that say nothing sensible.
func hostile(addr string) error {
	hello := []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
	for i := range 300 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		switch i % 6 {
		case 0: // half a ClientHello
			_, _ = c.Write(hello)
		case 1: // one that is too long
			_, _ = c.Write(append([]byte("\x16\x03\x01\xff\xff"), bytes.Repeat([]byte{1}, 200_000)...))
		case 2: // garbage
			_, _ = c.Write(bytes.Repeat([]byte{0xfe}, 50_000))
		case 3: // an endless head
			_, _ = c.Write([]byte("GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 300_000)))
		case 4: // many small records
			_, _ = c.Write(bytes.Repeat([]byte("\x16\x03\x01\x00\x01\x01"), 20_000))
		case 5: // nothing
		}
		defer c.Close()
	}
	return nil
}

// pull asks for a manifest by tag, anonymously, as a registry's client does.
func pull(host, repo, tag string) error {
	c := http.Client{Timeout: 30 * time.Second}
	resp, err := c.Get("https://" + host + "/v2/" + repo + "/manifests/" + tag)
	if err != nil {
		return err
	}
	resp.Body.Close()
	fmt.Println(resp.Status, resp.TLS.PeerCertificates[0].Issuer.CommonName)
	return nil
}

// otherHosts are what else is on the internet.
func otherHosts(in *lab.Internet) {
	in.HTTPS("other.example", true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ws" {
			fmt.Fprint(w, "hello from ", r.Host)
			return
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = io.Copy(c, rw)
	}))
	in.TCP("first.example", 5000, func(c net.Conn) { fmt.Fprint(c, "220 ready\n"); _, _ = io.Copy(c, c) })
	in.TCP("plain.example", 80, func(c net.Conn) {
		if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nhello from %s", len("hello from ")+len(r.Host), r.Host)
		}
	})
}
