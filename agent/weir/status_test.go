// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"

	"weir/agent/admin"
	"weir/agent/doctor"
	"weir/agent/runtimes"
	"weir/proxy"
	"weir/proxy/registry"
)

func TestPrintStatus(t *testing.T) {
	var out bytes.Buffer
	err := printStatus(&out, admin.Status{
		Version: "v1", PID: 7, Started: time.Now(),
		Runtimes: []runtimes.Status{
			{Kind: "dockerd", PID: 1, Reach: runtimes.ReachIntercepted, Trust: "because"},
			{Kind: "containerd", PID: 2, Reach: runtimes.ReachPassthrough, Reason: "it was there before", Step: "restart it", Except: map[string]string{"quay.io": "a hosts.toml decides"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"dockerd", "because", "passthrough", "it was there before", "restart it", "quay.io", "none was asked"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
}

// What belongs to a registry is said to.
func TestStatusNamesCompanions(t *testing.T) {
	var b bytes.Buffer
	if err := printStatus(&b, admin.Status{UnknownHosts: []proxy.Unknown{
		{Host: "auth.docker.io", Companion: &proxy.Companion{Role: proxy.RoleTokenServer, Of: registry.DockerHub}},
		{Host: "web.example"}}}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`auth\.docker\.io +0 +token server of docker\.io\n`, `web\.example +0 +not known as a registry\n`} {
		if !regexp.MustCompile(want).MatchString(b.String()) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
}

// What a pod names, or answers, is text in a terminal, and nothing else.
func TestStatusIsPlain(t *testing.T) {
	const evil = "a\x1b[2J\x1b]0;b\a\nall is well\r\u202e\t"
	var b bytes.Buffer
	err := printStatus(&b, admin.Status{
		Runtimes:      []runtimes.Status{{Kind: "containerd", Reason: evil, Step: evil, Except: map[string]string{evil: evil}}},
		Registries:    []registry.Stats{{Registry: evil}},
		OtherPrograms: []runtimes.Other{{Program: evil, Registries: []string{evil}}},
		UnknownHosts:  []proxy.Unknown{{Host: evil, Registry: true}, {Host: evil, Problem: evil}, {Host: evil, Companion: &proxy.Companion{Role: evil, Of: evil}}},
	})
	if err = errors.Join(err, printPulls(&b, []registry.Pull{{Registry: evil, Repository: evil, Reference: evil, Client: evil}})); err != nil {
		t.Fatal(err)
	}
	printFindings(&b, []doctor.Finding{{What: evil}, {What: evil, Problem: evil, Step: evil, Warning: true}, {What: evil, Problem: evil}})
	for _, r := range b.String() {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("%q is printed", r)
		}
	}
	for line := range strings.Lines(b.String()) {
		if strings.HasPrefix(line, "all is well") {
			t.Errorf("it makes a line of its own: %s", b.String())
		}
	}
}
