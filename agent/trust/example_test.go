// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto/x509"
	"fmt"
	"os"

	"weir/agent/trust"
)

// The CA speaks for the registries that it was made for, and a client that
// verifies its certificates finds them good for these and no others.
func ExampleOpenCA() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	ca, err := trust.OpenCA(dir, []string{"ghcr.io"}, nil)
	if err != nil {
		panic(err)
	}
	fmt.Println("ghcr.io:", ca.Permits("ghcr.io"), "bank.example:", ca.Permits("bank.example"))

	leaf, err := ca.Leaf("ghcr.io")
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca.PEM())
	_, err = leaf.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "ghcr.io"})
	fmt.Println("verified:", err == nil)
	_, err = ca.Leaf("bank.example")
	fmt.Println("refused:", err != nil)
	// Output:
	// ghcr.io: true bank.example: false
	// verified: true
	// refused: true
}
