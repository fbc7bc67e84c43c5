// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// onDisk is how many bytes the files below a directory take.
func onDisk(t *testing.T, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// filled is a store of size bytes with n blobs that take half of it, or all.
func filled(t *testing.T, size int64, n int, whole bool) (*Store, []digest.Digest) {
	t.Helper()
	s := open(t, t.TempDir(), Options{MaxBytes: size})
	each := size / int64(n)
	if !whole {
		each /= 2
	}
	var ds []digest.Digest
	for i := range n {
		ds = append(ds, put(t, s, random(uint64(400+i), int(each))))
	}
	return s, ds
}

// waitStored waits until all that was written is in the file.
func (u *Upload) waitStored() {
	w := &u.window
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.stored < w.arrived && w.err == nil && !w.unkept {
		w.starved = true // as the source waits for space
		w.space.Wait()
	}
}

func (s *Store) keeps(ds []digest.Digest) (n int) {
	for _, d := range ds {
		if s.Has(d) {
			n++
		}
	}
	return n
}

// A body without a length is given to its reader to the end, and takes no more
// of the store than is free, nor than half.
func TestNoLengthIsBounded(t *testing.T) {
	const size = 8 << 20
	for _, whole := range []bool{false, true} {
		s, ds := filled(t, size, 8, whole)
		want := random(20, 20<<20)
		src := func(_ context.Context, off int64) (io.ReadCloser, error) { return body(want[off:]), nil }
		r := begin(t, s, digest.FromBytes(want), -1, body(want), src)
		got, err := io.ReadAll(r)
		if err == nil {
			t.Fatal("all of it was kept")
		}
		most := onDisk(t, filepath.Join(s.dir, "ingest"))
		if used := s.Stats().Bytes; used > size || most > size/provisionalShare {
			t.Errorf("%d bytes counted, %d on the disk", used, most)
		}
		tail, err := io.ReadAll(r.With(t.Context(), Failover{Own: src}))
		if err != nil || !bytes.Equal(append(got, tail...), want) {
			t.Errorf("%d and %d bytes, %v", len(got), len(tail), err)
		}
		before := s.Stats()
		r.Close()
		if n := s.keeps(ds); n != len(ds) || before.Evicted > 0 {
			t.Errorf("%d of %d blobs are left", n, len(ds))
		}
		if after := s.Stats(); after.NotKept != 1 || after.Bytes != int64(len(ds))*size/int64(len(ds))/map[bool]int64{false: 2, true: 1}[whole] {
			t.Errorf("%+v", after)
		}
	}
}

// One whose length turns out to be small is kept as any other.
func TestNoLength(t *testing.T) {
	s, _ := filled(t, 8<<20, 8, false)
	want := random(21, 700<<10)
	d := digest.FromBytes(want)
	r := begin(t, s, d, -1, body(want), nil)
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Fatal(len(got), err)
	}
	if st := s.Stats(); !s.Has(d) || st.Bytes != 4<<20+700<<10 || s.provisional != 0 {
		t.Errorf("%+v, provisional %d", st, s.provisional)
	}
}

