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

// Stream reads a blob that isn't kept: it gives the last byte only when the
// digest is right, and goes on at another source when one breaks off.
type Stream struct {
	digest   digest.Digest
	hash     hash.Hash
	size     int64 // -1 if not known
	ctx      context.Context
	more     Source
	body     io.ReadCloser
	read     int64 // bytes hashed
	failures int

	buf   [32 << 10]byte
	ready []byte // of buf: what may be given away
	last  byte   // the byte held back
	held  bool
	err   error
}

// NewStream returns a stream of the blob of size bytes (-1 if not known) that
// body gives. more, which may be nil, opens it again when it breaks off.
func NewStream(ctx context.Context, d digest.Digest, size int64, body io.ReadCloser, more Source) *Stream {
	return &Stream{digest: d, hash: d.Algorithm().Hash(), size: size, ctx: ctx, more: more, body: body}
}

// Read implements io.Reader. The error wraps [ErrCorrupt] when the bytes are
// not the digest's.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(s.ready) == 0 && s.err == nil {
		s.fill()
	}
	n := copy(p, s.ready)
	s.ready = s.ready[n:]
	if n == 0 {
		return 0, s.err
	}
	return n, nil
}

// fill reads what comes next. The byte that was held back goes before it.
func (s *Stream) fill() {
	end := 0
	if s.held {
		s.buf[0], end = s.last, 1
	}
	n, err := s.body.Read(s.buf[end:])
	_, _ = s.hash.Write(s.buf[end : end+n])
	s.read += int64(n)
	end += n
	switch {
	case s.size >= 0 && s.read > s.size:
		s.err = fmt.Errorf("%s: more than the announced %d bytes: %w", s.digest, s.size, ErrCorrupt)
		return
	case s.read == s.size, s.size < 0 && err == io.EOF:
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

func (s *Stream) reopen(n int, cause error) {
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

// Close closes the source.
func (s *Stream) Close() error { return s.body.Close() }
