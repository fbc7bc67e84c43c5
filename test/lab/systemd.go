// SPDX-License-Identifier: Apache-2.0

package lab

import "context"

// ownServices makes a node a place where systemd can't reach anything that
// isn't the node's: it finds no unit but those that are put here, since
// Debian's would set up the whole machine anew, down to an empty /tmp.
const ownServices = `
mountpoint -q /etc
mountpoint -q /run
for dir in /tmp /var/tmp /var/log /usr/local/bin; do mount -t tmpfs tmpfs $dir; done
rm -rf /etc/systemd
mkdir -p /etc/systemd/system /run/systemd/system /run/none /var/lib/systemd
ln -s /etc/systemd/system /var/lib/systemd/user
for target in basic shutdown multi-user; do
	printf '[Unit]\nDefaultDependencies=no\n' > /etc/systemd/system/$target.target
done
`

// Systemd has systemd look after services of the node. It is a user's, told
// where a system's has its files: a system's is the first process of a PID
// namespace, and in one of its own weir would not see the node's processes.
func (n *Node) Systemd() {
	n.t.Helper()
	n.Run("sh", "-ec", ownServices)
	p := n.start("systemd", []string{
		"XDG_RUNTIME_DIR=/run", "XDG_CONFIG_HOME=/var/lib",
		"SYSTEMD_UNIT_PATH=/etc/systemd/system", "SYSTEMD_GENERATOR_PATH=/run/none", "SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/none",
		"SYSTEMD_LOG_TARGET=console",
	}, Debian(n.t, "/lib/systemd/systemd", "systemd"), "--user", "--unit=basic.target")
	p.until("starting", func(context.Context) error {
		_, err := n.Output("systemctl", "is-active", "basic.target")
		return err
	})
}
