// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"weir/proxy/store"
)

// opener opens a part of a blob, where the last such request has ended (nil at the beginning), and
// returns where that was.
type opener func(ctx context.Context, at *url.URL, part store.Span) (io.ReadCloser, *url.URL, error)

// parallel reads a body whose parts are asked for over several connections, where
// that is faster. It begins as the body that there is. Parts that follow are asked
// for beside it, over more connections for as long as those get more from the
// registry; where the body comes to the first of them it rests. Where the link is
// what bounds it, it stays with one connection.
//
// What fails is asked for once more over a connection of its own. When that fails too,
// or breaks off, the body is taken up again where it rests: a registry that gives no more parts has
// already agreed to give all of it.
type parallel struct {
	ws   *widths
	w    *width
	size int64 // of the whole blob
	open opener

	ctx    context.Context
	cancel context.CancelFunc
	// least is how many bytes a connection has to bring in ws.stall.
	least atomic.Int64

	mu      sync.Mutex
	change  *sync.Cond
	pos     int64         // of the reader
	reading int64         // up to where it is reading from body
	body    io.ReadCloser // what comes before the first part: first, or a reopened one; nil if that has to be opened
	first   *resting      // nil if the blob was asked for by its first part
	failed  error         // of a reopened body, in whose place first is taken up
	opening bool          // a body
	parts   []*part       // one after the other, without gaps
	next    int64         // where the next part begins; 0 before there is one
	want    int           // how many connections there are to be
	workers int           // connections that ask for parts
	closed  bool
}

// resting is the body that a blob has begun with, which knows where it rests. It is for one
// goroutine, but for Close.
type resting struct {
	io.ReadCloser
	at int64
}

// Read implements io.Reader.
func (r *resting) Read(b []byte) (int, error) {
	n, err := r.ReadCloser.Read(b)
	r.at += int64(n)
	return n, err
}

// upTo reads for nothing what comes before off.
func (r *resting) upTo(off int64) error {
	_, err := io.CopyN(io.Discard, r, off-r.at)
	return err
}

// reopened is a body that was asked for where a part has failed. It fails when it is far slower
// than the blob's beginning.
type reopened struct {
	io.ReadCloser
	least  *atomic.Int64 // see [parallel]
	stall  time.Duration
	came   int64
	waited time.Duration // for that
}

var errTooSlow = errors.New("the registry gives the rest of a blob far more slowly than its beginning")

// Read implements io.Reader. It may give bytes and errTooSlow.
func (r *reopened) Read(b []byte) (int, error) {
	defer time.AfterFunc(r.stall, func() { r.Close() }).Stop()
	start := time.Now()
	n, err := r.ReadCloser.Read(b)
	r.came, r.waited = r.came+int64(n), r.waited+time.Since(start)
	if r.waited >= r.stall {
		if r.came < r.least.Load() {
			err = errTooSlow
		}
		r.came, r.waited = 0, 0
	}
	return n, err
}

// part is a part that is on its way.
type part struct {
	store.Span
	bytes []byte // what has come of it
	err   error
}

// parallel returns what reads a blob of size bytes, from where body begins. body has a range of it, to its end or only
// the first part. More is asked for by open. It is closed with what is returned.
func (ws *widths) parallel(registry string, body io.ReadCloser, has store.Span, size int64, open opener) io.ReadCloser {
	w := ws.registry(registry)
	if has.To == size && (ws.most < 2 || size-has.From < ws.from || w.alone()) {
		return body
	}
	p := &parallel{ws: ws, w: w, size: size, open: open, pos: has.From}
	p.change = sync.NewCond(&p.mu)
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if has.To == size {
		p.first = &resting{body, has.From}
		p.body = p.first
	} else {
		context.AfterFunc(p.ctx, func() { body.Close() })
		var taken atomic.Bool
		p.open = func(ctx context.Context, at *url.URL, part store.Span) (io.ReadCloser, *url.URL, error) {
			if part == has && taken.CompareAndSwap(false, true) {
				return body, nil, nil
			}
			return open(ctx, at, part)
		}
	}
	ws.join(w, p)
	return p
}

