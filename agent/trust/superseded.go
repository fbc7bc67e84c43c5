// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"fmt"
	"path"
	"time"

	"golang.org/x/sys/unix"
)

// FileID tells a file from one that was made anew in its place. It is comparable.
type FileID struct {
	dev, ino uint64
	born     unix.StatxTimestamp
}

// MarshalText implements encoding.TextMarshaler.
func (id FileID) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%d.%d.%d.%d", id.dev, id.ino, id.born.Sec, id.born.Nsec), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *FileID) UnmarshalText(b []byte) error {
	_, err := fmt.Sscanf(string(b), "%d.%d.%d.%d", &id.dev, &id.ino, &id.born.Sec, &id.born.Nsec)
	return err
}

// Holds fails unless a file that [CA.Install] named has a certificate of the CA's, of
// whichever generation.
func (ca *CA) Holds(r *Root, file string) (FileID, error) {
	id, err := r.fileID(file)
	var b []byte
	if err == nil {
		b, err = r.ReadFile(file, maxPEM)
	}
	if err == nil {
		if _, ok := ca.ownPEM(b); !ok {
			err = fmt.Errorf("%s has another content", file)
		}
	}
	if err != nil {
		return FileID{}, fmt.Errorf("weir's CA was installed and is gone: %w", err)
	}
	return id, nil
}

// superseded identifies name in d if it is one of the CA's certificates. The zero
// value is none.
func (in *installer) superseded(d *dir, name string) FileID {
	if name != systemFile {
		return FileID{}
	}
	id, _ := in.ca.Holds(in.root, path.Join(d.path, name))
	return id
}

// supersede records that the CA's own file was replaced by its next generation.
func (ca *CA) supersede(was, by FileID) {
	if was == (FileID{}) || by == (FileID{}) {
		return
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if len(ca.superseded) >= maxSuperseded {
		clear(ca.superseded)
	}
	ca.superseded[was] = by
}

// maxSuperseded bounds the files that are remembered. What is forgotten counts as
// removed.
const maxSuperseded = 1 << 14

// Follows says whether one file that [CA.Holds] has identified is the other, or has
// replaced it as the next generation of the certificate: that of the CA has been there
// all the time.
func (ca *CA) Follows(now, was FileID) bool {
	// The file is there a moment before that is recorded.
	for try := 0; ; try++ {
		ca.mu.Lock()
		id, ok := was, true
		for n := 0; id != now && ok; n++ {
			id, ok = ca.superseded[id]
			ok = ok && n < maxSuperseded
		}
		ca.mu.Unlock()
		if ok || try == 20 {
			return ok
		}
		time.Sleep(5 * time.Millisecond)
	}
}
