// SPDX-License-Identifier: Apache-2.0

package store

// Origin is where a blob comes from.
type Origin struct {
	// Name tells transfers of one blob apart that come from different places:
	// who waits for the one is not served from the other.
	Name string
	// Owner is what the room that its blobs take is bounded for. Empty means
	// that it is bounded with the whole store only.
	Owner string
	// Free says that it takes only room that is free until it is verified.
	Free bool
}
