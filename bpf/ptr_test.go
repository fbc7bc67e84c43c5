// SPDX-License-Identifier: Apache-2.0

package bpf

import "unsafe"

// ptr is for system calls that have no wrapper.
func ptr[T any](p *T) unsafe.Pointer { return unsafe.Pointer(p) }
