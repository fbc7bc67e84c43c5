// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"weir/agent/internal/agenttest"
	"weir/agent/redirect"
	"weir/bpf"
	"weir/proxy/upstream"
)

// What is asked of an ending agent doesn't use what it has closed. The race
// detector tells.
func TestAskedAtTheEnd(t *testing.T) {
	cgroup := agenttest.Cgroup(t)
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		ready, ended := make(chan *Agent, 1), make(chan error, 1)
		go func() {
			ended <- Run(ctx, Config{DataDir: t.TempDir(), RunDir: t.TempDir(), Cgroup: cgroup.Name(), Ports: []uint16{443}, Admin: "127.0.0.1:0",
				StoreSize: 1 << 20, Log: slog.New(slog.DiscardHandler)}, func(a *Agent) { ready <- a })
		}()
		var a *Agent
		select {
		case a = <-ready:
		case err := <-ended:
			t.Fatal(err)
		}
		url := "http://" + a.adminL.Addr().String() + "/api/status"
		var wg sync.WaitGroup
		asked := make(chan struct{}, 1)
		over := make(chan struct{})
		for range 4 {
			wg.Go(func() {
				for {
					select {
					case <-over:
						return
					default:
					}
					if resp, err := http.Get(url); err == nil {
						_, _ = io.Copy(io.Discard, resp.Body)
						resp.Body.Close()
						select {
						case asked <- struct{}{}:
						default:
						}
					}
				}
			})
		}
		<-asked
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		close(over)
		wg.Wait()
	}
}

// Who comes to a listener by itself, past the programs that refuse it, gets nothing
// there.
func TestConnectionWithoutOrigin(t *testing.T) {
	k, err := bpf.Load(bpf.Options{Cgroup: agenttest.Cgroup(t).Name()})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	// An agent that has nothing to serve it with.
	ds := redirect.New(k, upstream.Config{}, (&Agent{kernel: k}).serve, slog.New(slog.DiscardHandler))
	defer ds.Wait()
	defer ds.CloseAll()
	if err := ds.Enter(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", ds.Status()[0].Addrs[0])
	var said []byte
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, werr := io.WriteString(c, "GET /v2/ HTTP/1.1\r\nHost: ghcr.io\r\n\r\n")
		said, err = io.ReadAll(c)
		err = errors.Join(werr, err) // a socket tells of it once
	}
	// It may be so soon that the connection isn't even seen.
	if len(said) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v", said, err)
	}
}
