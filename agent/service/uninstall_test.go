// SPDX-License-Identifier: Apache-2.0

package service

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// What a killed agent was writing goes with the rest.
func TestRemoveOwnHalfWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "weir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{TagsFile, TagsFile + ".1234567", IdentityFile, IdentityFile + ".7654321"} {
		if err := os.WriteFile(filepath.Join(dir, n), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := removeOwn(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v, %v", left, err)
	}
}
