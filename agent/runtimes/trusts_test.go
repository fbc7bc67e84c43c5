// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"weir/agent/trust"
	"weir/proxy/registry"
)

// Where a pull was led without the CA it may still be on its way when the
// settings have changed.
func TestMisledLingers(t *testing.T) {
	hosts := registry.NewHosts()
	hosts.Set(nil, []string{"learned.example.com"})
	rs := &Runtimes{o: Options{Find: hosts.Find}}
	rt := &Runtime{basis: basis{certsD: &trust.CertsD{}}}
	if err := rs.lingers(rt, "ghcr.io", nil); err != nil {
		t.Error(err)
	}
	if err := rs.lingers(rt, "ghcr.io", trust.ErrNoCA); !errors.Is(err, trust.ErrNoCA) {
		t.Error(err)
	}
	if err := rs.lingers(rt, "ghcr.io", nil); err != nil {
		t.Error(err)
	}
	_ = rs.lingers(rt, "ghcr.io", trust.ErrLeads)
	if err := rs.lingers(rt, "ghcr.io", nil); !errors.Is(err, trust.ErrLeads) {
		t.Error(err)
	}
	if err := rs.lingers(rt, "quay.io", nil); err != nil {
		t.Error(err)
	}
	rt.misled["ghcr.io"] = time.Now().Add(-lingerTime)
	if err := rs.lingers(rt, "ghcr.io", nil); err != nil {
		t.Error(err)
	}
	for i := range 2 * maxMisled {
		rt.misleads(fmt.Sprint(i))
	}
	if len(rt.misled) > maxMisled {
		t.Errorf("%d are kept", len(rt.misled))
	}
}

// While it isn't known of a host whether it is a registry, or it isn't one of the
// known ones, a pull from there may be led to a learned registry without the CA.
func TestUnsureLingers(t *testing.T) {
	hosts := registry.NewHosts()
	hosts.Set(nil, []string{"tokens.example.com"})
	rs := &Runtimes{o: Options{Find: hosts.Find}}
	rt := &Runtime{basis: basis{certsD: &trust.CertsD{}}}
	passed := func(host string, want bool) {
		t.Helper()
		if err := rs.lingers(rt, host, nil); (err != nil) != want {
			t.Errorf("%s: %v", host, err)
		}
	}
	passed("tokens.example.com", false)
	rs.Unsure(rt, "new.example.com", true)
	passed("tokens.example.com", true)
	passed("ghcr.io", false)
	rs.Unsure(rt, "new.example.com", false) // it is none
	passed("tokens.example.com", false)
	rs.Unsure(rt, "new.example.com", true)
	hosts.Set(nil, []string{"tokens.example.com", "new.example.com"}) // it was learned
	passed("tokens.example.com", false)
	rs.Unsure(rt, "third.example.com", true)
	rt.unsure["third.example.com"] = time.Now().Add(-lingerTime)
	passed("tokens.example.com", false)
	rt.basis = basis{} // the system's roots are for all pulls
	rs.Unsure(rt, "third.example.com", true)
	passed("tokens.example.com", false)
}

// A connection waits until it is known how its runtime is treated; where that takes too
// long only the first one does, and the runtime is then taken to have read its roots.
func TestSettle(t *testing.T) {
	rs := &Runtimes{}
	rt := &Runtime{settled: make(chan struct{})}
	done := make(chan bool)
	go func() { done <- rs.Settle(rt) }()
	select {
	case <-done:
		t.Error("nothing was waited for")
	case <-time.After(settleTime / 20):
	}
	rt.settle()
	if !<-done || !rs.Settle(rt) || rt.wasCarried() {
		t.Error("it was known, and not waited for")
	}
	stuck := &Runtime{settled: make(chan struct{})}
	if rs.Settle(stuck) || !stuck.wasCarried() {
		t.Error("it isn't noted that a connection was carried")
	}
	start := time.Now()
	for range 10 {
		if rs.Settle(stuck) {
			t.Error("it is known")
		}
	}
	if took := time.Since(start); took > settleTime {
		t.Errorf("ten more connections waited for %s", took)
	}
}
