// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"testing"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
}

// What is asked of an ending agent doesn't use what it has closed. The race
// detector tells.
func TestAskedAtTheEnd(t *testing.T) {
	cgroup := ownCgroup(t)
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
