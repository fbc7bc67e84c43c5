// SPDX-License-Identifier: Apache-2.0

// Package doctor looks for what would keep weir from working on a node.
package doctor

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"weir/agent/admin"
	weirproc "weir/agent/procfs"
	"weir/agent/runtimes"
	"weir/p2p"
)

// Finding is one thing that weir needs on a node, and how it stands.
type Finding struct {
	What    string `json:"what"`
	Problem string `json:"problem,omitempty"` // empty when all is well
	Step    string `json:"step,omitempty"`    // what mends it
	// Warning says that weir works in spite of the problem, only less well.
	Warning bool `json:"warning,omitempty"`
}

// Config is what an agent is run with: see the agent's Config.
type Config struct {
	DataDir, RunDir, Cgroup, Admin string
	Registries                     []string
	RegistryFile                   string
	PeerListen, SwarmKey           string
}

// Examine examines the node, the most important things first. It changes
// nothing.
func Examine(ctx context.Context, conf Config) []Finding {
	d := &doctor{conf: conf}
	if os.Geteuid() != 0 {
		d.problem("privileges", "not root", "run it with sudo, or in a container as the README has it")
		return d.findings // the rest would only say the same
	}
	d.capabilities()
	d.confinement()
	if !d.cgroup() {
		return d.findings
	}
	d.processes()
	d.directories()
	d.clock()
	d.agent(ctx)
	d.peers()
	d.reachable(ctx)
	d.runtimes(ctx)
	return d.findings
}

// doctor collects findings.
type doctor struct {
	conf     Config
	findings []Finding
	hangs    bool         // the disk of --data-dir
	running  bool         // an agent answers at --admin
	status   admin.Status // of it
}

func (d *doctor) ok(what string) { d.findings = append(d.findings, Finding{What: what}) }

func (d *doctor) problem(what, problem, step string) {
	d.findings = append(d.findings, Finding{What: what, Problem: problem, Step: step})
}

func (d *doctor) warn(what, problem, step string) {
	d.findings = append(d.findings, Finding{What: what, Problem: problem, Step: step, Warning: true})
}

// runtimes looks at each runtime's own settings and, with an agent running, at
// how it is treated.
func (d *doctor) runtimes(ctx context.Context) {
	all, err := runtimes.Running(d.conf.Cgroup)
	if err != nil {
		d.problem("runtimes", err.Error(), "choose the cgroup2 directory that the runtimes are in with --cgroup")
		return
	}
	for _, rt := range all {
		what, found := fmt.Sprintf("%s (process %d)", rt.Name(), rt.PID), len(d.findings)
		if slices.ContainsFunc(weirproc.Strings(rt.PID, "environ"), proxied) {
			d.warn(what, "the proxy in its environment is spoken to with TLS, so its pulls can't be seen and are passed through",
				"name the proxy as http://, if it speaks that too, exempt its registries with NO_PROXY, or leave it so")
		}
		if mirrors := rt.Mirrors(); len(mirrors) > 0 {
			d.warn(what, "it has mirrors configured, which it asks first and weir doesn't know: "+strings.Join(mirrors, ", "),
				"take them out of its configuration to have weir in their place, or leave it so")
		}
		if i := slices.IndexFunc(d.status.Runtimes, func(r runtimes.Status) bool { return r.PID == rt.PID && r.Reach == runtimes.ReachPassthrough }); i >= 0 {
			d.warn(what, "it is passed through: "+d.status.Runtimes[i].Reason, d.status.Runtimes[i].Step)
			if d.status.Runtimes[i].RestartHelps {
				d.ok(what + ": " + d.restart(ctx, rt))
			}
		}
		if len(d.findings) == found {
			d.ok(what)
		}
	}
	if len(all) == 0 {
		d.warn("runtimes", "no container runtime is running in "+d.conf.Cgroup, "nothing to do: weir will see it when it starts")
	}
}

// proxied says whether a variable of the environment names a proxy that TLS is spoken
// to.
func proxied(kv string) bool {
	name, value, _ := strings.Cut(kv, "=")
	return strings.EqualFold(name, "HTTPS_PROXY") && strings.HasPrefix(strings.ToLower(value), "https://")
}

// clock compares the clock with the CA's time: it may have been wrong when the
// CA was made, or is now.
func (d *doctor) clock() {
	if d.hangs {
		return
	}
	b, err := os.ReadFile(filepath.Join(d.conf.DataDir, "ca", "ca.crt"))
	if err != nil {
		return // weir hasn't run yet
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return // the agent says what to do
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if now := time.Now(); err == nil && (now.Before(cert.NotBefore) || now.After(cert.NotAfter)) {
		d.warn("clock", fmt.Sprintf("it is %s, but weir's CA is valid from %s to %s: registries are passed through",
			now.Format(time.RFC3339), cert.NotBefore.Format(time.RFC3339), cert.NotAfter.Format(time.RFC3339)),
			"set the clock, with NTP; if it is right, restart the agent, which makes another CA, and then the runtimes")
	}
}

func (d *doctor) peers() {
	if d.conf.SwarmKey == "" {
		return
	}
	what := "--swarm-key " + d.conf.SwarmKey
	if _, err := p2p.ReadSwarmKey(d.conf.SwarmKey); err != nil {
		d.problem(what, err.Error(), "")
	} else if st, err := os.Stat(d.conf.SwarmKey); err == nil && st.Mode()&0o077 != 0 {
		d.warn(what, fmt.Sprintf("others than root may read it (mode %04o)", st.Mode().Perm()), "chmod 600 "+d.conf.SwarmKey)
	} else {
		d.ok(what)
	}
	if d.running {
		return
	}
	what = "--peer-listen " + d.conf.PeerListen
	if l, err := net.Listen("tcp", d.conf.PeerListen); err != nil {
		d.problem(what, err.Error(), "stop what listens there, or choose another address with --peer-listen")
	} else {
		l.Close()
		d.ok(what)
	}
}
