// SPDX-License-Identifier: Apache-2.0

package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
)

// chunkSize is the unit in which a blob's bytes are checked when they are read,
// and so what an answer needs of memory.
const chunkSize = 64 << 10

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sums are a blob's checksums: the CRC-32C of each chunk. They guard against
// damage, not against malice: whoever can write the store's files can write
// these too. Malice is what the digest was checked for on the way in.
type sums struct {
	size   int64
	chunks []uint32 // the last one is of a part of a chunk, unless size is a multiple
}

// Write appends bytes to what is summed up. It never fails.
func (s *sums) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		at := int(s.size % chunkSize)
		if at == 0 {
			s.chunks = append(s.chunks, 0)
		}
		k := min(len(p), chunkSize-at)
		last := &s.chunks[len(s.chunks)-1]
		*last = crc32.Update(*last, castagnoli, p[:k])
		s.size += int64(k)
		p = p[k:]
	}
	return n, nil
}

// ok says whether b is the blob's i-th chunk.
func (s *sums) ok(i int64, b []byte) bool {
	return i >= 0 && i < int64(len(s.chunks)) && crc32.Checksum(b, castagnoli) == s.chunks[i]
}

// The file: a magic, the blob's size, the checksums, and a checksum of all
// this, in little-endian order.
const sumsMagic = "weirsum2"

func (s *sums) marshal() []byte {
	b := make([]byte, 0, len(sumsMagic)+8+4*len(s.chunks)+4)
	b = append(b, sumsMagic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.size))
	for _, c := range s.chunks {
		b = binary.LittleEndian.AppendUint32(b, c)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

var errSums = errors.New("not a file of checksums")

func parseSums(b []byte) (*sums, error) {
	const head = len(sumsMagic) + 8
	if len(b) < head+4 || string(b[:len(sumsMagic)]) != sumsMagic {
		return nil, errSums
	}
	body, check := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	size := binary.LittleEndian.Uint64(b[len(sumsMagic):])
	n := uint64(len(body)-head) / 4
	if crc32.Checksum(body, castagnoli) != check || size > 1<<62 || (size+chunkSize-1)/chunkSize != n || len(body) != head+int(n)*4 {
		return nil, errSums
	}
	s := &sums{size: int64(size), chunks: make([]uint32, n)}
	for i := range s.chunks {
		s.chunks[i] = binary.LittleEndian.Uint32(body[head+4*i:])
	}
	return s, nil
}

// save writes the file, in aside first.
func (s *sums) save(path, aside string) error {
	if err := replaceFile(path, aside, s.marshal()); err != nil {
		return fmt.Errorf("writing checksums: %w", err)
	}
	return nil
}

// replaceFile writes a file, in the directory aside first, so that it is there whole or not at all.
func replaceFile(path, aside string, b []byte) error {
	f, err := os.CreateTemp(aside, "aside.")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
