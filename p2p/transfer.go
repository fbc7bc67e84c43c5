// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// Content is what a node has for its peers. Its methods may be called
// concurrently.
type Content interface {
	// Open opens a blob that is kept, or is on its way; then it waits until it
	// has begun. The error is [ErrNotHere] when it is neither.
	Open(ctx context.Context, d digest.Digest) (*Blob, error)
	// Progress says how much of a blob is here, without waiting: how many bytes,
	// how many there will be or -1, and whether it is kept. The error is
	// [ErrNotHere].
	Progress(d digest.Digest) (arrived, size int64, kept bool, err error)
	// Export returns what is known under a name that was given to
	// [Node.ProvideName] as its hash, hexadecimal, or nil.
	Export(name string) []byte
	// Figures returns this node's figures for peers, at most [MaxFigures]
	// bytes of JSON, or nil when there is nothing to say yet.
	Figures() []byte
}

// Blob is an open blob of a [Content].
type Blob struct {
	io.ReadSeekCloser
	// Size is its length in bytes, or -1 while that isn't known.
	Size int64
	// Kept is whether all of it is here and verified.
	Kept bool
}

var (
	// ErrNotHere says that a node doesn't have a blob.
	ErrNotHere = errors.New("the blob isn't here")
	errBusy    = errors.New("the peer serves as many as it can")
)

const (
	// maxServing bounds the blobs that are sent at a time, maxServingEach
	// those to one peer: a node's own pulls come first.
	maxServing, maxServingEach = 64, 16
	// sendSize is how many bytes are sent at a time.
	sendSize = 256 << 10
	// maxName bounds what is known under a name.
	maxName = 4 << 20
)

// serving counts what is sent to peers.
type serving struct {
	mu                             sync.Mutex
	each                           map[peer.ID]int
	all                            int
	sent, refused, unauthenticated atomic.Int64
}

func newServing() *serving { return &serving{each: make(map[peer.ID]int)} }

func (s *serving) enter(who peer.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= maxServing || s.each[who] >= maxServingEach {
		s.refused.Add(1)
		return false
	}
	s.all++
	s.each[who]++
	return true
}

func (s *serving) leave(who peer.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.each[who]--; s.each[who] == 0 {
		delete(s.each, who)
	}
}

func (s *serving) running() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all
}

// meter measures a rate over the last seconds.
type meter struct {
	mu    sync.Mutex
	since time.Time
	bytes int64
	rate  float64 // bytes per second
}

func (m *meter) add(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bytes += int64(n)
	m.roll()
}

func (m *meter) roll() {
	if d := time.Since(m.since); d >= time.Second {
		m.rate = float64(m.bytes) / d.Seconds()
		m.since, m.bytes = time.Now(), 0
	}
}

func (m *meter) get() float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.roll()
	return m.rate
}

// state is how far a peer is with a blob.
type state struct {
	Size    int64 `json:"size"`
	Arrived int64 `json:"arrived"`
	Kept    bool  `json:"kept"`
}

// keptHeader tells that a blob is served whole and verified.
const keptHeader = "Weir-Kept"

// serveTransfers serves blobs to peers. Whoever gets here has proven that it
// is one (see secure).
func (n *Node) serveTransfers() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /blobs/{digest}", n.sendBlob)
	mux.HandleFunc("GET /blobs/{digest}/state", n.sendState)
	mux.HandleFunc("GET /figures", n.sendFigures)
	mux.HandleFunc("GET /names/{name}", func(w http.ResponseWriter, r *http.Request) {
		if raw, err := hex.DecodeString(r.PathValue("name")); err != nil || len(raw) != 32 {
			http.Error(w, "not the hash of a name", http.StatusBadRequest)
			return
		}
		b := n.opts.Content.Export(r.PathValue("name"))
		if b == nil {
			http.Error(w, "nothing is known", http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(b)
	})
	n.server = &http.Server{Handler: mux, ReadHeaderTimeout: peekTime, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 8 << 10,
		BaseContext: func(net.Listener) context.Context { return n.ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, whoKey{}, c.(*peerConn).id)
		}}
	n.wg.Go(func() { _ = n.server.Serve(n.incoming) })
}

