// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Each line of the document on runtimes names tests that there are.
func TestRuntimesDocument(t *testing.T) {
	doc, err := os.ReadFile("../../deploy/RUNTIMES.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		source.Write(b)
	}
	lines := 0
	for line := range strings.Lines(string(doc)) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| runtime |") {
			continue
		}
		lines++
		names := regexp.MustCompile(`\bTest\w+`).FindAllString(line, -1)
		if len(names) == 0 {
			t.Errorf("no test is named for %s", line)
		}
		for _, name := range names {
			if !strings.Contains(source.String(), "func "+name+"(t *testing.T)") {
				t.Errorf("there is no %s, named for %s", name, line)
			}
		}
	}
	if lines < 10 {
		t.Errorf("%d lines", lines)
	}
}
