// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"encoding/json"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"weir/agent/procfs"
	"weir/agent/trust"
)

// Mirrors returns the mirrors that the runtime is configured to ask before the
// registries themselves.
func (rt *Runtime) Mirrors() (mirrors []string) {
	add := func(all ...string) {
		for _, m := range all {
			if !slices.Contains(mirrors, m) {
				mirrors = append(mirrors, m)
			}
		}
	}
	args := procfs.Strings(rt.PID, "cmdline")
	for i, arg := range args {
		if m, ok := strings.CutPrefix(arg, "--registry-mirror="); ok {
			add(m)
		} else if arg == "--registry-mirror" && i+1 < len(args) {
			add(args[i+1])
		}
	}
	root, err := trust.OpenRoot(rt.PID)
	if err != nil {
		return mirrors
	}
	defer root.Close()
	if rt.kind.name == "dockerd" {
		var config struct {
			Mirrors []string `json:"registry-mirrors"`
		}
		if b, err := root.ReadFile("/etc/docker/daemon.json", maxSetting); err == nil && json.Unmarshal(b, &config) == nil {
			add(config.Mirrors...)
		}
	}
	if rt.kind.contentStore {
		for _, dir := range certsDOf(rt, root) {
			names, _ := root.ReadDir(dir)
			for _, name := range names {
				if b, err := root.ReadFile(filepath.Join(dir, name, "hosts.toml"), maxSetting); err == nil {
					for _, m := range hostRE.FindAllSubmatch(b, 8) {
						add(string(m[1]))
					}
				}
			}
		}
	}
	return mirrors
}

// hostRE finds the hosts that a hosts.toml puts before the registry itself.
var hostRE = regexp.MustCompile(`(?m)^\s*\[host\."([^"\n]+)"\]`)
