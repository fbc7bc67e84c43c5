// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"weir/agent/admin"
	"weir/proxy/registry"
)

func statusCommand() *cobra.Command {
	return watchCommand("status", "Show the runtimes, registries and store of the running agent", printStatus)
}

func pullsCommand() *cobra.Command {
	return watchCommand("pulls", "Show the running and the latest pulls, and where their bytes came from", printPulls)
}

// watchCommand shows what the agent has at /api/NAME.
func watchCommand[T any](name, short string, write func(io.Writer, T) error) *cobra.Command {
	var admin string
	var asJSON, watch bool
	c := &cobra.Command{Use: name, Short: short}
	adminFlag(c.Flags(), &admin)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&watch, "watch", false, "show it again every second")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		return show(cmd, admin, "/api/"+name, asJSON, watch, write)
	}
	return c
}

// show fetches something from the agent and prints it, once or each second.
func show[T any](cmd *cobra.Command, admin, path string, asJSON, watch bool, write func(io.Writer, T) error) error {
	out := cmd.OutOrStdout()
	for shown := false; ; shown = true {
		var v T
		raw, err := fetch(cmd.Context(), admin, path, &v)
		switch {
		case err != nil && shown && cmd.Context().Err() == nil: // it may come back
			fmt.Fprintln(cmd.ErrOrStderr(), err)
		case err != nil && !shown:
			return err
		case asJSON:
			_, err = out.Write(raw)
		default:
			if watch {
				fmt.Fprint(out, "\x1b[H\x1b[2J")
			}
			err = write(out, v)
		}
		if !watch {
			return err
		}
		select {
		case <-cmd.Context().Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// fetch asks the running agent.
func fetch(ctx context.Context, addr, path string, into any) (raw []byte, err error) {
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return nil, usageError{fmt.Errorf("--admin: %w", err)}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, admin.URL(addr, path), nil)
	if err != nil {
		return nil, usageError{fmt.Errorf("--admin: %w", err)}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, noAgent(addr)
	}
	defer resp.Body.Close()
	raw, err = io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	if err == nil {
		err = json.Unmarshal(raw, into)
	}
	if err != nil {
		return nil, fmt.Errorf("what answers at %s is not this version of weir's agent: %w", addr, err)
	}
	return raw, nil
}

// plain is a text from outside, such as the name that a pod gives to where
// it connects, without what would mean something to a terminal.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsPrint(r):
			return r
		case unicode.IsSpace(r):
			return ' '
		}
		return unicode.ReplacementChar
	}, s)
}

func printPulls(w io.Writer, all []registry.Pull) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "IMAGE\tCLIENT\tPROGRESS\tBYTES\tSTORE\tPEERS\tREGISTRY\tTIME\tREGISTRY ALONE")
	for _, p := range all {
		progress := "done"
		switch {
		case p.Ended.IsZero():
			progress = progressBar(p.Bytes, p.Size) + " " + admin.PercentText(p.Bytes, p.Size)
		case p.Failed > 0:
			progress = fmt.Sprintf("%d broke off", p.Failed)
		}
		part := func(n int64) string { return admin.PercentText(n, p.Bytes) }
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", plain(admin.PullName(p)), plain(p.Client), progress, admin.BytesText(p.Bytes),
			part(p.BytesFromStore), part(p.BytesFromPeers), part(p.BytesFromUpstream), admin.SecondsText(p.Seconds), admin.AloneText(p))
	}
	if len(all) == 0 {
		fmt.Fprintln(t, "none yet")
	}
	return t.Flush()
}

// progressBar is 20 characters wide.
func progressBar(part, whole int64) string {
	n := int(20 * min(part, whole) / max(whole, 1))
	return strings.Repeat("#", n) + strings.Repeat(".", 20-n)
}

