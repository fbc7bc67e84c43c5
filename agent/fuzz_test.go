// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func FuzzParseConnection(f *testing.F) {
	f.Add("   0: 0200000A:A3F2 0A00CB71:01BB 01 00000000:00000000 02:000004D2 00000000     0        0 31337 2 0000000000000000 20 4 30 10 -1")
	f.Add("  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode")
	f.Add("0 1 : 3 4 5 6 7 8 9")
	f.Fuzz(func(t *testing.T, line string) {
		if port, ino, ok := parseConnection(line); ok && (port == 0 || ino == "") {
			t.Errorf("port %d, inode %q", port, ino)
		}
	})
}

func FuzzParseUsers(f *testing.F) {
	f.Add("         0          0 4294967295\n", uint32(0))
	f.Add("0 1000 1\n1 100000 65536\n", uint32(165535))
	f.Add("0 4294967295 4294967295\n", uint32(4294967295))
	f.Fuzz(func(t *testing.T, uidMap string, uid uint32) {
		u, err := parseUsers(uidMap)
		if err != nil {
			return
		}
		if len(u) > len(strings.Split(uidMap, "\n")) {
			t.Errorf("%d ranges of %q", len(u), uidMap)
		}
		in := false
		for _, r := range u {
			in = in || uint64(uid) >= uint64(r.first) && uint64(uid) < uint64(r.first)+uint64(r.count)
		}
		if u.has(uid) != in {
			t.Errorf("%d in %v: %v", uid, u, !in)
		}
	})
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
		var rs registries
		if rs.set(content) != nil {
			return
		}
		for _, k := range rs.hosts.All() {
			if k.Host == "" || strings.ContainsAny(k.Host, "/ \t\n") {
				t.Errorf("the registry %q of %q", k.Host, content)
			}
			if known, ok := rs.hosts.Find(k.Host); !ok || known.Host != k.Host {
				t.Errorf("%q isn't found: %+v", k.Host, known)
			}
		}
	})
}

// FuzzState reads a state file that somebody or something has damaged.
func FuzzState(f *testing.F) {
	dir := f.TempDir()
	fresh := openState(dir, "certificate", slog.New(slog.DiscardHandler))
	fresh.installed("/", true)
	whole, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Add([]byte(`{"boot":"another","certificate":"certificate","installed":{"/":1}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, "state.json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		s := openState(dir, "certificate", slog.New(slog.DiscardHandler))
		if s.s.Boot != bootID() || s.s.Certificate != "certificate" {
			t.Errorf("taken for this boot's: %q", b)
		}
		s.installed("/new", true)
		s.forget(1)
	})
}
