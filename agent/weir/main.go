// SPDX-License-Identifier: Apache-2.0

// Command weir is a transparent cache for container images: `weir agent` runs
// on a node, the other commands look after it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"weir/agent"
)

// version is set when a release is built.
var version = ""

// Exit codes.
const (
	exitFailed = 1 // it could not be done; the message says why
	exitUsage  = 2 // the command line is wrong
)

func main() { os.Exit(run()) }

// run runs the command and returns the exit code.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)

	root := newCommand()
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if _, ok := errors.AsType[silentError](err); ok {
		return exitFailed
	}
	fmt.Fprintf(os.Stderr, "weir: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	if _, ok := errors.AsType[usageError](err); ok || strings.HasPrefix(err.Error(), "unknown command") {
		fmt.Fprintf(os.Stderr, "See `%s --help`.\n", cmd.CommandPath())
		return exitUsage
	}
	return exitFailed
}

// usageError is a mistake in the command line.
type usageError struct{ error }

// silentError is a failure that was reported already.
type silentError struct{ error }

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "weir",
		Short:         "A transparent cache for container images",
		Long:          "weir redirects the connections that container runtimes open to registries into a\nlocal cache, with eBPF. Nothing has to be configured in any runtime.",
		Version:       buildVersion(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(agentCommand(), statusCommand(), pullsCommand(), prefetchCommand(), registriesCommand(), doctorCommand(), installCommand(), uninstallCommand())
	for _, c := range root.Commands() {
		if c.Args == nil {
			c.Args = func(_ *cobra.Command, args []string) error {
				if len(args) > 0 {
					return usageError{fmt.Errorf("%q is too much: the command takes no arguments, only flags", args[0])}
				}
				return nil
			}
		}
		c.PreRunE = func(c *cobra.Command, _ []string) error { return fromEnvironment(c.Flags()) }
	}
	return root
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "devel"
}

// fromEnvironment gives flags that aren't on the command line the value of
// their WEIR_ variable: --data-dir is WEIR_DATA_DIR. A flag that may be repeated
// takes several values with commas between them.
func fromEnvironment(flags *pflag.FlagSet) (err error) {
	flags.VisitAll(func(f *pflag.Flag) {
		name := "WEIR_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if value, ok := os.LookupEnv(name); ok && !f.Changed && err == nil {
			if serr := flags.Set(f.Name, value); serr != nil {
				err = usageError{fmt.Errorf("%s: %w", name, serr)}
			}
		}
	})
	return err
}

// Flags that several commands have.
func dirFlags(f *pflag.FlagSet, c *agent.Config) {
	f.StringVar(&c.DataDir, "data-dir", agent.DefaultDataDir, "where the CA and the store are kept")
	f.StringVar(&c.RunDir, "run-dir", agent.DefaultRunDir, "where what is true until the next boot is kept")
}

func adminFlag(f *pflag.FlagSet, admin *string) {
	f.StringVar(admin, "admin", agent.DefaultAdmin, "`address` of status, metrics and health")
}

func registryFlags(f *pflag.FlagSet, c *agent.Config) {
	f.StringSliceVar(&c.Registries, "registry", nil, "a further registry, `HOST[:PORT][=CA.pem]`; may be repeated")
	f.StringVar(&c.RegistryFile, "registry-file", "", "`file` with further registries, one a line; read again when it changes")
}

func programFlag(f *pflag.FlagSet, c *agent.Config) {
	f.StringSliceVar(&c.Programs, "program", nil, "a further program that pulls, `NAME=KIND`, treated as the one that is known by KIND (crane, buildkitd); may be repeated")
}

func peerFlags(f *pflag.FlagSet, c *agent.Config) {
	f.StringVar(&c.PeerListen, "peer-listen", agent.DefaultPeers, "`address` that peers connect to")
	f.StringVar(&c.SwarmKey, "swarm-key", "", "`file` with the key that all peers share; without one there is no peer traffic")
}
