// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"fmt"
	"strings"
	"time"
)

// TagTTL is for how long a tag is taken to be what its registry last said, without a
// question, for clients whose right is known. It is by the registry's host; the one
// without a name is for all others. The zero value asks each time.
type TagTTL map[string]time.Duration

// ParseTagTTL reads values of the form DURATION or REGISTRY=DURATION.
func ParseTagTTL(values []string) (TagTTL, error) {
	t := make(TagTTL)
	for _, v := range values {
		name, duration, named := strings.Cut(v, "=")
		host := ""
		if !named {
			duration = name
		} else if host, _ = NewHosts().Named(name); name == "" || host == "" {
			return nil, fmt.Errorf("%q names no registry", v)
		}
		d, err := time.ParseDuration(duration)
		if err != nil || d < 0 {
			return nil, fmt.Errorf("%q is not a duration such as 5m, or REGISTRY=5m", v)
		}
		t[host] = d
	}
	return t, nil
}

// of is what counts for a registry.
func (t TagTTL) of(up Upstream) time.Duration {
	if d, ok := t[up.host()]; ok {
		return d
	}
	return t[""]
}
