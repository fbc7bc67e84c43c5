// SPDX-License-Identifier: Apache-2.0

//go:build ignore

// A soci-snapshotter-grpc made of SOCI's packages, as its own main has them, and
// `convert SOURCE DESTINATION`, as the soci command has it: those two are in a module
// that isn't released. It is built in a module of its own.
package main

import (
	"context"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"

	"github.com/awslabs/soci-snapshotter/config"
	"github.com/awslabs/soci-snapshotter/fs"
	"github.com/awslabs/soci-snapshotter/metadata"
	"github.com/awslabs/soci-snapshotter/service"
	"github.com/awslabs/soci-snapshotter/service/keychain/dockerconfig"
	"github.com/awslabs/soci-snapshotter/soci"
	"github.com/awslabs/soci-snapshotter/soci/store"
	"github.com/awslabs/soci-snapshotter/ztoc"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
)

const (
	root    = "/var/lib/soci-snapshotter-grpc"
	address = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
)

func main() {
	ctx := context.Background()
	var err error
	if len(os.Args) == 4 && os.Args[1] == "convert" {
		err = convert(namespaces.WithNamespace(ctx, namespaces.Default), os.Args[2], os.Args[3])
	} else {
		err = serve(ctx)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func serve(ctx context.Context) error {
	cfg, err := config.NewConfigFromToml(config.DefaultConfigPath)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(root, 0o711); err != nil {
		return err
	}
	db, err := bolt.Open(filepath.Join(root, "metadata.db"), 0o600, nil)
	if err != nil {
		return err
	}
	kept := func(sr *io.SectionReader, toc ztoc.TOC, opts ...metadata.Option) (metadata.Reader, error) {
		return metadata.NewReader(db, sr, toc, opts...)
	}
	snapshotter, err := service.NewSociSnapshotterService(ctx, root, &cfg.ServiceConfig,
		service.WithCredsFuncs(dockerconfig.NewDockerConfigKeychain(ctx)), service.WithFilesystemOptions(fs.WithMetadataStore(kept)))
	if err != nil {
		return err
	}
	// It asks containerd in the namespace that it is asked in.
	server := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if namespace, ok := namespaces.Namespace(ctx); ok {
			ctx = namespaces.WithNamespace(ctx, namespace)
		}
		return next(ctx, req)
	}))
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

// convert makes an image in containerd that has an index for lazy loading.
func convert(ctx context.Context, from, to string) error {
	client, err := containerd.New("/run/containerd/containerd.sock")
	if err != nil {
		return err
	}
	defer client.Close()
	image, err := client.ImageService().Get(ctx, from)
	if err != nil {
		return err
	}
	blobs, err := store.NewContentStore(store.WithType("containerd"))
	if err != nil {
		return err
	}
	db, err := soci.NewDB(filepath.Join(os.TempDir(), "soci-artifacts.db"))
	if err != nil {
		return err
	}
	builder, err := soci.NewIndexBuilder(client.ContentStore(), blobs, soci.WithMinLayerSize(0), soci.WithArtifactsDb(db))
	if err != nil {
		return err
	}
	ctx, done, err := blobs.BatchOpen(ctx)
	if err != nil {
		return err
	}
	defer done(ctx)
	target, err := builder.Convert(ctx, image, soci.ConvertWithPlatforms(platforms.DefaultSpec()), soci.ConvertWithNoGarbageCollectionLabels())
	if err != nil {
		return err
	}
	_, err = client.ImageService().Create(ctx, images.Image{Name: to, Target: *target})
	return err
}
