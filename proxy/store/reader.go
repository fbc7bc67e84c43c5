// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
)

// Source opens a blob at an offset, at a place that it can be had from. The
// store closes what it returns.
type Source func(ctx context.Context, offset int64) (io.ReadCloser, error)

// Reader reads a blob from where its bytes are: a kept file, a transfer, or a source
// that it has for itself. When one of them fails it goes on at the next, at the same
// offset, see [Reader.With]. It checks each byte of a kept file before it gives it
// away, and gives the last byte of all else only when the digest is verified.
//
// It is not for concurrent use, but for Detach, Arrived and Size.
type Reader struct {
	store  *Store
	digest digest.Digest
	ctx    context.Context
	over   Failover
	from   backing
	off    int64
	// arriving is the transfer that it was made for, if it was.
	arriving *follower
}

// Failover is how a [Reader] goes on when what it reads from fails. The zero value
// is not to.
type Failover struct {
	// Origin is that of the blob, to fetch it again.
	Origin Origin
	// Fetch opens it for a transfer, and Own for this reader alone, which reads at
	// its own pace.
	Fetch, Own Source
}

// backing is what a blob's bytes are read from.
type backing interface {
	// readAt reads what is at off, and waits until something is. It returns less
	// than p when there is less just now, and io.EOF at the end only.
	readAt(ctx context.Context, p []byte, off int64) (int, error)
	// size is the blob's length in bytes, or -1 while it isn't known.
	size() int64
	close()
}

// With makes reads end with ctx, and go on by over. It returns r.
func (r *Reader) With(ctx context.Context, over Failover) *Reader {
	r.ctx, r.over = ctx, over
	return r
}

// Size is the blob's length in bytes, or -1 when the source of a transfer didn't say.
func (r *Reader) Size() int64 {
	if r.arriving != nil {
		return r.arriving.size()
	}
	return r.from.size()
}

// Read implements io.Reader: it waits for bytes to arrive. The error wraps
// [ErrCorrupt] when they aren't the digest's; what was read before of a kept file is
// right.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		n, err := r.from.readAt(r.ctx, p, r.off)
		r.off += int64(n)
		if n > 0 || err == nil || errors.Is(err, io.EOF) {
			if n > 0 {
				err = nil
			}
			return n, err
		}
		if err := r.failOver(err); err != nil {
			return 0, err
		}
	}
}

// Seek implements io.Seeker. The end is known only when the size is. In what the reader
// has from a source for itself it goes forward only.
func (r *Reader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.off
	case io.SeekEnd:
		size := r.Size()
		if size < 0 {
			return r.off, errors.New("seek from the end of a blob of unknown size")
		}
		offset += size
	}
	if offset < 0 {
		return r.off, errors.New("seek before the beginning of a blob")
	}
	r.off = offset
	return offset, nil
}

// Close gives the reader up. A transfer without readers ends after a while. The file
// of a kept blob is the blob's to close.
func (r *Reader) Close() error {
	r.from.close()
	return nil
}

// failOver finds another way to the rest after cause, which it returns when there is
// none.
func (r *Reader) failOver(cause error) error {
	if r.over.Own == nil || r.ctx.Err() != nil {
		return cause
	}
	var werr *writeError
	switch from := r.from.(type) {
	case *keptFile:
		if errors.Is(cause, ErrCorrupt) || errors.Is(cause, ErrDiskHangs) {
			return r.refetch(cause)
		}
	case *follower:
		if errors.As(cause, &werr) || errors.Is(cause, errDetached) {
			return r.readOn(from)
		}
	}
	return cause
}

// readOn goes on by a source of the reader's own, verified against the digest like
// the transfer.
func (r *Reader) readOn(from *follower) error {
	from.t.mu.Lock()
	off := min(r.off, from.t.arrived) // what comes before the one is read, too
	from.t.mu.Unlock()
	body, err := r.over.Own(r.ctx, off)
	if err != nil {
		return err
	}
	st := newStream(r.ctx, r.digest, from.size(), body, r.over.Own)
	if st.read, err = io.Copy(st.hash, io.NewSectionReader(arrivedAt{from.t}, 0, off)); err != nil {
		body.Close()
		return fmt.Errorf("reading back %s: %w", r.digest, err)
	}
	st.given = off
	from.close() // its file takes room
	r.from = st
	r.store.log.Info("a blob is read on from its source, and not kept by this reader", "digest", r.digest, "at", r.off)
	return nil
}

