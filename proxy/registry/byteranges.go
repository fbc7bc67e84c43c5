// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"math"
	"mime"
	"net/http"
	"strconv"
	"strings"

	"weir/proxy/store"
)

// maxRanges is of how many ranges a request is understood. podman asks for no more (containers/storage,
// maxNumberMissingChunks).
const maxRanges = 1024

// parseRanges reads a Range field (RFC 9110, section 14.2) that names ranges from their first bytes on, in order and
// without overlap. A single one may have no end, which is -1. Anything else it returns nil for, as for a suffix.
func parseRanges(header string) (ranges []store.Span) {
	specs, ok := strings.CutPrefix(header, "bytes=")
	if !ok {
		return nil
	}
	for spec := range strings.SplitSeq(specs, ",") {
		from, to, dash := strings.Cut(spec, "-")
		first, ok := parseOffset(from)
		if !dash || !ok || len(ranges) == maxRanges {
			return nil
		}
		if n := len(ranges); n > 0 && first < ranges[n-1].To {
			return nil
		}
		if to == "" && spec == specs {
			return []store.Span{{From: first, To: -1}}
		}
		last, ok := parseOffset(to)
		if !ok || last < first || last >= math.MaxInt64-1 { // that is where what has no end ends
			return nil
		}
		ranges = append(ranges, store.Span{From: first, To: last + 1})
	}
	return ranges
}

// within returns what there is of ranges of a blob of size bytes.
func within(ranges []store.Span, size int64) (all []store.Span) {
	for _, e := range ranges {
		if e.To < 0 || e.To > size {
			e.To = size
		}
		if e.From < e.To {
			all = append(all, e)
		}
	}
	return all
}

// parseOffset reads what is only digits.
func parseOffset(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil //nolint:gosec // 63 bits
}

// parseContentRange reads a Content-Range field (section 14.4) of a part of a blob of size bytes.
func parseContentRange(header string) (at store.Span, size int64, ok bool) {
	where, total, slash := strings.Cut(header, "/")
	where, unit := strings.CutPrefix(where, "bytes ")
	ranges := parseRanges("bytes=" + where)
	size, ok = parseOffset(total)
	if !slash || !unit || !ok || len(ranges) != 1 || ranges[0].To < 0 || ranges[0].To > size {
		return store.Span{}, 0, false
	}
	return ranges[0], size, true
}

// formatRanges is the Range field for ranges. That of which nobody knows the end has none.
func formatRanges(ranges []store.Span) string {
	b := []byte("bytes=")
	for i, e := range ranges {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(strconv.AppendInt(b, e.From, 10), '-')
		if e.To >= 0 && e.To < math.MaxInt64 {
			b = strconv.AppendInt(b, e.To-1, 10)
		}
	}
	return string(b)
}

const (
	// severalRanges is the media type of an answer with several ranges.
	severalRanges = "multipart/byteranges"
	// maxPartLine is how long a line before a part's content may be, and maxPartLines how many there may be.
	maxPartLine  = 4 << 10
	maxPartLines = 16
	// maxBoundary is how long a boundary may be (RFC 2046, section 5.1.1).
	maxBoundary = 70
	// tailSize bounds what is read after the last part: when all was read, the connection can be used again.
	tailSize = 256
)

// byteranges reads an answer with several ranges of a blob, one after another (RFC 9110, section 14.6). It is strict:
// what is in a part, its Content-Range says, and not where a boundary follows.
type byteranges struct {
	r         *bufio.Reader
	delimiter []byte // of parts
}

// newByteranges returns nil if the media type isn't that of such an answer.
func newByteranges(body io.Reader, contentType string) *byteranges {
	mediaType, params, err := mime.ParseMediaType(contentType)
	boundary := params["boundary"]
	if errors.Is(err, mime.ErrInvalidMediaParameter) { // CloudFront has a colon in it, without quotes
		_, boundary, _ = strings.Cut(contentType, "; boundary=")
	}
	if mediaType != severalRanges || boundary == "" || len(boundary) > maxBoundary {
		return nil
	}
	return &byteranges{bufio.NewReaderSize(body, maxPartLine), []byte("--" + boundary)}
}

var errPart = errors.New("not a part of a blob")

