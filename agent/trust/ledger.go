// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"sync"
)

// maxLedger bounds the ledger file: some hundred thousand entries.
const maxLedger = 16 << 20

// Made is a file or directory that weir made.
type Made struct {
	// Root is the caller's name for the root file system, "/" for the host's.
	Root string `json:"root"`
	// Path is absolute below that root.
	Path string `json:"path"`
	// Dir tells a directory from a file.
	Dir bool `json:"dir,omitempty"`
}

// Ledger remembers, across restarts of the agent, what was made in root file
// systems that outlive it, so that it can all be removed. It is a file with a
// JSON object a line. Its methods may be called concurrently, but one process
// at a time has it open.
type Ledger struct {
	mu   sync.Mutex
	f    *os.File
	made []Made
}

// OpenLedger opens the ledger at path, or makes it. A last line that a crash has
// cut short is dropped; any other damage is an error.
func OpenLedger(path string) (*Ledger, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxLedger+1))
	if err == nil && len(b) > maxLedger {
		err = ErrTooLarge
	}
	var made []Made
	var whole int
	if err == nil {
		made, whole, err = parseLedger(b)
	}
	if err == nil && whole < len(b) {
		err = f.Truncate(int64(whole))
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("read ledger %s: %w", path, err)
	}
	return &Ledger{f: f, made: made}, nil
}

// parseLedger returns the entries in b and the length of its complete lines.
func parseLedger(b []byte) (made []Made, whole int, err error) {
	for line := 1; ; line++ {
		end := bytes.IndexByte(b[whole:], '\n')
		if end < 0 {
			return made, whole, nil
		}
		var m Made
		if err := json.Unmarshal(b[whole:whole+end], &m); err != nil {
			return nil, 0, fmt.Errorf("line %d: %w", line, err)
		}
		if m.Root == "" || !path.IsAbs(m.Path) || path.Clean(m.Path) != m.Path || m.Path == "/" {
			return nil, 0, fmt.Errorf("line %d: not a path that weir made", line)
		}
		made = append(made, m)
		whole += end + 1
	}
}

// Record adds what res has made in root. When it returns the entries are on
// disk. Files that a crash before that left out are found by [Uninstall] in the
// usual places; of directories, it leaves those above the registries'.
func (l *Ledger) Record(root string, res Result) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var added []Made
	add := func(m Made) {
		if !slices.Contains(l.made, m) && !slices.Contains(added, m) {
			added = append(added, m)
		}
	}
	for _, d := range res.Dirs {
		add(Made{Root: root, Path: path.Clean(d), Dir: true})
	}
	for _, f := range res.Files {
		add(Made{Root: root, Path: path.Clean(f)})
	}
	if len(added) == 0 {
		return nil
	}
	b, err := encodeLedger(added)
	if err != nil {
		return err
	}
	if _, err := l.f.Write(b); err != nil {
		return fmt.Errorf("write ledger: %w", err)
	}
	if err := l.f.Sync(); err != nil {
		return fmt.Errorf("sync ledger: %w", err)
	}
	l.made = append(l.made, added...)
	return nil
}

// Made returns what was made in root.
func (l *Ledger) Made(root string) []Made {
	l.mu.Lock()
	defer l.mu.Unlock()
	var made []Made
	for _, m := range l.made {
		if m.Root == root {
			made = append(made, m)
		}
	}
	return made
}

// Close closes the file.
func (l *Ledger) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.f.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
		return fmt.Errorf("close ledger: %w", err)
	}
	return nil
}

func encodeLedger(made []Made) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for _, m := range made {
		if err := enc.Encode(m); err != nil {
			return nil, fmt.Errorf("encode ledger: %w", err)
		}
	}
	return b.Bytes(), nil
}
