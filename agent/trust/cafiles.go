// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// lockDir opens the CA's directory. Two processes that start at once must not make
// two CAs: the lock goes with the descriptor.
func lockDir(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory of the CA: %w", err)
	}
	if err = checkOwner(d, 0o022); err == nil {
		if err = retryEINTR(func() error { return unix.Flock(int(d.Fd()), unix.LOCK_EX) }); err != nil {
			err = fmt.Errorf("lock %s: %w", dir, err)
		}
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// loadKey returns nil if there is no file.
func loadKey(path string) (*ecdsa.PrivateKey, error) {
	b, err := readOwn(path, 0o077)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// The parser's errors are left out: they may quote the key.
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("%s is not a PEM private key: restore it, or remove it and ca.crt to have a new CA made", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	key, ok := k.(*ecdsa.PrivateKey)
	if err != nil || !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%s is not a P-256 key: restore it, or remove it and ca.crt to have a new CA made", path)
	}
	return key, nil
}

// loadCert returns nil if there is no file.
func loadCert(path string) (*x509.Certificate, error) {
	b, err := readOwn(path, 0o022)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	cert, err := parseCert(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: remove it to have it made again from ca.key", path, err)
	}
	return cert, nil
}

// readOwn reads a regular file of this user that has none of the forbidden
// permission bits.
func readOwn(path string, forbidden fs.FileMode) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open file of the CA: %w", err)
	}
	defer f.Close()
	if err := checkOwner(f, forbidden); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, fmt.Errorf("read file of the CA: %w", err)
	}
	if len(b) > maxPEM {
		return nil, fmt.Errorf("%s is too large to be a file of the CA", path)
	}
	return b, nil
}

// checkOwner reports why f, a regular file or a directory, is not safe from
// other users.
func checkOwner(f *os.File, forbidden fs.FileMode) error {
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("stat file of the CA: %w", err)
	}
	if !fi.Mode().IsRegular() && !fi.IsDir() {
		return fmt.Errorf("%s is not a regular file", f.Name())
	}
	if open := fi.Mode().Perm() & forbidden; open != 0 {
		return fmt.Errorf("%s has mode %04o and is open to other users: if none of them can have used it, chmod %04o it; otherwise remove ca.key and ca.crt to have a new CA made",
			f.Name(), fi.Mode().Perm(), fi.Mode().Perm()&^forbidden)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("%s belongs to user %d: chown it to the user that runs the agent", f.Name(), st.Uid)
	}
	return nil
}

// writeDurably replaces the file name in d, which the caller has locked. After
// a crash there is the old file or the new one.
func writeDurably(d *os.File, name string, b []byte, perm fs.FileMode) error {
	path := filepath.Join(d.Name(), name)
	left, _ := filepath.Glob(filepath.Join(d.Name(), "."+name+"*")) // by a process that was killed, see renameio
	for _, l := range left {
		os.Remove(l)
	}
	err := renameio.WriteFile(path, b, perm, renameio.WithStaticPermissions(perm), renameio.WithTempDir(d.Name()))
	if err == nil {
		err = d.Sync()
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
