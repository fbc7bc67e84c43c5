// SPDX-License-Identifier: Apache-2.0

package p2p

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// drippingContent is a Content that gives a KiB a second of anything, and has no more
// by then. Or it gives no answer at all: its disk hangs.
type drippingContent struct {
	*shelf
	given *atomic.Int64
	hangs bool
}

func (c drippingContent) Open(ctx context.Context, _ digest.Digest) (*Blob, error) {
	if c.hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &Blob{&drips{ctx, c.given}, 100 << 20, false}, nil
}

func (c drippingContent) Progress(digest.Digest) (arrived, size int64, kept bool, err error) {
	if c.hangs {
		select {}
	}
	return c.given.Load(), 100 << 20, false, nil
}

type drips struct {
	ctx   context.Context
	given *atomic.Int64
}

func (d *drips) Close() error { return nil }
func (d *drips) Seek(o int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		return 100 << 20, nil
	}
	return o, nil
}
func (d *drips) Read(p []byte) (int, error) {
	select {
	case <-time.After(time.Second):
	case <-d.ctx.Done():
		return 0, d.ctx.Err()
	}
	d.given.Add(1024)
	return min(1024, len(p)), nil
}

// among returns a member among others that provide blobs.
func among(t *testing.T, count int, hang bool, blobs ...digest.Digest) *member {
	a := newMember(t, nil)
	var all []*member
	for range count {
		all = append(all, newMember(t, func(o *Options) { o.Content = drippingContent{o.Content.(*shelf), new(atomic.Int64), hang} }, a.addr()))
	}
	until(t, "all known", func() bool { return a.dht.RoutingTable().Size() >= count })
	for _, m := range all {
		until(t, "all known", func() bool { return m.dht.RoutingTable().Size() >= count })
		for _, d := range blobs {
			m.Provide(d)
		}
	}
	return a
}

// wanted is a share of a blob that peers say they have.
func wanted(t *testing.T, a *member, d digest.Digest) (s *Share) {
	until(t, "the blob is found", func() bool {
		if s = a.Want(t.Context(), d, 50<<20); !s.Mine() {
			return true
		}
		s.Close(false)
		return false
	})
	return s
}

// A peer that gives a thousandth of what the registry gives, and hasn't more
// itself, is left.
func TestDrip(t *testing.T) {
	d := digest.FromString("blob")
	body, _, err := wanted(t, among(t, 1, false, d), d).Open(t.Context(), 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	left := make(chan error, 1)
	go func() { _, err := io.Copy(io.Discard, body); left <- err }()
	select {
	case err := <-left:
		if err == nil {
			t.Error("it came to an end")
		}
	case <-time.After(3 * maxLowTicks * watchTime):
		t.Error("it isn't left")
	}
}

// Peers whose disks hang don't have a pull wait for each of them, nor for each
// blob.
func TestHangingPeers(t *testing.T) {
	blobs := []digest.Digest{digest.FromString("one"), digest.FromString("two"), digest.FromString("three"), digest.FromString("four")}
	a := among(t, 4, true, blobs...)
	begun := time.Now()
	for _, d := range blobs {
		var s *Share
		until(t, "the stewards answer", func() bool { s = a.Want(t.Context(), d, 50<<20); return s != nil })
		if _, _, err := s.Open(t.Context(), 0, -1); !errors.Is(err, ErrNoPeer) {
			t.Fatal(err)
		}
	}
	// One of them was 16 s, and so was each.
	if took := time.Since(begun); took > 30*time.Second {
		t.Errorf("the upstream is asked for the fourth blob after %s", took)
	}
}
