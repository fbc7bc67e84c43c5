// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// smallBlob is a blob whose file of checksums takes as long to read as itself.
const smallBlob = 1 << 20

// maxHot is how many blobs of one chunk are in memory at most: 16 MiB of them.
// Clients ask again and again for manifests and configurations, each of which would be
// opened, read, checked and closed.
const maxHot = 256

// fileID tells whether a file is still the same one.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// Blob is an open blob. It may be read by several goroutines, each with a
// reader of its own, and stays readable when the store evicts it.
type Blob struct {
	store   *Store
	disk    *disk // that the file is read from
	digest  digest.Digest
	file    *os.File
	size    int64
	id      fileID
	foreign bool
	bytes   []byte // all of it, if it is in memory; then there is no file

	once   sync.Once
	sums   *sums
	sumErr error
}

// open opens a blob's file. size is what the file must have, or -1. The error
// is [ErrCorrupt] when it has another.
func (s *Store) open(from *disk, d digest.Digest, path string, size int64) (*Blob, error) {
	return on(from, func() (*Blob, error) { return s.openFile(from, d, path, size) }, func(b *Blob) { b.Close() })
}

func (s *Store) openFile(from *disk, d digest.Digest, path string, size int64) (*Blob, error) {
	// O_NONBLOCK: in a directory that isn't the store's it might be a FIFO.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		f.Close()
		return nil, fs.ErrNotExist
	}
	if size >= 0 && st.Size != size {
		f.Close()
		return nil, fmt.Errorf("%s has %d bytes instead of %d: %w", d, st.Size, size, ErrCorrupt)
	}
	return &Blob{store: s, disk: from, digest: d, file: f, size: st.Size,
		id: fileID{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}}, nil
}

// Size is the blob's length in bytes.
func (b *Blob) Size() int64 { return b.size }

// Foreign says that the blob is in a content store that isn't weir's.
func (b *Blob) Foreign() bool { return b.foreign }

// Close closes the file; readers of the blob fail from then on.
func (b *Blob) Close() error {
	if b.bytes != nil {
		return nil
	}
	return b.file.Close()
}

// Reader returns a reader at the blob's beginning.
func (b *Blob) Reader() *Reader {
	r := &Reader{store: b.store, digest: b.digest, ctx: context.Background(), from: keptBytes(b.bytes)}
	if b.bytes == nil {
		r.from = &keptFile{blob: b, chunk: -1}
	}
	return r
}

// checksums returns what the blob is checked against, and makes it by hashing
// the whole blob when it isn't there.
func (b *Blob) checksums() (*sums, error) {
	b.once.Do(func() {
		if !b.foreign {
			if s, ok := b.store.small.Get(b.id); ok {
				b.sums = s
				return
			}
			if raw, err := on(b.disk, func() ([]byte, error) { return os.ReadFile(b.store.sumsPath(b.digest)) }, nil); err == nil {
				if s, err := parseSums(raw); err == nil && s.size == b.size {
					if b.size <= smallBlob {
						b.store.small.Add(b.id, s)
					}
					b.sums = s
					return
				}
			}
		}
		if s, ok := b.store.memo.Get(b.id); ok {
			b.sums = s
			return
		}
		v, err, _ := b.store.verifying.Do(b.digest.String()+b.file.Name(), func() (any, error) { return b.verify() })
		if err != nil {
			b.sumErr = err
			return
		}
		b.sums = v.(*sums)
	})
	return b.sums, b.sumErr
}

func (b *Blob) verify() (*sums, error) {
	s, v := new(sums), b.digest.Verifier()
	if _, err := io.Copy(io.MultiWriter(s, v), io.NewSectionReader(fileAt{b.disk, b.file}, 0, b.size)); err != nil {
		return nil, fmt.Errorf("reading %s: %w", b.digest, err)
	}
	if s.size != b.size || !v.Verified() {
		return nil, b.corrupt()
	}
	b.store.memo.Add(b.id, s)
	if !b.foreign && b.store.kept(b.digest) {
		if err := b.store.disk.do(func() error { return s.save(b.store.sumsPath(b.digest), b.store.path("ingest")) }, nil); err != nil {
			b.store.log.Warn("checksums not kept", "digest", b.digest, "err", err)
		}
	}
	return s, nil
}

func (b *Blob) corrupt() error {
	err := fmt.Errorf("%s in %s: %w", b.digest, b.file.Name(), ErrCorrupt)
	if b.foreign {
		b.store.log.Warn("a blob in another content store is damaged; it is not served", "digest", b.digest, "err", err)
	} else {
		b.store.drop(b.digest, err)
	}
	return err
}
