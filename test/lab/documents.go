// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

var (
	shRE = regexp.MustCompile("(?ms)^```sh\n(.*?)^```$")
	// commentRE is a comment at the end of a line.
	commentRE = regexp.MustCompile(`(^|\s)#(\s.*)?$`)
)

// Commands are the commands in a document's blocks of shell, in their order,
// without comments. A line that ends in a backslash goes on.
func Commands(t testing.TB, file string) (all []string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range shRE.FindAllStringSubmatch(string(b), -1) {
		command := ""
		for line := range strings.Lines(block[1]) {
			line = strings.TrimSpace(commentRE.ReplaceAllString(strings.TrimSuffix(line, "\n"), ""))
			if rest, more := strings.CutSuffix(line, `\`); more {
				command += rest
				continue
			}
			if command += line; command != "" {
				all = append(all, command)
			}
			command = ""
		}
	}
	if len(all) == 0 {
		t.Fatalf("%s has no commands", file)
	}
	return all
}
