// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"

	"weir/agent/procfs"
	"weir/agent/trust"
)

// What a runtime makes of one probe's certificate says nothing of the next one's, which
// has begun meanwhile.
func TestProbesAreToldApart(t *testing.T) {
	ca, err := trust.OpenCA(t.TempDir(), []string{"ghcr.io"}, Probes)
	if err != nil {
		t.Fatal(err)
	}
	rs := New(t.Context(), Options{CA: ca, RunDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go rs.AnswerProbe(c.(*net.TCPConn), os.Getpid(), probeSystem)
		}
	}()
	pull := func(verify func() error) error {
		c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return verify() }})
		if err == nil {
			c.Close()
		}
		return err
	}
	shown, goOn, asked, refuse := make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
	var n atomic.Int32
	ask := func(context.Context, *Runtime, string) error {
		switch n.Add(1) {
		case 1:
			return pull(func() error { close(shown); <-goOn; return nil })
		case 2:
			close(asked)
			<-refuse
			return pull(func() error { return errors.New("unknown authority") })
		}
		return nil
	}
	rt := &Runtime{Process: procfs.Process{PID: os.Getpid()}, kind: &kind{name: "dockerd", ask: ask}, ctx: t.Context(), probes: make(map[netip.Addr]*probe)}
	rs.mu.Lock()
	rs.all[rt.PID] = rt
	rs.mu.Unlock()
	probe := func() chan error {
		verdict := make(chan error, 1)
		go func() { verdict <- rs.probe(rt, probeSystem, 0, ca.Generation()) }()
		return verdict
	}
	first := probe()
	<-shown
	second := probe()
	<-asked
	close(goOn)
	if err := <-first; err != nil {
		t.Errorf("the first: %v", err)
	}
	close(refuse)
	if err := <-second; !errors.Is(err, errDistrusts) {
		t.Errorf("the second: %v", err)
	}
}
