// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"weir/proxy/registry"
)

// BytesText is a number of bytes for people.
func BytesText(n int64) string { return humanize.IBytesN(uint64(n), 3) }

// PercentText is part of whole in percent, for people: a dash of nothing, and
// neither 0 nor 100 of what is a little more or less.
func PercentText(part, whole int64) string {
	switch p := 100 * float64(part) / float64(whole); {
	case whole <= 0:
		return "–"
	case part > 0 && p < 1:
		return "<1 %"
	case part < whole && p > 99:
		return ">99 %"
	default:
		return fmt.Sprintf("%.0f %%", p)
	}
}

// SecondsText is a time for people.
func SecondsText(s float64) string {
	switch {
	case s <= 0:
		return "–"
	case s < 0.05:
		return "<0.1 s"
	case s < 100:
		return fmt.Sprintf("%.1f s", s)
	}
	return (time.Duration(s) * time.Second).String()
}

// AloneText is how long a pull would have taken from its registry alone. It is
// empty when that isn't known, and when that was the way it went.
func AloneText(p registry.Pull) string {
	if p.UpstreamSeconds <= 0 || p.BytesFromStore+p.BytesFromPeers == 0 {
		return ""
	}
	return "about " + SecondsText(p.UpstreamSeconds)
}

// PeerText is a peer's address without the port, which is that of a connection.
func PeerText(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}

// RegistryText is what people call a registry.
func RegistryText(host string) string {
	if host == registry.DockerHub {
		return registry.DockerHubName
	}
	return host
}

// PullName is the name of a pull's image, as far as it is known.
func PullName(p registry.Pull) string {
	repository, _, _ := strings.Cut(p.Repository, "?") // and which registry a mirror was asked for
	name := RegistryText(p.Registry) + "/" + repository
	switch {
	case p.Reference == "":
	case len(p.Reference) > 7 && p.Reference[:7] == "sha256:":
		name += "@" + p.Reference[:min(19, len(p.Reference))]
	default:
		name += ":" + p.Reference
	}
	return name
}
