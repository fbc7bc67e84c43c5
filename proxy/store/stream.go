// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

// stream reads a blob that isn't kept, from its beginning to its end: it gives the
// last byte only when the digest is right, and goes on at another source when one
// breaks off.
type stream struct {
	digest   digest.Digest
	hash     hash.Hash
	length   int64 // -1 if not known
	ctx      context.Context
	more     Source
	body     io.ReadCloser
	read     int64 // bytes hashed
	given    int64
	failures int

	buf   [32 << 10]byte
	ready []byte // of buf: what may be given away
	last  byte   // the byte held back
	held  bool
	err   error
}

// NewStream returns a reader of the blob of size bytes (-1 if not known) that body
// gives, and that isn't kept. more, which may be nil, opens it again when it breaks
// off.
func NewStream(ctx context.Context, d digest.Digest, size int64, body io.ReadCloser, more Source) *Reader {
	return &Reader{digest: d, ctx: ctx, from: newStream(ctx, d, size, body, more)}
}

func newStream(ctx context.Context, d digest.Digest, size int64, body io.ReadCloser, more Source) *stream {
	return &stream{digest: d, hash: d.Algorithm().Hash(), length: size, ctx: ctx, more: more, body: body}
}

func (s *stream) size() int64 { return s.length }
func (s *stream) close()      { s.body.Close() }

// readAt reads what comes at off, which has to be what comes next, or later. The error wraps [ErrCorrupt]
// when the bytes are not the digest's.
func (s *stream) readAt(_ context.Context, p []byte, off int64) (int, error) {
	if off < s.given {
		return 0, errors.New("seek back in a blob that is being streamed")
	}
	if err := s.skip(off); err != nil {
		return 0, err
	}
	for len(s.ready) == 0 && s.err == nil {
		s.fill()
	}
	n := copy(p, s.ready)
	s.ready = s.ready[n:]
	s.given += int64(n)
	if n == 0 {
		return 0, s.err
	}
	return n, nil
}

// skip reads up to an offset.
func (s *stream) skip(off int64) error {
	if s.given == off {
		return nil
	}
	buf := make([]byte, 32<<10)
	for s.given < off {
		if _, err := s.readAt(s.ctx, buf[:min(int64(len(buf)), off-s.given)], s.given); err != nil {
			return err
		}
	}
	return nil
}

// fill reads what comes next. The byte that was held back goes before it.
func (s *stream) fill() {
	end := 0
	if s.held {
		s.buf[0], end = s.last, 1
	}
	n, err := s.body.Read(s.buf[end:])
	_, _ = s.hash.Write(s.buf[end : end+n])
	s.read += int64(n)
	end += n
	switch {
	case s.length >= 0 && s.read > s.length:
		s.err = fmt.Errorf("%s: more than the announced %d bytes: %w", s.digest, s.length, ErrCorrupt)
		return
	case s.read == s.length, s.length < 0 && err == io.EOF:
		if digest.NewDigest(s.digest.Algorithm(), s.hash) != s.digest {
			s.err = fmt.Errorf("%s: what was sent has another digest: %w", s.digest, ErrCorrupt)
			return
		}
		s.ready, s.err = s.buf[:end], io.EOF
		return
	case err != nil:
		s.reopen(n, err)
	}
	if end > 0 {
		s.ready, s.last, s.held = s.buf[:end-1], s.buf[end-1], true
	}
}

func (s *stream) reopen(n int, cause error) {
	if n > 0 {
		s.failures = 0
	}
	s.body.Close()
	if s.failures++; s.more == nil || s.failures > attempts {
		if errors.Is(cause, io.EOF) {
			cause = io.ErrUnexpectedEOF
		}
		s.err = fmt.Errorf("%s broke off after %d bytes: %w", s.digest, s.read, cause)
		return
	}
	body, err := s.more(s.ctx, s.read)
	if err != nil {
		s.body, s.err = io.NopCloser(nil), fmt.Errorf("%s broke off after %d bytes: %w", s.digest, s.read, err)
		return
	}
	s.body = body
}
