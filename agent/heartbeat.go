// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	"weir/bpf"
)

// spareDescriptors are kept for the connections that the agent has by then, and
// those that still come until the kernel side knows: each may need some, to the
// registry and for the blob's file.
const spareDescriptors = 256

// crowded says that the agent has few descriptors left. A connection that is
// redirected to it then could neither be accepted nor passed through.
func crowded() bool {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return false
	}
	open, err := openDescriptors()
	return err != nil || open+min(spareDescriptors, limit.Cur/2) > limit.Cur
}

// openDescriptors counts those of this process. The error is that there is none
// left to do so with.
func openDescriptors() (uint64, error) {
	self, err := procfs.Self()
	if err != nil {
		return 0, err
	}
	n, err := self.FileDescriptorsLen()
	return uint64(n), err
}

// beats starts telling the kernel side that the agent is alive. When that stops,
// or it is out of descriptors, connections go direct.
//
// It is what an idle agent does most of the time. Each of a time.Ticker's ticks
// wakes three threads; timerfd_create(2) needs one.
func (a *Agent) beats() error {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("making the heartbeat's timer: %w", err)
	}
	t := os.NewFile(uintptr(fd), "heartbeat")
	every := unix.NsecToTimespec(bpf.BeatInterval.Nanoseconds())
	if err := unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: every, Value: every}, nil); err != nil {
		t.Close()
		return fmt.Errorf("setting the heartbeat's timer: %w", err)
	}
	a.kernel.Beat()
	context.AfterFunc(a.ctx, func() { t.Close() })
	a.wg.Go(func() { a.beat(t) })
	return nil
}

// beat beats each time that something can be read, until it is closed.
func (a *Agent) beat(timer io.Reader) {
	full, expirations := false, make([]byte, 8)
	for i := 0; ; i++ {
		if _, err := timer.Read(expirations); err != nil {
			return
		}
		if i%2 == 0 && crowded() != full {
			if full = !full; full {
				a.log.Warn("few descriptors are left: new connections go direct until there are more; LimitNOFILE of the unit (ulimit -n) is their bound")
			} else {
				a.log.Info("there are descriptors again: connections are redirected")
			}
		}
		if !full {
			a.kernel.Beat()
		}
	}
}