// conns is how many connections there are. p.mu is held.
func (p *parallel) conns() int {
	switch {
	case p.closed:
		return 0
	case p.body != nil:
		return p.workers + 1
	}
	return p.workers
}

// left is how many bytes nothing has asked for in parts, of those that were not read.
func (p *parallel) left() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0
	}
	return p.size - max(p.pos, p.next)
}

// ending says whether there is nothing to ask for any more.
func (p *parallel) ending() bool { return p.left() < 2*p.ws.part }

// use has n connections read, of which each has to bring so many bytes in ws.stall.
func (p *parallel) use(n int, least int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want = n
	p.least.Store(least)
	p.hire()
	p.change.Broadcast()
}

// hire begins to read over the connections that are missing. p.mu is held.
func (p *parallel) hire() {
	for ; p.want > 1 && p.conns() < p.want && !p.closed; p.workers++ {
		go p.work()
	}
}

// work asks for parts over one connection, one after the other.
func (p *parallel) work() {
	var at *url.URL
	for {
		t := p.take()
		if t == nil {
			return
		}
		var err error
		if at, err = p.bring(t, at); err != nil {
			p.fail(t, err)
		}
	}
}

// take returns the next part to ask for, or nil when this connection is not needed
// any more.
func (p *parallel) take() *part {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w.refuses() {
		p.want = 1
	}
	for !p.closed && p.workers <= p.want && p.want > 1 && len(p.parts) > p.want {
		p.change.Wait()
	}
	switch {
	case len(p.parts) > 0:
	case p.body != nil || p.opening:
		p.next = max(p.next, max(p.pos, p.reading)+p.ws.part) // the body comes as far meanwhile
	default:
		p.next = max(p.next, p.pos)
	}
	if p.closed || p.workers > p.want || p.want == 1 || p.size-p.next <= 0 || !p.ws.take() {
		p.workers--
		p.change.Broadcast()
		return nil
	}
	t := &part{Span: store.Span{From: p.next, To: min(p.next+p.ws.part, p.size)}}
	if b, ok := p.ws.free.Get().(*[]byte); ok {
		t.bytes = *b
	} else {
		t.bytes = make([]byte, 0, p.ws.part)
	}
	p.next = t.To
	p.parts = append(p.parts, t)
	p.change.Broadcast()
	return t
}

// bring reads a part.
func (p *parallel) bring(t *part, at *url.URL) (*url.URL, error) {
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	size := int(t.To - t.From)
	stalled := time.AfterFunc(p.ws.stall, cancel)
	defer stalled.Stop()
	body, at, err := p.open(ctx, at, t.Span)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	stop := context.AfterFunc(ctx, func() { body.Close() })
	defer stop()
	least := p.least.Load()
	missing := least
	for to := t.bytes[:size]; len(t.bytes) < size; {
		n, err := body.Read(to[len(t.bytes):])
		if missing -= int64(n); missing <= 0 {
			stalled.Reset(p.ws.stall)
			missing = least
		}
		p.w.received.Add(int64(n))
		p.mu.Lock()
		t.bytes = to[:len(t.bytes)+n]
		if len(p.parts) > 0 && p.parts[0] == t {
			p.change.Broadcast()
		}
		p.mu.Unlock()
		if err != nil && len(t.bytes) < size {
			return nil, noEOF(err)
		}
	}
	stalled.Reset(p.ws.stall)
	_, _ = body.Read(make([]byte, 1)) // its end, so that the connection is used again
	return at, nil
}

// fail gives up a part, and to ask for more than one at a time.
func (p *parallel) fail(t *part, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.w.refuse()
	}
	t.err = err
	p.want = 1
	p.change.Broadcast()
}

