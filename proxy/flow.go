// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net/netip"
	"time"

	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// Flow is a redirected connection's meaning: what the agent knows of it.
type Flow struct {
	// Dst is where the client wanted to go.
	Dst netip.AddrPort
	// NetworkID tells the network that Dst is an address in from all others that
	// there ever were. Empty means the node's.
	NetworkID string
	// Egress dials from the client's network namespace.
	Egress *upstream.Egress
	// tunnelled is where the client goes through the proxy at Dst, and through is how.
	tunnelled upstream.Host
	through   upstream.Tunnel
	// Client names the client in logs.
	Client string
	// Direct says that the connection is passed through unseen.
	Direct bool
	// Closed is called once, when the client's connection is closed. It may be
	// nil.
	Closed func()
	// Trusts says whether the client's runtime trusts weir's CA for a
	// registry, and sees to it that it can. The name is canonical, but for
	// upper-case letters that the client has written. Nil means never.
	Trusts func(host registry.Known, name string) bool
	// Settings returns what the client's runtime verifies a registry with, and
	// shows to it, beside the usual. The error says why that can't be had.
	// Nil means nothing.
	Settings func(host registry.Known, name string) (upstream.Settings, error)
	// Learn is told of a host that the client has connected to, and that is a
	// registry, though not a known one. ownRoots says that only the client's runtime
	// verifies it so. The error says why it isn't learned. Nil means that none is.
	Learn func(host string, ownRoots bool) error
	// Unsure is told of a host that the client has connected to, and of which it isn't
	// known whether it is a registry, or that is one which isn't known; and when it is
	// known to be none. It may be nil.
	Unsure func(host string, unsure bool)
	// Leave has further connections to Dst from the client's network not come here for
	// that long: no registry is there. Want has them come, whatever its port: one is
	// there, without TLS. They may be nil.
	Leave func(long time.Duration)
	Want  func()
	// Accepted is told when the client has trusted weir's certificate. It may be
	// nil.
	Accepted func()
	// Rejected is told when the client did not trust weir's certificate all
	// the same. It may be nil.
	Rejected func(host string, err error)
}
