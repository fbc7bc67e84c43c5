// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrDiskHangs says that the disk has not answered in time. Until it answers
// again nothing is asked of it.
var ErrDiskHangs = errors.New("the disk does not answer")

// diskTimeout is how long one operation on a disk may take before the disk
// counts as hanging.
const diskTimeout = time.Second

// disk bounds the time that operations on a disk are waited for. The system call
// of one that hangs can't be ended; so it runs in a goroutine of its own, which
// is left behind. No other operation is begun before all that were left behind
// have returned, and a probe was answered in time: a disk that hangs holds no
// more goroutines than had an operation running when it began to hang.
type disk struct {
	dir   string
	what  string       // what is not done while it hangs, for the log
	probe func() error // an operation; its error doesn't matter
	log   *slog.Logger
	// For tests:
	timeout time.Duration
	hold    func() // called before each operation, if not nil

	mu       sync.Mutex
	answers  context.Context // ends when the disk hangs
	hang     context.CancelFunc
	since    time.Time // of when it hangs, or zero
	running  int       // operations that have not returned
	probing  bool
	leftover []string // files to remove as soon as it answers
	closed   bool
}

func newDisk(dir, what string, log *slog.Logger, probe func() error) *disk {
	d := &disk{dir: dir, what: what, probe: probe, log: log, timeout: diskTimeout}
	d.answers, d.hang = context.WithCancel(context.Background())
	return d
}

// hangs returns since when the disk hangs, or zero.
func (d *disk) hangs() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.since
}

// answering returns a context that ends when the disk hangs.
func (d *disk) answering() context.Context {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.answers
}

// begin counts an operation until the function that it returns is called. The
// context ends when the disk hangs.
func (d *disk) begin() (answers context.Context, end func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.since.IsZero() {
		return nil, nil, fmt.Errorf("%s: %w", d.dir, ErrDiskHangs)
	}
	d.running++
	timer := time.AfterFunc(d.timeout, d.late)
	return d.answers, func() {
		timer.Stop()
		d.mu.Lock()
		defer d.mu.Unlock()
		d.running--
		d.look()
	}, nil
}

// late is called when an operation takes too long.
func (d *disk) late() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.since.IsZero() {
		d.since = time.Now().Add(-d.timeout)
		d.hang()
		d.log.Warn("the disk does not answer; until it does, "+d.what, "dir", d.dir)
	}
	d.look()
}

// look begins to look whether the disk answers again, once all operations have
// returned. The caller holds d.mu.
func (d *disk) look() {
	if d.since.IsZero() || d.running > 0 || d.probing || d.closed {
		return
	}
	d.probing = true
	go func() {
		for !d.answered() {
			time.Sleep(d.timeout)
		}
	}()
}

// answered probes the disk once, and says whether there is no more to be looked
// for.
func (d *disk) answered() bool {
	begun := time.Now()
	if d.hold != nil {
		d.hold()
	}
	_ = d.probe()
	for {
		d.mu.Lock()
		paths := d.leftover
		d.leftover = nil
		if len(paths) > 0 {
			d.mu.Unlock()
			_ = removeAll(paths)
			continue
		}
		defer d.mu.Unlock()
		if d.closed {
			return true
		}
		if time.Since(begun) >= d.timeout {
			return false
		}
		d.log.Info("the disk answers again", "dir", d.dir, "after", time.Since(d.since).Round(time.Second))
		d.answers, d.hang = context.WithCancel(context.Background())
		d.since, d.probing = time.Time{}, false
		return true
	}
}

// close ends looking.
func (d *disk) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
}

// on runs an operation and waits until it returns, or the disk hangs. When it
// succeeds after that, it is undone, if undo isn't nil.
func on[T any](d *disk, op func() (T, error), undo func(T)) (T, error) {
	type result struct {
		v   T
		err error
	}
	var none T
	answers, end, err := d.begin()
	if err != nil {
		return none, err
	}
	returned := make(chan result)
	go func() {
		defer end()
		if d.hold != nil {
			d.hold()
		}
		v, err := op()
		select {
		case returned <- result{v, err}:
		case <-answers.Done():
			if err == nil && undo != nil {
				undo(v)
			}
		}
	}()
	select {
	case r := <-returned:
		return r.v, r.err
	case <-answers.Done():
		return none, fmt.Errorf("%s: %w", d.dir, ErrDiskHangs)
	}
}

// do is on for an operation without a result.
func (d *disk) do(op func() error, undo func()) error {
	_, err := on(d, func() (struct{}, error) { return struct{}{}, op() }, func(struct{}) {
		if undo != nil {
			undo()
		}
	})
	return err
}

// within is do for a caller that may be left behind itself: it runs the operation
// where it is called.
func (d *disk) within(op func() error) error {
	_, end, err := d.begin()
	if err != nil {
		return err
	}
	defer end()
	if d.hold != nil {
		d.hold()
	}
	return op()
}

// aside runs an operation that nothing depends on, and doesn't wait for it.
func (d *disk) aside(op func()) {
	go func() {
		_ = d.within(func() error { op(); return nil })
	}()
}

// remove removes files: those that the disk hangs for, as soon as it answers.
func (d *disk) remove(paths ...string) error {
	err := d.do(func() error { return removeAll(paths) }, nil)
	if errors.Is(err, ErrDiskHangs) {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.since.IsZero() { // it has answered since, and has removed them
			return nil
		}
		d.leftover = append(d.leftover, paths...)
		return nil
	}
	return err
}

func removeAll(paths []string) (err error) {
	for _, p := range paths {
		if rerr := os.Remove(p); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

// readAt reads from a file as io.ReaderAt does: what the kernel has in memory at
// once, also while the disk hangs, and the rest within the disk's time.
func (d *disk) readAt(f *os.File, p []byte, off int64) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	inMemory := false
	if raw.Read(func(fd uintptr) bool {
		n, err = unix.Preadv2(int(fd), [][]byte{p}, off, unix.RWF_NOWAIT)
		// tmpfs doesn't know the flag, and has nothing that could hang.
		inMemory = errors.Is(err, unix.EOPNOTSUPP) && d.hold == nil && isTmpfs(int(fd))
		return true
	}) != nil {
		return 0, os.ErrClosed
	}
	if n = max(n, 0); n == len(p) {
		return n, nil
	}
	if inMemory {
		return f.ReadAt(p, off)
	}
	// The operation may be left behind, and p is the caller's.
	buf, err := on(d, func() ([]byte, error) {
		buf := make([]byte, len(p)-n)
		k, err := f.ReadAt(buf, off+int64(n))
		if k > 0 && errors.Is(err, io.EOF) {
			err = nil
		}
		return buf[:k], err
	}, nil)
	n += copy(p[n:], buf)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// isTmpfs says whether a file is in memory. It is asked only where reading without
// waiting isn't supported.
func isTmpfs(fd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// fileAt is a file as io.ReaderAt.
type fileAt struct {
	disk *disk
	file *os.File
}

func (f fileAt) ReadAt(p []byte, off int64) (int, error) { return f.disk.readAt(f.file, p, off) }
