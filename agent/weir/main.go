// SPDX-License-Identifier: Apache-2.0

// Command weir is a transparent cache for container images: `weir agent` runs
// on a node, the other commands look after it.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"weir/agent"
	"weir/agent/admin"
	"weir/agent/doctor"
	"weir/agent/runtimes"
	"weir/agent/service"
	"weir/proxy/registry"
	"weir/proxy/store"
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
	var silent silentError
	if errors.As(err, &silent) {
		return exitFailed
	}
	fmt.Fprintf(os.Stderr, "weir: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	var usage usageError
	if errors.As(err, &usage) || strings.HasPrefix(err.Error(), "unknown command") {
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

func agentCommand() *cobra.Command {
	var conf agent.Config
	var ports []uint
	var size, upload, level, format string
	var learn bool
	var tagTTL []string
	c := &cobra.Command{
		Use:   "agent",
		Short: "Run the node agent",
		Long:  "Run the node agent: redirect the connections of this node's container runtimes to\nregistries, cache what they pull, and let everything else through.\n\nEach flag can also be given in the environment: --data-dir as WEIR_DATA_DIR.",
	}
	f := c.Flags()
	dirFlags(f, &conf)
	adminFlag(f, &conf.Admin)
	f.StringVar(&conf.Cgroup, "cgroup", "", "cgroup2 `directory` whose processes are served (default: the cgroup2 mount)")
	for _, p := range agent.DefaultPorts {
		ports = append(ports, uint(p))
	}
	f.UintSliceVar(&ports, "ports", ports, "destination ports that are redirected")
	registryFlags(f, &conf)
	programFlag(f, &conf)
	f.BoolVar(&conf.RestartRuntimes, "restart-runtimes", false, "have systemd restart, once in a boot and when no pull runs, a runtime that can't trust weir's CA before")
	f.BoolVar(&learn, "learn", true, "learn which other hosts are registries, from the runtimes that use them")
	f.StringVar(&conf.MirrorListen, "mirror-listen", "", "`address` of a mirror endpoint for dockerd's registry-mirrors or containerd's hosts.toml (default: none; without a host: loopback)")
	f.StringVar(&conf.MirrorDefault, "mirror-default", agent.DefaultMirror, "the `registry` of requests to the mirror that name none")
	f.StringVar(&conf.ProxyListen, "proxy-listen", "", "`address` of a forward proxy for HTTPS_PROXY, for clients that trust weir's CA (default: none; without a host: loopback)")
	f.StringVar(&size, "store-size", "", "bound of the store, such as 50GiB (default: a tenth of the file system)")
	f.DurationVar(&conf.RightsTTL, "rights-ttl", registry.DefaultRightsTTL, "how long a registry's word that a client may read a repository is good")
	f.DurationVar(&conf.StaleIfError, "stale-if-error", registry.DefaultStaleIfError, "for how long a registry's last answer is good while it gives no other; 0 is never")
	f.StringSliceVar(&tagTTL, "tag-ttl", nil, "for how long a tag is what it was, without a question to the registry, `[REGISTRY=]DURATION`; may be repeated (default: ask at each pull)")
	peerFlags(f, &conf)
	f.StringSliceVar(&conf.Peers, "peer", nil, "where peers are found, `HOST[:PORT]`; a name stands for all its addresses; may be repeated (default: by multicast DNS)")
	f.StringVar(&upload, "peer-upload", "", "bound of what is sent to peers in a second, such as 50MiB (default: none)")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&format, "log-format", "text", "text or json")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		logLevel := new(slog.LevelVar)
		log, err := newLogger(os.Stderr, logLevel, level, format)
		if err != nil {
			return usageError{err}
		}
		if size != "" {
			if conf.StoreSize, err = store.ParseSize(size); err != nil {
				return usageError{fmt.Errorf("--store-size: %w", err)}
			}
			if conf.StoreSize == 0 {
				return usageError{errors.New("--store-size must be more than 0")}
			}
		}
		if upload != "" {
			if conf.PeerUpload, err = store.ParseSize(upload); err != nil || conf.PeerUpload == 0 {
				return usageError{fmt.Errorf("--peer-upload: %q is not a size above 0, such as 50MiB", upload)}
			}
		}
		if conf.RightsTTL <= 0 || conf.StaleIfError < 0 {
			return usageError{errors.New("--rights-ttl must be more than 0, and --stale-if-error not less")}
		}
		if conf.TagTTL, err = registry.ParseTagTTL(tagTTL); err != nil {
			return usageError{fmt.Errorf("--tag-ttl: %w", err)}
		}
		for _, p := range ports {
			if p == 0 || p > 65535 {
				return usageError{fmt.Errorf("--ports: %d is not a TCP port", p)}
			}
			conf.Ports = append(conf.Ports, uint16(p))
		}
		conf.NoLearn = !learn
		conf.Version, conf.Log, conf.LogLevel = buildVersion(), log, logLevel
		return agent.Run(cmd.Context(), conf, func(a *agent.Agent) {
			announce(log, a.Status())
			if err := notifyReady(); err != nil {
				log.Warn("systemd can't be notified that weir is ready", "err", err)
			}
		})
	}
	return c
}

