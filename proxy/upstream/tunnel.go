// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Tunnel is an HTTP proxy that a client reaches registries through, and how the client
// asks it for a connection (RFC 9110, section 9.3.6). The zero value is none.
type Tunnel struct {
	// Addr is the address that the client has dialled the proxy at.
	Addr netip.AddrPort
	// id tells proxies apart, and what clients ask them with.
	id string
	// fields are the header fields of the client's request, but for Host. There may
	// be a password in them.
	fields string
}

// salt keeps what a client's password is from being guessed by the id of its tunnel.
var salt = func() (b [16]byte) {
	_, _ = rand.Read(b[:]) // never fails
	return b
}()

// NewTunnel returns the tunnels that a proxy gives to a client which asks with a
// header.
func NewTunnel(proxy netip.AddrPort, header http.Header) Tunnel {
	header = header.Clone()
	header.Del("Host")
	var fields bytes.Buffer
	_ = header.Write(&fields)
	sum := sha256.Sum256(append(salt[:], fields.Bytes()...))
	return Tunnel{proxy, proxy.String() + " " + hex.EncodeToString(sum[:8]), fields.String()}
}

// ID tells proxies apart, and what clients ask them with, as long as this process
// lives. It is empty for no tunnel.
func (t Tunnel) ID() string { return t.id }

// maxTunnelHead bounds the head of a proxy's answer.
const maxTunnelHead = 64 << 10

// ErrTunnel says that a proxy refuses to connect its client to a host, or isn't there.
// It doesn't say so when the proxy can't connect it, or not now.
var ErrTunnel = errors.New("the proxy gives no connection")

// open asks the proxy at c for a connection to HOST:PORT. The error is [ErrTunnel] if it
// refuses that. It closes c with an error.
func (t Tunnel) open(ctx context.Context, c net.Conn, hostport string, long time.Duration) error {
	_ = c.SetDeadline(time.Now().Add(long))
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	resp, err := t.ask(c, hostport) //nolint:bodyclose // what has a body isn't a tunnel, and is closed
	if !stop() && err == nil {
		err = ctx.Err()
	}
	switch {
	case err != nil || resp.StatusCode/100 == 2:
	case resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests: // 503 where it can't reach the host, say
		err = fmt.Errorf("no connection to %s: %s", hostport, resp.Status)
	default:
		err = fmt.Errorf("%w to %s: %s", ErrTunnel, hostport, resp.Status)
	}
	if err != nil {
		c.Close()
		return fmt.Errorf("the proxy at %s: %w", t.Addr, err)
	}
	return c.SetDeadline(time.Time{})
}

func (t Tunnel) ask(c net.Conn, hostport string) (*http.Response, error) {
	if _, err := io.WriteString(c, "CONNECT "+hostport+" HTTP/1.1\r\nHost: "+hostport+"\r\n"+t.fields+"\r\n"); err != nil {
		return nil, err
	}
	r := bufio.NewReader(io.LimitReader(c, maxTunnelHead))
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err == nil && resp.StatusCode/100 == 2 && r.Buffered() > 0 {
		err = errors.New("something is said in the tunnel before the client has spoken")
	}
	return resp, err
}

// Tunnel opens a connection to HOST:PORT through a proxy.
func (e *Egress) Tunnel(ctx context.Context, t Tunnel, hostport string) (*net.TCPConn, error) {
	c, err := e.tcp(ctx, t.Addr)
	if err != nil {
		return nil, fmt.Errorf("%w to %s: %w", ErrTunnel, hostport, err)
	}
	if err := t.open(ctx, c, hostport, e.times.connect); err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}
