// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Internet is a network with registries and other hosts, each at an address of
// its own, with a certificate of the internet's CA.
type Internet struct {
	t     testing.TB
	space *space // where the hosts are
	// router is between the hosts and the nodes.
	router *space
	ca     *x509.Certificate
	key    *ecdsa.PrivateKey
	nodes  atomic.Int64

	mu     sync.Mutex
	hosts  map[string][]netip.Addr
	broken map[string]func(net.Conn) // hosts that are broken, and how
	conns  map[string]map[net.Conn]struct{}
	all    []*Registry
}

// secrets are the passwords and tokens of all registries.
func (in *Internet) secrets() (all []string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, r := range in.all {
		all = append(all, r.Secrets()...)
	}
	return all
}

// Proxy makes a host a forward proxy, which tunnels to other hosts, and counts
// how often. With a user's NAME:PASSWORD it tunnels for that user alone.
func (in *Internet) Proxy(name string, port int, user ...string) *atomic.Int64 {
	in.t.Helper()
	var n atomic.Int64
	in.TCP(name, port, func(c net.Conn) {
		br := bufio.NewReader(c)
		r, err := http.ReadRequest(br)
		if err != nil || r.Method != http.MethodConnect {
			return
		}
		for _, u := range user {
			if r.Header.Get("Proxy-Authorization") != "Basic "+base64([]byte(u)) {
				fmt.Fprint(c, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"company\"\r\nContent-Length: 0\r\n\r\n")
				return
			}
		}
		host, port, _ := net.SplitHostPort(r.Host)
		in.mu.Lock()
		addrs := in.hosts[host]
		in.mu.Unlock()
		if len(addrs) == 0 {
			fmt.Fprint(c, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
			return
		}
		up, err := in.space.Dial(context.Background(), "tcp", net.JoinHostPort(addrs[0].String(), port))
		if err != nil {
			return
		}
		defer up.Close()
		n.Add(1)
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(up, br); up.Close() }()
		_, _ = io.Copy(c, up)
	})
	return &n
}

// NewInternet makes an internet with nothing in it.
func NewInternet(t testing.TB) *Internet {
	t.Helper()
	in := &Internet{t: t, hosts: make(map[string][]netip.Addr), broken: make(map[string]func(net.Conn)), conns: make(map[string]map[net.Conn]struct{})}
	in.space = newSpace(t, "the internet", nil, nil, unix.CLONE_NEWNET|unix.CLONE_NEWNS, `
mount --make-rprivate /
mount -t tmpfs tmpfs /var/lib
mkdir -p /var/lib/home
ip link set lo up
ip addr add 203.0.113.1/32 dev lo # where nodes ask for names that they don't know: refused at once
`)
	in.router = newSpace(t, "the router", nil, nil, unix.CLONE_NEWNET, `
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
`)
	in.space.Run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "world", "netns", in.router.pid())
	up(in.space, "uplink", "10.76.0.1/30", "2001:db8:76::1/64")
	up(in.router, "world", "10.76.0.2/30", "2001:db8:76::2/64")
	for s, routes := range map[*space][][2]string{in.space: {{"default", "10.76.0.2"}, {"default", "2001:db8:76::2"}},
		in.router: {{"203.0.113.0/24", "10.76.0.1"}, {"2001:db8:113::/64", "2001:db8:76::1"}}} {
		for _, r := range routes {
			s.Run("ip", "route", "add", r[0], "via", r[1])
		}
	}
	in.makeCA("the lab's internet CA")
	return in
}

// up gives a device its addresses.
func up(s *space, dev, v4, v6 string) {
	s.t.Helper()
	s.Run("ip", "link", "set", dev, "up")
	s.Run("ip", "addr", "add", v4, "dev", dev)
	s.Run("ip", "addr", "add", v6, "dev", dev, "nodad")
}

// Shape limits the rate at which all nodes together get bytes from the hosts.
func (in *Internet) Shape(mbit int) {
	in.t.Helper()
	shape(in.space, "uplink", mbit)
}

// Part cuts the network between nodes and all other nodes, but not between them
// and the hosts. What it returns mends it.
func (in *Internet) Part(nodes ...*Node) (mend func()) {
	in.t.Helper()
	// Traffic between nodes that both are on one side comes back to the rule's
	// end, so it is let through first.
	in.router.Run("iptables", "-N", "part")
	for _, a := range nodes {
		for _, b := range nodes {
			in.router.Run("iptables", "-A", "part", "-s", a.Addr().String(), "-d", b.Addr().String(), "-j", "RETURN")
		}
	}
	for _, a := range nodes {
		in.router.Run("iptables", "-A", "part", "-s", a.Addr().String(), "-d", "10.77.0.0/16", "-j", "DROP")
		in.router.Run("iptables", "-A", "part", "-s", "10.77.0.0/16", "-d", a.Addr().String(), "-j", "DROP")
	}
	in.router.Run("iptables", "-I", "FORWARD", "-j", "part")
	return func() {
		in.t.Helper()
		in.router.Run("iptables", "-D", "FORWARD", "-j", "part")
		in.router.Run("iptables", "-F", "part")
		in.router.Run("iptables", "-X", "part")
	}
}

