// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"io"
	"os"
	"sync"
	"time"
)

// idleTimeout is how long a source may send nothing before another is asked
// beside it. It is a variable for tests.
var idleTimeout = 30 * time.Second

// beside reads a blob from one source. When that is silent for a while, a second
// one is opened where it has stopped, and whichever sends first goes on; the other
// is closed. A source that takes long is never given up for nothing.
type beside struct {
	// open opens a source at an offset, another one with each try; instead of one
	// that is silent too, or not. It returns nil when there is none.
	open func(try int, offset int64, instead bool) io.ReadCloser

	mu      sync.Mutex
	body    io.ReadCloser
	off     int64
	reading bool // body, for what is at off
	closed  bool
	timer   *time.Timer
	tries   int
	second  *second
}

// second is a source that was opened beside the silent one.
type second struct {
	body  io.ReadCloser
	first []byte // what it sent first
	won   bool   // it goes on
}

func newBeside(body io.ReadCloser, off int64, open func(try int, offset int64, instead bool) io.ReadCloser) *beside {
	b := &beside{open: open, body: body, off: off}
	b.timer = time.AfterFunc(idleTimeout, b.silent)
	b.timer.Stop()
	return b
}

// Read implements io.Reader. It is not for concurrent use.
func (b *beside) Read(p []byte) (n int, err error) {
	b.mu.Lock()
	if s := b.second; s != nil && s.won {
		n = copy(p, s.first)
		if s.first = s.first[n:]; len(s.first) == 0 {
			b.second = nil
		}
		b.off += int64(n)
		b.mu.Unlock()
		return n, nil
	}
	body := b.body
	b.reading = true
	b.timer.Reset(idleTimeout)
	b.mu.Unlock()

	n, err = body.Read(p)

	b.mu.Lock()
	b.timer.Stop()
	b.reading = false
	s := b.second
	if s != nil && s.won {
		b.mu.Unlock()
		return b.Read(p)
	}
	defer b.mu.Unlock()
	if s != nil && (n > 0 || err != nil) {
		s.body.Close()
		b.second = nil
	}
	b.off += int64(n)
	return n, err
}

// silent opens the second source.
func (b *beside) silent() {
	b.mu.Lock()
	if !b.reading || b.closed || b.second != nil && b.second.won {
		b.mu.Unlock()
		return
	}
	body := b.open(b.tries+1, b.off, b.second != nil)
	if body == nil {
		b.mu.Unlock()
		return
	}
	b.tries++
	if b.second != nil {
		b.second.body.Close()
	}
	s := &second{body: body}
	b.second = s
	b.timer.Reset(idleTimeout)
	b.mu.Unlock()

	buf := make([]byte, chunkSize)
	n, err := 0, error(nil)
	for n == 0 && err == nil {
		n, err = s.body.Read(buf)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.second != s || b.closed: // it isn't needed any more
	case n == 0:
		s.body.Close()
		b.second = nil
	default:
		s.first, s.won = buf[:n], true
		b.body.Close()
		b.body, b.tries = s.body, 0
	}
}

// Close closes the sources, also while they are being read.
func (b *beside) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.timer.Stop()
	if b.second != nil && !b.second.won {
		b.second.body.Close()
	}
	return b.body.Close()
}

// opening is a source that is opened when it is read, which Close ends.
type opening struct {
	ctx    context.Context
	cancel context.CancelFunc
	src    Source
	off    int64

	mu     sync.Mutex
	body   io.ReadCloser
	closed bool
}

func newOpening(ctx context.Context, src Source, off int64) *opening {
	ctx, cancel := context.WithCancel(ctx)
	return &opening{ctx: ctx, cancel: cancel, src: src, off: off}
}

// Read implements io.Reader. It is not for concurrent use.
func (o *opening) Read(p []byte) (int, error) {
	if o.body == nil {
		body, err := o.src(o.ctx, o.off)
		if err != nil {
			return 0, err
		}
		o.mu.Lock()
		o.body = body
		closed := o.closed
		o.mu.Unlock()
		if closed {
			body.Close()
			return 0, os.ErrClosed
		}
	}
	return o.body.Read(p)
}

// Close implements io.Closer.
func (o *opening) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	o.cancel()
	if o.body != nil {
		return o.body.Close()
	}
	return nil
}