// Read implements io.Reader. It is not for concurrent use.
func (p *parallel) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		end := p.size
		if len(p.parts) > 0 {
			end = max(p.parts[0].From, p.pos) // or it is being read
		}
		switch {
		case p.closed:
			return 0, os.ErrClosed
		case p.pos == p.size:
			return 0, io.EOF
		case p.pos == end:
			p.replaced()
			if n := p.fromPart(b); n > 0 {
				return n, nil
			}
		case p.body == nil && len(p.parts) == 0 && p.workers > 0:
			p.change.Wait() // for the next part, or for who would ask for it to leave
		case p.body == nil:
			if err := p.reopen(end); err != nil {
				return 0, err
			}
		default:
			if n, err := p.fromBody(b[:min(int64(len(b)), end-p.pos)]); n > 0 || err != nil {
				return n, err
			}
		}
	}
}

// replaced leaves the body, which has come to what others bring, and has another
// connection in its place. p.mu is held.
func (p *parallel) replaced() {
	if p.body == nil {
		return
	}
	if p.body != p.first {
		p.body.Close()
	}
	p.body = nil
	p.hire()
}

// fromPart reads from the first part, and waits until there is something, or it has
// failed, or the reader is closed. It returns 0 then. p.mu is held.
func (p *parallel) fromPart(b []byte) int {
	t := p.parts[0]
	read := int(p.pos - t.From)
	for read == len(t.bytes) && t.err == nil && !p.closed {
		p.change.Wait()
	}
	if p.closed {
		return 0
	}
	n := copy(b, t.bytes[read:])
	p.pos += int64(n)
	if p.pos == t.To || n == 0 {
		p.parts[0] = nil // its bytes may be another's now
		p.parts = p.parts[1:]
		if n > 0 {
			free := t.bytes[:0]
			p.ws.free.Put(&free)
		}
		p.ws.give()
		p.change.Broadcast()
	}
	return n
}

// reopen opens what is missing before end. p.mu is held, and given up meanwhile.
func (p *parallel) reopen(end int64) error {
	from, err := p.pos, p.failed
	p.opening, p.failed = true, nil
	p.mu.Unlock()
	var body io.ReadCloser
	if err == nil {
		body, err = p.begun(store.Span{From: from, To: end})
	}
	if err != nil && p.first != nil && p.first.upTo(from) == nil {
		body, err = p.first, nil
	}
	p.mu.Lock()
	p.opening = false
	switch {
	case err != nil:
		return err
	case p.closed:
		body.Close()
	}
	p.body = body
	return nil
}

// begun opens a part of which some has come.
func (p *parallel) begun(part store.Span) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(p.ctx)
	stalled := time.AfterFunc(p.ws.stall, cancel)
	body, _, err := p.open(ctx, nil, part)
	if err != nil {
		cancel()
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { body.Close() })
	b := make([]byte, 1)
	_, err = io.ReadFull(body, b)
	if !stalled.Stop() && err == nil {
		err = context.Canceled
	}
	if stop(); err != nil {
		cancel()
		body.Close()
		return nil, err
	}
	whole := &cancelBody{&readCloser{io.MultiReader(bytes.NewReader(b), body), body}, cancel}
	return &reopened{ReadCloser: whole, least: &p.least, stall: p.ws.stall}, nil
}

// fromBody reads from the body. p.mu is held, and given up meanwhile.
func (p *parallel) fromBody(b []byte) (int, error) {
	body := p.body
	p.reading = p.pos + int64(len(b))
	p.mu.Unlock()
	n, err := body.Read(b)
	p.mu.Lock()
	p.pos += int64(n)
	p.w.received.Add(int64(n))
	if n > 0 && !errors.Is(err, errTooSlow) {
		err = nil // it comes again
	}
	err = noEOF(err)
	if err != nil && body != p.first && !p.closed {
		body.Close()
		p.body, p.failed, err = nil, err, nil
		p.w.refuse()
	}
	return n, err
}

// inParts says whether all of the blob was read, and parts among it.
func (p *parallel) inParts() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pos == p.size && p.next > 0
}

// Close ends all that is under way.
func (p *parallel) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.cancel()
	for range p.parts {
		p.ws.give()
	}
	p.parts = nil
	p.change.Broadcast()
	body := p.body
	p.mu.Unlock()
	p.w.leave(p)
	if body != nil && body != p.first {
		body.Close()
	}
	if p.first != nil {
		p.first.Close()
	}
	return nil
}
