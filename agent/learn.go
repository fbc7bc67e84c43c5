// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"net/http"

	"weir/agent/runtimes"
	"weir/proxy/registry"
)

// learn makes a registry of the node of a host that a runtime has connected to. What
// a pod alone can verify isn't learned: a pod can pose as any registry to itself.
func (a *Agent) learn(rt *runtimes.Runtime, host string, ownRoots bool) error {
	if ownRoots && !rt.OnNode() {
		return errors.New("only a pod's own CA verifies it: name it and that CA with --registry")
	}
	added, err := a.regs.Learn(host, rt.Name(), rt.OnNode())
	if err != nil || !added {
		return err
	}
	if err := a.adopt(host); err != nil {
		return errors.Join(err, a.regs.Revert(host))
	}
	a.log.Info("a registry was learned: runtimes that start from now on are intercepted for it", "registry", host, "by", rt.String())
	return nil
}

// adopt has the CA made for the registries that are known now, and put where
// runtimes read it.
func (a *Agent) adopt(added ...string) error {
	a.adopting.Lock()
	defer a.adopting.Unlock()
	if err := a.ca.SetHosts(a.regs.Names()); err != nil {
		return err
	}
	for _, port := range a.regs.Ports() {
		if err := a.kernel.AddPort(port); err != nil {
			return err
		}
	}
	a.runtimes.Refresh(added...)
	return nil
}

// forget answers DELETE /registries/HOST, on the socket that is root's.
func (a *Agent) forget(w http.ResponseWriter, r *http.Request) {
	host := registry.Canonical(r.PathValue("host"))
	was, err := a.regs.Forget(host)
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	case !was:
		http.Error(w, host+" was not learned: it is known by itself, or was named by an operator", http.StatusConflict)
		return
	}
	a.runtimes.Withdraw(host)
	if err := a.adopt(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	a.log.Info("a registry was forgotten", "registry", host)
	w.WriteHeader(http.StatusNoContent)
}
