// SPDX-License-Identifier: Apache-2.0

// Command image makes weir's container image, for several platforms, without a
// container engine: what the Dockerfile makes, from binaries that are there. The
// same files give the same image, byte for byte.
//
//	go run ./deploy/image -out dist/image dist/weir-linux-amd64 dist/weir-linux-arm64
//
// It is a directory in the OCI image layout, which skopeo, crane and oras push.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	out := flag.String("out", "", "`directory` to make, which must not be there")
	roots := flag.String("roots", "/etc/ssl/certs/ca-certificates.crt", "`file` of the CAs that registries are verified with")
	flag.Parse()
	if err := build(*out, *roots, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func build(out, roots string, binaries []string) error {
	if out == "" || len(binaries) == 0 {
		return errors.New("say -out DIRECTORY and which binaries, named NAME-OS-ARCHITECTURE")
	}
	if _, err := os.Stat(out); err == nil {
		return fmt.Errorf("%s is there already", out)
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, binary := range binaries {
		fields := strings.Split(filepath.Base(binary), "-")
		if len(fields) < 3 {
			return fmt.Errorf("%s doesn't end in -OS-ARCHITECTURE", binary)
		}
		platform := v1.Platform{OS: fields[len(fields)-2], Architecture: fields[len(fields)-1]}
		image, err := imageOf(binary, roots, platform)
		if err != nil {
			return fmt.Errorf("the image of %s: %w", binary, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &platform}})
	}
	path, err := layout.Write(out, empty.Index)
	if err != nil {
		return err
	}
	return path.AppendIndex(index)
}

// imageOf has a layer with the roots, which rarely change, and one with the
// binary.
func imageOf(binary, roots string, platform v1.Platform) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.ConfigFile(image, &v1.ConfigFile{OS: platform.OS, Architecture: platform.Architecture,
		RootFS: v1.RootFS{Type: "layers"}, Config: v1.Config{Entrypoint: []string{"/weir"}, Cmd: []string{"agent"}}})
	if err != nil {
		return nil, err
	}
	for _, f := range []struct {
		from, to string
		mode     int64
	}{{roots, "etc/ssl/certs/ca-certificates.crt", 0o644}, {binary, "weir", 0o755}} {
		content, err := os.ReadFile(f.from)
		if err != nil {
			return nil, err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return packed(f.to, f.mode, content) },
			tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return nil, err
		}
	}
	return image, nil
}

// packed is a tar archive with one file, of no time.
func packed(name string, mode int64, content []byte) (io.ReadCloser, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(content))})
	if err == nil {
		_, err = w.Write(content)
	}
	return io.NopCloser(&b), errors.Join(err, w.Close())
}