// A push that wasn't accepted takes nothing from what is kept, and nothing that
// is verified waits for it.
func TestUploadTakesWhatIsFree(t *testing.T) {
	const size = 16 << 20
	s, ds := filled(t, size, 16, false)
	piece := random(22, 64<<10)
	var ups []*Upload
	for _, owner := range []string{"", "a", "b", "b", "c", "d"} {
		up := s.NewUpload(Origin{Owner: owner})
		defer up.Close()
		for range 64 << 20 / len(piece) {
			_, _ = up.Write(piece)
		}
		ups = append(ups, up)
	}
	if n := s.keeps(ds); n != len(ds) {
		t.Errorf("%d of %d blobs are left", n, len(ds))
	}
	if s.provisional > size/provisionalShare {
		t.Errorf("%d bytes are reserved", s.provisional)
	}
	// One that is small enough rests, until something verified needs its room.
	for _, up := range ups {
		up.Close()
	}
	resting, other := s.NewUpload(Origin{Owner: "a"}), s.NewUpload(Origin{Owner: "b"})
	defer resting.Close()
	defer other.Close()
	_, _ = resting.Write(piece)
	_, _ = other.Write(piece)
	big := put(t, s, random(23, size-int(2*reserveStep)))
	if !s.Has(big) || resting.room.lost.Load() || other.room.lost.Load() {
		t.Error("no room for what is verified, or more was made than needed")
	}
	d := put(t, s, random(24, size-int(reserveStep)))
	if !s.Has(d) || !resting.room.lost.Load() || other.room.lost.Load() {
		t.Error("it is not the oldest that gave way")
	}
	other.waitStored()
	if n := onDisk(t, filepath.Join(s.dir, "ingest")); n != int64(len(piece)) {
		t.Errorf("%d bytes of what gave way are on the disk", n-int64(len(piece)))
	}
	_, _ = resting.Write(piece)
	if err := resting.Commit(digest.FromBytes(append(bytes.Clone(piece), piece...))); !errors.Is(err, ErrNoSpace) {
		t.Errorf("what gave way was kept: %v", err)
	}
	if err := other.Commit(digest.FromBytes(piece)); err != nil {
		t.Error(err)
	}
	if st := s.Stats(); st.Bytes > size || s.provisional != 0 {
		t.Errorf("%+v, %d", st, s.provisional)
	}
}

// A full store has some room that is free, once it had to make some.
func TestSpareRoom(t *testing.T) {
	const size = 32 << 20
	s, _ := filled(t, size, 64, true)
	put(t, s, random(25, 1000))
	pushed := random(26, 500_000)
	up := s.NewUpload(Origin{})
	_, _ = up.Write(pushed)
	if err := up.Commit(digest.FromBytes(pushed)); err != nil {
		t.Error(err)
	}
}

// What an authenticated registry is sent goes before what any other is sent.
func TestAuthenticatedGoesFirst(t *testing.T) {
	const size = 64 << 20
	s := open(t, t.TempDir(), Options{MaxBytes: size})
	put(t, s, random(28, size-size/ownersProvisional)) // what is free is what owners may have
	first := s.NewUpload(Origin{Owner: "a"})
	defer first.Close()
	piece := random(27, 3<<20)
	for _, owner := range []string{"a", "b", "b", "c", "d", "e"} {
		up := first
		if up.Size() > 0 {
			up = s.NewUpload(Origin{Owner: owner})
			defer up.Close()
		}
		_, _ = up.Write(piece)
	}
	if s.owners["b"].provisional > size/ownerProvisional || s.provisional > size/ownersProvisional {
		t.Fatalf("%d of %d bytes are reserved", s.owners["b"].provisional, s.provisional)
	}
	up := s.NewUpload(Origin{})
	_, _ = up.Write(piece)
	if err := up.Commit(digest.FromBytes(piece)); err != nil || !first.room.lost.Load() {
		t.Errorf("%v; the oldest gave way: %v", err, first.room.lost.Load())
	}
}

