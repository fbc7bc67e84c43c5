// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"strings"
	"testing"

	"weir/agent/runtimes"
	"weir/p2p"
	"weir/proxy"
	"weir/proxy/registry"
)

// What comes from outside is text on the page, and nothing else.
func TestPageEscapes(t *testing.T) {
	const evil = `<script>alert(1)</script>"'`
	d := pageData{Host: evil, Version: evil, Peers: &p2p.Status{},
		Node: &pageNode{Status: Status{Runtimes: []runtimes.Status{{Kind: evil, Reason: evil, Step: evil, Except: map[string]string{evil: evil}}},
			OtherPrograms: []runtimes.Other{{Program: evil, Registries: []string{evil}}},
			UnknownHosts:  []proxy.Unknown{{Host: evil, Registry: true}, {Host: evil, Companion: &proxy.Companion{Role: evil, Of: evil}}}, Peers: &p2p.Status{Peers: []p2p.Peer{{Address: evil}}}},
			Pulls: []pagePull{{registry.Pull{Registry: evil, Repository: evil, Reference: evil, Client: evil}}}},
		Cluster:    &Cluster{Nodes: []NodeFigures{{Address: evil, Version: evil}}},
		Registries: []pageRegistry{{registry.Stats{Registry: evil}}},
		Bars:       []bar{{Class: "store", Title: evil}}}
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, d); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), "<script>") || !strings.Contains(b.String(), "&lt;script&gt;") {
		t.Error(b.String())
	}
}
