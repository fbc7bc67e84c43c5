// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
)

// Stats count what the programs decided about tracked processes' connections,
// since they were loaded.
type Stats struct {
	Redirected     uint64 `json:"redirected"`
	NoListener     uint64 `json:"no_listener"`     // went direct: no listener, a suspended or full one, or loopback was down
	StaleHeartbeat uint64 `json:"stale_heartbeat"` // went direct: no heartbeat
	Unfit          uint64 `json:"unfit"`           // went direct: not plain TCP, or bound to a device
	Early          uint64 `json:"early"`           // connections of new processes that went direct
	NoOrigin       uint64 `json:"no_origin"`       // came to a listener without having been redirected
	EventsLost     uint64 `json:"events_lost"`     // because Next was not called often enough
	Refused        uint64 `json:"refused"`         // refused: made to a listener's port by the client itself
	// ArrivalsLost are network namespaces that were not reported at first,
	// because NextArrival was not called often enough.
	ArrivalsLost uint64 `json:"arrivals_lost"`
}

// Stats returns the counts.
func (k *Kernel) Stats() (s Stats, err error) {
	for i, n := range []*uint64{&s.Redirected, &s.NoListener, &s.StaleHeartbeat, &s.Unfit, &s.Early, &s.NoOrigin, &s.EventsLost, &s.Refused, &s.ArrivalsLost} {
		var perCPU []uint64
		if err := k.objs.WeirCounters.Lookup(uint32(i), &perCPU); err != nil {
			return s, fmt.Errorf("reading the kernel side's counts: %w", err)
		}
		for _, v := range perCPU {
			*n += v
		}
	}
	return s, nil
}
