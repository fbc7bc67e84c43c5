// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"weir/proxy/rights"
)

// allows says whether the client may have a digest without a question to the
// upstream, and allowsStale while the upstream gives no answer.
func (x *exchange) allows(d digest.Digest) bool {
	return x.h.rights.Allows(x.who, x.vantage.From, d)
}

func (x *exchange) allowsStale(d digest.Digest) bool {
	return x.h.rights.AllowsStale(x.who, x.vantage.From, d)
}

// contains says whether a digest was proven to be in the client's repository.
func (x *exchange) contains(d digest.Digest) bool { return x.h.rights.Contains(x.vantage, d) }

// grant records that the client was answered with content, and prove that what it
// was answered with proves that content is in the repository.
func (x *exchange) grant(at time.Time) { x.h.rights.Grant(x.who, at) }

func (x *exchange) prove(by rights.Vantage, d digest.Digest, at time.Time) {
	x.h.rights.Prove(by, d, at)
}

// provenBy is for whom an answer of content proves that it is in the repository:
// for the client's network, where it is that of where the registry redirected to.
func (x *exchange) provenBy(resp *reply) rights.Vantage {
	if x.own(resp.Response) {
		return rights.Vantage{Repository: x.who.Repository}
	}
	return x.vantage
}

// learn records an upstream's own answer to a request to read.
func (x *exchange) learn(resp *reply) {
	if foreign(resp.Response) {
		return
	}
	switch resp.StatusCode {
	case http.StatusOK:
		if x.target.kind == manifest && describesManifest(resp, x.target.digest) {
			x.grant(resp.at)
		}
	case http.StatusPartialContent:
		if x.target.kind == blob {
			x.grant(resp.at)
		}
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound:
		x.h.rights.Refuse(x.who)
		if resp.StatusCode == http.StatusNotFound && x.target.digest != "" {
			x.h.rights.Deny(x.who, x.vantage.From, x.target.digest, resp.at)
		}
		x.recheck(resp.StatusCode)
		if x.target.kind == manifest {
			_ = x.learnLogin(resp)
		}
	}
}

// proof is what a registry has shown of a blob, by which it is told from one that
// only claims to have it.
type proof struct {
	offset int64
	bytes  []byte
	by     rights.Vantage // for whom it counts
	at     time.Time
	// agreed is that a peer that is believed has the same bytes there.
	agreed bool
}

// proofSize is how many bytes a registry has to show.
const proofSize = 1 << 10

// requestProof asks the upstream, with the client's own request, for a small range
// of the blob, which has size bytes, at an offset that can't be foreseen. It returns
// what the upstream has shown, or else its answer, whose body is the caller's to
// close. The error is [errOutage] when it gives none, and the client may have the
// blob all the same.
func (x *exchange) requestProof(size int64) (*proof, *reply, error) {
	n := min(size, proofSize)
	if n <= 0 {
		return nil, nil, errNothingToShow
	}
	at, err := rand.Int(rand.Reader, big.NewInt(size-n+1))
	if err != nil {
		return nil, nil, err
	}
	first := at.Int64()
	wanted := fmt.Sprintf("bytes %d-%d/", first, first+n-1)
	resp, err := x.ask(question{
		method: http.MethodGet, follow: true, stale: x.stale(x.target.digest),
		extra: http.Header{"Accept-Encoding": {"identity"}, "Range": {fmt.Sprintf("bytes=%d-%d", first, first+n-1)}},
	})
	if err != nil {
		return nil, nil, err
	}
	total, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), wanted)
	if resp.StatusCode != http.StatusPartialContent || !ok || total != "*" && total != strconv.FormatInt(size, 10) || encoded(resp) {
		return nil, resp, nil
	}
	defer resp.Body.Close()
	p := &proof{offset: first, bytes: make([]byte, n), by: x.provenBy(resp), at: resp.at}
	if _, err := io.ReadFull(x.counted(resp.Body), p.bytes); err != nil {
		return nil, nil, fmt.Errorf("reading a range of a blob: %w", err)
	}
	return p, resp, nil
}

var errNothingToShow = errors.New("the blob has no bytes to show")

// errNotShown says that a registry has shown other bytes than there are.
var errNotShown = errors.New("the registry has shown other bytes of the blob")

// compare compares what was shown with what r has there, and waits until that has
// arrived. The error is [errNotShown] if it differs.
func (p *proof) compare(r io.ReadSeeker) error {
	has := make([]byte, len(p.bytes))
	if _, err := r.Seek(p.offset, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.ReadFull(r, has); err != nil {
		return err
	}
	if !bytes.Equal(has, p.bytes) {
		return errNotShown
	}
	return nil
}

// encoded says whether what comes is not the blob's own bytes, though they were
// asked for. The client may know how to decode it.
func encoded(resp *reply) bool {
	e := resp.Header.Get("Content-Encoding")
	return e != "" && e != "identity"
}
