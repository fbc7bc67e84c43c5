// SPDX-License-Identifier: Apache-2.0

package tlsconn

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
)

// counted counts the writes of a connection.
type counted struct {
	net.Conn
	writes atomic.Int64
}

func (c *counted) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

// What is written arrives, and four records of it leave at a time.
func TestTogether(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	of := &x509.Certificate{SerialNumber: big.NewInt(1)}
	cert, err := x509.CreateCertificate(rand.Reader, of, of, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	raw := &counted{Conn: a}
	server := Server(raw, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}, DynamicRecordSizingDisabled: true})
	if server.Raw() != raw {
		t.Error("it is over another connection")
	}
	client := tls.Client(b, &tls.Config{InsecureSkipVerify: true})
	sizes := []int{1, maxRecord, maxRecord + 1, 256 << 10, 0, 5, 1 << 20}
	for range 20 {
		sizes = append(sizes, mathrand.IntN(300<<10))
	}
	var want []byte
	for _, n := range sizes {
		part := make([]byte, n)
		_, _ = rand.Read(part)
		want = append(want, part...)
	}
	done := make(chan error, 1)
	go func() {
		defer server.Close()
		if err := server.Handshake(); err != nil {
			done <- err
			return
		}
		rest := want
		for _, n := range sizes {
			before := raw.writes.Load()
			if _, err := server.Write(rest[:n]); err != nil {
				done <- err
				return
			}
			if took, most := raw.writes.Load()-before, int64(n/(4*maxRecord)+1); took > most {
				t.Errorf("%d bytes left in %d writes", n, took)
			}
			rest = rest[n:]
		}
		done <- nil
	}()
	got, err := io.ReadAll(client)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	// One that is gone is an error, also of what is sent together.
	client.Close()
	if _, err := server.Write(want); err == nil {
		t.Error("it went nowhere")
	}
}