// refetch fetches all of a kept blob again, whose file is damaged, or is on a disk
// that hangs.
func (r *Reader) refetch(cause error) error {
	t, leader := r.store.Claim(r.digest, r.over.Origin)
	if !leader {
		n, err := t.Wait(r.ctx)
		if err != nil {
			return errors.Join(cause, err)
		}
		r.from = n.from
		return nil
	}
	size := r.from.size()
	// It belongs to the transfer once that has begun, and to the client before.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.ctx))
	stop := context.AfterFunc(r.ctx, cancel)
	body, err := r.over.Fetch(ctx, 0)
	if err != nil {
		cancel()
		t.Abandon(err)
		return errors.Join(cause, err)
	}
	body = &cancelBody{body, cancel}
	stop()
	n, err := t.Begin(size, body, r.over.Fetch)
	if err == nil {
		r.from = n.from
		return nil
	}
	// What was given until here is known to be right.
	context.AfterFunc(r.ctx, cancel)
	st := newStream(r.ctx, r.digest, size, body, r.over.Own)
	if err := st.skip(r.off); err != nil {
		st.close()
		return errors.Join(cause, err)
	}
	r.from = st
	return nil
}

// cancelBody is a body whose request ends when it is closed.
type cancelBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b *cancelBody) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
}

// keptFile reads a kept blob.
type keptFile struct {
	blob  *Blob
	chunk int64 // which one is in buf, or -1
	buf   []byte
}

func (f *keptFile) size() int64 { return f.blob.size }
func (f *keptFile) close()      {}

func (f *keptFile) readAt(_ context.Context, p []byte, off int64) (int, error) {
	if off >= f.blob.size {
		return 0, io.EOF
	}
	i, at := off/chunkSize, off%chunkSize
	size := min(chunkSize, f.blob.size-i*chunkSize) // of the chunk
	if at == 0 && int64(len(p)) >= size {           // it needs no copy
		if err := f.load(i, p[:size]); err != nil {
			return 0, err
		}
		return int(size), nil
	}
	if f.chunk != i {
		if int64(cap(f.buf)) < size {
			f.buf = make([]byte, size)
		}
		f.buf, f.chunk = f.buf[:size], -1
		if err := f.load(i, f.buf); err != nil {
			return 0, err
		}
		f.chunk = i
	}
	return copy(p, f.buf[at:]), nil
}

// load reads a chunk into b and checks it.
func (f *keptFile) load(i int64, b []byte) error {
	s, err := f.blob.checksums()
	if err != nil {
		return err
	}
	if _, err := f.blob.disk.readAt(f.blob.file, b, i*chunkSize); err != nil {
		if errors.Is(err, os.ErrClosed) || errors.Is(err, ErrDiskHangs) {
			return err
		}
		// A file that got shorter, or a disk that can't be read there.
		return errors.Join(err, f.blob.corrupt())
	}
	if !s.ok(i, b) {
		return f.blob.corrupt()
	}
	if size := int64(len(b)); size > 0 && size == f.blob.size && !f.blob.foreign {
		f.blob.store.hot.Add(f.blob.digest, bytes.Clone(b))
	}
	return nil
}

// keptBytes reads a kept blob that is in memory.
type keptBytes []byte

func (m keptBytes) size() int64 { return int64(len(m)) }
func (m keptBytes) close()      {}

func (m keptBytes) readAt(_ context.Context, p []byte, off int64) (int, error) {
	if off >= int64(len(m)) {
		return 0, io.EOF
	}
	return copy(p, m[off:]), nil
}

// follower reads a transfer. What isn't const of it is guarded by the transfer's
// mutex.
type follower struct {
	t        *Transfer
	at       int64 // up to where it has read
	closed   bool
	detached bool
	raw      bool // see [Store.Follow]
	round    int
}

var (
	errRestarted = errors.New("the transfer began again: what came first was wrong")
	errDetached  = errors.New("the reader has left the transfer")
)

func (a *follower) size() int64 {
	a.t.mu.Lock()
	defer a.t.mu.Unlock()
	return a.t.size
}

func (a *follower) readAt(ctx context.Context, p []byte, off int64) (int, error) {
	t := a.t
	t.mu.Lock()
	if a.at != off {
		a.at = off
		t.freed()
	}
	visible := t.visible(a)
	if off >= visible && t.state == arriving {
		defer t.wakeWith(ctx)()
	}
	for off >= visible && t.state == arriving && a.refused() == nil && ctx.Err() == nil {
		t.waiting++
		t.told = t.arrived
		t.change.Wait()
		t.waiting--
		visible = t.visible(a)
	}
	state, err, refused := t.state, t.err, a.refused()
	if refused == nil && !a.raw && off < visible && state == arriving {
		t.given = true
	}
	t.mu.Unlock()
	switch {
	case refused != nil:
		return 0, refused
	case off < visible:
	case state == kept:
		return 0, io.EOF
	case state == failed:
		return 0, err
	default:
		return 0, ctx.Err()
	}
	n, err := arrivedAt{t}.ReadAt(p[:min(int64(len(p)), visible-off)], off)
	switch {
	case n > 0:
		err = nil
	case errors.Is(err, io.EOF):
		err = errRestarted // cut just now
	case errors.Is(err, ErrDiskHangs):
		err = &writeError{err}
	}
	return n, err
}

