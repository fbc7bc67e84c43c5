// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"time"
)

// Transport is an http.RoundTripper for the requests of one client connection.
// Those to the target go to the address that the client dialled, and those to
// other hosts, such as where the registry redirects, to what their name resolves
// to.
//
// A request that may be sent twice uses a connection that is kept for all clients
// of the target. Such a connection may have been forgotten on the way, which no side
// is told of, so it is a guess: when the other side's kernel doesn't acknowledge the
// request, it is sent over a new connection as well, and the first answer counts. One
// that was acknowledged is waited for, as the client would. Every other
// request uses a connection that was made for this client connection, as the client
// would have; a fresh one where the target closes them after each answer.
type Transport struct {
	egress *Egress
	target Target

	mu   sync.Mutex
	own  *http.Transport // nil until it is needed
	last map[key]lastUse
}

// lastUse is the last request on a connection that was made for this client
// connection.
type lastUse struct {
	conn net.Conn
	when time.Time // it was answered; zero if the answer says that the connection ends
}

// Transport returns a RoundTripper for a client connection to a target. Close it
// with the client connection.
func (e *Egress) Transport(t Target) *Transport { return &Transport{egress: e, target: t} }

// Close closes the connections that were made for this client connection. Requests
// that run on go on.
func (t *Transport) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.own != nil {
		t.own.CloseIdleConnections()
	}
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	k := t.target.keyFor(req.URL)
	if d, ok := req.Context().Value(budgetKey{}).(time.Duration); ok && k != t.target.key() {
		// What a kept connection takes until it is known to be forgotten is of it too.
		req = req.WithContext(context.WithValue(req.Context(), untilKey{}, time.Now().Add(d)))
	}
	if repeatable(req) {
		p := t.egress.pool(k)
		return p.roundTrip(req, &guess{
			pool: p, times: t.egress.times,
			fresh:     func() *http.Transport { return t.egress.newHTTP(t.target, userTimeout) },
			forgotten: func() { t.egress.closeOthers(p) },
		})
	}
	p := t.egress.pool(k)
	t.mu.Lock()
	if t.own == nil {
		t.own, t.last = t.egress.newHTTP(t.target, 0), make(map[key]lastUse)
		t.own.MaxIdleConnsPerHost = 1
	}
	own, last := t.own, t.last[k]
	t.mu.Unlock()
	if last.conn != nil && (!alive(last.conn) || p.isClosing()) {
		own.CloseIdleConnections()
	}
	use, reused := lastUse{}, false
	resp, err := own.RoundTrip(req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		use.conn, reused = info.Conn, info.Reused
		if !info.Reused && time.Since(last.when) < closingTime {
			p.setClosing()
		}
	}})))
	switch {
	case err == nil:
		resp.Request = req
		if !resp.Close {
			use.when = time.Now()
		}
	case reused && req.Context().Err() == nil:
		// net/http has several errors for it, one of them without a name.
		err = fmt.Errorf("%w: the connection has ended: %w", io.EOF, err)
	}
	t.mu.Lock()
	t.last[k] = use
	t.mu.Unlock()
	return resp, err
}

// repeatable says whether a request may be sent twice.
func repeatable(req *http.Request) bool {
	return (req.Method == http.MethodGet || req.Method == http.MethodHead) && (req.Body == nil || req.Body == http.NoBody) &&
		req.Header.Get("Upgrade") == ""
}

// ErrUnreachable says that a host could not be reached in the time that
// [WithDialBudget] gave.
var ErrUnreachable = errors.New("the host can't be reached from here")

// budgetKey is for what [WithDialBudget] gives, and untilKey for when it is over.
type budgetKey struct{}

type untilKey struct{}

// WithDialBudget bounds the time to connect to hosts other than the registry
// itself, for requests that something can be done without: the client can be left
// to follow a redirect its own way, which may be another than weir's. A host that
// could not be reached in that time fails at once for a while, with
// [ErrUnreachable]. Requests without a budget try it.
func WithDialBudget(ctx context.Context, d time.Duration) context.Context {
	return context.WithValue(ctx, budgetKey{}, d)
}

const (
	// keepAlive is how long a connection is silent before the kernel looks whether
	// it is still there, and how long between two such looks.
	keepAlive = 15 * time.Second
	// userTimeout is how long what was sent on a kept connection may go without an
	// acknowledgement, see TCP_USER_TIMEOUT in tcp(7). Uploads have no such bound:
	// it counts too while the other side is there and takes nothing.
	userTimeout = 2 * time.Minute
)

func (p *pool) transport(fresh func() *http.Transport) *http.Transport {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.http == nil {
		p.http = fresh()
	}
	return p.http
}

// replace has further requests use the connections of fresh, which has answered
// where those of old were silent.
func (p *pool) replace(old, fresh *http.Transport) {
	p.mu.Lock()
	current := p.http == old
	if current {
		p.http = fresh
	}
	p.mu.Unlock()
	old.CloseIdleConnections()
	if !current {
		fresh.CloseIdleConnections()
	}
}

// isClosing says whether the target is known to close connections after an answer
// without saying so. A request that is sent over one meets its end.
func (p *pool) isClosing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Since(p.closing) < closingTTL
}

