// SPDX-License-Identifier: Apache-2.0

// Package store keeps blobs in files named by their digest, and never hands
// out a wrong byte.
//
// A blob comes in through a [Transfer]: one writer takes it from a source and
// hashes it, and all clients that want it read from the same file while it
// grows. The last byte is visible only once the digest is verified, so no client
// can take a forged blob for a whole one.
//
// A blob that is kept has a file of checksums beside it, one CRC-32C for each
// 64 KiB. Each read is checked against them, which costs next to nothing, and
// so a damaged file is noticed at the damaged place before a byte of it has
// left. That is also what makes the store safe against crashes without a
// single fsync: whatever a power cut leaves behind, it either matches its
// checksums or is not served.
//
// Content stores of others (containerd's) are read in place. Their files have
// no checksums of ours, so such a blob is hashed as a whole when it is first
// read, and its checksums are remembered for as long as the file is the same.
//
// The layout below the store's directory:
//
//	blobs/ALGORITHM/HEX   the bytes (as in an OCI image layout)
//	sums/ALGORITHM/HEX    their checksums; may be lost without harm
//	ingest/               running transfers, and what is left of those that failed,
//	                      each with a record of what is there (NAME.partial); all else is
//	                      removed when the store is opened
//	lock                  held by the process that has the store open
package store

import (
	"container/list"
	"context"
	_ "crypto/sha256" // digest algorithms of the OCI image specification
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
)

var (
	// ErrNotFound says that the store has no such blob.
	ErrNotFound = errors.New("blob not in the store")
	// ErrCorrupt says that a blob's bytes are not those of its digest. The
	// store has dropped the blob when a caller sees this error.
	ErrCorrupt = errors.New("blob is damaged")
	// ErrShort says that a [Source] has no more of a blob, though there was to be:
	// it isn't asked again.
	ErrShort = errors.New("blob is shorter than was announced")
	// ErrNoSpace says that a blob can't be kept: it is larger than the store,
	// or the disk has no room. It can still be streamed, see [NewStream].
	ErrNoSpace = errors.New("no room to keep the blob")
	// ErrLocked says that another process has the store open.
	ErrLocked = errors.New("the store is in use by another process")
)

// Options of a store.
type Options struct {
	// MaxBytes bounds the bytes of all blobs; the least recently used make
	// room. Zero means no bound but the disk's.
	MaxBytes int64
	// MinFree is how many bytes of the file system the store leaves to
	// others: it evicts, and then stops keeping, rather than go below.
	MinFree int64
	// Changed, if it isn't nil, is told of each blob that can be had from now on, as it
	// is kept, or others have it, and of each that can't any more. It must not block,
	// nor call the store.
	Changed func(d digest.Digest, here bool)
	// Log gets what an operator should know, such as a damaged blob. Nil
	// means slog.Default().
	Log *slog.Logger
}

// Store is a directory of blobs. Its methods may be called concurrently.
type Store struct {
	dir  string
	opts Options
	log  *slog.Logger
	lock *os.File

	ctx    context.Context // ends the transfers
	cancel context.CancelFunc
	wg     sync.WaitGroup

	verifying singleflight.Group
	memo      *lru.Cache[fileID, *sums]         // checksums of files that have none beside them
	small     *lru.Cache[fileID, *sums]         // of small blobs, which are read again and again
	hot       *lru.Cache[digest.Digest, []byte] // kept blobs of one chunk, whole and verified

	looking sync.Mutex // at what others have

	disk    *disk // that is written to
	reading *disk // the same, that is read from: a frozen file system can be read
	pieces  pieces
	// gathered is how many bytes of ranges are in memory that are to be written.
	gathered atomic.Int64

	mu      sync.Mutex
	stats   Stats
	index   map[digest.Digest]*list.Element // of *entry
	recent  *list.List                      // most recently used first
	running map[running]*Transfer
	foreign []*foreign    // never changed in place
	look    chan struct{} // receives when there is another one of foreign
	// partials are those that no transfer has, and idle is the same, the oldest first.
	partials map[running]*partial
	idle     *list.List
	accounts
}

// running names a running transfer: that of a blob from one repository.
type running struct {
	digest digest.Digest
	name   string
}

type entry struct {
	digest  digest.Digest
	size    int64
	touched time.Time // what the file's mtime says
	owner   string
	twice   bool          // others have it as well, and it is read there when it is evicted
	own     *list.Element // of the owner's blobs; nil for one without a name
}

