// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// BenchmarkTransfer compares the transfers with streams of libp2p, for the same
// bytes between the same two nodes.
func BenchmarkTransfer(b *testing.B) {
	all := swarm(b, 2)
	blob := random(64 << 20)
	d := all[0].put(blob)
	all[0].Provide(d)
	until(b, "the blob is found", func() bool { s := all[1].Want(b.Context(), d, 0); return s != nil && !s.Mine() })
	b.Run("http", func(b *testing.B) {
		b.SetBytes(int64(len(blob)))
		defer reportCPU(b, len(blob))()
		for b.Loop() {
			body, _, err := all[1].Want(b.Context(), d, 0).Open(b.Context(), 0, -1)
			if err != nil {
				b.Fatal(err)
			}
			drain(b, body, len(blob))
		}
	})
	all[0].host.SetStreamHandler("/weir/bench", func(s network.Stream) {
		_, _ = io.CopyBuffer(struct{ io.Writer }{s}, struct{ io.Reader }{bytes.NewReader(blob)}, make([]byte, sendSize))
		s.Close()
	})
	b.Run("stream", func(b *testing.B) {
		b.SetBytes(int64(len(blob)))
		defer reportCPU(b, len(blob))()
		for b.Loop() {
			s, err := all[1].host.NewStream(b.Context(), all[0].host.ID(), "/weir/bench")
			if err != nil {
				b.Fatal(err)
			}
			drain(b, s, len(blob))
		}
	})
}

// BenchmarkFirstByte is the time from the question to a peer's first byte.
func BenchmarkFirstByte(b *testing.B) {
	all := swarm(b, 3)
	d := all[0].put(random(1 << 20))
	all[0].Provide(d)
	until(b, "the blob is found", func() bool { s := all[1].Want(b.Context(), d, 0); return s != nil && !s.Mine() })
	for b.Loop() {
		body, _, err := all[1].Want(b.Context(), d, 0).Open(b.Context(), 0, -1)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(body, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		body.Close()
	}
}

// BenchmarkFound is the time from a blob's being kept to its being found by
// another node.
func BenchmarkFound(b *testing.B) {
	all := swarm(b, 8)
	for b.Loop() {
		blob := random(1000)
		d := digest.FromBytes(blob)
		all[0].put(blob)
		all[0].Provide(d)
		for {
			if got, _ := all[7].Get(b.Context(), d, 1000); got != nil {
				break
			}
		}
	}
}

func drain(b *testing.B, r io.ReadCloser, want int) {
	b.Helper()
	defer r.Close()
	if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, make([]byte, sendSize)); err != nil || n != int64(want) {
		b.Fatalf("%d bytes, %v", n, err)
	}
}

// reportCPU reports what both sides together use of the processors.
func reportCPU(b *testing.B, size int) func() {
	used := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	return func() {
		b.ReportMetric((used()-before).Seconds()/(float64(b.N)*float64(size)/(1<<30)), "CPU-s/GiB")
	}
}
