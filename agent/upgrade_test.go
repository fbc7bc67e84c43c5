// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"weir/agent/service"
	"weir/agent/trust"
	"weir/proxy/rights"
)

// earlier are data directories that earlier versions have made, each by a
// containerd's pull of docker.io/library/debian:12. Those from before the first
// release are named by their commits.
const earlier = "testdata/data"

// opened opens what a data directory has, as an agent does when it starts, until
// the test ends or end is called.
func opened(t *testing.T, dir string, log io.Writer) (a *Agent, end func()) {
	t.Helper()
	key := filepath.Join(t.TempDir(), "swarm.key")
	if err := os.WriteFile(key, []byte("/key/swarm/psk/1.0.0/\n/base16/\n"+strings.Repeat("5a", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a = &Agent{conf: Config{DataDir: dir, SwarmKey: key, PeerListen: "127.0.0.1:0"}, metrics: prometheus.NewRegistry(), log: slog.New(slog.NewTextHandler(log, nil))}
	a.ctx, a.cancel = context.WithCancel(t.Context())
	end = func() {
		a.cancel()
		for i := len(a.stops) - 1; i >= 0; i-- {
			a.stops[i]()
		}
		a.stops = nil
	}
	t.Cleanup(end)
	for _, p := range []part{a.loadRegistries, a.openTrust, a.openStore, a.joinPeers, a.openProxy} {
		stop, err := p()
		if stop != nil {
			a.stops = append(a.stops, stop)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return a, end
}

// copied copies a data directory, with the modes that git doesn't keep.
func copied(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "weir")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(to, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func read(t *testing.T, path ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// After an upgrade a node is the same one to its runtimes and its peers, and
// knows and has what it knew and had.
func TestDataOfEarlierVersions(t *testing.T) {
	dirs, err := os.ReadDir(earlier)
	if err != nil || len(dirs) == 0 {
		t.Fatal(err, dirs)
	}
	for _, d := range dirs {
		t.Run(d.Name(), func(t *testing.T) {
			was := filepath.Join(earlier, d.Name())
			dir := copied(t, was)
			var log bytes.Buffer
			a, end := opened(t, dir, &log)

			// A runtime that has read the earlier certificate trusts what is signed now.
			block, _ := pem.Decode(read(t, was, "ca", "ca.crt"))
			old, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			roots := x509.NewCertPool()
			roots.AddCert(old)
			leaf, err := a.ca.Leaf("registry-1.docker.io")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := leaf.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "registry-1.docker.io"}); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(read(t, dir, "ca", "ca.key"), read(t, was, "ca", "ca.key")) {
				t.Error("the CA has another key")
			}

			// What was installed is known, and removed by uninstalling.
			node := t.TempDir()
			for line := range bytes.Lines(read(t, was, service.LedgerFile)) {
				var m trust.Made
				if err := json.Unmarshal(line, &m); err != nil {
					t.Fatal(err)
				}
				found := false
				for _, have := range a.ledger.Made(m.Root) {
					found = found || have == m
				}
				if !found {
					t.Errorf("%+v is not known", m)
				}
				if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(node, m.Path)), 0o755), os.WriteFile(filepath.Join(node, m.Path), pem.EncodeToMemory(block), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			root, err := trust.OpenRootDir(node)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			if removed, err := trust.Uninstall(root, trust.Places{}, a.ledger.Made("/")); err != nil || len(removed) == 0 {
				t.Errorf("removed: %v, %v", removed, err)
			}
			for _, m := range a.ledger.Made("/") {
				if _, err := os.Lstat(filepath.Join(node, m.Path)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", m.Path, err)
				}
			}

			// Blobs.
			blobs, err := filepath.Glob(filepath.Join(was, "store/blobs/sha256/*"))
			if err != nil || len(blobs) < 2 {
				t.Fatal(err, blobs)
			}
			for _, path := range blobs {
				want := digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(path))
				b, err := a.store.Get(want)
				if err != nil {
					t.Error(want, err)
					continue
				}
				content, err := io.ReadAll(b.Reader())
				if err != nil || digest.FromBytes(content) != want {
					t.Errorf("%s: %v, %s", want, err, digest.FromBytes(content))
				}
				b.Close()
			}

			// The node's identity among peers.
			key, err := crypto.UnmarshalPrivateKey(read(t, was, service.IdentityFile))
			if err != nil {
				t.Fatal(err)
			}
			if id, err := peer.IDFromPrivateKey(key); err != nil || a.peers.ID() != id.String() {
				t.Errorf("among peers it is %s, and was %s, %v", a.peers.ID(), id, err)
			}

			// What tags were: it is written again when the agent ends.
			end()
			var now rights.Memory
			if err := json.Unmarshal(read(t, dir, service.TagsFile), &now); err != nil {
				t.Fatal(err)
			}
			tags := 0
			for _, r := range now.Repositories {
				if r.Registry == "registry-1.docker.io" && r.Name == "library/debian" {
					tags += len(r.Tags["12"])
				}
			}
			if tags == 0 {
				t.Errorf("the tag is not known: %+v", now)
			}
			if log.Len() > 0 {
				t.Errorf("the log has:\n%s", log.String())
			}
		})
	}
}

// An agent that finds what a later version has written says what it can't read,
// and goes on without.
func TestDataOfLaterVersion(t *testing.T) {
	dirs, err := os.ReadDir(earlier)
	if err != nil || len(dirs) == 0 {
		t.Fatal(err, dirs)
	}
	dir := copied(t, filepath.Join(earlier, dirs[len(dirs)-1].Name()))
	blobs, err := filepath.Glob(filepath.Join(dir, "store/blobs/sha256/*"))
	if err != nil || len(blobs) == 0 {
		t.Fatal(err, blobs)
	}
	ledger := string(read(t, dir, service.LedgerFile))
	for name, content := range map[string]string{
		service.TagsFile:           `{"version":99,"repositories":{"docker.io":"as it is not yet"},"new":true}`,
		service.LedgerFile:         strings.ReplaceAll(ledger, `"root":`, `"when":"2030-01-01T00:00:00Z","root":`),
		"store/later/sha256/thing": "kept in a way of its own",
		"later.db":                 "also",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var log bytes.Buffer
	a, end := opened(t, dir, &log)
	if got := len(a.ledger.Made("/")); ledger == "" || got != strings.Count(ledger, `"root":"/"`) {
		t.Errorf("%d things are known to be installed, of\n%s", got, ledger)
	}
	if got := a.store.Stats().Blobs; got != len(blobs) {
		t.Errorf("%d blobs are kept of %d", got, len(blobs))
	}
	end()
	if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, service.TagsFile) || !strings.Contains(said, "later version") {
		t.Errorf("the log has:\n%s", said)
	}
	for _, name := range []string{"store/later/sha256/thing", "later.db"} {
		read(t, dir, name) // is left alone
	}
}
