// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"weir/agent"
	"weir/agent/admin"
	"weir/agent/registries"
	"weir/agent/service"
)

func registriesCommand() *cobra.Command {
	var admin string
	var asJSON bool
	c := &cobra.Command{Use: "registries", Short: "Show which hosts are known to be registries, and how",
		Long: "Show which hosts are known to be registries: by themselves, because they were\nconfigured, or learned because a runtime has used them."}
	adminFlag(c.Flags(), &admin)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		return show(cmd, admin, "/api/registries", asJSON, false, printRegistries)
	}
	c.AddCommand(forgetCommand())
	return c
}

func forgetCommand() *cobra.Command {
	var runDir string
	c := &cobra.Command{Use: "forget HOST[:PORT]", Short: "Forget a registry that was learned, and don't learn it again, as root"}
	c.Flags().StringVar(&runDir, "run-dir", agent.DefaultRunDir, "the running agent's")
	c.PreRunE = func(c *cobra.Command, _ []string) error { return fromEnvironment(c.Flags()) }
	c.Args = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError{errors.New("name one registry, as `weir registries` does")}
		}
		return nil
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		socket := filepath.Join(runDir, service.SocketFile)
		req, err := http.NewRequestWithContext(cmd.Context(), http.MethodDelete, "http://weir/registries/"+url.PathEscape(args[0]), nil)
		if err != nil {
			return usageError{err}
		}
		resp, err := clientOf(socket).Do(req)
		if err != nil {
			return fmt.Errorf("no agent answers at %s: %w; is it running, and are you root?", socket, err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusNoContent {
			b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
			return errors.New(strings.TrimSpace(plain(string(b))))
		}
		return nil
	}
	return c
}

func printRegistries(w io.Writer, all []admin.Registry) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "REGISTRY\tKNOWN\tSINCE\tINTERCEPTED")
	for _, r := range all {
		host, how, since := r.Host, string(r.State), "–"
		if r.Below {
			host = "*." + host
		}
		if r.By != "" {
			how += " by " + r.By
		}
		if !r.At.IsZero() {
			since = r.At.Local().Format(time.DateTime)
		}
		on := fmt.Sprintf("for %d of %d runtimes", r.Runtimes, r.Of)
		if r.State == registries.StateForgotten {
			on = "no"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", plain(admin.RegistryText(host)), plain(how), since, on)
	}
	return t.Flush()
}
