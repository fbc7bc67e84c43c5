// SPDX-License-Identifier: Apache-2.0

package registries

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"weir/proxy/registry"
)

func opened(t testing.TB, file string, configured ...string) *List {
	t.Helper()
	rs := &List{}
	if err := errors.Join(rs.Load(configured, ""), rs.OpenLearned(file)); err != nil {
		t.Fatal(err)
	}
	return rs
}

func TestLearn(t *testing.T) {
	file := filepath.Join(t.TempDir(), "learned.json")
	rs := opened(t, file, "named.example.com")
	learn := func(host string, want bool) {
		t.Helper()
		if added, err := rs.Learn(host, "dockerd", true); err != nil || added != want {
			t.Errorf("%s: %v, %v", host, added, err)
		}
	}
	learn("Registry.Example.com:443", true)
	learn("registry.example.com", false)
	learn("registry.example.com:8443", true)
	learn("10.1.2.3:5000", true)
	// What is known already stays what it is, and a host of a known domain gets a
	// directory of its own.
	learn("named.example.com", false)
	learn(registry.DockerHub, false)
	learn("gcr.io", false)
	learn("123456789012.dkr.ecr.us-east-1.amazonaws.com", true)
	if k, _ := rs.Hosts.Find("123456789012.dkr.ecr.us-east-1.amazonaws.com"); k.Learned || !k.Below {
		t.Errorf("it is %+v now", k)
	}
	names, dirs := rs.Names(), rs.Directories()
	if !slices.Contains(names, "registry.example.com:8443") || slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, "1234") }) {
		t.Errorf("the CA is to speak for %q", names)
	}
	if !slices.Contains(dirs, "123456789012.dkr.ecr.us-east-1.amazonaws.com") || slices.Contains(dirs, "dkr.ecr.us-east-1.amazonaws.com") {
		t.Errorf("directories are %q", dirs)
	}
	if ports := rs.Ports(); !slices.Equal(ports, []uint16{8443, 5000}) {
		t.Errorf("ports are %d", ports)
	}
	if recent := rs.Recent(); len(recent) != 4 {
		t.Errorf("recent are %q", recent)
	}
	// Who names a registry to weir does not mean a learned one.
	if _, ok := rs.Hosts.Named("registry.example.com"); ok {
		t.Error("the mirror knows a learned registry")
	}
	// Names that stand for others' too, or are none.
	for _, host := range []string{"com", "co.uk", "registry", "localhost:5000", "github.io", "127.0.0.1:5000", "[::1]:5000", "0.0.0.0", "a b.example.com", "é.example.com", "*.example.com", "", "fe80::1%eth0"} {
		if added, err := rs.Learn(host, "dockerd", true); err == nil || added {
			t.Errorf("%q was learned", host)
		}
	}
	// It lasts, and what is forgotten is not learned again.
	rs = opened(t, file)
	learn("registry.example.com", false)
	for _, host := range []string{"registry.example.com", "never.example.com"} {
		if was, err := rs.Forget(host); err != nil || !was {
			t.Errorf("%s: %v, %v", host, was, err)
		}
		learn(host, false)
	}
	if was, err := rs.Forget("ghcr.io"); err != nil || was {
		t.Errorf("ghcr.io: %v, %v", was, err)
	}
	rs = opened(t, file)
	learn("registry.example.com", false)
	if _, ok := rs.Hosts.Find("registry.example.com"); ok {
		t.Error("what was forgotten is known")
	}
	if err := rs.Revert("10.1.2.3:5000"); err != nil {
		t.Error(err)
	}
	learn("10.1.2.3:5000", true)
	// Without a file none is.
	rs = &List{}
	if added, err := rs.Learn("other.example.com", "dockerd", true); err != nil || added {
		t.Errorf("%v, %v", added, err)
	}
}

// So many are learned, half of them from pods, and not more.
func TestLearnBound(t *testing.T) {
	file := filepath.Join(t.TempDir(), "learned.json")
	rs := opened(t, file)
	for i := range maxLearned + 1 {
		added, err := rs.Learn(fmt.Sprintf("r%d.example.com", i), "containerd", i >= maxLearned/2)
		if want := i < maxLearned; added != want || (err == nil) != want {
			t.Errorf("%d: %v, %v", i, added, err)
		}
		if i == maxLearned/2-1 {
			if added, err := rs.Learn("pod.example.com", "dockerd", false); added || !errors.Is(err, errBound) {
				t.Errorf("%v, %v", added, err)
			}
		}
	}
	for i := range maxLearned + 10 {
		if _, err := rs.Forget(fmt.Sprintf("f%d.example.com", i)); err != nil {
			t.Fatal(err)
		}
	}
	if all := opened(t, file).All(); len(all) != 2*maxLearned+len(registry.WellKnown) {
		t.Errorf("%d are kept", len(all))
	}
}

// A file that makes no sense is as if nothing had been learned.
func FuzzLearned(f *testing.F) {
	whole, _ := json.Marshal([]Registry{{Host: "registry.example.com:8443", State: StateLearned, By: "dockerd"}, {Host: "x.example.com", State: StateForgotten}})
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Add([]byte(`[{"host":"com","state":"learned"}]`))
	f.Add([]byte(`[{"host":"a.example.com","state":"learned"},{"host":"a.example.com","state":"forgotten"}]`))
	file := filepath.Join(f.TempDir(), "learned.json")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		rs := &List{}
		if err := rs.Load(nil, ""); err != nil {
			t.Fatal(err)
		}
		_ = rs.OpenLearned(file)
		if more := rs.Hosts.All()[len(registry.WellKnown):]; len(more) > maxLearned || slices.ContainsFunc(more, func(k registry.Known) bool { return checkName(k.Host) != nil }) {
			t.Errorf("%+v", more)
		}
	})
}
