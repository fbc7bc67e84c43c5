// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"

	"github.com/spf13/cobra"
	"weir/agent"
	"weir/agent/admin"
	"weir/proxy/registry"
	"weir/proxy/store"
)

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
	f.DurationVar(&conf.RightsTTL, "rights-ttl", registry.DefaultRightsTTL, "how long a registry's answer that a client may read a repository is good")
	f.DurationVar(&conf.StaleIfError, "stale-if-error", registry.DefaultStaleIfError, "for how long a registry's last answer is good while it gives no other; 0 is never")
	f.StringSliceVar(&tagTTL, "tag-ttl", nil, "for how long a tag is what it was, without a question to the registry, `[REGISTRY=]DURATION`; may be repeated (default: ask at each pull)")
	f.IntVar(&conf.UpstreamConnections, "upstream-connections", registry.DefaultUpstreamConnections, "connections to its registry that a large blob has at most, where more are faster; 1 is as runtimes do")
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
		if conf.UpstreamConnections < 1 {
			return usageError{errors.New("--upstream-connections must be at least 1")}
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
