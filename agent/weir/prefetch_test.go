// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"testing"
)

// FuzzDocument reads what a registry gives as a manifest or an index.
func FuzzDocument(f *testing.F) {
	const digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	f.Add([]byte(`{"config":{"digest":"` + digest + `","size":2},"layers":[{"digest":"` + digest + `","size":3}]}`))
	f.Add([]byte(`{"manifests":[{"digest":"` + digest + `","size":3,"platform":{"os":"linux","architecture":"amd64"}}]}`))
	f.Add([]byte(`{"config":{"digest":"../../../token","size":-2}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		doc, err := parseDocument(b)
		if err != nil {
			return
		}
		all := slices.Concat(doc.Layers, doc.Manifests)
		if doc.Config != nil {
			all = append(all, *doc.Config)
		}
		for _, d := range all {
			if d.Digest.Validate() != nil || d.Size < 0 {
				t.Errorf("%+v", d)
			}
		}
	})
}
