// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
)

// maxAsked is for how many ranges a registry is asked at a time. Servers bound them (Apache's httpd 200), and
// the length of a field (nginx and httpd 8 KiB).
const maxAsked = 200

// Opener opens ranges of a blob that are missing, which are in order. What it returns gives the bytes of
// the first n of them, one after another. Of the last of these it may give less.
type Opener func(ctx context.Context, missing []Span) (body io.ReadCloser, n int, err error)

// inflow is what registries send to somebody who has asked for ranges. The zero value is nothing. It is not for
// concurrent use, but for end.
type inflow struct {
	mu    sync.Mutex // guards bodies, but for the one who reads
	ended bool
	// bodies are mostly one. What has to come before the rest of one, and isn't in it, is another's, which is
	// after it.
	bodies []flow
}

// flow is one answer.
type flow struct {
	io.ReadCloser
	rest []Span // that it gives, one after another: the first begins where it is
}

// at says how many bytes come from off on, without a gap.
func (f *inflow) at(off int64) int64 {
	if len(f.bodies) == 0 {
		return 0
	}
	b := &f.bodies[len(f.bodies)-1]
	if len(b.rest) == 0 || b.rest[0].From != off {
		return 0
	}
	return b.rest[0].To - off
}

// find has what is at off come next, and says whether it does. What is of no use any more it
// closes.
func (f *inflow) find(off int64) bool {
	for len(f.bodies) > 0 {
		b := &f.bodies[len(f.bodies)-1]
		if found, later := b.seek(off); found || later {
			return found
		}
		f.pop()
	}
	return false
}

// seek has it give what is at off next, and says whether it does: what comes before is read for
// nothing, if that isn't much. Or else it says whether it gives only what comes later.
func (b *flow) seek(off int64) (found, later bool) {
	skip := int64(0)
	for i, s := range b.rest {
		if s.To <= off {
			skip += s.To - s.From
			continue
		}
		if s.From > off {
			return false, true
		}
		if skip += off - s.From; skip > nearSpan {
			return false, false
		}
		if _, err := io.CopyN(io.Discard, b, skip); err != nil || len(b.rest) <= i { // it gives less
			return false, false
		}
		b.rest = b.rest[i:]
		b.rest[0].From = off
		return true, false
	}
	return false, false
}

// add adds what gives ranges, one after another, which come before all else.
func (f *inflow) add(body io.ReadCloser, rest []Span) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		body.Close()
		return os.ErrClosed
	}
	f.bodies = append(f.bodies, flow{body, rest})
	return nil
}

// gives says that the one that was added last gives only the first n of its ranges.
func (f *inflow) gives(n int) {
	b := &f.bodies[len(f.bodies)-1]
	b.rest = b.rest[:n]
}

// read reads what is next. The error is not [io.EOF] before all of it has come.
func (f *inflow) read(p []byte) (int, error) {
	b := &f.bodies[len(f.bodies)-1]
	n, err := b.Read(p)
	if b.rest[0].From += int64(n); b.rest[0].From >= b.rest[0].To {
		b.rest = b.rest[1:]
	}
	switch {
	case n > 0:
		err = nil
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// pop closes the one that comes next.
func (f *inflow) pop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.bodies) - 1
	f.bodies[n].Close()
	f.bodies = f.bodies[:n]
}

// end closes all, and what is added later.
func (f *inflow) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	for i := range f.bodies { // not their rest, which the reader has
		f.bodies[i].Close()
	}
}
