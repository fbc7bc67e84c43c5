// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"strings"
	"testing"
)

// TestWellKnown looks hosts up: registries by their domain, and what is near them
// and isn't one.
func TestWellKnown(t *testing.T) {
	h := NewHosts()
	for host, by := range map[string]string{
		"registry-1.docker.io": "registry-1.docker.io",
		"mirror.gcr.io":        "gcr.io",
		"gcr.io":               "gcr.io",
		"123456789012.dkr.ecr.eu-central-1.amazonaws.com":       "dkr.ecr.eu-central-1.amazonaws.com",
		"123456789012.dkr.ecr.cn-northwest-1.amazonaws.com.cn":  "dkr.ecr.cn-northwest-1.amazonaws.com.cn",
		"123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com": "dkr.ecr-fips.us-gov-west-1.amazonaws.com",
		"123456789012.dkr-ecr.us-east-1.on.aws":                 "dkr-ecr.us-east-1.on.aws",
		"company.jfrog.io":                                      "jfrog.io",
		"fra.ocir.io":                                           "ocir.io",
		"us.icr.io":                                             "icr.io",
		"x-registry.cn-hangzhou.cr.aliyuncs.com":                "cr.aliyuncs.com",
		"swr.cn-north-4.myhuaweicloud.com":                      "swr.cn-north-4.myhuaweicloud.com",
		// Others that are there.
		"docker.io": "", "auth.docker.io": "", "jfrog.io": "", "api.ecr.us-east-1.amazonaws.com": "",
		"dkr.ecr.us-east-1.amazonaws.com": "", "s3.us-east-1.amazonaws.com": "", "iam.cn-north-4.myhuaweicloud.com": "",
		"cr.cn-hangzhou.aliyuncs.com": "", "evilgcr.io": "", "us-east-1.amazonaws.com": "", "mirror.gcr.io:8443": "",
	} {
		if k, ok := h.Find(host); ok != (by != "") || k.Host != by {
			t.Errorf("%s is found as %+v, want %q", host, k, by)
		}
	}
	seen := map[string]bool{}
	for _, k := range h.All() {
		if seen[k.Host] || k.Host != Canonical(k.Host) || strings.Count(k.Host, ".") == 0 || k.Below && k.Subtree {
			t.Errorf("%+v is there twice, or is nothing that can be found", k)
		}
		seen[k.Host] = true
	}
}