func printStatus(w io.Writer, s admin.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "weir %s, process %d, up %s\n\n", s.Version, s.PID, time.Since(s.Started).Round(time.Second))
	fmt.Fprintln(t, "RUNTIME\tPID\tREACH\tWHY")
	for _, r := range s.Runtimes {
		why := r.Trust
		if r.Reason != "" {
			why = r.Reason
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\n", r.Kind, r.PID, r.Reach, plain(why))
		if r.Step != "" {
			fmt.Fprintf(t, "\t\t\t→ %s\n", plain(r.Step))
		}
		for _, host := range slices.Sorted(maps.Keys(r.Except)) {
			fmt.Fprintf(t, "\t\t\tbut not %s: %s\n", plain(host), plain(r.Except[host]))
		}
	}
	if len(s.Runtimes) == 0 {
		fmt.Fprintln(t, "none is running")
	}
	for i, r := range s.Restarts {
		if i == 0 {
			fmt.Fprintln(t, "\nRESTARTED\tWHEN\tRESULT\tWHY")
		}
		result := "done"
		if !r.Done {
			result = cmp.Or(r.Failed, "not known to have ended")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", plain(r.Service), r.At.Local().Format(time.DateTime), plain(result), plain(r.Reason))
	}
	if len(s.OtherPrograms) > 0 {
		fmt.Fprintln(t, "\nNOT FOLLOWED\tLAST SEEN\tREGISTRIES")
		for _, o := range s.OtherPrograms {
			hosts := strings.Join(o.Registries, ", ")
			fmt.Fprintf(t, "%s\t%s\t%s\n", plain(o.Program), o.LastSeen.Local().Format(time.DateTime), plain(hosts))
		}
		fmt.Fprintln(t, "\t\t→ `weir agent --program NAME=KIND` has one intercepted, see deploy/RUNTIMES.md")
	}
	fmt.Fprintln(t, "\nREGISTRY\tREQUESTS\tHIT RATE\tFROM STORE\tFROM PEERS\tFROM REGISTRY\tNO ANSWER")
	for _, r := range s.Registries {
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%d\n", plain(admin.RegistryText(r.Registry)), r.Requests, admin.PercentText(r.Hits, r.Hits+r.Misses), admin.BytesText(r.BytesFromStore), admin.BytesText(r.BytesFromPeers), admin.BytesText(r.BytesFromUpstream), r.Errors)
	}
	if len(s.Registries) == 0 {
		fmt.Fprintln(t, "none was asked for anything yet")
	}
	if len(s.UnknownHosts) > 0 {
		fmt.Fprintln(t, "\nPASSED THROUGH\tCONNECTIONS\tWHAT IT IS")
		for _, u := range s.UnknownHosts {
			what := "not known as a registry"
			switch {
			case u.Registry:
				what = "a registry: `weir agent --registry " + u.Host + "` has it cached"
				if u.Problem != "" {
					what = "a registry that is not learned: " + u.Problem
				}
			case u.Companion != nil:
				what = u.Companion.Role + " of " + admin.RegistryText(u.Companion.Of)
			case u.Problem != "":
				what = u.Problem
			}
			fmt.Fprintf(t, "%s\t%d\t%s\n", plain(u.Host), u.Connections, plain(what))
		}
	}
	if p := s.Peers; p != nil {
		fmt.Fprintf(t, "\nPEER\tRECEIVED\tNOTE\n")
		for _, peer := range p.Peers {
			note := ""
			switch {
			case peer.Shunned:
				note = "it sent wrong bytes; nothing is read from it for a while"
			case peer.Believed:
				note = "what it sends is passed on as it comes"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\n", admin.PeerText(peer.Address), admin.BytesText(peer.Received), note)
		}
		if len(p.Peers) == 0 {
			fmt.Fprintln(t, "none is connected")
		}
		fmt.Fprintf(t, "\nPEERS\t%d connected, %s sent to them, %d blobs being sent, %d connections without the key\n", len(p.Peers), admin.BytesText(p.Sent), p.Sending, p.Unauthenticated)
		fmt.Fprintf(t, "THIS NODE\t%s", p.ID)
	}
	fmt.Fprintf(t, "\nSTORE\t%d blobs, %s of %s, %s in unfinished blobs, %s also in containerd; %d evicted, %d damaged, %d not kept\n", s.Store.Blobs, admin.BytesText(s.Store.Bytes),
		admin.BytesText(s.Store.MaxBytes), admin.BytesText(s.Store.Partial), admin.BytesText(s.Store.Duplicate), s.Store.Evicted, s.Store.Corrupt, s.Store.NotKept)
	if since := s.Store.Hangs; !since.IsZero() {
		fmt.Fprintf(t, "\tthe disk of %s does not answer since %s: blobs are served and pushed through without being kept; look at the disk and the kernel's log\n", plain(s.DataDir), since.Local().Format(time.DateTime))
	}
	fmt.Fprintf(t, "CONNECTIONS\t%d intercepted, %d passed through, %d failed\n", s.Connections.Intercepted, s.Connections.PassedThrough, s.Connections.Failed)
	fmt.Fprintf(t, "LISTENERS\t%d\n", len(s.Listeners))
	return t.Flush()
}

func noAgent(admin string) error {
	return fmt.Errorf("no agent answers at %s; start it with `weir agent`, or name its address with --admin", admin)
}
