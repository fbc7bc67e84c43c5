// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"hash"
	"os"
	"sync"
	"sync/atomic"
)

const (
	// windowSize is how many bytes of one blob on its way in are in memory.
	windowSize = 4 << 20
	// windowsSize bounds those of all blobs on their way in. Beyond it each has
	// one piece: what is not written yet can't be elsewhere.
	windowsSize = 32 << 20
	// nearSize is how many bytes that are in the file stay in memory for those who
	// haven't read them.
	nearSize = 1 << 20
	// batchSize is how many bytes of a transfer are hashed and written at a time:
	// waking a goroutine for less takes longer than its work.
	batchSize = 256 << 10
)

// piece is a chunk of a blob on its way in.
type piece struct {
	bytes [chunkSize]byte
	refs  int // of the window, and of those who work with it outside of its mutex
}

// pieces lends pieces, and counts them.
type pieces struct {
	pool sync.Pool
	lent atomic.Int64
}

func (ps *pieces) get() *piece {
	ps.lent.Add(1)
	p, ok := ps.pool.Get().(*piece)
	if !ok {
		p = new(piece)
	}
	p.refs = 1
	return p
}

func (ps *pieces) put(p *piece) {
	ps.lent.Add(-1)
	ps.pool.Put(p)
}

// window is what is in memory of a blob on its way into a file. Its source
// appends; one goroutine hashes and another writes, each at its own pace; and
// whoever reads near the end reads from it. Bytes leave it when they are hashed
// and in the file, and, if there is no more room, before they were read.
//
// When the disk hangs the window goes on without the file: then bytes leave it
// when they are hashed and were read.
type window struct {
	pieces *pieces

	mu      sync.Mutex
	change  sync.Cond // of what readers wait for
	toHash  sync.Cond // of what the one who hashes waits for
	toWrite sync.Cond // of what the writer waits for
	space   sync.Cond // of what the source waits for
	file    *os.File  // set before anything is appended
	base    int64     // where held begins
	held    []*piece
	arrived int64
	hashed  int64
	stored  int64 // in the file
	starved bool  // the source waits for space
	ended   bool  // no more is appended
	quit    bool  // nothing more is to be hashed
	unkept  bool  // nothing more is to be written, as the disk hangs
	writing bool  // the writer is there
	err     error // of the writer
	batch   int64 // bytes that are hashed and written at a time, if nothing waits for them
	// passed says up to where all have read. It is called with mu held.
	passed func() int64
}

func (w *window) init(s *Store, batch int64, passed func() int64) {
	w.pieces, w.batch, w.passed = &s.pieces, batch, passed
	w.change.L, w.toHash.L, w.toWrite.L, w.space.L = &w.mu, &w.mu, &w.mu, &w.mu
}

// start begins a blob, with a goroutine that hashes with sum and h, and one that
// writes by write. hashed is closed when all is hashed. left is called when the
// writer has gone, which may be late, with mu held.
func (w *window) start(sum *sums, h hash.Hash, write func(p []byte, off int64) error, left func()) (hashed <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clear()
	w.base, w.arrived, w.hashed, w.stored = 0, 0, 0, 0
	w.ended, w.quit, w.writing = false, false, true
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.mu.Lock()
		defer w.mu.Unlock()
		for !w.quit {
			if n, p := w.next(w.hashed); n > 0 {
				b := p.bytes[:n]
				w.mu.Unlock()
				_, _ = sum.Write(b)
				_, _ = h.Write(b)
				w.mu.Lock()
				w.hashed += n
				w.done()
				continue
			}
			if w.ended {
				return
			}
			w.wait(&w.toHash, w.hashed)
		}
	}()
	go func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for w.err == nil && !w.unkept {
			if n, p := w.next(w.stored); n > 0 {
				p.refs++
				at := w.stored
				w.mu.Unlock()
				err := write(p.bytes[:n], at)
				w.mu.Lock()
				w.unref(p)
				switch {
				case w.unkept:
				case errors.Is(err, ErrDiskHangs):
					w.unkept = true
					w.wake()
				case err != nil:
					w.err = err
					w.wake()
				default:
					w.stored += n
					w.done()
				}
				continue
			}
			if w.ended {
				break
			}
			w.wait(&w.toWrite, w.stored)
		}
		w.writing = false
		w.freed()
		w.change.Broadcast()
		left()
	}()
	return done
}

// next returns the piece at off, which is to be hashed or written, and how many
// bytes of it: none before it is whole, or the last. The caller holds w.mu.
func (w *window) next(off int64) (int64, *piece) {
	n := min(chunkSize, w.arrived-off)
	if n == 0 || n < chunkSize && !w.ended {
		return 0, nil
	}
	return n, w.held[(off-w.base)/chunkSize]
}

