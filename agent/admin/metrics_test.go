// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"weir/agent/runtimes"
)

type metric struct {
	name, help string
	labels     []string
	histogram  bool
}

// metrics are weir's own, as the source has them.
func metrics(t *testing.T) (all []metric) {
	t.Helper()
	label := regexp.MustCompile(`"([a-z]+)"`)
	for file, re := range map[string]string{
		"metrics.go":                        `= desc\("([a-z_]+)", "([^"]+)"((?:, "[a-z]+")*)\)`,
		"../../proxy/registry/durations.go": `: histogram\("([a-z_]+)", "([^"]+)"`,
	} {
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(re).FindAllStringSubmatch(string(src), -1)
		if len(found) < 3 {
			t.Fatalf("%s has %d metrics", file, len(found))
		}
		for _, m := range found {
			one := metric{name: "weir_" + m[1], help: m[2]}
			if len(m) == 3 {
				one.labels, one.histogram = []string{"source"}, true
			} else {
				for _, l := range label.FindAllStringSubmatch(m[3], -1) {
					one.labels = append(one.labels, l[1])
				}
			}
			all = append(all, one)
		}
	}
	return all
}

// The document has each metric with its labels and its help, and no other.
func TestMetricsDocument(t *testing.T) {
	doc, err := os.ReadFile("../../deploy/METRICS.md")
	if err != nil {
		t.Fatal(err)
	}
	table := string(doc)
	all := metrics(t)
	for _, m := range all {
		row := "| `" + m.name + "` | –"
		if len(m.labels) > 0 {
			row = "| `" + m.name + "` | `" + strings.Join(m.labels, "`, `") + "`"
		}
		if row += " | " + m.help; !strings.Contains(table, row) {
			t.Errorf("not in METRICS.md: %s", row)
		}
	}
	if n := strings.Count(table, "| `weir_"); n != len(all) {
		t.Errorf("METRICS.md has %d metrics, the agent %d", n, len(all))
	}
}

// What the rules and the dashboard ask for is what the agent has, with the
// values of labels that it gives.
func TestMonitoringNames(t *testing.T) {
	have := make(map[string]bool)
	for _, m := range metrics(t) {
		have[m.name] = true
		if m.histogram {
			have[m.name+"_bucket"] = true
		}
	}
	values := map[string]string{"reach": runtimes.ReachIntercepted + " " + runtimes.ReachPassthrough + " " + runtimes.ReachStarting, "source": "store peer upstream", "result": "hit miss", "kind": "no_answer rate_limited server_error"}
	for _, file := range []string{"rules.yaml", "rules_test.yaml", "dashboard.json"} {
		b, err := os.ReadFile("../../deploy/chart/monitoring/" + file)
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
		for _, m := range regexp.MustCompile(`\b(reach|source|result|kind)!?=\\?"([a-z ]+)\\?"`).FindAllStringSubmatch(string(b), -1) {
			if !strings.Contains(" "+values[m[1]]+" ", " "+m[2]+" ") {
				t.Errorf("%s asks for %s=%q, which isn't one of %s", file, m[1], m[2], values[m[1]])
			}
		}
	}
}
