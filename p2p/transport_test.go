// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// A stranger is any node without the swarm's key.
func TestStranger(t *testing.T) {
	all := swarm(t, 2)
	d := all[0].put(random(1000))
	all[0].Provide(d)
	stranger := newMember(t, func(o *Options) { o.SwarmKey = bytes.Repeat([]byte{8}, 32) }, all[0].addr())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	// The transfers.
	if c, _, err := stranger.dialPeer(ctx, "", []string{all[0].addr()}); err == nil {
		t.Error("a transfer connection with another key")
		c.Close()
	}
	// libp2p: identify, the DHT, the leases.
	info := all[0].host.Peerstore().PeerInfo(all[0].host.ID())
	if err := stranger.host.Connect(ctx, info); err == nil {
		t.Error("a libp2p connection with another key")
	}
	// No key at all.
	for _, hello := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x13/multistream/1.0.0\n", "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", strings.Repeat("x", 4096)} {
		c, err := net.Dial("tcp", all[0].addr())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(c, hello)
		_ = c.(*net.TCPConn).CloseWrite()
		got, _ := io.ReadAll(c)
		if bytes.Contains(got, []byte("HTTP")) || bytes.Contains(got, []byte("multistream")) {
			t.Errorf("to %q it says %q", hello, got)
		}
		c.Close()
	}
	all[0].says = func() []byte { return []byte(`{}`) }
	if b, err := stranger.figuresOf(ctx, source{ID: all[0].host.ID(), Addrs: []string{all[0].addr()}}); err == nil {
		t.Errorf("a stranger is told %q", b)
	}
	if s := stranger.Want(t.Context(), d, 0); s != nil {
		t.Error("a stranger gets a lease")
	}
	if st := all[0].Status(); len(st.Peers) != 1 || st.Unauthenticated == 0 {
		t.Errorf("status: %+v", st)
	}
}

// Who has the port that peers look for one at, and not the key, isn't taken for
// one, whatever it answers to a peer's proof.
func TestStrangerListens(t *testing.T) {
	all := swarm(t, 2)
	// It speaks libp2p's TLS, for which any node has an identity.
	stranger := newMember(t, func(o *Options) { o.SwarmKey = bytes.Repeat([]byte{8}, 32) })
	secure := func(c net.Conn, side func(net.Conn, *tls.Config) *tls.Conn) *tls.Conn {
		conf, _ := stranger.identity.ConfigForPeer("")
		conf.NextProtos = []string{"http/1.1"}
		return side(c, conf)
	}
	for how, reply := range map[string]func(proof []byte) []byte{
		"nothing":   func([]byte) []byte { return nil },
		"zeros":     func([]byte) []byte { return make([]byte, 32) },
		"the proof": func(proof []byte) []byte { return proof },
		"what another peer says to it": func(proof []byte) []byte {
			c, err := net.Dial("tcp", all[1].addr())
			if err != nil {
				t.Error(err)
				return nil
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			relay := secure(c, tls.Client)
			_, _ = relay.Write(proof)
			theirs, _ := io.ReadAll(io.LimitReader(relay, 32))
			if len(theirs) > 0 {
				t.Errorf("a proof that was made for another connection is taken, and answered with %x", theirs)
			}
			return theirs
		},
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			tc := secure(c, tls.Server)
			proof := make([]byte, 32)
			if _, err := io.ReadFull(tc, proof); err != nil {
				t.Errorf("%s: no proof came: %v", how, err)
				return
			}
			_, _ = tc.Write(reply(proof))
		}()
		if c, _, err := all[0].dialPeer(t.Context(), "", []string{l.Addr().String()}); err == nil {
			t.Errorf("%s makes a stranger a peer", how)
			c.Close()
		}
		l.Close()
	}
}