// Refuse has the network reset what is sent between two nodes. What it returns
// mends it.
func (in *Internet) Refuse(a, b *Node) (mend func()) {
	in.t.Helper()
	rules := func(do string) {
		in.t.Helper()
		for _, n := range [][2]*Node{{a, b}, {b, a}} {
			in.router.Run("iptables", do, "FORWARD", "-p", "tcp", "-s", n[0].Addr().String(), "-d", n[1].Addr().String(), "-j", "REJECT", "--reject-with", "tcp-reset")
		}
	}
	rules("-I")
	return func() { rules("-D") }
}

// LAN puts nodes on one more network, on which they hear each other's
// multicasts.
func (in *Internet) LAN(nodes ...*Node) {
	in.t.Helper()
	in.router.Run("ip", "link", "add", "lan", "type", "bridge", "mcast_snooping", "0")
	in.router.Run("ip", "link", "set", "lan", "up")
	for _, n := range nodes {
		in.router.Run("ip", "link", "add", fmt.Sprintf("lan%d", n.number), "master", "lan", "type", "veth", "peer", "name", "lan0", "netns", n.pid())
		in.router.Run("ip", "link", "set", fmt.Sprintf("lan%d", n.number), "up")
		up(n.space, "lan0", fmt.Sprintf("10.79.0.%d/24", n.number), fmt.Sprintf("2001:db8:79::%d/64", n.number))
	}
}

// shape limits what leaves by a device.
func shape(s *space, dev string, mbit int) {
	s.t.Helper()
	s.Run("tc", "qdisc", "replace", "dev", dev, "root", "tbf", "rate", fmt.Sprintf("%dmbit", mbit), "burst", "256kb", "latency", "200ms")
}

// makeCA makes a CA of that name.
func (in *Internet) makeCA(name string) {
	t := in.t
	t.Helper()
	var err error
	if in.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().AddDate(-1, 0, 0), NotAfter: time.Now().AddDate(1, 0, 0), // clocks are set
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, in.key.Public(), in.key)
	if err != nil {
		t.Fatal(err)
	}
	in.ca, _ = x509.ParseCertificate(der)
}

func (in *Internet) caPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: in.ca.Raw})
}

// CA is the CA of the internet's hosts, as PEM.
func (in *Internet) CA() string { return string(in.caPEM()) }

// Roots are those that the machines of this internet trust, as PEM.
func (in *Internet) Roots() string {
	in.t.Helper()
	world, err := os.ReadFile("/etc/ssl/certs/ca-certificates.crt")
	if err != nil {
		in.t.Fatal(err)
	}
	return string(world) + string(in.caPEM())
}

// CertificateFiles issues a certificate for a host, and returns the names of
// files with it and its key, as PEM.
func (in *Internet) CertificateFiles(host string) (cert, key string) {
	t := in.t
	t.Helper()
	c := in.certificate(host)
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	err = errors.Join(os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o644),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// Spawn starts a program among the hosts that runs until it is stopped.
func (in *Internet) Spawn(name string, args ...string) *Process {
	in.t.Helper()
	return in.space.start(name, nil, args...)
}

// certificate issues a certificate for a host.
func (in *Internet) certificate(host string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		in.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: time.Now().AddDate(-1, 0, 0), NotAfter: time.Now().AddDate(1, 0, 0), // clocks are set
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, in.ca, key.Public(), in.key)
	if err != nil {
		in.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Host gives a name an IPv4 and an IPv6 address on the internet, and returns
// them. Nodes that are made later resolve it.
func (in *Internet) Host(name string) (v4, v6 netip.Addr) {
	in.t.Helper()
	in.mu.Lock()
	defer in.mu.Unlock()
	if a := in.hosts[name]; a != nil {
		return a[0], a[1]
	}
	n := byte(len(in.hosts) + 10)
	v4 = netip.AddrFrom4([4]byte{203, 0, 113, n})
	v6 = netip.MustParseAddr(fmt.Sprintf("2001:db8:113::%d", n))
	in.space.Run("ip", "addr", "add", v4.String()+"/32", "dev", "lo")
	in.space.Run("ip", "addr", "add", v6.String()+"/128", "dev", "lo", "nodad")
	in.hosts[name] = []netip.Addr{v4, v6}
	return v4, v6
}

// OnlyIPv6 takes a name's IPv4 address away, for nodes that are made later.
func (in *Internet) OnlyIPv6(name string) {
	in.Host(name)
	in.mu.Lock()
	defer in.mu.Unlock()
	in.hosts[name][0] = netip.Addr{}
}

// hostsFile is /etc/hosts for a node.
func (in *Internet) hostsFile() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	b := strings.Builder{}
	b.WriteString("127.0.0.1 localhost\n::1 localhost\n")
	for name, addrs := range in.hosts {
		for _, a := range addrs {
			if a.IsValid() {
				fmt.Fprintln(&b, a, name)
			}
		}
	}
	return b.String()
}

// listen listens at a host's port, at both of its addresses.
func (in *Internet) listen(name string, port int) (ls []net.Listener) {
	in.t.Helper()
	v4, v6 := in.Host(name)
	for _, a := range []netip.Addr{v4, v6} {
		l, err := in.space.Listen("tcp", netip.AddrPortFrom(a, uint16(port)).String())
		if err != nil {
			in.t.Fatalf("listening as %s:%d: %v", name, port, err)
		}
		in.t.Cleanup(func() { l.Close() })
		ls = append(ls, &host{l, in, name})
	}
	return ls
}

// Break cuts the connections to a host, and has new ones be dealt with by a
// function, until it is mended by nil.
func (in *Internet) Break(name string, how func(net.Conn)) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.broken[name] = how
	for c := range in.conns[name] {
		reset(c)
	}
}

