// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"weir/agent/internal/agenttest"
)

func TestSecondAgentIsRefused(t *testing.T) {
	agenttest.Root(t)
	dir := t.TempDir()
	left := filepath.Join(dir, pidFile) // by one that was killed, when others could read it
	if err := os.WriteFile(left, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	first, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if info, err := os.Stat(left); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("another user could hold the lock: %v, %v", info.Mode(), err)
	}
	_, err = Lock(dir)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("the second one: %v", err)
	}
}