// An owner has its part of the store, of which its least recently used blobs go
// first, and all owners together have half.
func TestOwners(t *testing.T) {
	const size = 10_000_000
	s := open(t, t.TempDir(), Options{MaxBytes: size})
	other := put(t, s, random(30, 100_000))
	give := func(owner string, seed uint64) digest.Digest {
		b := random(seed, 200_000)
		up := s.NewUpload(Origin{Owner: owner})
		_, _ = up.Write(b)
		if err := up.Commit(digest.FromBytes(b)); err != nil {
			t.Fatal(err)
		}
		return digest.FromBytes(b)
	}
	var ds []digest.Digest
	for i := range 5 {
		ds = append(ds, give("a", uint64(31+i)))
	}
	if s.keeps(ds) != 5 || !s.Has(ds[0]) { // used last
		t.Fatal("they don't fit")
	}
	give("a", 40)
	if s.Has(ds[1]) || !s.Has(ds[0]) || !s.Has(other) {
		t.Error("it isn't the least recently used of the owner's that went")
	}
	if n := s.owners["a"].bytes; n > size/ownerShare {
		t.Errorf("an owner has %d bytes", n)
	}
	if b := random(41, size/ownerShare+1); !errors.Is(s.Put(digest.FromBytes(b), b, Origin{Owner: "a"}), ErrNoSpace) {
		t.Error("more than an owner's part was kept")
	}
	// What an authenticated registry brings too counts for no owner.
	again := random(31, 200_000)
	if err := s.Put(ds[0], again, Origin{}); err != nil || s.owners["a"].bytes != 800_000 {
		t.Error(err, s.owners["a"].bytes)
	}
	for i := range 40 {
		give(string(rune('b'+i/5)), uint64(50+i))
	}
	if !s.Has(other) || !s.Has(ds[0]) || s.owned > size/ownersShare {
		t.Errorf("all owners have %d bytes", s.owned)
	}
	if _, ok := s.owners["i"]; !ok {
		t.Error("the last one has nothing")
	}
	for _, d := range s.Digests() {
		s.drop(d, ErrCorrupt)
	}
	if st := s.Stats(); st.Bytes != 0 || s.owned != 0 || len(s.owners) != 0 {
		t.Errorf("%+v, %d, %v", st, s.owned, s.owners)
	}
}

// Two repositories' transfers of one blob know nothing of each other, and leave
// one blob. Who reads for a peer gets the one that is furthest.
func TestTransfersOfTwo(t *testing.T) {
	s := open(t, t.TempDir(), Options{MaxBytes: 10 << 20})
	want := random(70, 100_000)
	d := digest.FromBytes(want)
	type way struct {
		w *io.PipeWriter
		r *Reader
	}
	claim := func(from Origin) way {
		tr, leader := s.Claim(d, from)
		if !leader {
			t.Fatal("it waits for another repository's")
		}
		pr, pw := io.Pipe()
		r, err := tr.Begin(int64(len(want)), pr, nil)
		if err != nil {
			t.Fatal(err)
		}
		return way{pw, r}
	}
	one, two, free := claim(Origin{Name: "one"}), claim(Origin{Name: "two"}), claim(Origin{Name: "three", Owner: "x", Free: true})
	defer free.r.Close()
	write := func(w way, b []byte) {
		t.Helper()
		_, _ = w.w.Write(b)
		if _, err := io.ReadFull(w.r, make([]byte, len(b)-1)); err != nil { // it has arrived
			t.Fatal(err)
		}
	}
	write(free, bytes.Repeat([]byte("x"), 60_000)) // too little for a partial
	write(one, want[:1000])
	write(two, want[:50_000])
	if n, size, err := s.Arriving(d); n != 50_000 || size != int64(len(want)) || err != nil {
		t.Error(n, size, err)
	}
	peer, err := s.Follow(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	if got := make([]byte, 40_000); true {
		if _, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, want[:40_000]) {
			t.Error("another transfer's bytes:", err)
		}
	}
	peer.Close()
	free.w.CloseWithError(io.ErrUnexpectedEOF)
	for _, w := range []struct {
		way
		from int
	}{{two, 50_000}, {one, 1000}} {
		go func() { _, _ = w.w.Write(want[w.from:]) }()
		if got, err := io.ReadAll(w.r); err != nil || !bytes.Equal(got, want[w.from-1:]) {
			t.Error(len(got), err)
		}
		w.r.Close()
	}
	if got, err := read(s, d); err != nil || !bytes.Equal(got, want) {
		t.Error("not the same:", err)
	}
	free.r.Close()
	s.cancel()
	s.wg.Wait()
	if st := s.Stats(); st.Bytes != int64(len(want)) || st.Blobs != 1 || files(t, filepath.Join(s.dir, "ingest")) != 0 {
		t.Errorf("%+v, %d files", st, files(t, filepath.Join(s.dir, "ingest")))
	}
}