// Stats are a store's figures.
type Stats struct {
	Blobs    int   `json:"blobs"`     // kept
	Bytes    int64 `json:"bytes"`     // of kept blobs, and reserved for running transfers
	MaxBytes int64 `json:"max_bytes"` // as configured; 0 is no bound
	Running  int   `json:"running"`   // transfers
	// Partial is how many of Bytes are of blobs of which only a part has come.
	Partial int64 `json:"partial_bytes"`
	// Duplicate is how many of Bytes are in content stores of others as well.
	Duplicate int64 `json:"duplicate_bytes"`
	Evicted   int64 `json:"evicted"`  // blobs, since the store was opened
	Corrupt   int64 `json:"corrupt"`  // blobs found damaged, since the store was opened
	NotKept   int64 `json:"not_kept"` // blobs there was no room for, since the store was opened
	// Hangs is since when the disk does not answer. Until it does, blobs are
	// served and pushed through without being kept.
	Hangs time.Time `json:"hangs,omitzero"`
}

// Open opens the store in dir and makes it if it isn't there. What an earlier
// process left unfinished is found again, or removed. The error is [ErrLocked] while another
// process has it open.
func Open(dir string, opts Options) (*Store, error) {
	s := &Store{
		dir:      dir,
		opts:     opts,
		log:      opts.Log,
		index:    make(map[digest.Digest]*list.Element),
		recent:   list.New(),
		running:  make(map[running]*Transfer),
		look:     make(chan struct{}, 1),
		partials: make(map[running]*partial),
		idle:     list.New(),
		accounts: accounts{owners: make(map[string]*owned), waiting: list.New()},
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.stats.MaxBytes = opts.MaxBytes
	s.disk = newDisk(dir, "blobs are served and pushed through without being kept", s.log, s.probe)
	s.reading = newReading(dir, s.log)
	var err error
	for _, cache := range []**lru.Cache[fileID, *sums]{&s.memo, &s.small} {
		if *cache, err = lru.New[fileID, *sums](4096); err != nil {
			return nil, err
		}
	}
	if s.hot, err = lru.New[digest.Digest, []byte](maxHot); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the store's directory: %w", err)
	}
	if s.lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("opening the store's lock: %w", err)
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		s.lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", dir, ErrLocked)
		}
		return nil, fmt.Errorf("locking the store %s: %w", dir, err)
	}
	if err := s.load(); err != nil {
		s.lock.Close()
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(s.followForeign)
	return s, nil
}

// load reads what is there and removes what is half done.
func (s *Store) load() error {
	for _, d := range []string{"ingest", "blobs", "sums"} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return fmt.Errorf("making the store's directories: %w", err)
		}
	}
	var found []*entry
	algorithms, err := os.ReadDir(s.path("blobs"))
	if err != nil {
		return fmt.Errorf("reading the store: %w", err)
	}
	for _, alg := range algorithms {
		names, err := os.ReadDir(s.path("blobs", alg.Name()))
		if err != nil {
			return fmt.Errorf("reading the store: %w", err)
		}
		for _, n := range names {
			d := digest.NewDigestFromEncoded(digest.Algorithm(alg.Name()), n.Name())
			info, err := n.Info()
			if err != nil || d.Validate() != nil || !info.Mode().IsRegular() {
				continue // not ours: left alone
			}
			found = append(found, &entry{digest: d, size: info.Size(), touched: info.ModTime()})
		}
	}
	slices.SortFunc(found, func(a, b *entry) int { return b.touched.Compare(a.touched) })
	for _, e := range found {
		s.index[e.digest] = s.recent.PushBack(e)
		s.stats.Bytes += e.size
		s.own("", e.size)
	}
	for _, alg := range algorithms {
		names, _ := os.ReadDir(s.path("sums", alg.Name()))
		for _, n := range names {
			if _, ok := s.index[digest.NewDigestFromEncoded(digest.Algorithm(alg.Name()), n.Name())]; !ok {
				os.Remove(s.path("sums", alg.Name(), n.Name())) // of a blob that is gone
			}
		}
	}
	if err := s.loadPartials(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.makeRoom("", 0)
	return nil
}

// Close ends running transfers, waits for them, and gives the store up. Blobs
// that are open stay readable.
func (s *Store) Close() error {
	s.cancel()
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.partials {
		if p.unsaved() > 0 {
			_ = s.disk.do(func() error { return p.save() }, nil)
		}
	}
	s.disk.close()
	s.reading.close()
	for _, f := range s.foreign {
		f.close()
	}
	return s.lock.Close()
}

// Stats returns the store's figures.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Blobs, st.Running = len(s.index), len(s.running)
	for _, d := range []*disk{s.disk, s.reading} {
		if since := d.hangs(); st.Hangs.IsZero() || !since.IsZero() && since.Before(st.Hangs) {
			st.Hangs = since
		}
	}
	return st
}

// probe does what keeping a blob needs of the disk.
func (s *Store) probe() error {
	f, err := os.CreateTemp(s.path("ingest"), "probe.")
	if err != nil {
		return err
	}
	_, err = f.Write([]byte{0})
	return errors.Join(err, f.Close(), os.Rename(f.Name(), s.path("ingest", "probe")), os.Remove(s.path("ingest", "probe")))
}

