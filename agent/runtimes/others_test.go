// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Programs that aren't known are remembered by their executables' names, and not
// without end.
func TestOthers(t *testing.T) {
	var o Others
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	self := filepath.Base(exe)
	o.See(os.Getpid(), "a-thread", "ghcr.io")
	o.See(os.Getpid(), "another", "docker.io")
	o.See(os.Getpid(), "another", "docker.io")
	if all := o.All(); len(all) != 1 || all[0].Program != self || !slices.Equal(all[0].Registries, []string{"docker.io", "ghcr.io"}) || all[0].LastSeen.IsZero() {
		t.Errorf("%+v", all)
	}
	const gone = 1 << 30
	o.See(gone, "crane", "ghcr.io")
	if len(o.All()) != 1 {
		t.Errorf("%+v", o.All())
	}
	for i := range 2 * maxOthers {
		o.See(gone, fmt.Sprint("program", i), "ghcr.io")
		o.See(gone, "busy", fmt.Sprintf("%d.azurecr.io", i))
	}
	all := o.All()
	if len(all) != maxOthers || slices.ContainsFunc(all, func(o Other) bool { return o.Program == self }) {
		t.Errorf("%d are remembered", len(all))
	}
	for _, p := range all {
		if p.Program == "busy" && len(p.Registries) != maxOtherHosts {
			t.Errorf("%+v", p)
		}
	}
}
