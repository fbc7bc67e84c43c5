// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"weir/agent"
)

func prefetchCommand() *cobra.Command {
	var admin, platform string
	c := &cobra.Command{
		Use:   "prefetch IMAGE...",
		Short: "Get images into the store before they are pulled",
		Long:  "Get images into the store of this node, and so into the reach of its peers, before\nthey are pulled. They are fetched as somebody without a name: what needs a login can't\nbe prefetched.",
	}
	adminFlag(c.Flags(), &admin)
	c.Flags().StringVar(&platform, "platform", "linux/"+runtime.GOARCH, "`OS/ARCHITECTURE` that is taken of images for several")
	c.Args = func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError{errors.New("name at least one image, such as debian:12 or ghcr.io/OWNER/NAME:TAG")}
		}
		return nil
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		p := prefetcher{admin: admin, platform: platform, out: cmd.OutOrStdout()}
		if os, arch, ok := strings.Cut(platform, "/"); !ok || os == "" || arch == "" {
			return usageError{fmt.Errorf("--platform: %q is not OS/ARCHITECTURE, such as linux/arm64", platform)}
		}
		var refs []reference.Named
		for _, arg := range args {
			ref, err := reference.ParseDockerRef(arg)
			if err != nil {
				return usageError{fmt.Errorf("%q is not an image: %w", arg, err)}
			}
			refs = append(refs, ref)
		}
		// One image that can't be had doesn't keep the others.
		var errs []error
		for _, ref := range refs {
			if err := p.image(cmd.Context(), ref); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", ref, err))
			}
		}
		return errors.Join(errs...)
	}
	return c
}

// prefetcher reads images through the running agent.
type prefetcher struct {
	admin, platform string
	out             io.Writer
}

// document is a manifest or an index (OCI image spec, Docker's schema 2).
type document struct {
	Config    *descriptor
	Layers    []descriptor
	Manifests []descriptor
}

type descriptor struct {
	Digest   digest.Digest
	Size     int64
	Platform struct{ OS, Architecture string }
}

// maxDocument bounds a manifest.
const maxDocument = 4 << 20

var documentTypes = []string{
	"application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json",
	"application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.docker.distribution.manifest.v2+json",
}

func (p prefetcher) image(ctx context.Context, ref reference.Named) error {
	name := "latest"
	switch r := ref.(type) {
	case reference.Digested:
		name = r.Digest().String()
	case reference.Tagged:
		name = r.Tag()
	}
	doc, err := p.document(ctx, ref, name)
	if err == nil && len(doc.Manifests) > 0 {
		var of digest.Digest
		for _, m := range doc.Manifests {
			if m.Platform.OS+"/"+m.Platform.Architecture == p.platform && of == "" {
				of = m.Digest
			}
		}
		if of == "" {
			return fmt.Errorf("there is none for %s; choose another with --platform", p.platform)
		}
		doc, err = p.document(ctx, ref, of.String())
	}
	if err != nil {
		return err
	}
	blobs := doc.Layers
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	if len(blobs) == 0 {
		return errors.New("it has no layers")
	}
	var size int64
	for _, b := range blobs {
		size += b.Size
	}
	var got, done, here atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(3) // as runtimes do
	for _, b := range blobs {
		g.Go(func() error {
			resp, err := p.get(ctx, ref, "blobs/"+b.Digest.String())
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			n, err := io.Copy(io.Discard, resp.Body)
			if err == nil && n != b.Size {
				err = fmt.Errorf("%s has %d bytes, and should have %d", b.Digest, n, b.Size)
			}
			if err != nil {
				return err
			}
			if strings.Contains(resp.Header.Get("Cache-Status"), "; hit") {
				here.Add(n)
			}
			fmt.Fprintf(p.out, "%s  %s %s, %d of %d blobs\n", ref, progressBar(got.Add(n), size), agent.BytesText(got.Load()), done.Add(1), len(blobs))
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	fmt.Fprintf(p.out, "%s  is there: %s, of which %s had been there or came from a peer\n", ref, agent.BytesText(size), agent.BytesText(here.Load()))
	return nil
}

func (p prefetcher) document(ctx context.Context, ref reference.Named, name string) (doc document, err error) {
	resp, err := p.get(ctx, ref, "manifests/"+name)
	if err != nil {
		return doc, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err == nil && len(b) > maxDocument {
		err = errors.New("its manifest is larger than 4 MiB")
	}
	if err == nil {
		err = json.Unmarshal(b, &doc)
	}
	if err != nil {
		return doc, fmt.Errorf("reading its manifest: %w", err)
	}
	for _, d := range append(append([]descriptor{}, doc.Layers...), doc.Manifests...) {
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return doc, fmt.Errorf("its manifest names %q with %d bytes, which can't be", d.Digest, d.Size)
		}
	}
	return doc, nil
}

// get asks the agent, which asks the registry where it has to.
func (p prefetcher) get(ctx context.Context, ref reference.Named, path string) (*http.Response, error) {
	url := "http://" + p.admin + "/v2/" + reference.Path(ref) + "/" + path + "?ns=" + reference.Domain(ref)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, usageError{fmt.Errorf("--admin: %w", err)}
	}
	req.Header["Accept"] = documentTypes
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, noAgent(p.admin)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return nil, errors.New("the registry gives it to those only who log in, or it isn't there; prefetch can get what everybody may")
	case http.StatusNotFound:
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		var refusal struct {
			Errors []struct{ Message string }
		}
		if json.Unmarshal(b, &refusal) == nil && len(refusal.Errors) > 0 && refusal.Errors[0].Message != "" {
			return nil, errors.New(refusal.Errors[0].Message)
		}
		return nil, errors.New("the registry has none of that name")
	default:
		return nil, fmt.Errorf("%s answers with %s", reference.Domain(ref), resp.Status)
	}
}

func noAgent(admin string) error {
	return fmt.Errorf("no agent answers at %s; start it with `weir agent`, or name its address with --admin", admin)
}