// whoKey carries who is at the other side of a transfer connection.
type whoKey struct{}

func (n *Node) open(w http.ResponseWriter, r *http.Request) *Blob {
	d, err := digest.Parse(r.PathValue("digest"))
	if err != nil {
		http.Error(w, "not a digest", http.StatusBadRequest)
		return nil
	}
	b, err := n.opts.Content.Open(r.Context(), d)
	switch {
	case errors.Is(err, ErrNotHere):
		http.Error(w, "not here", http.StatusNotFound)
		return nil
	case err != nil:
		n.log.Debug("a blob can't be opened for a peer", "digest", d, "err", err)
		http.Error(w, "can't be read", http.StatusServiceUnavailable)
		return nil
	}
	return b
}

func (n *Node) sendState(w http.ResponseWriter, r *http.Request) {
	d, err := digest.Parse(r.PathValue("digest"))
	if err != nil {
		http.Error(w, "not a digest", http.StatusBadRequest)
		return
	}
	var s state
	if s.Arrived, s.Size, s.Kept, err = n.opts.Content.Progress(d); err != nil {
		http.Error(w, "not here", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(s)
}

func (n *Node) sendBlob(w http.ResponseWriter, r *http.Request) {
	who, _ := r.Context().Value(whoKey{}).(peer.ID)
	if !n.serving.enter(who) {
		w.Header().Set("Retry-After", "1")
		http.Error(w, "busy", http.StatusServiceUnavailable)
		return
	}
	defer n.serving.leave(who)
	b := n.open(w, r)
	if b == nil {
		return
	}
	defer b.Close()
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	if b.Kept {
		h.Set(keptHeader, "1")
	}
	if b.Size < 0 {
		// No ranges of what has no end yet, but from an offset on.
		offset, ok := rangeFrom(r.Header.Get("Range"))
		if _, err := b.Seek(offset, io.SeekStart); !ok || err != nil {
			http.Error(w, "no such range", http.StatusRequestedRangeNotSatisfiable)
			return
		}
		if offset > 0 {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-*/*", offset))
			w.WriteHeader(http.StatusPartialContent)
		}
		if _, err := n.send(w, r.Context(), b); err != nil {
			panic(http.ErrAbortHandler)
		}
		return
	}
	http.ServeContent(pacedWriter{w, n, r.Context()}, r, "", time.Time{}, b)
}

// rangeFrom reads a Range header of the form bytes=N-; none is from 0 on.
func rangeFrom(header string) (int64, bool) {
	if header == "" {
		return 0, true
	}
	from, ok := strings.CutPrefix(header, "bytes=")
	if from, ok2 := strings.CutSuffix(from, "-"); ok && ok2 {
		n, err := strconv.ParseInt(from, 10, 64)
		return n, err == nil && n >= 0
	}
	return 0, false
}

// pacedWriter counts and bounds what is sent.
type pacedWriter struct {
	http.ResponseWriter
	n   *Node
	ctx context.Context
}

// ReadFrom implements io.ReaderFrom, so that io.CopyN writes what there is, and
// large pieces of it.
func (p pacedWriter) ReadFrom(r io.Reader) (int64, error) {
	return p.n.send(p.ResponseWriter, p.ctx, r)
}

var sendBuffers = sync.Pool{New: func() any { b := make([]byte, sendSize); return &b }}

// send copies r to w, at the node's pace, and flushes when r has no more at
// the time: followers shall have what is there.
func (n *Node) send(w http.ResponseWriter, ctx context.Context, r io.Reader) (sent int64, err error) {
	buf := sendBuffers.Get().(*[]byte)
	defer sendBuffers.Put(buf)
	rc := http.NewResponseController(w)
	for {
		k, err := r.Read(*buf)
		if k > 0 {
			if n.upload != nil {
				if err := waitN(ctx, n.upload, k); err != nil {
					return sent, err
				}
			}
			if _, err := w.Write((*buf)[:k]); err != nil {
				return sent, err
			}
			sent += int64(k)
			n.serving.sent.Add(int64(k))
			if k < sendSize {
				_ = rc.Flush()
			}
		}
		if err == io.EOF {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
	}
}

func waitN(ctx context.Context, l *rate.Limiter, k int) error {
	for k > 0 {
		part := min(k, l.Burst())
		if err := l.WaitN(ctx, part); err != nil {
			return err
		}
		k -= part
	}
	return nil
}

// addrsKey carries the addresses that a steward gave for a peer to the dialler.
type addrsKey struct{}

// newClient makes the client of transfers. The host of its URLs is a peer's id.
func (n *Node) newClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				name, _, _ := net.SplitHostPort(addr)
				id, err := peer.Decode(name)
				if err != nil {
					return nil, err
				}
				given, _ := ctx.Value(addrsKey{}).([]string)
				var c *tls.Conn
				c, _, err = n.dialPeer(ctx, id, n.likely(id, given))
				return c, err
			},
			DisableCompression:     true,
			MaxIdleConnsPerHost:    8,
			IdleConnTimeout:        time.Minute,
			ReadBufferSize:         16 << 10, // which bodies go past
			MaxResponseHeaderBytes: 8 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// likely are the addresses of a peer, those first that it is connected from.
func (n *Node) likely(id peer.ID, given []string) []string {
	all := append(slices.Clone(given), n.addrsOf(id)...)
	here := make(map[string]bool)
	for _, c := range n.host.Network().ConnsToPeer(id) {
		if ip, _, err := net.SplitHostPort(hostPort(c.RemoteMultiaddr())); err == nil {
			here[ip] = true
		}
	}
	rank := func(addr string) int {
		ip, _, _ := net.SplitHostPort(addr)
		switch {
		case here[ip]:
			return 0
		case net.ParseIP(ip).IsLoopback():
			return 2
		}
		return 1
	}
	slices.SortStableFunc(all, func(a, b string) int { return rank(a) - rank(b) })
	seen := make(map[string]bool)
	return slices.DeleteFunc(all, func(a string) bool { dup := seen[a]; seen[a] = true; return dup })
}

// get asks a peer for something, from an offset on, and getRange for some bytes of it.
func (n *Node) get(ctx context.Context, s source, path string, offset int64) (*http.Response, error) {
	return n.getRange(ctx, s, path, offset, 0)
}

func (n *Node) getRange(ctx context.Context, s source, path string, offset, length int64) (*http.Response, error) {
	ctx = context.WithValue(ctx, addrsKey{}, s.Addrs)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+s.ID.String()+path, nil)
	if err != nil {
		return nil, err
	}
	ranged := offset > 0 || length > 0
	switch {
	case length > 0:
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	case ranged:
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	resp, err := n.client.Do(req)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusOK && !ranged:
		return resp, nil
	case resp.StatusCode == http.StatusPartialContent && ranged && strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", offset)):
		return resp, nil
	}
	resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusNotFound:
		return nil, ErrNotHere
	case http.StatusServiceUnavailable:
		return nil, errBusy
	}
	return nil, fmt.Errorf("peer %s answers with %s", s.ID, resp.Status)
}

// stateAt asks a peer how far it is.
func (n *Node) stateAt(ctx context.Context, s source, d digest.Digest) (st state, err error) {
	resp, err := n.get(ctx, s, "/blobs/"+d.String()+"/state", 0)
	if err != nil {
		return st, err
	}
	defer resp.Body.Close()
	err = json.NewDecoder(io.LimitReader(resp.Body, 4<<10)).Decode(&st)
	return st, err
}
