// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// oneWay is a connection that breaks before the answer.
type oneWay struct{ net.Conn }

func (*oneWay) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// Whatever isn't a registry comes through byte by byte, in both directions,
// with both ways of ending.
func TestPassThrough(t *testing.T) {
	for name, tt := range map[string]struct {
		server func(c net.Conn)
		client func(c *net.TCPConn) error
	}{
		"garbage echo": {
			func(c net.Conn) { _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error { return echo(c, []byte("\x00\x01garbage\xff")) },
		},
		"looks like TLS": {
			func(c net.Conn) { _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error { return echo(c, []byte("\x16\x03\x01\x00\x05hello and more")) },
		},
		"TLS record too long": {
			func(c net.Conn) { _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error {
				return echo(c, append([]byte("\x16\x03\x01\xff\xff"), bytes.Repeat([]byte("x"), 100_000)...))
			},
		},
		"HTTP": {
			func(c net.Conn) {
				r, _ := http.ReadRequest(bufio.NewReader(c))
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Host: %s\r\n\r\n", r.Host)
			},
			func(c *net.TCPConn) error {
				fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: plain.test\r\n\r\n")
				resp, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err == nil && resp.Header.Get("X-Host") != "plain.test" {
					err = errors.New("another host")
				}
				return err
			},
		},
		"HTTP head too long": {
			func(c net.Conn) { _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error {
				return echo(c, []byte("GET / HTTP/1.1\r\nX: "+strings.Repeat("x", 200_000)))
			},
		},
		"server speaks first": {
			func(c net.Conn) { fmt.Fprint(c, "220 ready\r\n"); _, _ = io.Copy(c, c) },
			func(c *net.TCPConn) error {
				line := make([]byte, 11)
				if _, err := io.ReadFull(c, line); err != nil || string(line) != "220 ready\r\n" {
					return fmt.Errorf("greeting %q: %w", line, err)
				}
				return echo(c, []byte("HELO"))
			},
		},
		"client half-closes": {
			func(c net.Conn) { b, _ := io.ReadAll(c); _, _ = c.Write(bytes.ToUpper(b)) },
			func(c *net.TCPConn) error {
				fmt.Fprint(c, "question")
				_ = c.CloseWrite()
				b, err := io.ReadAll(c)
				if string(b) != "QUESTION" {
					return fmt.Errorf("%q: %w", b, err)
				}
				return err
			},
		},
		"server resets": {
			func(c net.Conn) { _, _ = c.Read(make([]byte, 1)); _ = c.(*net.TCPConn).SetLinger(0) },
			func(c *net.TCPConn) error {
				fmt.Fprint(c, "x")
				if _, err := io.ReadAll(c); err == nil {
					return errors.New("the reset became an orderly end")
				}
				return nil
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			s := newStage(t, l)
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() { defer c.Close(); tt.server(c) }()
				}
			}()
			if err := tt.client(s.dial()); err != nil {
				t.Error(err)
			}
		})
	}
}

func echo(c *net.TCPConn, b []byte) error {
	go func() { _, _ = c.Write(b) }()
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return errors.New("other bytes came back")
	}
	return nil
}

func TestUnreachableIsReset(t *testing.T) {
	l := listen(t)
	s := newStage(t, l)
	l.Close()
	c := s.dial()
	fmt.Fprint(c, "hello")
	if _, err := io.ReadAll(c); err == nil {
		t.Error("an orderly end from a destination that isn't there")
	}
}
