// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"log/slog"
	"path/filepath"

	"weir/agent/runtimes"
	"weir/agent/service"
	"weir/agent/systemd"
)

// restart says what an agent with --restart-runtimes would do about a runtime that has
// to be restarted.
func (d *doctor) restart(ctx context.Context, rt *runtimes.Runtime) string {
	manager, err := systemd.OfNode()
	var s systemd.Service
	if err == nil {
		s, err = runtimes.NewRestarter(manager, filepath.Join(d.conf.DataDir, service.RestartsFile), slog.New(slog.DiscardHandler)).Plan(ctx, rt)
	}
	if err != nil {
		return "with --restart-runtimes it would not be restarted: " + err.Error()
	}
	return "with --restart-runtimes, weir would restart " + s.Name + " once, when no pull of it runs"
}
