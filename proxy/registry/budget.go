// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"io"
	"sync"
)

const (
	// manifestMemory bounds the bytes of manifests that are held in memory
	// while they pass by, and ownerMemory those of one owner. What is beyond
	// passes by and isn't kept.
	manifestMemory = 32 << 20
	ownerMemory    = 8 << 20
)

// quota bounds what there is of something: for all, for each owner, and for all
// owners with a name together, who have half of it.
type quota struct {
	max, each int64

	mu     sync.Mutex
	all    int64
	named  int64
	owners map[string]int64
}

func newQuota(limit, each int64) *quota {
	return &quota{max: limit, each: each, owners: make(map[string]int64)}
}

// take takes n for an owner, and says whether there were as many.
func (q *quota) take(owner string, n int64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.all+n > q.max || owner != "" && (q.named+n > q.max/2 || q.owners[owner]+n > q.each) {
		return false
	}
	q.count(owner, n)
	return true
}

// give gives n back.
func (q *quota) give(owner string, n int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.count(owner, -n)
}

func (q *quota) count(owner string, n int64) {
	q.all += n
	if owner == "" {
		return
	}
	q.named += n
	if q.owners[owner] += n; q.owners[owner] == 0 {
		delete(q.owners, owner)
	}
}

// buffer holds a manifest while it passes by, in memory that a quota counts. It
// may be released while it is being written: a request's body is read for as
// long as its upstream likes.
type buffer struct {
	quota *quota
	owner string

	mu    sync.Mutex
	bytes []byte
	taken int64
	over  bool // it is too long, there is no memory for it, or it is released
}

// buffer returns an empty one. Release it. A client can hold it up at any registry,
// so that it is the client's network whose bounds count.
func (x *exchange) buffer() *buffer {
	owner := x.up.owner()
	if x.up.NetworkID != "" {
		owner = "network " + x.up.NetworkID
	}
	return &buffer{quota: x.h.memory, owner: owner}
}

// firstBuffer is enough for most manifests.
const firstBuffer = 8 << 10

// grow makes room for more, if there may be more. The caller holds b.mu.
func (b *buffer) grow() bool {
	if len(b.bytes) < cap(b.bytes) {
		return true
	}
	size := max(min(2*cap(b.bytes), maxManifest+1), firstBuffer)
	if b.over || len(b.bytes) > maxManifest || !b.quota.take(b.owner, int64(size)-b.taken) {
		b.over = true
		return false
	}
	b.taken = int64(size)
	b.bytes = append(make([]byte, 0, size), b.bytes...)
	return true
}

// fill reads r to its end, or until it is over. It isn't to be called while
// another goroutine uses the buffer.
func (b *buffer) fill(r io.Reader) error {
	for b.grow() {
		n, err := r.Read(b.bytes[len(b.bytes):cap(b.bytes)])
		b.bytes = b.bytes[:len(b.bytes)+n]
		if err == io.EOF {
			b.over = len(b.bytes) > maxManifest
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Write keeps a copy of what passes by. It never fails.
func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for rest := p; len(rest) > 0 && b.grow(); {
		n := copy(b.bytes[len(b.bytes):cap(b.bytes)], rest)
		b.bytes, rest = b.bytes[:len(b.bytes)+n], rest[n:]
	}
	if b.over {
		b.giveBack()
	}
	return len(p), nil
}

// whole returns what was written, if that is all of a manifest.
func (b *buffer) whole() ([]byte, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.bytes, !b.over && len(b.bytes) <= maxManifest
}

// release gives the memory back.
func (b *buffer) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	b.giveBack()
}

// giveBack is release. The caller holds b.mu.
func (b *buffer) giveBack() {
	b.quota.give(b.owner, b.taken)
	b.bytes, b.taken = nil, 0
}

// from copies what is held from an offset on, and gives the memory back when
// that is nothing.
func (b *buffer) from(offset int, to []byte) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if offset < len(b.bytes) {
		return copy(to, b.bytes[offset:])
	}
	b.giveBack()
	return 0
}

// replayed is the body of an answer whose beginning was read into a buffer,
// which is released once that was sent.
type replayed struct {
	buffer *buffer
	sent   int
	io.ReadCloser
}

// Read implements io.Reader.
func (r *replayed) Read(p []byte) (int, error) {
	if n := r.buffer.from(r.sent, p); n > 0 {
		r.sent += n
		return n, nil
	}
	return r.ReadCloser.Read(p)
}

// Close implements io.Closer.
func (r *replayed) Close() error {
	r.buffer.release()
	return r.ReadCloser.Close()
}