// Get opens a blob. The error is [ErrNotFound] when it isn't there. The caller
// closes the blob.
func (s *Store) Get(d digest.Digest) (*Blob, error) {
	s.mu.Lock()
	el, kept := s.index[d]
	var touch bool
	var hot []byte
	if kept {
		hot, _ = s.hot.Get(d)
		s.used(el)
		// The order has to survive a restart only roughly, so a busy blob's
		// inode isn't written each time.
		if e := el.Value.(*entry); time.Since(e.touched) > time.Minute {
			e.touched, touch = time.Now(), true
		}
	}
	foreign := s.foreign
	s.mu.Unlock()

	if kept {
		if touch {
			s.disk.aside(func() { _ = os.Chtimes(s.blobPath(d), time.Time{}, time.Now()) })
		}
		if hot != nil {
			return &Blob{store: s, digest: d, size: int64(len(hot)), bytes: hot}, nil
		}
		b, err := s.open(s.reading, d, s.blobPath(d), el.Value.(*entry).size)
		if err == nil {
			return b, nil
		}
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrCorrupt):
			s.drop(d, err)
		case !errors.Is(err, ErrDiskHangs):
			s.log.Warn("a kept blob can't be opened", "digest", d, "err", err)
		}
	} else if err := d.Validate(); err != nil { // it may be a path that leads elsewhere
		return nil, fmt.Errorf("%q: %w", d, err)
	}
	for _, f := range foreign {
		b, err := s.open(f.disk, d, filepath.Join(f.dir, d.Algorithm().String(), d.Encoded()), -1)
		if err == nil {
			b.foreign = true
			return b, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", d, ErrNotFound)
}

// Has says whether Get would find the blob, without opening it.
func (s *Store) Has(d digest.Digest) bool {
	b, err := s.Get(d)
	if err != nil {
		return false
	}
	b.Close()
	return true
}

// Digests returns the digests of what can be had, as far as is known. Some may be
// there twice.
func (s *Store) Digests() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := slices.Collect(maps.Keys(s.index))
	for _, f := range s.foreign {
		all = slices.AppendSeq(all, maps.Keys(f.has))
	}
	return all
}

// kept says whether a blob is among the store's own.
func (s *Store) kept(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.index[d]
	return ok
}

// used says that a blob is the most recently used one. The caller holds s.mu.
func (s *Store) used(el *list.Element) {
	s.recent.MoveToFront(el)
	if e := el.Value.(*entry); e.own != nil {
		s.owners[e.owner].blobs.MoveToFront(e.own)
	}
}

func (s *Store) changed(d digest.Digest, here bool) {
	if s.opts.Changed != nil {
		s.opts.Changed(d, here)
	}
}

// drop forgets a kept blob and removes its files; those who read it read on.
func (s *Store) drop(d digest.Digest, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	el, ok := s.index[d]
	if !ok {
		return
	}
	s.remove(el)
	if errors.Is(why, ErrCorrupt) {
		s.stats.Corrupt++
	}
	s.log.Warn("dropped a blob from the store; it will be fetched again", "digest", d, "err", why)
}

// evict removes a blob to make room. The caller holds s.mu.
func (s *Store) evict(el *list.Element) {
	s.remove(el)
	s.stats.Evicted++
}

// remove takes a blob out. The caller holds s.mu.
func (s *Store) remove(el *list.Element) {
	e := el.Value.(*entry)
	if !e.twice {
		s.changed(e.digest, false)
	}
	s.forget(el)
	if err := s.disk.remove(s.blobPath(e.digest), s.sumsPath(e.digest)); err != nil {
		s.log.Warn("can't remove a blob's file", "err", err)
	}
}

// forget takes a blob out of the books. The caller holds s.mu.
func (s *Store) forget(el *list.Element) {
	e := el.Value.(*entry)
	s.recent.Remove(el)
	delete(s.index, e.digest)
	s.hot.Remove(e.digest)
	s.stats.Bytes -= e.size
	s.twice(e, false)
	s.disown(e)
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func (s *Store) blobPath(d digest.Digest) string {
	return s.path("blobs", d.Algorithm().String(), d.Encoded())
}

func (s *Store) sumsPath(d digest.Digest) string {
	return s.path("sums", d.Algorithm().String(), d.Encoded())
}

// ParseSize reads a size such as 20GiB, 500MB or a number of bytes.
func ParseSize(text string) (int64, error) {
	units := []struct {
		suffix string
		factor int64
	}{
		{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
		{"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1}, {"", 1},
	}
	for _, u := range units {
		num, ok := strings.CutSuffix(text, u.suffix)
		if !ok {
			continue
		}
		var n int64
		if _, err := fmt.Sscanf(num, "%d", &n); err != nil || n < 0 || fmt.Sprint(n) != num || n > (1<<62)/u.factor {
			break
		}
		return n * u.factor, nil
	}
	return 0, fmt.Errorf("%q is not a size: write a whole number and a unit, such as 20GiB", text)
}