// notifyReady notifies systemd that the agent is ready, if it asked for it:
// sd_notify(3).
func notifyReady() error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	c, err := net.Dial("unixgram", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte("READY=1"))
	return err
}

func newLogger(w io.Writer, l *slog.LevelVar, level, format string) (*slog.Logger, error) {
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level: %q is none of debug, info, warn, error", level)
	}
	o := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return nil, fmt.Errorf("--log-format: %q is neither text nor json", format)
}

// announce says what the agent found and what it will do.
func announce(log *slog.Logger, s admin.Status) {
	log.Info("weir is ready", "version", s.Version, "cgroup", s.Cgroup, "data", s.DataDir,
		"store_blobs", s.Store.Blobs, "store_bytes", s.Store.Bytes, "store_max_bytes", s.Store.MaxBytes)
	if len(s.Runtimes) == 0 {
		log.Info("no container runtime is running yet; each will be intercepted from its start")
	}
	for _, r := range s.Runtimes {
		log.Info("found a runtime; it is passed through until it is known to trust weir's CA", "runtime", r.Kind, "pid", r.PID)
	}
}

func statusCommand() *cobra.Command {
	var admin string
	var asJSON, watch bool
	c := &cobra.Command{Use: "status", Short: "Show the runtimes, registries and store of the running agent"}
	adminFlag(c.Flags(), &admin)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&watch, "watch", false, "show it again every second")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		return show(cmd, admin, "/api/status", asJSON, watch, printStatus)
	}
	return c
}

func pullsCommand() *cobra.Command {
	var admin string
	var asJSON, watch bool
	c := &cobra.Command{Use: "pulls", Short: "Show the running and the latest pulls, and where their bytes came from"}
	adminFlag(c.Flags(), &admin)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&watch, "watch", false, "show them again every second")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		return show(cmd, admin, "/api/pulls", asJSON, watch, printPulls)
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
func fetch(ctx context.Context, admin, path string, into any) (raw []byte, err error) {
	if _, _, err := net.SplitHostPort(admin); err != nil {
		return nil, usageError{fmt.Errorf("--admin: %w", err)}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+path, nil)
	if err != nil {
		return nil, usageError{fmt.Errorf("--admin: %w", err)}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, noAgent(admin)
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
		return nil, fmt.Errorf("what answers at %s is not this version of weir's agent: %w", admin, err)
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
			if peer.Shunned {
				note = "it sent wrong bytes; nothing is read from it for a while"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\n", admin.PeerText(peer.Address), admin.BytesText(peer.Received), note)
		}
		if len(p.Peers) == 0 {
			fmt.Fprintln(t, "none is connected")
		}
		fmt.Fprintf(t, "\nPEERS\t%d connected, %s sent to them, %d blobs being sent, %d connections without the key\n", len(p.Peers), admin.BytesText(p.Sent), p.Sending, p.Unauthenticated)
		fmt.Fprintf(t, "THIS NODE\t%s", p.ID)
	}
	fmt.Fprintf(t, "\nSTORE\t%d blobs, %s of %s; %d evicted, %d damaged, %d not kept\n", s.Store.Blobs, admin.BytesText(s.Store.Bytes), admin.BytesText(s.Store.MaxBytes), s.Store.Evicted, s.Store.Corrupt, s.Store.NotKept)
	if since := s.Store.Hangs; !since.IsZero() {
		fmt.Fprintf(t, "\tthe disk of %s does not answer since %s: blobs are served and pushed through without being kept; look at the disk and the kernel's log\n", plain(s.DataDir), since.Local().Format(time.DateTime))
	}
	fmt.Fprintf(t, "CONNECTIONS\t%d intercepted, %d passed through, %d failed\n", s.Connections.Intercepted, s.Connections.PassedThrough, s.Connections.Failed)
	fmt.Fprintf(t, "LISTENERS\t%d\n", len(s.Listeners))
	return t.Flush()
}

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

func noAgent(admin string) error {
	return fmt.Errorf("no agent answers at %s; start it with `weir agent`, or name its address with --admin", admin)
}
