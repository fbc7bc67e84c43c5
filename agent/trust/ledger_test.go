// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

func openLedger(t *testing.T, path string) *Ledger {
	t.Helper()
	l, err := OpenLedger(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestLedger(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	l := openLedger(t, path)
	res := Result{Dirs: []string{"/etc/docker", "/etc/docker//certs.d"}, Files: []string{"/etc/a \"b\"\n"}}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for _, root := range []string{"/", "/other"} {
				if err := l.Record(root, res); err != nil {
					t.Errorf("Record: %v", err)
				}
			}
		})
	}
	wg.Wait()
	want := []Made{{"/", "/etc/docker", true}, {"/", "/etc/docker/certs.d", true}, {"/", "/etc/a \"b\"\n", false}}
	check := func(l *Ledger, what string) {
		t.Helper()
		if got := l.Made("/"); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	check(l, "recorded")
	l.Close()
	l = openLedger(t, path)
	check(l, "opened again")
	l.Close()

	// A crash in the middle of a line.
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(b, `{"root":"/","pa`...), 0o600); err != nil {
		t.Fatal(err)
	}
	l = openLedger(t, path)
	check(l, "after a crash")
	if err := l.Record("/", Result{Files: []string{"/new"}}); err != nil {
		t.Fatal(err)
	}
	want = append(want, Made{"/", "/new", false})
	check(l, "recorded after a crash")
	l.Close()
	l = openLedger(t, path)
	check(l, "opened again after a crash")
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

func TestLedgerDamaged(t *testing.T) {
	for _, s := range []string{"x\n", "{}\n", `{"root":"/","path":"etc"}` + "\n", `{"root":"/","path":"/etc/../x"}` + "\n",
		`{"root":"/","path":"/"}` + "\n", "\x00\x00\n", `{"root":"/","path":"/a"}` + "\n\n"} {
		path := filepath.Join(t.TempDir(), "ledger")
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenLedger(path); err == nil {
			t.Errorf("%q was read", s)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != s {
			t.Errorf("%q was changed to %q, %v", s, b, err)
		}
	}
}

func FuzzParseLedger(f *testing.F) {
	f.Add([]byte(`{"root":"/","path":"/etc/docker","dir":true}` + "\n" + `{"root":"/","path":"/a"}` + "\n"))
	f.Add([]byte(`{"root":"/","pa`))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		made, whole, err := parseLedger(b)
		if err != nil {
			return
		}
		enc, err := encodeLedger(made)
		if err != nil {
			t.Fatal(err)
		}
		again, n, err := parseLedger(enc)
		if err != nil || n != len(enc) || !slices.Equal(again, made) {
			t.Errorf("%q gives %v, written and read again %v, %v", b[:whole], made, again, err)
		}
	})
}