// next reads up to the content of the next part, and says which range of the blob that is, and how large that
// is. What is before it must have been read.
func (b *byteranges) next() (at store.Span, size int64, err error) {
	line, err := b.line()
	if err == nil && len(line) == 0 { // it ends the content before
		line, err = b.line()
	}
	if err == nil && !bytes.Equal(line, b.delimiter) {
		err = errPart
	}
	for named, n := false, 0; err == nil && n < maxPartLines; n++ {
		if line, err = b.line(); err != nil {
			break
		}
		if len(line) == 0 && named {
			return at, size, nil
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		switch {
		case !ok:
			return store.Span{}, 0, errPart
		case strings.EqualFold(string(name), "Content-Range") && named:
			return store.Span{}, 0, errPart
		case strings.EqualFold(string(name), "Content-Range"):
			if at, size, named = parseContentRange(string(bytes.TrimSpace(value))); !named {
				return store.Span{}, 0, errPart
			}
		case strings.EqualFold(string(name), "Content-Encoding"), strings.EqualFold(string(name), "Content-Transfer-Encoding"):
			return store.Span{}, 0, errPart
		}
	}
	if err == nil {
		err = errPart
	}
	return store.Span{}, 0, err
}

// line reads a line. It is good until the next one.
func (b *byteranges) line() ([]byte, error) {
	line, err := b.r.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	return bytes.TrimRight(line, " \t\r\n"), nil
}

// picked reads the ranges that were asked for, one after another, of an answer that has them all: of its parts,
// or of one that is around them.
type picked struct {
	io.Closer
	r     io.Reader
	parts *byteranges  // nil if the answer is one range
	asked []store.Span // that were not read, the first from there on
	at    store.Span   // what is to be read of a part
	size  int64
}

// Read implements io.Reader.
func (p *picked) Read(b []byte) (int, error) {
	for len(p.asked) > 0 {
		want := &p.asked[0]
		skip := min(want.From, p.at.To) - p.at.From
		switch {
		case skip < 0:
			return 0, errPart // it is in another order
		case skip > 0:
			n, err := io.CopyN(io.Discard, p.r, skip)
			if p.at.From += n; err != nil {
				return 0, noEOF(err)
			}
		case p.at.From == p.at.To:
			if err := p.next(); err != nil {
				return 0, noEOF(err)
			}
		default:
			n, err := p.r.Read(b[:min(int64(len(b)), min(want.To, p.at.To)-want.From)])
			p.at.From += int64(n)
			if want.From += int64(n); want.From == want.To {
				p.asked = p.asked[1:]
			}
			if len(p.asked) == 0 && p.parts != nil {
				_, _ = io.CopyN(io.Discard, p.r, tailSize)
			}
			if n > 0 {
				err = nil
			}
			return n, noEOF(err)
		}
	}
	return 0, io.EOF
}

// next goes on to the next part.
func (p *picked) next() error {
	if p.parts == nil {
		return io.ErrUnexpectedEOF
	}
	at, size, err := p.parts.next()
	switch {
	case err != nil:
		return err
	case at.From < p.at.To || p.size > 0 && size != p.size:
		return errPart
	}
	p.at, p.size = at, size
	return nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// pick returns what gives the ranges that were asked for, one after another, of the answer to that, which is read
// by way of through; which ranges these are, up to the blob's end; and the blob's size. ok is false if the answer is another one.
// If it has several ranges, some of it was read then, and it is closed.
func pick(resp *reply, asked []store.Span, through func(io.ReadCloser) io.ReadCloser) (body io.ReadCloser, given []store.Span, size int64, ok bool) {
	at, size, one := sentRange(resp)
	if len(asked) == 1 {
		if !one || at.From != asked[0].From {
			return nil, nil, 0, false
		}
		return through(resp.Body), []store.Span{at}, size, true
	}
	if resp.StatusCode != http.StatusPartialContent || encoded(resp) || foreign(resp.Response) {
		return nil, nil, 0, false
	}
	body = through(resp.Body)
	p := &picked{Closer: body, r: body, at: at, size: size}
	if !one {
		if p.parts = newByteranges(body, resp.Header.Get("Content-Type")); p.parts == nil || p.next() != nil {
			body.Close()
			return nil, nil, 0, false
		}
		p.r = p.parts.r
	}
	given = within(asked, p.size)
	if len(given) == 0 || p.at.From > given[0].From || p.at.To <= given[0].From || one && p.at.To < given[len(given)-1].To {
		body.Close()
		return nil, nil, 0, false
	}
	p.asked = append(p.asked, given...)
	return p, given, p.size, true
}
