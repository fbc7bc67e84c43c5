// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"weir/proxy/rights"
	"weir/proxy/store"
)

// Bounds of what the handler remembers, which its documents name.
const (
	oracleTTL        = DefaultRightsTTL
	oracleStale      = DefaultStaleIfError
	oracleContentTTL = rights.ContentTTL
)

// oracleSide is weir, as the oracle sees it: connections go in, and a clock. All
// that the oracle knows of weir's inside is here.
type oracleSide struct {
	dir    string
	store  *store.Store
	h      *Handler
	now    func() time.Time
	server *http.Server
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	active atomic.Int64 // requests that are being answered
}

func newOracleSide(dir string, now func() time.Time) (*oracleSide, error) {
	s := &oracleSide{dir: dir, now: now, conns: make(chan net.Conn), closed: make(chan struct{})}
	var err error
	if s.store, err = store.Open(filepath.Join(dir, "store"), store.Options{Log: slog.New(slog.DiscardHandler)}); err != nil {
		return nil, err
	}
	s.start()
	type key struct{}
	s.server = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.active.Add(1)
			defer s.active.Add(-1)
			s.h.Serve(w, r, r.Context().Value(key{}).(*oracleConn).up)
		}),
		ReadHeaderTimeout: time.Minute,
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, key{}, c) },
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	go func() { _ = s.server.Serve(s) }()
	return s, nil
}

func (s *oracleSide) start() {
	s.h = New(Options{Store: s.store, RightsTTL: oracleTTL, StaleIfError: oracleStale, File: filepath.Join(s.dir, "memory.json"), Log: slog.New(slog.DiscardHandler), now: s.now})
	eager(s.h.widths)
	s.h.widths.from, s.h.widths.part = 64<<10, 16<<10 // some of the contents come in parts
}

// restart begins anew, with what is kept over restarts.
func (s *oracleSide) restart() {
	s.h.Close()
	s.start()
}

func (s *oracleSide) close() {
	s.server.Close()
	s.Close()
	s.h.Close()
	s.store.Close()
}

// worldwide says whether a registry is one of those that everybody uses.
func (g *modelRegistry) worldwide() bool { return g.name == "hub" || g.name == "gh" }

// connect is a client's connection to a registry.
func (s *oracleSide) connect(g *modelRegistry, transport http.RoundTripper, network, cert string) net.Conn {
	up := Upstream{Host: g.host, Plain: g.plain, NetworkID: network, Worldwide: g.worldwide(), TrustRootsID: g.roots, ClientIdentity: cert, Client: "a client in " + network, Transport: transport}
	client, server := net.Pipe()
	select {
	case s.conns <- &oracleConn{server, up}:
	case <-s.closed:
		server.Close()
	}
	return client
}

// idle waits until no request is being answered and nothing runs in the
// background.
func (s *oracleSide) idle() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for s.active.Load() > 0 || s.store.Stats().Running > 0 {
		select {
		case <-ctx.Done():
			return errors.New("a transfer or an answer doesn't end")
		case <-time.After(20 * time.Microsecond):
		}
	}
	if err := s.h.asking.all.Acquire(ctx, maxAskingAll); err != nil {
		return errors.New("what weir asks by itself doesn't end")
	}
	s.h.asking.all.Release(maxAskingAll)
	return nil
}

// evict has the store lose a content.
func (s *oracleSide) evict(c *modelContent) {
	os.Remove(filepath.Join(s.dir, "store", "blobs", "sha256", c.sha256.Encoded()))
	os.Remove(filepath.Join(s.dir, "store", "blobs", "sha512", c.sha512.Encoded()))
}

// foreign puts a content into a store that weir reads in place.
func (s *oracleSide) foreign(c *modelContent) error {
	dir := filepath.Join(s.dir, "foreign")
	s.store.AddForeign(dir)
	return errors.Join(os.MkdirAll(filepath.Join(dir, "sha256"), 0o700), os.WriteFile(filepath.Join(dir, "sha256", c.sha256.Encoded()), c.bytes, 0o600))
}

// oracleConn is a connection and whom it is to.
type oracleConn struct {
	net.Conn
	up Upstream
}

// Accept implements net.Listener.
func (s *oracleSide) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.closed:
		return nil, io.EOF
	}
}

// Close implements net.Listener.
func (s *oracleSide) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// Addr implements net.Listener.
func (s *oracleSide) Addr() net.Addr { return &net.UnixAddr{} }
