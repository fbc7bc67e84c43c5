// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"errors"
	"slices"
	"testing"
)

func TestExceptions(t *testing.T) {
	why, other := errors.New("a file"), errors.New("another")
	for _, tt := range []struct {
		all  map[string]error
		want []string
	}{
		{map[string]error{"a": nil, "b": nil}, nil},
		{map[string]error{"a": why, "b": nil}, []string{"a"}},
		{map[string]error{"a": why, "b": other}, []string{"a", "b"}},
		{map[string]error{"a": why, "b": why}, []string{"any registry"}},
	} {
		got := exceptions(tt.all)
		var hosts []string
		for h := range got {
			hosts = append(hosts, h)
		}
		slices.Sort(hosts)
		if !slices.Equal(hosts, tt.want) {
			t.Errorf("%v: %v", tt.all, got)
		}
	}
}
