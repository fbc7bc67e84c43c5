// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// slowBody gives some bytes, then nothing until it is released or closed.
type slowBody struct {
	before, after []byte
	released      chan struct{}
	closed        chan struct{}
}

func newSlowBody(b []byte, before int) *slowBody {
	return &slowBody{b[:before], b[before:], make(chan struct{}), make(chan struct{})}
}

func (b *slowBody) Read(p []byte) (int, error) {
	if len(b.before) > 0 {
		n := copy(p, b.before)
		b.before = b.before[n:]
		return n, nil
	}
	select {
	case <-b.released:
	case <-b.closed:
		return 0, errors.New("closed")
	}
	if len(b.after) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.after)
	b.after = b.after[n:]
	return n, nil
}

func (b *slowBody) Close() error {
	select {
	case <-b.closed:
	default:
		close(b.closed)
	}
	return nil
}

// A source falls silent. A second one is asked beside it, where it has stopped, and
// whichever sends first goes on; none is given up while there is no other.
func TestSilentSource(t *testing.T) {
	defer func(was time.Duration) { idleTimeout = was }(idleTimeout)
	idleTimeout = 5 * time.Millisecond
	want := random(21, 200_000)
	const stop = 70_000
	for name, play := range map[string]func(t *testing.T, first, second *slowBody, asked chan int64){
		"the second sends": func(t *testing.T, first, second *slowBody, asked chan int64) {
			if off := <-asked; off != stop {
				t.Errorf("asked from byte %d", off)
			}
			close(second.released)
			<-first.closed
		},
		"the first goes on": func(_ *testing.T, first, second *slowBody, asked chan int64) {
			<-asked
			close(first.released)
			<-second.closed
		},
		"the others refuse": func(_ *testing.T, first, second *slowBody, asked chan int64) {
			second.Close()
			for range attempts {
				<-asked
			}
			close(first.released)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir(), Options{})
			first, second := newSlowBody(want, stop), newSlowBody(want[stop:], 0)
			asked := make(chan int64, 100)
			more := func(_ context.Context, off int64) (io.ReadCloser, error) {
				asked <- off
				return second, nil
			}
			r := begin(t, s, digest.FromBytes(want), int64(len(want)), first, more)
			played := make(chan struct{})
			go func() { defer close(played); play(t, first, second, asked) }()
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			<-played
		})
	}
}

// A source that doesn't even open keeps no other from being asked, and has all the
// time when there is none.
func TestSourceHangsWhileOpening(t *testing.T) {
	defer func(was time.Duration) { idleTimeout = was }(idleTimeout)
	idleTimeout = 5 * time.Millisecond
	want := random(22, 50_000)
	for _, alone := range []bool{false, true} {
		s := open(t, t.TempDir(), Options{})
		tr, _ := s.Claim(digest.FromBytes(want), Origin{})
		calls, ended := make(chan struct{}, 100), make(chan struct{}, 100)
		release := make(chan struct{})
		hangs := func(ctx context.Context, off int64) (io.ReadCloser, error) {
			calls <- struct{}{}
			select {
			case <-ctx.Done():
				ended <- struct{}{}
				return nil, ctx.Err()
			case <-release:
				return body(want[off:]), nil
			}
		}
		first := newSlowBody(want, 1000)
		r, err := tr.Begin(int64(len(want)), first, hangs)
		if err != nil {
			t.Fatal(err)
		}
		if !alone { // two more, of which one hangs too
			for _, src := range []Source{hangs, func(_ context.Context, off int64) (io.ReadCloser, error) { return body(want[off:]), nil }} {
				other, err := tr.Wait(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				other.AddSource(src)
				other.Close()
			}
		}
		first.Close() // it breaks off
		if alone {
			for range 2 { // and once beside the first time
				<-calls
			}
			close(release)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("alone %v: %d bytes, %v", alone, len(got), err)
		}
		if !alone {
			for range len(calls) {
				<-ended // it isn't waited for any more
			}
		}
		r.Close()
	}
}
