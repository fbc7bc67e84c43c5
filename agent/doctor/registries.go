// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"weir/agent/registries"
	"weir/proxy/registry"
)

// reachTime bounds how long registries are waited for.
const reachTime = 5 * time.Second

// reachable tries whether registries can be reached from here, and verified: the
// ones that most images come from, and those that were added.
func (d *doctor) reachable(ctx context.Context) {
	var rs registries.List
	if err := rs.Load(d.conf.Registries, d.conf.RegistryFile); err != nil {
		d.problem("registries", err.Error(), "")
		return
	}
	hosts := []string{registry.DockerHub, "ghcr.io", "quay.io", "registry.k8s.io"}
	for _, k := range rs.Hosts.All() {
		if !slices.Contains(registry.WellKnown, k) {
			hosts = append(hosts, k.Host)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, reachTime)
	defer cancel()
	errs := make([]error, len(hosts))
	var wg sync.WaitGroup
	for i, host := range hosts {
		wg.Go(func() { errs[i] = greet(ctx, host, rs.Roots(host)) })
	}
	wg.Wait()
	var unreachable []string
	var why error
	for i, host := range hosts {
		var untrusted x509.UnknownAuthorityError
		var invalid x509.CertificateInvalidError
		switch err := errs[i]; {
		case err == nil:
			d.ok("registry " + host)
		case errors.As(err, &untrusted):
			d.warn("registry "+host, "its certificate is not of a CA that this machine trusts: its connections are passed through",
				"give weir the CA: --registry "+host+"=CA.pem")
		case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
			d.warn("registry "+host, "its certificate is not valid now: "+invalid.Error(), "look at the clock")
		default:
			unreachable, why = append(unreachable, host), err
		}
	}
	if len(unreachable) > 0 {
		d.warn("registries", "not reachable from here: "+strings.Join(unreachable, ", ")+" ("+why.Error()+")",
			"see whether the runtimes reach them; if not either, it is not for weir to mend")
	}
}

// greet shakes hands with a registry.
func greet(ctx context.Context, host string, roots *x509.CertPool) error {
	name, addr := host, net.JoinHostPort(host, "443")
	if h, _, err := net.SplitHostPort(host); err == nil {
		name, addr = h, host
	}
	c, err := (&tls.Dialer{Config: &tls.Config{ServerName: name, RootCAs: roots}}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return c.Close()
}
