// SPDX-License-Identifier: Apache-2.0

package registries

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"weir/agent/trust"
	"weir/proxy/registry"
)

func TestRegistries(t *testing.T) {
	dir := t.TempDir()
	ca, err := trust.OpenCA(filepath.Join(dir, "ca"), []string{"a.test"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	pem := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(pem, ca.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "registries")
	write := func(content string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# ours\nlisted.a.test # for now\n\n")
	var rs List
	if err := rs.Load([]string{"Plain.test", "own.test:5000=" + pem}, file); err != nil {
		t.Fatal(err)
	}
	if rs.Roots("plain.test") != nil || rs.Roots("own.test:5000") == nil || rs.Roots("own.test") != nil {
		t.Error("the wrong registry has a CA of its own")
	}
	known := func(want string) {
		t.Helper()
		var got []string
		for _, k := range rs.Hosts.All()[len(registry.WellKnown):] {
			got = append(got, k.Host)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("known are %q, want %q", got, want)
		}
	}
	known("plain.test own.test:5000 listed.a.test")
	// A changed file counts at once.
	var told []string
	changed := func(added ...string) { told = added }
	write("new.a.test\nelse.test\n")
	rs.reload(changed, slog.New(slog.DiscardHandler))
	known("plain.test own.test:5000 new.a.test else.test")
	recent := rs.Recent()
	slices.Sort(recent)
	if !slices.Equal(told, []string{"new.a.test", "else.test"}) || !slices.Equal(recent, []string{"else.test", "new.a.test"}) {
		t.Errorf("%q were told, %q are recent", told, recent)
	}
	// One that makes no sense doesn't.
	told = nil
	write("a/b\n")
	rs.reload(changed, slog.New(slog.DiscardHandler))
	os.Remove(file)
	rs.reload(changed, slog.New(slog.DiscardHandler))
	known("plain.test own.test:5000 new.a.test else.test")
	if told != nil {
		t.Errorf("%q were told", told)
	}

	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "=" + pem, "x.test=" + filepath.Join(dir, "none"), "x.test=" + empty} {
		var rs List
		if err := rs.Load([]string{bad}, ""); err == nil || strings.Contains(err.Error(), "\n") || !utf8.ValidString(err.Error()) {
			t.Errorf("--registry %q: %v", bad, err)
		}
	}
}

// FuzzRegistryFile reads files of registries; those that name a file of a CA
// aren't for here.
func FuzzRegistryFile(f *testing.F) {
	f.Add([]byte("registry.example.com # a comment\n\nregistry.lan:5000\n"))
	f.Add([]byte("a/b\n"))
	f.Add([]byte("[::1]:5000\n*.example.com\n.\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		if strings.Contains(string(content), "=") {
			return
		}
		var rs List
		if rs.set(content) != nil {
			return
		}
		for _, k := range rs.Hosts.All() {
			if k.Host == "" || strings.ContainsAny(k.Host, "/ \t\n") {
				t.Errorf("the registry %q of %q", k.Host, content)
			}
			host := k.Host
			if k.Below {
				host = "some." + host
			}
			if known, ok := rs.Hosts.Find(host); !ok || known.Host != k.Host {
				t.Errorf("%q isn't found: %+v", k.Host, known)
			}
		}
	})
}
