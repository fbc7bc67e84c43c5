// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"weir/agent/trust"
)

// Where a pull was led without the CA it may still be on its way when the
// settings have changed.
func TestMisledLingers(t *testing.T) {
	rt := &Runtime{basis: basis{certsD: &trust.CertsD{}}}
	if err := rt.lingers("ghcr.io", nil); err != nil {
		t.Error(err)
	}
	if err := rt.lingers("ghcr.io", trust.ErrNoCA); !errors.Is(err, trust.ErrNoCA) {
		t.Error(err)
	}
	if err := rt.lingers("ghcr.io", nil); err != nil {
		t.Error(err)
	}
	_ = rt.lingers("ghcr.io", trust.ErrLeads)
	if err := rt.lingers("ghcr.io", nil); !errors.Is(err, trust.ErrLeads) {
		t.Error(err)
	}
	if err := rt.lingers("quay.io", nil); err != nil {
		t.Error(err)
	}
	rt.misled["ghcr.io"] = time.Now().Add(-lingerTime)
	if err := rt.lingers("ghcr.io", nil); err != nil {
		t.Error(err)
	}
	for i := range 2 * maxMisled {
		rt.misleads(fmt.Sprint(i))
	}
	if len(rt.misled) > maxMisled {
		t.Errorf("%d are kept", len(rt.misled))
	}
}
