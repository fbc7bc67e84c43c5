// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
)

func TestRedirect(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:8443")
	s.serve("tcp4", "127.0.0.1:443")
	s.serve("tcp6", "[::1]:443")
	p := s.start("dockerd", true)
	for _, addr := range []string{"203.0.113.9:443", "203.0.113.9:80", "203.0.113.9:5000", "192.0.2.1:443", "[2001:db8::9]:443", "[2001:db8:1::1]:443"} {
		network := "tcp4"
		if strings.HasPrefix(addr, "[") {
			network = "tcp6"
		}
		if o := p.redirected(network, addr); o.Mode != ModeNew {
			t.Errorf("%s: mode %d", addr, o.Mode)
		}
	}
	p.redirected("mapped", "203.0.113.9:443") // an IPv4 address on an IPv6 socket
	p.redirected("tcp4", probe1.String()+":443")
	p.direct("tcp4", "203.0.113.9:8443")
	p.direct("tcp4", "127.0.0.1:443")
	p.direct("tcp6", "[::1]:443")
	if got := p.do("udp", "203.0.113.9:443"); got != "203.0.113.9:443" {
		t.Errorf("UDP: %s", got)
	}
	if got := p.do("bound", "203.0.113.9:443"); !strings.HasPrefix(got, "error: ") {
		t.Errorf("bound to a device: %s", got)
	}
	if st, err := s.k.Stats(); err != nil || st.Redirected != 8 || st.Unfit != 1 {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestSocketUsedAgain(t *testing.T) {
	s := newStage(t)
	s.openListener()
	s.serve("tcp4", "203.0.113.9:8443")
	p := s.start("dockerd", true)
	if got := p.do("reuse", "203.0.113.9:443", "203.0.113.9:8443"); got != "203.0.113.9:8443" {
		t.Errorf("through the listener and then past it: %s", got)
	}
	if got := p.do("reuse", "203.0.113.9:443", "198.51.100.7:80"); got != "198.51.100.7:80" {
		t.Errorf("through the listener twice: %s", got)
	}
}

// Each of many connections at once is known for what it is.
func TestMany(t *testing.T) {
	s := newStage(t)
	s.openListener()
	var wg sync.WaitGroup
	for i := range 4 {
		p := s.start("dockerd", true)
		wg.Go(func() {
			if got := p.do("many", fmt.Sprintf("198.%d", 51+0*i)); got != "" {
				t.Error(got)
			}
		})
	}
	wg.Wait()
	if st, _ := s.k.Stats(); st.Redirected != 2000 || st.NoOrigin != 0 {
		t.Errorf("%+v", st)
	}
	var key kernelEndpoint
	if err := s.k.objs.WeirHandover.NextKey(nil, &key); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("something is left between client and listener: %+v, %v", key, err)
	}
}
