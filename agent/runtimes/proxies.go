// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"cmp"
	"context"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"weir/agent/procfs"
)

// infoTime is how long a dockerd has to say which proxies it is configured with.
const infoTime = 5 * time.Second

// proxyPorts are the ports of the proxies that a runtime may pull through, by its
// environment, or what a dockerd is configured with. It is for knowing whether a pull
// is running, and no more.
func proxyPorts(rt *Runtime) (ports []uint16) {
	var proxies []string
	for _, variable := range procfs.Strings(rt.PID, "environ") {
		name, value, _ := strings.Cut(variable, "=")
		switch strings.ToLower(name) {
		case "https_proxy", "http_proxy", "all_proxy":
			proxies = append(proxies, value)
		}
	}
	if rt.kind.name == "dockerd" {
		ctx, cancel := context.WithTimeout(context.Background(), infoTime)
		defer cancel()
		if c, err := newDockerClient(rt); err == nil {
			if info, err := c.Info(ctx, client.InfoOptions{}); err == nil {
				proxies = append(proxies, info.Info.HTTPSProxy, info.Info.HTTPProxy)
			}
			c.Close()
		}
	}
	for _, proxy := range proxies {
		if !strings.Contains(proxy, "://") {
			proxy = "http://" + proxy
		}
		u, err := url.Parse(proxy)
		if err != nil || u.Host == "" {
			continue
		}
		port := cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme], "1080")
		if n, err := strconv.ParseUint(port, 10, 16); err == nil {
			ports = append(ports, uint16(n))
		}
	}
	return ports
}
