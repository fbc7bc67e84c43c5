// SPDX-License-Identifier: Apache-2.0

//go:build ignore

// A containerd-stargz-grpc made of stargz-snapshotter's packages, as its own main
// has them, and `convert estargz|zstdchunked SOURCE DESTINATION`, as the ctr-remote
// command has it: those two are in a module that isn't released. It is built in a
// module of its own.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"path/filepath"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/nativeconverter/estargz"
	"github.com/containerd/stargz-snapshotter/nativeconverter/zstdchunked"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/containerd/stargz-snapshotter/service/keychain/dockerconfig"
	"github.com/pelletier/go-toml"
	"google.golang.org/grpc"
)

const (
	root    = "/var/lib/containerd-stargz-grpc"
	address = "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock"
)

func main() {
	ctx := context.Background()
	var err error
	if len(os.Args) == 5 && os.Args[1] == "convert" {
		err = convert(namespaces.WithNamespace(ctx, namespaces.Default), os.Args[2], os.Args[3], os.Args[4])
	} else {
		err = serve(ctx)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// convert makes an image in containerd whose layers can be read in parts.
func convert(ctx context.Context, how, from, to string) error {
	client, err := containerd.New("/run/containerd/containerd.sock")
	if err != nil {
		return err
	}
	defer client.Close()
	layers := estargz.LayerConvertFunc()
	if how == "zstdchunked" {
		layers = zstdchunked.LayerConvertFunc()
	}
	_, err = converter.Convert(ctx, client, to, from, converter.WithLayerConvertFunc(layers), converter.WithDockerToOCI(true), converter.WithPlatform(platforms.Default()))
	return err
}

func serve(ctx context.Context) error {
	var cfg service.Config
	b, err := os.ReadFile("/etc/containerd-stargz-grpc/config.toml")
	if err == nil {
		err = toml.Unmarshal(b, &cfg)
	}
	if err != nil {
		return err
	}
	snapshotter, err := service.NewStargzSnapshotterService(ctx, root, &cfg, service.WithCredsFuncs(dockerconfig.NewDockerconfigKeychain(ctx)))
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return err
	}
	l, err := net.Listen("unix", address)
	if err != nil {
		return err
	}
	return server.Serve(l)
}