// The ways in which a host can be broken.
var (
	// Down is a host at which nothing listens any more.
	Down = func(c net.Conn) { reset(c) }
	// Silent is one that takes connections and says nothing.
	Silent = func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }
	// NotTLS is one that speaks something else.
	NotTLS = func(c net.Conn) { fmt.Fprint(c, "220 welcome\r\n"); c.Close() }
)

func reset(c net.Conn) {
	if h, ok := c.(*hostConn); ok {
		c = h.Conn
	}
	_ = c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// host is a host's listener.
type host struct {
	net.Listener
	in   *Internet
	name string
}

type hostConn struct {
	net.Conn
	gone func()
}

func (c *hostConn) Close() error {
	c.gone()
	return c.Conn.Close()
}

func (h *host) Accept() (net.Conn, error) {
	for {
		c, err := h.Listener.Accept()
		if err != nil {
			return nil, err
		}
		h.in.mu.Lock()
		broken := h.in.broken[h.name]
		hc := &hostConn{Conn: c}
		hc.gone = func() {
			h.in.mu.Lock()
			delete(h.in.conns[h.name], hc)
			h.in.mu.Unlock()
		}
		if broken == nil {
			if h.in.conns[h.name] == nil {
				h.in.conns[h.name] = make(map[net.Conn]struct{})
			}
			h.in.conns[h.name][hc] = struct{}{}
		}
		h.in.mu.Unlock()
		if broken == nil {
			return hc, nil
		}
		go broken(c)
	}
}

// HTTPS serves a handler as a host, at port 443. With h2, over HTTP/2 as well.
func (in *Internet) HTTPS(name string, h2 bool, h http.Handler) {
	in.t.Helper()
	in.HTTPSAs(name, name, 443, h2, h)
}

// HTTPSAs serves a handler at a host's port with the certificate of another name.
func (in *Internet) HTTPSAs(host, name string, port int, h2 bool, h http.Handler) {
	in.t.Helper()
	in.https(host, port, in.certificate(name), h2, h)
}

func (in *Internet) https(host string, port int, cert tls.Certificate, h2 bool, h http.Handler) {
	in.t.Helper()
	for _, l := range in.listen(host, port) {
		srv := &http.Server{Handler: h, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}, ErrorLog: log.New(io.Discard, "", 0)}
		if !h2 {
			srv.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
		}
		go func() { _ = srv.ServeTLS(l, "", "") }()
		in.t.Cleanup(func() { srv.Close() })
	}
}

// HTTP serves a handler as a host without TLS, at a port.
func (in *Internet) HTTP(name string, port int, h http.Handler) {
	in.t.Helper()
	for _, l := range in.listen(name, port) {
		srv := &http.Server{Handler: h}
		go func() { _ = srv.Serve(l) }()
		in.t.Cleanup(func() { srv.Close() })
	}
}

// TCP serves connections as a host, at a port.
func (in *Internet) TCP(name string, port int, serve func(net.Conn)) {
	in.t.Helper()
	for _, l := range in.listen(name, port) {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); serve(c) }()
			}
		}()
	}
}

// client is an HTTP client on the internet.
func (in *Internet) client() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: in.space.Dial, MaxIdleConnsPerHost: 16, DisableCompression: true}}
}

