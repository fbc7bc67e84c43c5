// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"weir/agent/admin"
	weirproc "weir/agent/procfs"
	"weir/agent/service"
)

// agent looks for a running agent.
func (d *doctor) agent(ctx context.Context) {
	what := "--admin " + d.conf.Admin
	d.status, d.running = askStatus(ctx, d.conf.Admin)
	holder, held := service.Holder(d.conf.RunDir)
	switch {
	case d.running:
		d.ok(fmt.Sprintf("the agent is running: weir %s, process %d", d.status.Version, d.status.PID))
		if d.status.Kernel.StaleHeartbeat > 0 {
			d.warn("the agent's heartbeat", fmt.Sprintf("%d connections went direct because it was late", d.status.Kernel.StaleHeartbeat),
				"see whether the node is short of processor time")
		}
		if since := d.status.Store.Hangs; !since.IsZero() && !d.hangs {
			d.warn("--data-dir "+d.status.DataDir, "its disk does not answer since "+since.Local().Format(time.DateTime)+": blobs are served and pushed through without being kept",
				"look at the disk and the kernel's log (dmesg); weir keeps blobs again as soon as it answers")
		}
	case held:
		d.problem("the agent", fmt.Sprintf("process %d runs but doesn't answer at %s: connections go direct meanwhile", holder, d.conf.Admin),
			fmt.Sprintf("give the agent's --admin, if it has another; or else kill -9 %d, and look at its log", holder))
	default:
		l, err := net.Listen("tcp", d.conf.Admin)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			d.problem(what, "the address is in use by something that is not weir", "stop it, or choose another address with --admin")
		case err != nil:
			d.problem(what, err.Error(), "choose another address with --admin")
		default:
			l.Close()
			d.ok(what)
		}
	}
	if pids := agents(); len(pids) > 1 {
		d.warn("the agent", fmt.Sprintf("there are %d in this network namespace (processes %s)", len(pids), strings.Trim(fmt.Sprint(pids), "[]")),
			"one is enough: stop the others, as the container or the service that they are")
	}
}

// agents are the processes that run weir's agent in this network namespace.
func agents() (pids []int) {
	own, _ := weirproc.Netns(os.Getpid())
	all, _ := os.ReadDir("/proc")
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		args := weirproc.Strings(pid, "cmdline")
		if len(args) < 2 || filepath.Base(args[0]) != "weir" || args[1] != "agent" {
			continue
		}
		if ns, err := weirproc.Netns(pid); err == nil && ns == own {
			pids = append(pids, pid)
		}
	}
	return pids
}

// askStatus asks the agent at an admin address.
func askStatus(ctx context.Context, addr string) (s admin.Status, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, admin.URL(addr, "/api/status"), nil)
	if err != nil {
		return s, false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return s, false
	}
	defer resp.Body.Close()
	ok = resp.StatusCode == http.StatusOK && resp.Header.Get("Content-Type") == "application/json"
	return s, ok && json.NewDecoder(resp.Body).Decode(&s) == nil
}
