// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"mime"
	"net/http"

	"github.com/opencontainers/go-digest"
)

// stale says whether the client may have a digest while the upstream gives no
// answer, as a question needs it.
func (x *exchange) stale(d digest.Digest) func() bool {
	may := x.allowsStale(d)
	return func() bool { return may }
}

// failed says whether an answer is none to the question: 429 or 5xx says something
// about the upstream, and nothing about what was asked for, and what isn't the
// registry's says nothing at all. Where the registry redirects to, a page or a
// refusal is an answer: a login page, for one.
func (x *exchange) failed(resp *http.Response) bool {
	return resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500 || x.own(resp) && foreign(resp)
}

// foreign says whether an answer is hardly a registry's, but that of something in
// its stead: a page for people (a challenge, a captive portal), or a refusal
// without a word. A registry's own has the version of the API in its header, or a
// challenge (distribution specification, "Error Codes"; RFC 9110, section 11.6.1),
// or an error in JSON.
func foreign(resp *http.Response) bool {
	if resp.Header.Get("Cf-Mitigated") != "" {
		return true
	}
	if resp.Header.Get("Docker-Distribution-Api-Version") != "" || resp.Header.Get("Www-Authenticate") != "" || resp.Header.Get("Docker-Content-Digest") != "" {
		return false
	}
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	switch resp.StatusCode {
	case http.StatusOK, http.StatusUnauthorized:
		return mediaType == "text/html"
	case http.StatusForbidden:
		return mediaType == "text/html" || mediaType == ""
	}
	return false
}
