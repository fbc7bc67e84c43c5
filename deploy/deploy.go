// SPDX-License-Identifier: Apache-2.0

// Package deploy has the files of this directory that the binary brings along.
package deploy

import _ "embed"

// Unit is the systemd unit of the agent.
//
//go:embed weir.service
var Unit string
