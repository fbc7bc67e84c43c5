// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
)

// kind is what a request's path names.
type kind int

const (
	other    kind = iota // nothing that is kept: it is forwarded
	blob                 // /v2/NAME/blobs/DIGEST
	manifest             // /v2/NAME/manifests/REFERENCE
	base                 // /v2/, where clients ask whether they must log in
	uploads              // /v2/NAME/blobs/uploads/, where pushes of blobs begin
)

// target is what a path of the distribution API asks for.
type target struct {
	kind   kind
	repo   string
	digest digest.Digest // empty for a tag
	tag    string
}

// The grammar of the OCI distribution specification, "Pulling manifests".
var (
	nameRE = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagRE  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

// parsePath reads the (escaped) path of a request. Whatever it isn't sure of
// is other.
func parsePath(path string) target {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok || len(rest) > 1024 {
		return target{}
	}
	if rest == "" {
		return target{kind: base}
	}
	if repo, ok := strings.CutSuffix(strings.TrimSuffix(rest, "/"), "/blobs/uploads"); ok && isName(repo) {
		return target{kind: uploads, repo: repo}
	}
	// A repository's name may itself contain "blobs" or "manifests": the last
	// one in the path counts.
	i, k := strings.LastIndex(rest, "/manifests/"), manifest
	sep := len("/manifests/")
	if j := strings.LastIndex(rest, "/blobs/"); j > i {
		i, k, sep = j, blob, len("/blobs/")
	}
	if i < 0 {
		return target{}
	}
	t := target{kind: k, repo: rest[:i]}
	ref := rest[i+sep:]
	if !isName(t.repo) {
		return target{}
	}
	if d, err := digest.Parse(ref); err == nil {
		t.digest = d
		return t
	}
	if k == manifest && tagRE.MatchString(ref) {
		t.tag = ref
		return t
	}
	return target{}
}

func isName(repo string) bool { return len(repo) <= 255 && nameRE.MatchString(repo) }