// A peer's announcement evicts nothing; its bytes do, when there is no room for
// them otherwise.
func TestUnverifiedRoom(t *testing.T) {
	const size = 8 << 20
	s, ds := filled(t, size, 8, true)
	want := random(80, 4<<20)
	d := digest.FromBytes(want)
	tr, _ := s.Claim(d, Origin{})
	pr, pw := io.Pipe()
	r, err := tr.BeginUnverified(int64(len(want)), pr, nil, Unverified{Wrong: func() {}, Refetch: againFrom()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n := s.keeps(ds); n != len(ds) {
		t.Errorf("%d of %d blobs are left", n, len(ds))
	}
	go func() { _, _ = pw.Write(want) }()
	if err := r.WaitReadable(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) || !s.Has(d) || s.Stats().Bytes > size {
		t.Errorf("%d bytes, %v, kept %v, %+v", len(got), err, s.Has(d), s.Stats())
	}
}

func TestEviction(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{MaxBytes: 10_000})
	var ds []digest.Digest
	for i := range 10 {
		ds = append(ds, put(t, s, random(uint64(100+i), 1000)))
	}
	held, err := s.Get(ds[0]) // used: no longer the oldest
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	put(t, s, random(200, 2500)) // three must go
	for i, d := range ds {
		if want := i == 0 || i > 3; s.Has(d) != want {
			t.Errorf("blob %d there: %v, want %v", i, !want, want)
		}
	}
	if st := s.Stats(); st.Evicted != 3 || st.Bytes > st.MaxBytes {
		t.Errorf("%+v", st)
	}
	put(t, s, random(201, 9900)) // everything else must go, also what is being read
	if got, err := io.ReadAll(held.Reader()); err != nil || !bytes.Equal(got, random(100, 1000)) {
		t.Error("a blob that was open when it was evicted can't be read:", err)
	}
	big := random(202, 10_001)
	if err := s.Put(digest.FromBytes(big), big, Origin{}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("larger than the store: %v", err)
	}
	if got := files(t, dir); got != 3 { // blob, sums, lock
		t.Errorf("%d files left", got)
	}
	s.Close()
	s = open(t, dir, Options{MaxBytes: 5000})
	if st := s.Stats(); st.Blobs != 0 || st.Bytes != 0 {
		t.Errorf("reopened with a smaller bound: %+v", st)
	}
}

// smallDisk is a file system of n bytes.
func smallDisk(t *testing.T, n int) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", n)); err != nil {
		t.Fatal("mounting a small tmpfs (needs root):", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestDiskFull(t *testing.T) {
	dir := smallDisk(t, 2<<20)
	s := open(t, dir, Options{})
	want := random(11, 3<<20)
	d := digest.FromBytes(want)
	tr, _ := s.Claim(d, Origin{})
	if _, err := tr.Begin(int64(len(want)), body(want), nil); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("begin on a full disk: %v", err)
	}
	st := NewStream(t.Context(), d, int64(len(want)), body(want), nil)
	if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, want) {
		t.Error("streamed, but not the same:", err)
	}

	// Of unknown size: the disk is full in the middle.
	r := begin(t, s, d, -1, body(want), nil)
	got, err := io.ReadAll(r)
	if err == nil || len(got) == 0 {
		t.Fatalf("%d bytes on a disk too small, err %v", len(got), err)
	}
	r.With(t.Context(), Failover{Own: func(_ context.Context, off int64) (io.ReadCloser, error) { return body(want[off:]), nil }})
	tail, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(append(got, tail...), want) {
		t.Error("continued, but not the same:", err)
	}
	r.Close()
	if st := s.Stats(); st.Bytes != 0 || st.Blobs != 0 || files(t, dir) != 1 {
		t.Errorf("left behind: %+v, %d files", st, files(t, dir))
	}
}

func TestMinFree(t *testing.T) {
	dir := smallDisk(t, 4<<20)
	s := open(t, dir, Options{MinFree: 2 << 20})
	var last digest.Digest
	for i := range 20 {
		last = put(t, s, random(uint64(300+i), 300<<10))
	}
	if st := s.Stats(); st.Bytes > 2<<20 || st.Evicted == 0 || !s.Has(last) {
		t.Errorf("%+v", st)
	}
}
