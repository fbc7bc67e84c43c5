// SPDX-License-Identifier: Apache-2.0

package runtimes

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"weir/agent/procfs"
	"weir/agent/trust"
)

// isNodes says whether a process is root's, in a root file system that outlives
// it: the node's, and not a container's.
func isNodes(pid int, lasting map[trust.RootID]string) bool {
	root, err := trust.OpenRoot(pid)
	if err != nil {
		return false
	}
	defer root.Close()
	uid, err := procfs.User(pid)
	return err == nil && uid == 0 && lasting[root.ID()] != ""
}

// shareContent lets the store read the blobs that the node's containerd has, in
// place. That of a pod, or of an ordinary user, may be any program of that
// name. Whoever owns the files can change them after they were verified, so that
// no checksum tells (in memory that is mapped, or on a file system of the owner's own),
// can have each look there wait forever, and can lead it elsewhere by links.
func (rs *Runtimes) shareContent(rt *Runtime) {
	if !isNodes(rt.PID, rs.o.Lasting) {
		return
	}
	for delay := 200 * time.Millisecond; rt.ctx.Err() == nil; delay = min(2*delay, 10*time.Second) {
		dir, err := contentDir(rt)
		if err == nil {
			dir = filepath.Join("/proc", fmt.Sprint(rt.PID), "root", dir, "blobs")
			rs.o.Content.AddForeign(dir)
			rs.o.Log.Debug("reading a containerd's content store", "pid", rt.PID, "dir", dir)
			<-rt.ctx.Done()
			rs.o.Content.RemoveForeign(dir)
			return
		}
		select {
		case <-rt.ctx.Done():
		case <-time.After(delay):
		}
	}
}

// contentDir asks a containerd where its content store is.
func contentDir(rt *Runtime) (string, error) {
	conn, err := dialGRPC(rt)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(rt.ctx, 10*time.Second)
	defer cancel()
	c, err := containerd.NewWithConn(conn)
	if err != nil {
		return "", err
	}
	resp, err := c.IntrospectionService().Plugins(ctx, "type==io.containerd.content.v1,id==content")
	if err != nil {
		return "", fmt.Errorf("asking containerd (process %d) for its plugins: %w", rt.PID, err)
	}
	for _, p := range resp.Plugins {
		if dir := p.Exports["root"]; strings.HasPrefix(dir, "/") && filepath.Clean(dir) == dir {
			return dir, nil
		}
	}
	return "", fmt.Errorf("containerd (process %d) doesn't say where its content is", rt.PID)
}