// wait waits by c until there is something to do for who has come to off. The
// caller holds w.mu.
func (w *window) wait(c *sync.Cond, off int64) {
	writer := c == &w.toWrite
	for !w.ended && !w.quit && (!writer || !w.unkept && w.err == nil) {
		if n := w.arrived - off; n >= w.batch || w.starved && n >= chunkSize {
			return
		}
		c.Wait()
	}
}

// resume wakes those who hash and write. The caller holds w.mu.
func (w *window) resume() {
	w.toHash.Signal()
	w.toWrite.Signal()
}

// done lets go of what was hashed and written. The caller holds w.mu.
func (w *window) done() {
	w.trim(false)
	w.freed()
}

// freed lets the source look again whether there is space. The caller holds w.mu.
func (w *window) freed() {
	if w.starved {
		w.space.Signal()
	}
}

// trim lets go of pieces that are done with; with force also of one that wasn't
// read by all yet. It says whether there were any. The caller holds w.mu.
func (w *window) trim(force bool) bool {
	passed, n := int64(-1), 0
	for _, p := range w.held {
		end := w.base + chunkSize
		if end > w.hashed || end > w.stored && !w.unkept {
			break
		}
		if passed < 0 {
			passed = w.passed()
		}
		if end > passed {
			if !force || w.unkept {
				break
			}
			force = false
		}
		w.unref(p)
		w.base = end
		n++
	}
	w.held = append(w.held[:0], w.held[n:]...)
	return n > 0
}

// unref gives up a reference to a piece. The caller holds w.mu.
func (w *window) unref(p *piece) {
	if p.refs--; p.refs == 0 {
		w.pieces.put(p)
	}
}

// clear lets go of all pieces. The caller holds w.mu.
func (w *window) clear() {
	for _, p := range w.held {
		w.unref(p)
	}
	w.base, w.held = w.base+int64(len(w.held))*chunkSize, nil
}

// place returns where the next bytes go, and waits until there is space, or stop
// says why it mustn't. Only the source calls it. The caller holds w.mu.
func (w *window) place(stop func() error) ([]byte, error) {
	for {
		if err := stop(); err != nil {
			return nil, err
		}
		if i := (w.arrived - w.base) / chunkSize; i < int64(len(w.held)) {
			return w.held[i].bytes[w.arrived%chunkSize:], nil
		}
		full := func() bool {
			return len(w.held) > 0 && (len(w.held) >= windowSize/chunkSize || w.pieces.lent.Load() >= windowsSize/chunkSize)
		}
		w.trim(false)
		for (full() || min(w.hashed, w.stored)-w.base > nearSize) && w.trim(true) {
		}
		if !full() {
			w.starved = false
			if len(w.held) == 0 {
				w.base = w.arrived
			}
			w.held = append(w.held, w.pieces.get())
			continue
		}
		w.starved = true
		w.resume()
		w.space.Wait()
	}
}

// append says that n bytes were put where place said. The caller holds w.mu.
func (w *window) append(n int64) {
	w.arrived += n
	if w.arrived-w.hashed >= w.batch {
		w.toHash.Signal()
	}
	if w.arrived-w.stored >= w.batch {
		w.toWrite.Signal()
	}
}

// end says that no more is appended, and waits until all is written, or can't
// be; hashed is what start returned. With give up nothing more is hashed.
func (w *window) end(giveUp bool, hashed <-chan struct{}) {
	w.mu.Lock()
	w.ended, w.quit = true, giveUp
	w.resume()
	for w.writing && !w.unkept {
		w.change.Wait()
	}
	w.mu.Unlock()
	<-hashed
}

// readAt reads what is at off, which must have arrived, if it is in memory. Else
// it returns 0.
func (w *window) readAt(b []byte, off int64) int {
	w.mu.Lock()
	if off < w.base || off >= w.base+int64(len(w.held))*chunkSize {
		w.mu.Unlock()
		return 0
	}
	p := w.held[(off-w.base)/chunkSize]
	n := min(int64(len(b)), chunkSize-off%chunkSize)
	p.refs++
	w.mu.Unlock()
	copy(b[:n], p.bytes[off%chunkSize:])
	w.mu.Lock()
	w.unref(p)
	w.mu.Unlock()
	return int(n)
}

// wake wakes all who wait. The caller holds w.mu.
func (w *window) wake() {
	w.change.Broadcast()
	w.resume()
	w.space.Signal()
}
