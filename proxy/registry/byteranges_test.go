// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"weir/proxy/store"
)

func TestParseRanges(t *testing.T) {
	for header, want := range map[string]string{
		"bytes=0-": "[{0 -1}]", "bytes=5-9": "[{5 10}]", "bytes=7-": "[{7 -1}]", "bytes=3-3": "[{3 4}]",
		"bytes=1-2,4-5": "[{1 3} {4 6}]", "bytes=1-2,3-5,6-6": "[{1 3} {3 6} {6 7}]",
		"": "[]", "bytes=": "[]", "bytes=-5": "[]", "bytes=5": "[]", "bytes=9-5": "[]",
		"bytes=+1-2": "[]", "bytes=1-+2": "[]", "bytes=1--2": "[]", "items=1-2": "[]", "bytes=a-": "[]",
		"bytes=1-9223372036854775807": "[]", "bytes=0-9223372036854775806": "[]", "bytes=0-9223372036854775805": "[{0 9223372036854775806}]", "bytes=99999999999999999999-": "[]", "bytes= 1-2": "[]",
		"bytes=1-2,4-": "[]", "bytes=1-2,2-5": "[]", "bytes=4-5,1-2": "[]", "bytes=1-2,-5": "[]", "bytes=1-2,": "[]", "bytes=1-,3-4": "[]",
	} {
		if got := fmt.Sprint(parseRanges(header)); got != want {
			t.Errorf("%q: %s, want %s", header, got, want)
		}
	}
	for n, want := range map[int]int{maxRanges: maxRanges, maxRanges + 1: 0} {
		var specs []string
		for i := range n {
			specs = append(specs, fmt.Sprintf("%d-%d", 2*i, 2*i))
		}
		if got := parseRanges("bytes=" + strings.Join(specs, ",")); len(got) != want {
			t.Errorf("of %d ranges %d", n, len(got))
		}
	}
}

func FuzzParseRanges(f *testing.F) {
	for _, s := range []string{"bytes=0-", "bytes=5-9", "bytes=-5", "bytes=1-2,4-5", "bytes=1-9223372036854775807", "bytes=0-9223372036854775806", "bytes=0-0,1-1,5-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		ranges := parseRanges(header)
		at := int64(0)
		for _, e := range ranges {
			if e.From < at || e.To <= e.From && (e.To != -1 || len(ranges) > 1) {
				t.Fatalf("%q: %v", header, ranges)
			}
			at = e.To
		}
		if ranges != nil && !slices.Equal(parseRanges(formatRanges(ranges)), ranges) {
			t.Errorf("%q: %v, and then %v", header, ranges, parseRanges(formatRanges(ranges)))
		}
		if at, size, ok := parseContentRange(header); ok && (at.From < 0 || at.From >= at.To || at.To > size) {
			t.Errorf("%q: %v of %d", header, at, size)
		}
	})
}

// severalOf is an answer with ranges of a blob, as net/http has it.
func severalOf(content []byte, ranges []store.Span) (body []byte, contentType string) {
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	for _, e := range ranges {
		part, _ := w.CreatePart(map[string][]string{
			"Content-Type": {"application/octet-stream"}, "Content-Range": {fmt.Sprintf("bytes %d-%d/%d", e.From, e.To-1, len(content))},
		})
		_, _ = part.Write(content[e.From:e.To])
	}
	w.Close()
	return b.Bytes(), "multipart/byteranges; boundary=" + w.Boundary()
}

// rangePart is one of several ranges that an answer has.
type rangePart struct {
	contentRange string
	bytes        []byte
}

// partsOf are the ranges of an answer that has several, and what reading them has ended with: io.EOF at their end, and
// nil if it is another answer. The last one may have less than it says.
func partsOf(h http.Header, body []byte) (all []rangePart, end error) {
	mediaType, params, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil || mediaType != severalRanges {
		return nil, nil
	}
	for r := multipart.NewReader(bytes.NewReader(body), params["boundary"]); ; {
		part, err := r.NextRawPart()
		if err != nil {
			return all, err
		}
		b, err := io.ReadAll(part)
		all = append(all, rangePart{part.Header.Get("Content-Range"), b})
		if err != nil {
			return all, err
		}
	}
}

// closable says whether it was closed.
type closable struct {
	io.Reader
	closed bool
}

func (c *closable) Close() error { c.closed = true; return nil }