func (p *pool) setClosing() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closing = time.Now()
}

// roundTrip sends a request that may be sent twice.
func (p *pool) roundTrip(req *http.Request, g *guess) (*http.Response, error) {
	g.req, g.old = req, p.transport(g.fresh)
	// It ends with its parent, or is cancelled when the second answer counts: what
	// is read of an answer depends on it.
	ctx, cancel := context.WithCancel(req.Context())
	g.giveUp = cancel
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: g.got, GotFirstResponseByte: g.stop})
	resp, err := g.end(g.old.RoundTrip(req.WithContext(ctx)))
	if err != nil && req.Context().Err() == nil && g.spoiled(err) {
		g.old.CloseIdleConnections()
		resp, err = p.transport(g.fresh).RoundTrip(req)
	}
	if resp != nil {
		resp.Request = req
	}
	return resp, err
}

// guess is a request that may be on a connection which was forgotten on the way.
type guess struct {
	pool      *pool
	times     times
	fresh     func() *http.Transport // for the pool
	forgotten func()                 // called when it was

	req    *http.Request
	old    *http.Transport
	giveUp context.CancelFunc // the first attempt

	mu     sync.Mutex
	timer  *time.Timer // until it is suspect; nil when it isn't a guess
	since  time.Time   // when it had its connection
	again  uint32      // segments that had been sent again on that
	waited bool        // that connection has waited for it for a while
	reused bool        // that connection was used before
	heard  bool        // an answer to it has begun
	over   bool        // the first attempt's answer counts, or none
	done   chan struct{}
	won    bool // the second attempt's answer counts
	end2   context.CancelFunc
	resp   *http.Response
	err    error // of the second attempt, if the first was given up for it
}

// spoiled says whether a request failed by what its connection was used for before. It was
// closed as an idle one: net/http takes it for idle once an answer's head is there, and before the
// caller has it, and its error for that has no name. Or something was left on it, and read as the
// beginning of this answer.
func (g *guess) spoiled(err error) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.heard && (g.reused || strings.HasSuffix(err.Error(), "http: CloseIdleConnections called"))
}

// got begins to wait. A connection that was not used before may have waited for
// its first request, and be forgotten since.
func (g *guess) got(info httptrace.GotConnInfo) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.timer != nil {
		g.timer.Stop()
		g.timer = nil
	}
	g.since, g.heard, g.reused = time.Now(), false, info.Reused
	g.waited = info.WasIdle && info.IdleTime >= g.times.idle
	g.again = sentAgain(info.Conn)
	if !g.over {
		g.timer = time.AfterFunc(g.times.guess, func() { g.suspect(info.Conn) })
	}
}

// stop is called when an answer begins.
func (g *guess) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.heard = true
	if g.timer != nil {
		g.timer.Stop()
	}
}

// suspect sends the request a second time, unless the first one is known to have
// arrived, or may be on its way still.
func (g *guess) suspect(c net.Conn) {
	g.mu.Lock()
	if g.heard || g.over || g.done != nil {
		g.mu.Unlock()
		return
	}
	var wait time.Duration
	switch delivered(c, g.again) {
	case arrived:
		if !g.waited { // a client's own connection would be no better
			g.mu.Unlock()
			return
		}
		wait = g.times.relay - time.Since(g.since)
	case underway:
		wait = 2*g.times.guess - time.Since(g.since)
	}
	if wait > 0 {
		g.timer = time.AfterFunc(wait, func() { g.suspect(c) })
		g.mu.Unlock()
		return
	}
	g.done = make(chan struct{})
	ctx, cancel := context.WithCancel(g.req.Context())
	g.end2 = cancel
	// The caller may change its own as soon as the first attempt has returned.
	req := g.req.Clone(ctx)
	g.mu.Unlock()
	defer close(g.done)
	g.pool.mu.Lock()
	g.pool.discardReady() // they are no newer
	g.pool.mu.Unlock()
	fresh := g.fresh()
	resp, err := fresh.RoundTrip(req)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case err != nil:
		fresh.CloseIdleConnections()
		cancel()
		if delivered(c, g.again) != arrived { // a client without weir would have come no farther
			g.err = err
			g.giveUp()
		}
	case g.over:
		resp.Body.Close()
		fresh.CloseIdleConnections()
		cancel()
	default:
		g.won, g.resp = true, resp
		g.giveUp()
		g.pool.replace(g.old, fresh)
		g.forgotten()
	}
}

// end takes the first attempt's answer, and returns the one that counts.
func (g *guess) end(resp *http.Response, err error) (*http.Response, error) {
	g.mu.Lock()
	if g.timer != nil {
		g.timer.Stop()
	}
	if g.won {
		defer g.mu.Unlock()
		if err == nil {
			resp.Body.Close()
		}
		return g.resp, nil
	}
	second := g.done
	if err == nil || second == nil {
		g.over = true
		if second != nil {
			g.end2()
		}
		g.mu.Unlock()
		return resp, err
	}
	g.mu.Unlock()
	// The connection has failed meanwhile, or the client has left.
	<-second
	switch {
	case g.won:
		return g.resp, nil
	case g.err != nil:
		err = g.err
	}
	return nil, err
}