// Request is a line of the log of what a registry was asked.
type Request struct {
	Host, Method, Path string
	Status             int
	Bytes              int64  // of the answer's body
	Auth               string // kind of credentials: "", Basic, Bearer
	Range              string
	UserAgent          string
}

func (r Request) String() string {
	return fmt.Sprintf("%s %s%s → %d, %d bytes, auth %q, range %q, by %s", r.Method, r.Host, r.Path, r.Status, r.Bytes, r.Auth, r.Range, r.UserAgent)
}

// Kinds of requests, for [Log.Count].
func blobGET(r Request) bool {
	return r.Method == "GET" && strings.Contains(r.Path, "/blobs/sha") && r.Status != 401 && !question(r)
}

// question says whether a request asks for so small a range that it can only be
// meant to find out whether the registry gives the blob.
func question(r Request) bool {
	var from, to int64
	n, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &from, &to)
	return n == 2 && err == nil && to-from < 1<<10 && !strings.Contains(r.Range, ",")
}
func manifestGET(r Request) bool {
	return r.Method == "GET" && strings.Contains(r.Path, "/manifests/") && r.Status != 401
}

// Log is what registries were asked, in the order in which it was answered.
type Log struct {
	mu       sync.Mutex
	requests []Request
	added    chan struct{}
}

func (l *Log) add(r Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests = append(l.requests, r)
	if l.added != nil {
		close(l.added)
		l.added = nil
	}
}

// Reset empties the log.
func (l *Log) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests = nil
}

// All returns the requests that match, all when match is nil.
func (l *Log) All(match func(Request) bool) (rs []Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.requests {
		if match == nil || match(r) {
			rs = append(rs, r)
		}
	}
	return rs
}

// BlobGETs counts the GETs of blobs that were not refused, but for those of so
// small a range that they only ask whether the registry gives the blob. A redirect
// and what it leads to are two.
func (l *Log) BlobGETs() int { return len(l.All(blobGET)) }

// ManifestGETs counts the GETs of manifests that were not refused.
func (l *Log) ManifestGETs() int { return len(l.All(manifestGET)) }

// BlobBytes sums up the bytes of blobs that were sent.
func (l *Log) BlobBytes() (n int64) {
	for _, r := range l.All(blobGET) {
		n += r.Bytes
	}
	return n
}

// SentTwice returns the answers with ranges of blobs of which some bytes were sent before. That of 1 KiB is a question.
func (l *Log) SentTwice() (twice []Request) {
	sent := make(map[string][][2]int64)
	for _, r := range l.All(func(r Request) bool { return r.Status == http.StatusPartialContent }) {
		var ranges [][2]int64
		again := false
		for spec := range strings.SplitSeq(strings.TrimPrefix(r.Range, "bytes="), ",") {
			var from, to int64
			if n, _ := fmt.Sscanf(spec, "%d-%d", &from, &to); n != 2 || to-from == 1<<10-1 {
				continue
			}
			ranges = append(ranges, [2]int64{from, to})
			again = again || slices.ContainsFunc(sent[r.Path], func(e [2]int64) bool { return from <= e[1] && e[0] <= to })
		}
		if sent[r.Path] = append(sent[r.Path], ranges...); again {
			twice = append(twice, r)
		}
	}
	return twice
}

// String is for failures' messages.
func (l *Log) String() string {
	var b strings.Builder
	for _, r := range l.All(nil) {
		fmt.Fprintln(&b, " ", r)
	}
	return b.String()
}

// WaitFor waits until a request matches.
func (l *Log) WaitFor(t testing.TB, match func(Request) bool) Request {
	t.Helper()
	timeout := time.After(waitTime)
	for {
		l.mu.Lock()
		for _, r := range l.requests {
			if match(r) {
				l.mu.Unlock()
				return r
			}
		}
		if l.added == nil {
			l.added = make(chan struct{})
		}
		added := l.added
		l.mu.Unlock()
		select {
		case <-added:
		case <-timeout:
			t.Fatalf("no such request came; the log is\n%s", l)
		}
	}
}

// counted counts the bytes of an answer.
type counted struct {
	http.ResponseWriter
	status int
	n      int64
}

func (w *counted) WriteHeader(code int) {
	if w.status == 0 {
		w.status = code
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *counted) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(b)
	w.n += int64(n)
	return n, err
}

func (w *counted) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// logging logs what a host is asked. path is taken before h may change it.
func (l *Log) logging(host string, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &counted{ResponseWriter: w}
		auth, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		req := Request{Host: host, Method: r.Method, Path: r.URL.Path, Auth: auth, Range: r.Header.Get("Range"), UserAgent: r.UserAgent()}
		defer func() {
			req.Status, req.Bytes = c.status, c.n
			l.add(req)
		}()
		h.ServeHTTP(c, r)
	})
}
