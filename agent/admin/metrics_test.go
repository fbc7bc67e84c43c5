// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"weir/agent/runtimes"
)

// What the rules and the dashboard ask for is what the agent has, with the
// values of labels that it gives.
func TestMonitoringNames(t *testing.T) {
	src, err := os.ReadFile("metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	have := make(map[string]bool)
	for _, m := range regexp.MustCompile(`= desc\("([a-z_]+)"`).FindAllStringSubmatch(string(src), -1) {
		have["weir_"+m[1]] = true
	}
	if !have["weir_build_info"] || !have["weir_registry_bytes_total"] {
		t.Fatalf("the metrics' names aren't found: %v", have)
	}
	values := map[string]string{"reach": runtimes.ReachIntercepted + " " + runtimes.ReachPassthrough + " " + runtimes.ReachStarting, "source": "store peers upstream", "result": "hit miss"}
	for _, file := range []string{"rules.yaml", "rules_test.yaml", "dashboard.json"} {
		b, err := os.ReadFile("../../deploy/monitoring/" + file)
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(`\bweir_[a-z_]+`).FindAllString(string(b), -1)
		if len(found) == 0 {
			t.Errorf("%s asks for nothing of weir's", file)
		}
		for _, name := range found {
			if !have[name] {
				t.Errorf("%s asks for %s, which the agent doesn't have", file, name)
			}
		}
		for _, m := range regexp.MustCompile(`\b(reach|source|result)!?=\\?"([a-z ]+)\\?"`).FindAllStringSubmatch(string(b), -1) {
			if !strings.Contains(" "+values[m[1]]+" ", " "+m[2]+" ") {
				t.Errorf("%s asks for %s=%q, which isn't one of %s", file, m[1], m[2], values[m[1]])
			}
		}
	}
}
