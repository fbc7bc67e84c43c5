// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/xml"
	"os"
	"path/filepath"
	"testing"

	"weir/test/lab"
)

// outcomes are the results of the OCI distribution conformance tests by name.
func outcomes(t *testing.T, node *lab.Node, program, host string) map[string]string {
	t.Helper()
	dir := t.TempDir()
	// Its exit code says whether all passed, which no registry does.
	out, _ := node.Output("env", "OCI_REGISTRY="+host, "OCI_RESULTS_DIR="+dir, "OCI_USERNAME=alice", "OCI_PASSWORD=wonderland", program)
	b, err := os.ReadFile(filepath.Join(dir, "junit.xml"))
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	type result struct {
		Name    string    `xml:"name,attr"`
		Failure *struct{} `xml:"failure"`
		Error   *struct{} `xml:"error"`
		Skipped *struct{} `xml:"skipped"`
	}
	var results struct {
		Suites []struct {
			Cases []result `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(b, &results); err != nil {
		t.Fatal(err)
	}
	all := make(map[string]string)
	for _, s := range results.Suites {
		for _, c := range s.Cases {
			switch {
			case c.Failure != nil, c.Error != nil:
				all[c.Name] = "failed"
			case c.Skipped != nil:
				all[c.Name] = "skipped"
			default:
				all[c.Name] = "passed"
			}
		}
	}
	return all
}

// The OCI distribution conformance tests come to the same results through weir
// as without it, for two implementations of registries.
func TestConformance(t *testing.T) {
	t.Parallel()
	in := lab.NewInternet(t)
	for name, registries := range map[string][2]*lab.Registry{
		"distribution": {in.Registry("ghcr.io"), in.Registry("quay.io")},
		"crane":        {in.CraneRegistry("nvcr.io"), in.CraneRegistry("cgr.dev")},
	} {
		through, direct := registries[0], registries[1]
		t.Run(name, func(t *testing.T) {
			for _, r := range registries {
				r.User("alice", "wonderland")
			}
			node := in.Node()
			agent := node.Agent()
			want := outcomes(t, node, lab.Tool(t, "conformance"), direct.Host)
			got := outcomes(t, node, node.As(lab.Tool(t, "conformance"), "crane"), through.Host)
			passed := 0
			for name, w := range want {
				if got[name] != w {
					t.Errorf("%s: %s through weir, %s without", name, got[name], w)
				}
				if w == "passed" {
					passed++
				}
			}
			if len(got) != len(want) || passed < 20 {
				t.Errorf("%d results through weir, %d without, %d of them passed", len(got), len(want), passed)
			}
			if direct.Log.All(nil) == nil || through.Log.All(nil) == nil {
				t.Error("a registry was not asked")
			}
			s := agent.Status()
			hits := false
			for _, r := range s.Registries {
				hits = hits || r.Registry == through.Host && r.Hits > 0
			}
			if !hits {
				t.Errorf("nothing came from the store: %+v", s.Registries)
			}
			t.Logf("%d tests, %d passed by the registry itself, the same through weir", len(want), passed)
		})
	}
}
