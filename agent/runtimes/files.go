// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"errors"
	"io/fs"
	"sync"
	"time"

	"weir/agent/trust"
)

// readTime is how long reading a runtime's files may take. It is some hundred
// microseconds, but for file systems that give no answer (NFS, FUSE).
const readTime = time.Second

var errNoAnswer = errors.New("its files can't be read in time: see whether a file system there gives no answer (NFS, FUSE)")

// fileAccess lets one at a time read a runtime's files, so that a file system that
// gives no answer holds one thread.
type fileAccess struct {
	mu    sync.Mutex
	taken chan struct{} // closed when the one that reads has ended; nil if there is none
	stuck bool          // that one has not ended in time
}

// begin waits until no other one reads. It returns false if that isn't to be
// expected before the timer.
func (l *fileAccess) begin(timer <-chan time.Time) bool {
	for {
		l.mu.Lock()
		taken, stuck := l.taken, l.stuck
		if taken == nil {
			l.taken, l.stuck = make(chan struct{}), false
		}
		l.mu.Unlock()
		switch {
		case taken == nil:
			return true
		case stuck:
			return false
		}
		select {
		case <-taken:
		case <-timer:
			return false
		}
	}
}

func (l *fileAccess) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.taken)
	l.taken = nil
}

func (l *fileAccess) late() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stuck = l.taken != nil
}

// bounded returns what f finds in a runtime's files. The error is errNoAnswer
// when that takes too long; f then goes on, and others are not let in before it
// has ended.
func bounded[T any](rs *Runtimes, rt *Runtime, f func() (T, error)) (found T, err error) {
	timer := time.NewTimer(readTime)
	defer timer.Stop()
	if !rt.files.begin(timer.C) {
		return found, errNoAnswer
	}
	if !rs.reading.TryAcquire(1) { // by those that are stuck
		rt.files.end()
		return found, errNoAnswer
	}
	type result struct {
		found T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		defer rt.files.end()
		defer rs.reading.Release(1)
		found, err := f()
		done <- result{found, err}
	}()
	select {
	case r := <-done:
		return r.found, r.err
	case <-timer.C:
		rt.files.late()
		return found, errNoAnswer
	}
}

// inRoot has f do something in a runtime's root file system, if that is still there.
func inRoot(rs *Runtimes, rt *Runtime, f func(*trust.Root) error) error {
	_, err := bounded(rs, rt, func() (struct{}, error) {
		root, err := trust.OpenRoot(rt.PID)
		if err != nil {
			return struct{}{}, err
		}
		defer root.Close()
		return struct{}{}, f(root)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
