// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"weir/agent/procfs"
	"weir/agent/trust"
	"weir/proxy/registry"
	"weir/proxy/upstream"
)

// maxSetting bounds a file of certificates.
const maxSetting = 1 << 20

// Settings is settings, and an error when a runtime's files can't be read in time.
func (rs *Runtimes) Settings(rt *Runtime, known registry.Known, host string) (upstream.Settings, error) {
	return bounded(rs, rt, func() (upstream.Settings, error) { return settings(rt, known, host) })
}

// settings returns what a runtime's certs.d directories have for a registry:
// CAs (*.crt) that it trusts beside the system's, and certificates (*.cert with
// their *.key) that it can show (Docker, "Verify repository client with
// certificates"; containers-certs.d(5)). weir speaks to the registry in the
// runtime's place, so it has to verify and to show the same.
func settings(rt *Runtime, known registry.Known, host string) (s upstream.Settings, err error) {
	root, err := trust.OpenRoot(rt.PID)
	if err != nil {
		return s, err
	}
	defer root.Close()
	names := []string{host}
	if known.Name != "" {
		names = append(names, known.Name)
	}
	uid, err := procfs.User(rt.PID)
	if err != nil {
		return s, err
	}
	dirs := slices.Concat(rt.userSettings(), rt.kind.settings)
	if rt.kind.contentStore {
		dirs = append(dirs, certsDOf(rt, root)...)
	}
	key := sha256.New()
	for _, dir := range dirs {
		for _, name := range names {
			if err := readSettings(&s, root, filepath.Join(dir, name), key.Write); err != nil {
				return upstream.Settings{}, err
			}
			// weir reads as root: it must not show a registry what the
			// runtime's user may not read.
			if uid != 0 && len(s.Certificates) > 0 {
				return upstream.Settings{}, fmt.Errorf("%s has a client certificate, and the process is not root's", filepath.Join(dir, name))
			}
		}
	}
	if s.Roots != nil || len(s.Certificates) > 0 {
		s.Key = hex.EncodeToString(key.Sum(nil))
	}
	return s, nil
}

func readSettings(s *upstream.Settings, root *trust.Root, dir string, sum func([]byte) (int, error)) error {
	files, err := root.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	slices.Sort(files)
	for _, file := range files {
		path := filepath.Join(dir, file)
		switch filepath.Ext(file) {
		case ".crt":
			pem, err := root.ReadFile(path, maxSetting)
			if err != nil {
				return err
			}
			if trust.IsNodeCA(pem) {
				continue
			}
			if s.Roots == nil {
				if s.Roots, err = x509.SystemCertPool(); err != nil {
					s.Roots = x509.NewCertPool()
				}
			}
			if !s.Roots.AppendCertsFromPEM(pem) {
				return fmt.Errorf("%s has no PEM certificate", path)
			}
			_, _ = sum(pem)
		case ".cert":
			cert, err := root.ReadFile(path, maxSetting)
			if err != nil {
				return err
			}
			key, err := root.ReadFile(strings.TrimSuffix(path, ".cert")+".key", maxSetting)
			if err != nil {
				return err
			}
			pair, err := tls.X509KeyPair(cert, key)
			if err != nil {
				return fmt.Errorf("%s and its key: %w", path, err)
			}
			s.Certificates = append(s.Certificates, pair)
			_, _ = sum(cert)
			_, _ = sum(key)
		}
	}
	return nil
}
