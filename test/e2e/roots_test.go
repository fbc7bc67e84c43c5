// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"

	"weir/test/lab"
)

// Root file systems of all sorts, and environments and users that read roots
// elsewhere: each pull succeeds. Where the CA can be put where the program reads
// roots it is intercepted, else passed through, and the status says why.
func TestRoots(t *testing.T) {
	t.Parallel()
	const bundle, bin = "/var/lib/clean.crt", "/var/lib/home/bin"
	const (
		debian = "mkdir /etc/ssl/certs; cp " + bundle + " /etc/ssl/certs/ca-certificates.crt\n"
		user   = "setpriv --reuid=1000 --regid=1000 --clear-groups "
	)
	w := newWorld(t)
	node := w.Node()
	node.Run("sh", "-ec", fmt.Sprintf(`
cp /etc/ssl/certs/ca-certificates.crt %[1]s
mkdir -p /etc/pki /var/lib/own /var/lib/others /var/lib/clean %[2]s
cp %[1]s /var/lib/others/
cp %[1]s /var/lib/clean/
cp %[3]s %[4]s %[2]s/
`, bundle, bin, node.As(lab.Tool(t, "crane"), "crane"), clientNamed(t, "krane")))
	agent := node.Agent()
	node.Spawn("listener", bin+"/crane", "registry", "serve", "--address=127.0.0.1:0") // keeps the listener open
	node.Run(bin+"/crane", "pull", flyway, "/dev/null")

	const pull, stay = bin + "/crane pull " + flyway + " /dev/null", bin + "/crane registry serve --address=127.0.0.1:0"
	const fallback = bin + "/krane client fallback " + bundle
	for _, tt := range []struct {
		name   string
		script string // sets a mount namespace up whose /etc/ssl and /etc/pki are empty
		run    string // what leads to the program there
		reason string // why it is passed through; empty if it is intercepted
		own    bool   // it has roots of its own
	}{
		{name: "Debian", script: debian},
		{name: "Alpine", script: debian + "ln -s certs/ca-certificates.crt /etc/ssl/cert.pem"},
		{name: "Alpine's bundle alone", script: "cp " + bundle + " /etc/ssl/cert.pem"},
		{name: "Fedora", script: "mkdir -p /etc/pki/ca-trust/extracted/pem /etc/pki/tls/certs; cp " + bundle + " /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem\n" +
			"ln -s ../../ca-trust/extracted/pem/tls-ca-bundle.pem /etc/pki/tls/certs/ca-bundle.crt; ln -s ../pki/tls/certs /etc/ssl/certs"},
		{name: "read-only", script: debian + "mount -o remount,ro /etc/ssl", reason: "the file system is read-only"},
		{name: "read-only, with a directory that isn't", script: "mkdir /etc/ssl/certs; mount -o remount,ro /etc/ssl; mount -t tmpfs tmpfs /etc/ssl/certs; cp " + bundle + " /etc/ssl/certs/"},
		{name: "a read-only base with the node's own etc, as a snap has", script: "umount /etc/ssl /etc/pki; mount -o remount,bind,ro /"},
		{name: "SSL_CERT_FILE", run: "env SSL_CERT_FILE=" + bundle},
		{name: "SSL_CERT_FILE that is relative", script: debian + "cd /var/lib", run: "env SSL_CERT_FILE=clean.crt"},
		{name: "SSL_CERT_DIR", run: "env SSL_CERT_DIR=/var/lib/clean"},
		{name: "SSL_CERT_DIR, the last of which is there", run: "env SSL_CERT_DIR=certs:/no:/etc/ssl/certs", script: debian},
		{name: "SSL_CERT_DIR that is relative", script: "cd /var/lib", run: "env SSL_CERT_DIR=clean", reason: "SSL_CERT_DIR of the process names none"},
		{name: "no roots but its own", own: true, reason: "there are no root certificates"},
		{name: "an empty directory", script: "mkdir /etc/ssl/certs", own: true, reason: "there are no root certificates"},
		{name: "its own roots preferred", script: debian, run: "env GODEBUG=x509usefallbackroots=1", own: true, reason: "x509usefallbackroots"},

		{name: "an ordinary user", script: debian, run: user},
		{name: "an ordinary user with a directory", run: user + "env SSL_CERT_DIR=/var/lib/own",
			script: "mount -t tmpfs -o uid=1000 tmpfs /var/lib/own; cp " + bundle + " /var/lib/own/"},
		{name: "an ordinary user with another's directory", run: user + "env SSL_CERT_DIR=/var/lib/others", reason: "the directory isn't its own"},
		{name: "a user namespace with the node's files", script: "umount /etc/ssl /etc/pki", run: user + "unshare --user --map-root-user --mount"},
		{name: "a user namespace with files of its own", script: debian + "chown 1000 /etc/ssl/certs", run: user + "unshare --user --map-root-user --mount"},
		{name: "a user namespace with a file system of its own",
			run:    user + "unshare --user --map-root-user --mount sh -ec 'mount -t tmpfs tmpfs /etc/ssl; mkdir /etc/ssl/certs; cp " + bundle + ` /etc/ssl/certs/; exec "$@"' -`,
			reason: "the file system is of a user namespace"},
		{name: "a user namespace with another's files", script: debian,
			run: user + `unshare --user --map-root-user --mount sh -ec 'mount --bind /var/lib/others /etc/ssl/certs; exec "$@"' -`, reason: "the directory isn't its own"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			node.WriteFile("/var/lib/home/enter", "mount -t tmpfs tmpfs /etc/ssl; mount -t tmpfs tmpfs /etc/pki\n"+tt.script+"\nexec "+tt.run+" $COMMAND\n")
			enter := func(command string) []string {
				return []string{"env", "COMMAND=" + command, "unshare", "--mount", "sh", "-e", "/var/lib/home/enter"}
			}
			w.forget()
			command := stay
			if tt.own {
				command = fallback + " stay"
				if out := node.Run(enter(fallback + " pull registry-1.docker.io flyway/flyway 10.11.0")...); !strings.Contains(out, "the lab's internet CA") {
					t.Error(out)
				}
			} else {
				node.Run(enter(pull)...)
				if n := w.hub.Log.BlobGETs(); (n > 0) != (tt.reason != "") {
					t.Errorf("%d blobs were fetched", n)
				}
			}
			p := node.Spawn("stay", enter(command)...)
			defer p.Kill()
			rt := agent.Runtime(p.PID())
			if tt.reason == "" && rt.Reach != "intercepted" || tt.reason != "" && (rt.Reach != "passthrough" || !strings.Contains(rt.Reason, tt.reason)) {
				t.Errorf("%+v, want %q", rt, tt.reason)
			}
		})
	}
	if names, _ := node.ReadDir("/var/lib/others"); len(names) != 1 {
		t.Errorf("another's directory has %q", names)
	}
}