// picking is what pick gives of an answer.
func picking(t *testing.T, body io.Reader, header http.Header, asked []store.Span) (got []byte, given []store.Span, size int64, err error) {
	resp := &reply{Response: &http.Response{StatusCode: http.StatusPartialContent, Header: header, Body: http.NoBody}}
	through := &closable{closed: true} // unless it is to be read
	b, given, size, ok := pick(resp, asked, func(io.ReadCloser) io.ReadCloser {
		*through = closable{Reader: body}
		return through
	})
	if !ok {
		if !through.closed {
			t.Error("what is not read to its end is open")
		}
		return nil, nil, 0, errPart
	}
	got, err = io.ReadAll(b)
	return got, given, size, err
}

// Answers to a request for several ranges, in the forms that servers have, and that nobody has.
func TestPick(t *testing.T) {
	content := bytesOf(77, 1000)
	asked := []store.Span{{From: 10, To: 20}, {From: 100, To: 300}, {From: 990, To: 2000}, {From: 3000, To: 3001}}
	given := []store.Span{{From: 10, To: 20}, {From: 100, To: 300}, {From: 990, To: 1000}}
	want := slices.Concat(content[10:20], content[100:300], content[990:])
	body, contentType := severalOf(content, given)
	_, boundary, _ := strings.Cut(contentType, "boundary=")
	before, _, _ := strings.Cut(string(body), "bytes 990")
	replace := func(old, by string) string { return strings.ReplaceAll(string(body), old, by) }
	merged, mergedType := severalOf(content, []store.Span{{From: 5, To: 25}, {From: 90, To: 1000}})
	split, splitType := severalOf(content, []store.Span{{From: 0, To: 15}, {From: 15, To: 200}, {From: 200, To: 300}, {From: 990, To: 1000}})
	turned, turnedType := severalOf(content, []store.Span{{From: 10, To: 20}, {From: 990, To: 1000}, {From: 100, To: 300}})
	twice, twiceType := severalOf(content, []store.Span{{From: 10, To: 20}, {From: 10, To: 20}, {From: 100, To: 300}, {From: 990, To: 1000}})
	for name, tt := range map[string]struct {
		body, contentType, contentRange string
		n                               int // bytes that come; -1 if none of it is good
		ok                              bool
	}{
		"net/http":               {string(body), contentType, "", len(want), true},
		"nginx":                  {"\r\n" + string(body), contentType, "", len(want), true},
		"lines without CR":       {replace("\r\n", "\n"), contentType, "", len(want), true},
		"CloudFront":             {replace(boundary, "CloudFront:3F0A"), "multipart/byteranges; boundary=CloudFront:3F0A", "", len(want), true},
		"quoted":                 {replace(boundary, "a b:c"), `multipart/byteranges; boundary="a b:c"`, "", len(want), true},
		"merged":                 {string(merged), mergedType, "", len(want), true},
		"split":                  {string(split), splitType, "", len(want), true},
		"all as one range":       {string(content), "", "bytes 0-999/1000", len(want), true},
		"one range around it":    {string(content[7:]), "", "bytes 7-999/1000", len(want), true},
		"one range of it":        {string(content[10:20]), "", "bytes 10-19/1000", -1, false},
		"in another order":       {string(turned), turnedType, "", 10, false},
		"one twice":              {string(twice), twiceType, "", 10, false},
		"another first":          {replace("bytes 10-19/", "bytes 11-20/"), contentType, "", -1, false},
		"another size":           {replace("100-299/1000", "100-299/1001"), contentType, "", 10, false},
		"no size":                {replace("/1000", "/*"), contentType, "", -1, false},
		"beyond its size":        {replace("/1000", "/15"), contentType, "", -1, false},
		"longer than it says":    {replace("bytes 10-19/", "bytes 10-18/"), contentType, "", 9, false},
		"shorter than it says":   {replace("bytes 100-299/", "bytes 100-309/"), contentType, "", 210, false},
		"no boundary":            {string(body), "multipart/byteranges", "", -1, false},
		"another boundary":       {string(body), "multipart/byteranges; boundary=x", "", -1, false},
		"a long boundary":        {replace(boundary, strings.Repeat("x", 71)), "multipart/byteranges; boundary=" + strings.Repeat("x", 71), "", -1, false},
		"another type":           {string(body), strings.Replace(contentType, "byteranges", "mixed", 1), "", -1, false},
		"and a range of its own": {string(body), contentType, "bytes 10-999/1000", len(want), true},
		"two ranges of one part": {replace("Content-Type", "Content-Range: bytes 10-19/1000\r\nContent-Type"), contentType, "", -1, false},
		"encoded":                {replace("Content-Type", "Content-Encoding: gzip\r\nContent-Type"), contentType, "", -1, false},
		"a long line":            {replace("Content-Type", strings.Repeat("x", maxPartLine)+": "), contentType, "", -1, false},
		"many lines":             {replace("Content-Type", strings.Repeat("x: y\r\n", maxPartLines)+"Content-Type"), contentType, "", -1, false},
		"no colon":               {replace("Content-Type", "x\r\nContent-Type"), contentType, "", -1, false},
		"a preamble":             {"This is\r\n" + string(body), contentType, "", -1, false},
		"broken off":             {string(body[:len(body)/2]), contentType, "", -2, false},
		"nothing":                {"", contentType, "", -1, false},
		"a boundary and no part": {"--" + boundary + "--\r\n", contentType, "", -1, false},
		"fewer":                  {before, contentType, "", 210, false},
	} {
		header := http.Header{"Content-Type": {tt.contentType}}
		if tt.contentRange != "" {
			header.Set("Content-Range", tt.contentRange)
		}
		for _, r := range []io.Reader{strings.NewReader(tt.body), iotest.OneByteReader(strings.NewReader(tt.body)), iotest.DataErrReader(strings.NewReader(tt.body))} {
			got, of, size, err := picking(t, r, header, asked)
			switch {
			case (err == nil) != tt.ok || !bytes.HasPrefix(want, got) && name != "shorter than it says" && name != "longer than it says":
				t.Errorf("%s: %d bytes, right: %v, %v", name, len(got), bytes.HasPrefix(want, got), err)
			case tt.n >= -1 && len(got) != max(tt.n, 0) || tt.n == -1 && of != nil:
				t.Errorf("%s: %d bytes of %v, want %d", name, len(got), of, tt.n)
			case tt.n >= 0 && (size != 1000 || !slices.Equal(of, given)):
				t.Errorf("%s: %v of %d", name, of, size)
			}
		}
	}
}

