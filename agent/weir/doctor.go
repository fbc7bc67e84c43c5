// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"weir/agent"
	"weir/agent/doctor"
	"weir/agent/runtimes"
)

func doctorCommand() *cobra.Command {
	var conf agent.Config
	var asJSON bool
	c := &cobra.Command{Use: "doctor", Short: "Look for what would keep weir from working on this node"}
	f := c.Flags()
	dirFlags(f, &conf)
	adminFlag(f, &conf.Admin)
	f.StringVar(&conf.Cgroup, "cgroup", "", "cgroup2 `directory` whose processes are served (default: the cgroup2 mount)")
	registryFlags(f, &conf)
	programFlag(f, &conf)
	peerFlags(f, &conf)
	f.BoolVar(&asJSON, "json", false, "print JSON")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := runtimes.SetPrograms(conf.Programs); err != nil {
			return usageError{fmt.Errorf("--program: %w", err)}
		}
		findings := doctor.Examine(cmd.Context(), doctor.Config{DataDir: conf.DataDir, RunDir: conf.RunDir, Cgroup: conf.Cgroup, Admin: conf.Admin,
			Registries: conf.Registries, RegistryFile: conf.RegistryFile, PeerListen: conf.PeerListen, SwarmKey: conf.SwarmKey})
		out, text := cmd.OutOrStdout(), cmd.OutOrStdout()
		if asJSON {
			if err := json.NewEncoder(out).Encode(findings); err != nil {
				return err
			}
			text = io.Discard
		}
		failed, warned := printFindings(text, findings)
		switch {
		case failed > 0:
			fmt.Fprintf(text, "\nweir can't work on this node until what is marked FAIL is mended (%d).\n", failed)
		case warned > 0:
			fmt.Fprintf(text, "\nweir can work on this node; what is marked warn is worth a look (%d).\n", warned)
		default:
			fmt.Fprintln(text, "\nweir can work on this node.")
		}
		if failed > 0 {
			return silentError{errors.New("the node is not ready")}
		}
		return nil
	}
	return c
}

// printFindings returns how many of them keep weir from working, and how many are
// worth a look.
func printFindings(w io.Writer, findings []doctor.Finding) (failed, warned int) {
	for _, f := range findings {
		switch {
		case f.Problem == "":
			fmt.Fprintf(w, "ok    %s\n", plain(f.What))
		case f.Warning:
			warned++
			fmt.Fprintf(w, "warn  %s: %s\n", plain(f.What), plain(f.Problem))
		default:
			failed++
			fmt.Fprintf(w, "FAIL  %s: %s\n", plain(f.What), plain(f.Problem))
		}
		if f.Step != "" {
			fmt.Fprintf(w, "      → %s\n", plain(f.Step))
		}
	}
	return failed, warned
}
