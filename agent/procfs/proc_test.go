// SPDX-License-Identifier: Apache-2.0

package procfs

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	p, err := parseStat([]byte("42 (a) b (c)) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 1234 0 0\n"))
	if err != nil || p.PID != 42 || p.Comm != "a) b (c)" || p.Start != 12340*time.Millisecond {
		t.Errorf("%+v, %v", p, err)
	}
	for _, bad := range []string{"", "x", "1 (a", "1 (a) S", "x (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", ") 1 (", "1 (a) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 99999999999999999999 0"} {
		if p, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, p)
		}
	}
	self, err := Read(os.Getpid())
	if err != nil || self.PID != os.Getpid() || self.Exe == "" || self.Start > SinceBoot() || SinceBoot()-self.Start > time.Hour {
		t.Errorf("%+v at %s, %v", self, SinceBoot(), err)
	}
	if _, err := Read(1 << 30); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("42 (a) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 1234 0 0\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parseStat(b); err == nil && p.Start < 0 {
			t.Errorf("%+v", p)
		}
	})
}

// A process's connections are counted by the port at the other side.
func TestConnections(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	count := func() int {
		n, err := Connections(os.Getpid(), []uint16{1, port})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := count(); n != 0 {
		t.Errorf("%d connections before there is one", n)
	}
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if n := count(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	c.Close()
	if n := count(); n != 0 {
		t.Errorf("%d connections after it was closed", n)
	}
	for _, line := range []string{"", "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
		"0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1", "0: a b c d e f g h i"} {
		if _, _, ok := parseConnection(line); ok {
			t.Errorf("%q is taken for a connection", line)
		}
	}
}

func FuzzParseConnection(f *testing.F) {
	f.Add("   0: 0200000A:A3F2 0A00CB71:01BB 01 00000000:00000000 02:000004D2 00000000     0        0 31337 2 0000000000000000 20 4 30 10 -1")
	f.Add("  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode")
	f.Add("0 1 : 3 4 5 6 7 8 9")
	f.Fuzz(func(t *testing.T, line string) {
		if port, ino, ok := parseConnection(line); ok && (port == 0 || ino == "") {
			t.Errorf("port %d, inode %q", port, ino)
		}
	})
}
