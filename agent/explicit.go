// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"weir/agent/service"
	"weir/proxy/upstream"
)

// listener serves clients that have weir in their configuration.
type listener struct {
	l      net.Listener
	server *http.Server
	egress *upstream.Egress // of its own, or nil
}

func (l *listener) close() {
	l.l.Close()
	l.server.Close()
	if l.egress != nil {
		l.egress.Close()
	}
}

// listenExplicit opens the mirror and the forward proxy, if they are configured,
// and the socket for `weir prefetch`.
func (a *Agent) listenExplicit() (stop func(), err error) {
	stop = func() {
		for _, l := range a.explicit {
			l.close()
		}
	}
	if a.conf.MirrorListen != "" {
		if _, ok := a.regs.Hosts.Named(a.conf.MirrorDefault); !ok {
			return stop, fmt.Errorf("--mirror-default %q is not a known registry; name one, such as %s", a.conf.MirrorDefault, DefaultMirror)
		}
		e := a.ups.NewNodeEgress()
		if err := a.listen("--mirror-listen", a.conf.MirrorListen, e, a.proxy.Mirror(e, a.conf.MirrorDefault)); err != nil {
			return stop, err
		}
	}
	if a.conf.ProxyListen != "" {
		e := a.ups.NewNodeEgress()
		if err := a.listen("--proxy-listen", a.conf.ProxyListen, e, a.proxy.Forward(a.ctx, e)); err != nil {
			return stop, err
		}
	}
	a.listenPrefetch()
	return stop, nil
}

// listenPrefetch opens the socket for `weir prefetch`, as a mirror of all registries
// that are known by themselves or named, and for `weir registries forget`. Without it
// there is neither, and all else goes on.
func (a *Agent) listenPrefetch() {
	path := filepath.Join(a.conf.RunDir, service.SocketFile)
	_ = os.Remove(path) // of a process that was killed; the run directory is locked
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		a.log.Warn("nothing can be prefetched", "err", err)
		return
	}
	mux := http.NewServeMux()
	mux.HandleFunc("DELETE /registries/{host}", a.forget)
	mux.Handle("/", a.proxy.Mirror(a.own, DefaultMirror))
	a.explicit = append(a.explicit, &listener{l, &http.Server{Handler: mux, ReadHeaderTimeout: 30 * time.Second}, nil})
}

// listen opens a listener, on loopback unless the address says where.
func (a *Agent) listen(flag, addr string, e *upstream.Egress, h http.Handler) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%s %s: %w; write HOST:PORT", flag, addr, err)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("%s is in use; stop what listens there, or choose another address with %s", addr, flag)
	}
	if err != nil {
		return fmt.Errorf("listening on %s %s: %w", flag, addr, err)
	}
	a.explicit = append(a.explicit, &listener{l, &http.Server{Handler: h, ReadHeaderTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute}, e})
	return nil
}
