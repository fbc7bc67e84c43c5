// SPDX-License-Identifier: Apache-2.0

package service

// SocketFile is the name, in the run directory, of the Unix socket at which the
// agent answers `weir prefetch` and `weir registries forget`, which is none of the
// programs whose connections are redirected. Only root may connect.
const SocketFile = "prefetch.sock"

// Names of files in the data directory.
const (
	LedgerFile   = "installed.jsonl" // what was installed in root file systems
	TagsFile     = "tags.json"       // what is known of registries
	IdentityFile = "peer.key"        // this node's identity among peers
	LearnedFile  = "learned.json"    // which registries were learned
	RestartsFile = "restarts.json"   // which runtimes were restarted
)
