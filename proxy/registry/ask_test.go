// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

func TestScrub(t *testing.T) {
	c := http.Client{}
	_, err := c.Get("http://127.0.0.1:1/blob?X-Amz-Signature=verysecret")
	if err == nil || strings.Contains(scrub(fmt.Errorf("wrapped: %w", err)).Error(), "verysecret") {
		t.Error(scrub(err))
	}
	if plain := errors.New("plain"); !errors.Is(scrub(plain), plain) {
		t.Error("changed")
	}
}
