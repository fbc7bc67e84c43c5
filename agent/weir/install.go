// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"weir/agent"
	"weir/agent/admin"
	"weir/agent/doctor"
	"weir/agent/runtimes"
	"weir/agent/service"
)

func installCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "install",
		Short: "Make weir a service of this machine, or the service's new version",
		Long: "Copy this binary to /usr/local/bin, have systemd run it from now on and at each boot,\nand wait until it is ready. With a newer binary, this is the upgrade.\n\n" +
			"Flags of the agent go into " + service.SettingsFile + ", as WEIR_…; `systemctl restart weir` after a change.",
	}
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		vars, err := service.Settings(service.SettingsFile)
		if err != nil {
			return err
		}
		setting := func(name, otherwise string) string { return cmp.Or(vars["WEIR_"+name], otherwise) }
		address := setting("ADMIN", agent.DefaultAdmin)
		out := cmd.OutOrStdout()
		if err := runtimes.SetPrograms(strings.FieldsFunc(setting("PROGRAM", ""), func(r rune) bool { return r == ',' })); err != nil {
			return fmt.Errorf("WEIR_PROGRAM in %s: %w", service.SettingsFile, err)
		}
		findings := doctor.Examine(cmd.Context(), doctor.Config{Admin: address, Cgroup: setting("CGROUP", ""),
			DataDir: setting("DATA_DIR", agent.DefaultDataDir), RunDir: setting("RUN_DIR", agent.DefaultRunDir)})
		if failed, _ := printFindings(out, slices.DeleteFunc(findings, func(f doctor.Finding) bool { return f.Problem == "" || f.Warning })); failed > 0 {
			return fmt.Errorf("not installed: this machine isn't fit for weir until what is marked FAIL is mended (%d)", failed)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), serviceTime)
		defer cancel()
		started, err := service.Install(ctx)
		if err != nil {
			return err
		}
		if !started {
			fmt.Fprintln(out, "weir is installed already in this version, and runs.")
		} else {
			fmt.Fprintf(out, "weir %s is installed, and runs.\n", buildVersion())
		}
		var s admin.Status
		if _, err := fetch(cmd.Context(), address, "/api/status", &s); err != nil {
			return err
		}
		if len(s.Runtimes) == 0 {
			fmt.Fprintln(out, "No container runtime is running yet; each will be intercepted from its start.")
		}
		for _, r := range s.Runtimes {
			fmt.Fprintf(out, "Found %s (process %d).\n", r.Kind, r.PID)
		}
		fmt.Fprintln(out, "\nNext: `weir status` says which runtimes are intercepted, and what to do about the others.")
		return nil
	}
	return c
}

// serviceTime is how long installing and uninstalling may take. An agent that
// ends waits for what it serves.
const serviceTime = 2 * time.Minute

func uninstallCommand() *cobra.Command {
	var conf agent.Config
	var stay bool
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Stop the agent and remove every trace of weir from this node",
		Long:  "Stop the agent, and the service that `weir install` made; take its CA out of every place\nwhere a runtime reads certificates, and remove the store and the CA's key.",
	}
	dirFlags(c.Flags(), &conf)
	c.Flags().BoolVar(&stay, "stay", false, "run on when all is removed, until told to end, as a DaemonSet's pods have to")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), serviceTime)
		defer cancel()
		removed, err := service.Uninstall(ctx, conf.DataDir, conf.RunDir)
		for _, r := range removed {
			fmt.Fprintln(cmd.OutOrStdout(), "removed", r)
		}
		if err == nil {
			fmt.Fprintln(cmd.OutOrStdout(), "weir is gone from this node.")
			if stay {
				<-cmd.Context().Done()
			}
		}
		return err
	}
	return c
}