// What weir reads of an answer with several ranges, another reader of such answers reads of it, too.
func FuzzPick(f *testing.F) {
	content := bytesOf(78, 255)
	add := func(ranges ...store.Span) {
		body, contentType := severalOf(content, ranges)
		_, boundary, _ := strings.Cut(contentType, "boundary=")
		f.Add(bytes.ReplaceAll(body, []byte(boundary), []byte("b")), []byte{10, 20, 100, 200})
	}
	add(store.Span{From: 10, To: 20}, store.Span{From: 100, To: 200})
	add(store.Span{From: 5, To: 230})
	add(store.Span{From: 10, To: 20}, store.Span{From: 100, To: 150}, store.Span{From: 150, To: 255})
	f.Add([]byte("--b\nContent-Range: bytes 0-9/255\n\n0123456789\n--b\ncontent-range:bytes 10-10/255\n\n0\n--b--"), []byte{0, 10, 10, 11})
	f.Fuzz(func(t *testing.T, body, ends []byte) {
		var asked []store.Span
		for at := int64(-1); len(ends) >= 2; ends = ends[2:] {
			e := store.Span{From: int64(ends[0]), To: int64(ends[1])}
			if e.From <= at || e.To <= e.From {
				break
			}
			asked, at = append(asked, e), e.To
		}
		if len(asked) < 2 {
			return
		}
		header := http.Header{"Content-Type": {"multipart/byteranges; boundary=b"}}
		got, given, size, err := picking(t, bytes.NewReader(body), header, asked)
		if len(got) > 0 && (len(given) == 0 || given[len(given)-1].To > size) {
			t.Fatalf("%v of %d", given, size)
		}
		if err != nil {
			return
		}
		// All of it was read: each byte is in the part that says so. A boundary in the
		// content of a part ends that for the other reader.
		has := make(map[int64]byte)
		parts, _ := partsOf(header, body)
		for _, part := range parts {
			at, total, ok := parseContentRange(part.contentRange)
			if !ok || total != size || int64(len(part.bytes)) != at.To-at.From {
				return
			}
			for i, b := range part.bytes {
				if _, ok := has[at.From+int64(i)]; !ok {
					has[at.From+int64(i)] = b
				}
			}
		}
		for _, e := range given {
			for i := e.From; i < e.To; i++ {
				b, ok := has[i]
				if ok && b != got[0] {
					t.Fatalf("at %d", i)
				}
				got = got[1:]
			}
		}
		if len(got) > 0 {
			t.Errorf("%d bytes more", len(got))
		}
	})
}