// refused says why the reader gets nothing more of the transfer. The caller holds
// t.mu.
func (a *follower) refused() error {
	switch {
	case a.closed:
		return os.ErrClosed
	case a.detached:
		return errDetached
	case a.raw && a.round != a.t.round:
		return errRestarted
	}
	return nil
}

func (a *follower) close() {
	t := a.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if a.closed {
		return
	}
	a.closed = true
	delete(t.readers, a)
	switch {
	case len(t.readers) > 0:
	case t.state != arriving:
		t.clear()
	case t.unkept:
		t.cancel(ErrDiskHangs)
	default:
		t.lingers()
	}
	t.freed()
	t.unrefFile()
}

// Detach has the reader go on by itself, from its own source, while the transfer
// goes on for others.
func (r *Reader) Detach() {
	r.arriving.t.mu.Lock()
	defer r.arriving.t.mu.Unlock()
	r.arriving.detached = true
	r.arriving.t.change.Broadcast()
}

// Whole says that all of the blob is wanted, so that the transfer asks for no pieces of it, as it does for clients
// who ask for ranges.
func (r *Reader) Whole() {
	t := r.arriving.t
	t.mu.Lock()
	p := t.part
	t.mu.Unlock()
	if p != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.piece = 0
	}
}

// AddSource adds a source to the transfer, for when those that it has break off.
func (r *Reader) AddSource(more Source) {
	t := r.arriving.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.sources) < maxSources {
		t.sources = append(t.sources, more)
	}
}

// Arrived is how many bytes of the transfer are there by now.
func (r *Reader) Arrived() int64 {
	r.arriving.t.mu.Lock()
	defer r.arriving.t.mu.Unlock()
	return r.arriving.t.arrived
}

// Verified says that the transfer has ended, and that the bytes are the digest's.
func (r *Reader) Verified() bool {
	r.arriving.t.mu.Lock()
	defer r.arriving.t.mu.Unlock()
	return r.arriving.t.state == kept
}

// WaitReadable waits until nothing of the transfer is held back but the last byte. The
// size stays what it is from then on. The error is the transfer's, when it has
// failed, or ctx's.
func (r *Reader) WaitReadable(ctx context.Context) error {
	t := r.arriving.t
	defer t.wakeWith(ctx)()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.holding() && ctx.Err() == nil {
		t.change.Wait()
	}
	switch {
	case t.state == failed:
		return t.err
	case t.state == arriving && ctx.Err() == nil && t.fromPeer():
		t.given = true // the size
	}
	return ctx.Err()
}

// Ended waits until the transfer has ended. The error is the transfer's, when it
// has failed, or ctx's.
func (r *Reader) Ended(ctx context.Context) error {
	t := r.arriving.t
	defer t.wakeWith(ctx)()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.state == arriving && ctx.Err() == nil {
		t.change.Wait()
	}
	if t.state == arriving {
		return ctx.Err()
	}
	return t.err
}

// arrivedAt reads what has arrived of a transfer: from memory, or from the file.
type arrivedAt struct{ *Transfer }

func (t arrivedAt) ReadAt(p []byte, off int64) (int, error) {
	if n := t.readAt(p, off); n > 0 {
		return n, nil
	}
	t.mu.Lock()
	stored := t.stored
	t.mu.Unlock()
	// What follows is in memory alone. In the file there may be zeros in its place, where something
	// beyond it has come before.
	if p = p[:max(0, min(int64(len(p)), stored-off))]; len(p) == 0 {
		return 0, io.EOF
	}
	return t.store.reading.readAt(t.file, p, off)
}

// visible is how many bytes a reader may have. The caller holds t.mu.
func (t *Transfer) visible(r *follower) int64 {
	switch {
	case t.state == kept:
		return t.arrived
	case !r.raw && (t.holding() || t.state == failed && t.unverified != nil && !t.given):
		return 0
	}
	return max(t.arrived-1, 0)
}

// holding says whether bytes are held back. The caller holds t.mu.
func (t *Transfer) holding() bool {
	return t.state == arriving && time.Now().Before(t.until)
}
