// SPDX-License-Identifier: Apache-2.0

// Package service makes weir a service of a machine, keeps a second agent from
// starting beside a running one, and removes weir with all that it has left.
package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
	"weir/agent/systemd"
	"weir/deploy"
)

// Where weir is on a node that it was installed on as a service.
const (
	unitFile   = "/etc/systemd/system/weir.service"
	binaryFile = "/usr/local/bin/weir" // as the unit has it
	// SettingsFile has flags of the agent as WEIR_ variables. It is the
	// user's: weir makes none, and leaves it where it is.
	SettingsFile = "/etc/weir/weir.env"
)

// Install makes the running binary a service of this node, or the new version of
// the service that weir is already. It returns when the service is ready, and
// whether it had to be started for that: when nothing is new it goes on as it
// is.
func Install(ctx context.Context) (started bool, err error) {
	if os.Geteuid() != 0 {
		return false, errors.New("weir install must run as root: it makes a system service; use sudo")
	}
	manager, err := systemd.Own()
	if err != nil {
		return false, fmt.Errorf("%w; have what starts services here run `weir agent`, or run weir in a container", err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return false, fmt.Errorf("reading weir's own binary: %w", err)
	}
	for _, f := range []struct {
		path    string
		content []byte
		mode    os.FileMode
	}{{binaryFile, self, 0o755}, {unitFile, []byte(deploy.Unit), 0o644}} {
		changed, err := replace(f.path, f.content, f.mode)
		if err != nil {
			return false, fmt.Errorf("installing %s: %w", f.path, err)
		}
		started = started || changed
	}
	if _, err := manager.Run(ctx, "daemon-reload"); err != nil {
		return false, err
	}
	if _, err := manager.Run(ctx, "enable", "weir.service"); err != nil {
		return false, err
	}
	if !started {
		if _, err := manager.Run(ctx, "is-active", "--quiet", "weir.service"); err == nil {
			return false, nil
		}
	}
	// The old one lets what it serves end, and what begins meanwhile goes direct.
	if _, err := manager.Run(ctx, "restart", "weir.service"); err != nil {
		return true, fmt.Errorf("%w; `journalctl -u weir` and `weir doctor` say why", err)
	}
	return true, nil
}

// replace makes a file have a content. Who reads it meanwhile sees the old one
// or the new one, and a binary that is running goes on.
func replace(path string, content []byte, mode os.FileMode) (changed bool, err error) {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return false, os.Chmod(path, mode)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, err
	}
	err = renameio.WriteFile(path, content, mode, renameio.WithStaticPermissions(mode), renameio.WithTempDir(filepath.Dir(path)))
	return err == nil, err
}

// removeService ends the service and takes it out, when weir is one here. In a
// container, or where weir was started by other means, there is none.
func removeService(ctx context.Context) (removed []string, err error) {
	if _, err := os.Lstat(unitFile); err != nil {
		return nil, nil
	}
	manager, none := systemd.Own()
	if none == nil {
		if _, err := manager.Run(ctx, "disable", "--now", "weir.service"); err != nil {
			return nil, err
		}
	}
	for _, path := range []string{unitFile, binaryFile} {
		switch rerr := os.Remove(path); {
		case rerr == nil:
			removed = append(removed, path)
		case !errors.Is(rerr, os.ErrNotExist):
			err = errors.Join(err, rerr)
		}
	}
	if none == nil {
		_, rerr := manager.Run(ctx, "daemon-reload")
		err = errors.Join(err, rerr)
	}
	return removed, err
}

// Settings reads the variables of a systemd environment file, systemd.exec(5):
// KEY=VALUE lines, with or without quotes around the value. A file that isn't
// there has none.
func Settings(file string) (vars map[string]string, err error) {
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil, err
	}
	vars = make(map[string]string)
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		name, value, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		vars[strings.TrimSpace(name)] = value
	}
	return vars, nil
}
