// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	oci "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"weir/agent"
	"weir/agent/admin"
	"weir/agent/service"
	"weir/proxy/registry"
)

func prefetchCommand() *cobra.Command {
	var runDir, platform string
	c := &cobra.Command{
		Use:   "prefetch IMAGE...",
		Short: "Get images into the store before they are pulled",
		Long:  "Get images into the store of this node, and so into the reach of its peers, before\nthey are pulled. What needs a login is asked for with what `docker login` has kept for\nthe user who runs this (~/.docker/config.json, or in $DOCKER_CONFIG).",
	}
	c.Flags().StringVar(&runDir, "run-dir", agent.DefaultRunDir, "the running agent's")
	c.Flags().StringVar(&platform, "platform", "linux/"+runtime.GOARCH, "`OS/ARCHITECTURE` that is taken of images for several")
	c.Args = func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError{errors.New("name at least one image, such as debian:12 or ghcr.io/OWNER/NAME:TAG")}
		}
		return nil
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		socket := filepath.Join(runDir, service.SocketFile)
		p := &prefetcher{socket: socket, platform: platform, agent: clientOf(socket), out: cmd.OutOrStdout(), tokens: make(map[string]string)}
		if name, arch, ok := strings.Cut(platform, "/"); !ok || name == "" || arch == "" {
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
	socket, platform string
	agent            *http.Client
	out              io.Writer

	mu     sync.Mutex
	tokens map[string]string // Authorization headers, by repository
}

// document is a manifest or an index (OCI image spec, Docker's schema 2).
type document struct {
	Config    *oci.Descriptor
	Layers    []oci.Descriptor
	Manifests []oci.Descriptor
}

// maxDocument bounds a manifest.
const maxDocument = 4 << 20

var documentTypes = []string{
	"application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json",
	"application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.docker.distribution.manifest.v2+json",
}

func (p *prefetcher) image(ctx context.Context, ref reference.Named) error {
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
			if m.Platform != nil && m.Platform.OS+"/"+m.Platform.Architecture == p.platform && of == "" {
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
	line := func() string {
		return fmt.Sprintf("%s  %s %s of %s, %d of %d blobs", ref, progressBar(got.Load(), size), admin.BytesText(got.Load()), admin.BytesText(size), done.Load(), len(blobs))
	}
	stop := p.progress(line)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(3) // as runtimes do
	for _, b := range blobs {
		g.Go(func() error {
			resp, err := p.get(ctx, ref, "blobs/"+b.Digest.String())
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			n, err := io.Copy(counter{&got}, resp.Body)
			if err == nil && n != b.Size {
				err = fmt.Errorf("%s has %d bytes, and should have %d", b.Digest, n, b.Size)
			}
			if err != nil {
				return err
			}
			if !registry.FromUpstream(resp.Header) {
				here.Add(n)
			}
			done.Add(1)
			return nil
		})
	}
	err = g.Wait()
	stop()
	if err != nil {
		return err
	}
	fmt.Fprintf(p.out, "%s  is there: %s, of which %s had been there or came from a peer\n", ref, admin.BytesText(size), admin.BytesText(here.Load()))
	return nil
}

// counter counts what is thrown away.
type counter struct{ n *atomic.Int64 }

func (c counter) Write(b []byte) (int, error) {
	c.n.Add(int64(len(b)))
	return len(b), nil
}

// progress shows a line, until it is stopped: on a terminal always the newest in
// the place of the one before, and else a new one each few seconds, for logs.
func (p *prefetcher) progress(line func() string) (stop func()) {
	before, after, every := "", "\n", 5*time.Second
	if f, ok := p.out.(*os.File); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			before, after, every = "\r\x1b[K", "", 200*time.Millisecond
		}
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				fmt.Fprint(p.out, before, line(), after)
			case <-done:
				fmt.Fprint(p.out, before, line(), "\n")
				return
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

func (p *prefetcher) document(ctx context.Context, ref reference.Named, name string) (doc document, err error) {
	resp, err := p.get(ctx, ref, "manifests/"+name)
	if err != nil {
		return doc, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err == nil && len(b) > maxDocument {
		err = errors.New("its manifest is larger than 4 MiB")
	}
	if err != nil {
		return doc, fmt.Errorf("reading its manifest: %w", err)
	}
	return parseDocument(b)
}

func parseDocument(b []byte) (doc document, err error) {
	if err := json.Unmarshal(b, &doc); err != nil {
		return doc, fmt.Errorf("reading its manifest: %w", err)
	}
	all := slices.Concat(doc.Layers, doc.Manifests)
	if doc.Config != nil {
		all = append(all, *doc.Config)
	}
	for _, d := range all {
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return doc, fmt.Errorf("its manifest names %q with %d bytes, which can't be", d.Digest, d.Size)
		}
	}
	return doc, nil
}

// get asks the agent, which asks the registry where it has to. What the registry
// refuses to an anonymous client is asked for again with the user's login.
func (p *prefetcher) get(ctx context.Context, ref reference.Named, path string) (*http.Response, error) {
	p.mu.Lock()
	was := p.tokens[ref.Name()]
	p.mu.Unlock()
	resp, err := p.ask(ctx, ref, path, was)
	if err != nil || resp.StatusCode == http.StatusOK {
		return resp, err
	}
	login := "there is no login for it (`docker login " + reference.Domain(ref) + "` as the user who runs this)"
	if resp.StatusCode == http.StatusUnauthorized || resp.Header.Get("WWW-Authenticate") != "" {
		c, err := loggedIn(ctx, reference.Domain(ref))
		if err == nil && c != nil {
			resp.Body.Close()
			var token string
			if token, err = c.authorize(ctx, resp.Header, reference.Domain(ref)); err == nil {
				p.mu.Lock()
				p.tokens[ref.Name()] = token
				p.mu.Unlock()
				resp, err = p.ask(ctx, ref, path, token)
			}
			login = "the login that `docker login` has kept isn't enough"
		}
		if err != nil || resp.StatusCode == http.StatusOK {
			return resp, err
		}
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return nil, fmt.Errorf("the registry doesn't give it, or has none of that name; %s", login)
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

func (p *prefetcher) ask(ctx context.Context, ref reference.Named, path, authorization string) (*http.Response, error) {
	url := "http://weir/v2/" + reference.Path(ref) + "/" + path + "?ns=" + reference.Domain(ref)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header["Accept"] = documentTypes
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := p.agent.Do(req)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s is root's: run weir prefetch as root (with sudo --preserve-env=HOME, it is your login that counts)", p.socket)
	case err != nil:
		return nil, fmt.Errorf("no agent answers at %s; start it with `weir agent`, or name its directory with --run-dir", p.socket)
	}
	return resp, nil
}

// clientOf returns a client of the agent at its socket.
func clientOf(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
}
