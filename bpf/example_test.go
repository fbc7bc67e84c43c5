// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"log"
	"net"
	"time"

	"weir/bpf"
)

// dockerd's connections to port 443 come to a listener in this network namespace,
// as long as the process beats. It needs root; nothing is left when it ends.
func Example() {
	cgroup, err := bpf.CgroupRoot()
	if err != nil {
		panic(err)
	}
	k, err := bpf.Load(bpf.Options{Cgroup: cgroup, Ports: []uint16{443}, Names: []string{"dockerd"}})
	if err != nil {
		panic(err)
	}
	defer k.Close()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		panic(err)
	}
	defer l.Close()
	if _, err := k.OpenListener(l, nil); err != nil {
		panic(err)
	}
	go func() {
		for range time.Tick(bpf.BeatInterval) {
			k.Beat()
		}
	}()
	go func() { // dockerds that start from now on
		for {
			e, err := k.Next()
			if err != nil {
				return // k is closed
			}
			if e.Kind == bpf.Exec {
				_ = k.Remode(e.PID, bpf.ModeRedirect)
			}
		}
	}()
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			panic(err)
		}
		if o, err := k.Origin(c); err == nil {
			log.Printf("process %d connects to %s", o.PID, o.Dst)
		}
		c.Close()
	}
}
