// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// pool is what is known of a target, and the connections that are kept to it.
type pool struct {
	mu    sync.Mutex
	http  *http.Transport
	ready []net.Conn // not used yet
	last  verdict    // what was found out when it was verified, or asked
	away  verdict    // that it could not be reached in the time that there was
	tried time.Time  // when it was tried again since
	// closing is when it has last closed a connection soon after an answer, without
	// saying so.
	closing time.Time
}

// verdict is what was found out, and when.
type verdict struct {
	err  error
	when time.Time
}

const (
	// verifiedTTL is how long a target whose certificate was verified is
	// intercepted without looking again.
	verifiedTTL = 10 * time.Minute
	// refusedTTL is how long one that could not be verified is passed through
	// without looking again.
	refusedTTL = time.Minute
	// downTTL is how long one that is down is taken to be down.
	downTTL = 30 * time.Second
	// answersTTL is how long one that has answered, or hasn't, is not asked again.
	answersTTL = 3 * time.Second
	// awayTTL is how long a host that could not be reached in time isn't waited for
	// by those who can do without.
	awayTTL = 5 * time.Minute
	// readyTTL is how long a connection that was made to look at a target may wait
	// for its first request. It is fresh, as the client's own would be.
	readyTTL = 5 * time.Second
	// closingTime is how soon after an answer a connection has to be closed for that
	// to be the target's way, and not that it has waited too long for a request.
	closingTime = time.Second
	// closingTTL is for how long that is remembered.
	closingTTL = time.Minute
)

// pool returns the pool of a key.
func (e *Egress) pool(k key) *pool {
	if p, ok := e.pools.Get(k); ok {
		return p
	}
	p := &pool{}
	if other, ok, _ := e.pools.PeekOrAdd(k, p); ok {
		return other
	}
	return p
}

// close closes idle connections.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.http != nil {
		p.http.CloseIdleConnections()
	}
	p.discardReady()
}

// discardReady closes the connections that are ready. p.mu is held.
func (p *pool) discardReady() {
	for _, c := range p.ready {
		c.Close()
	}
	p.ready = nil
}

func (p *pool) waiting() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ready) > 0
}

// keep keeps a connection for whoever dials next.
func (p *pool) keep(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ready) >= 4 {
		c.Close()
		return
	}
	p.ready = append(p.ready, c)
	time.AfterFunc(readyTTL, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for i, r := range p.ready {
			if r == c {
				p.ready = append(p.ready[:i:i], p.ready[i+1:]...)
				c.Close()
			}
		}
	})
}

// take takes a ready connection, or returns nil.
func (p *pool) take() net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.ready) > 0 {
		c := p.ready[0]
		p.ready = p.ready[1:]
		if alive(c) {
			return c
		}
		c.Close()
	}
	return nil
}

// verdict returns what was found out, if that is still good.
func (p *pool) verdict() (known bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ttl := downTTL
	switch {
	case p.last.err == nil:
		ttl = verifiedTTL
	case Refused(p.last.err):
		ttl = refusedTTL
	}
	return time.Since(p.last.when) < ttl, p.last.err
}

func (p *pool) judge(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = verdict{err, time.Now()}
}

// unreachable returns why the host could not be reached in time a while ago.
func (p *pool) unreachable() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.away.when) < awayTTL {
		return p.away.err
	}
	return nil
}

// tryAgain says whether it is time to try a host that could not be reached, which is
// once in each interval, and records that it is tried now.
func (p *pool) tryAgain(interval time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.away.when) < interval || time.Since(p.tried) < interval {
		return false
	}
	p.tried = time.Now()
	return true
}

func (p *pool) found(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away = verdict{err, time.Now()}
}

// Verify finds out whether a registry can be spoken to in the client's place: it
// is there, and its certificate is good. Where the client dialled an address, it
// makes the connection that the client's first request will use.
//
// The name is the client's word. Who gives a registry's name to an address of
// its own learns that this address isn't the registry's, and no other client of
// the network namespace is sent there, or loses the registry for it.
func (e *Egress) Verify(ctx context.Context, t Target) error {
	k := t.key()
	p := e.pool(k)
	if known, err := p.verdict(); known {
		return err
	}
	var err error
	if k.addr.IsValid() || k.tunnel != "" {
		var c net.Conn
		if c, err = e.connect(ctx, k, t, true); err == nil {
			p.keep(c)
		}
	} else {
		ctx, cancel := context.WithTimeout(ctx, e.times.connect)
		defer cancel()
		_, _, err = e.Base(ctx, t)
	}
	if !errors.Is(ctx.Err(), context.Canceled) {
		p.judge(err)
	}
	return err
}

// Reaches says whether a registry answers by this way out.
func (e *Egress) Reaches(ctx context.Context, host Host) bool {
	t := Target{Host: host}
	p := e.pool(t.key())
	p.mu.Lock()
	last := p.last
	p.mu.Unlock()
	if time.Since(last.when) < answersTTL {
		return last.err == nil
	}
	ctx, cancel := context.WithTimeout(ctx, answersTTL/2)
	defer cancel()
	_, _, err := e.Base(ctx, t)
	p.judge(err)
	return err == nil
}

// Base asks a registry for /v2/ in weir's own name, the way that a client's
// requests go, and returns the answer's status and header.
func (e *Egress) Base(ctx context.Context, t Target) (int, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+t.Host.HostPort()+"/v2/", nil)
	if err != nil {
		return 0, nil, err
	}
	req.Host = t.Host.String()
	req.Header.Set("User-Agent", "weir")
	resp, err := e.Transport(t).RoundTrip(req)
	if err != nil {
		return 0, nil, err
	}
	resp.Body.Close()
	return resp.StatusCode, resp.Header, nil
}

// control has f look at, or change, the socket of a connection.
func control(c net.Conn, f func(fd int) error) error {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		return errors.ErrUnsupported
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = raw.Control(func(fd uintptr) { ferr = f(int(fd)) })
	return errors.Join(err, ferr)
}

// tcpInfo returns what the kernel knows of a connection.
func tcpInfo(c net.Conn) (info *unix.TCPInfo, err error) {
	err = control(c, func(fd int) (err error) {
		info, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		return err
	})
	return info, err
}

// alive says whether the other side hasn't closed a connection. A request that
// is sent on one that it has fails, which net/http repairs only for connections
// that were used before.
func alive(c net.Conn) bool {
	info, err := tcpInfo(c)
	return err == nil && info.State == unix.BPF_TCP_ESTABLISHED
}

// delivery is what the kernel knows of what was sent.
type delivery int

const (
	underway delivery = iota // not acknowledged yet
	repeated                 // not acknowledged in time, so that the kernel has sent it again
	arrived                  // acknowledged
)

// delivered says how far what was sent on a connection has come, on which the kernel had sent so
// many segments again before. It doesn't arrive when the connection was forgotten on the way.
func delivered(c net.Conn, before uint32) delivery {
	info, err := tcpInfo(c)
	switch {
	case err != nil || info.Unacked == 0 && info.Notsent_bytes == 0:
		return arrived
	case info.Total_retrans > before: // by a loss probe, or a time-out (RFC 8985, section 7)
		return repeated
	}
	return underway
}

// sentAgain is how many segments the kernel has sent again on a connection.
func sentAgain(c net.Conn) uint32 {
	info, err := tcpInfo(c)
	if err != nil {
		return 0
	}
	return info.Total_retrans
}
