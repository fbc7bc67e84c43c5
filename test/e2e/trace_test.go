// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/hex"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
	"weir/test/lab"
)

// With OpenTelemetry's own variables set, each pull is a trace: its parts, where
// their bytes came from, and no secret.
func TestTraces(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.ghcr.User("alice", "alices-password")
	w.ghcr.Private("team/private", "alice")
	private := w.ghcr.Push("team/private:1", lab.Image{Layers: []int{300_000}, Seed: 9})
	node := w.Node()
	l, err := node.Listen("tcp", "127.0.0.1:4318")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var spans []*otlp.Span
	var raw strings.Builder
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		var req collector.ExportTraceServiceRequest
		if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(b, &req) != nil {
			t.Errorf("%s %s: %v", r.Method, r.URL, err)
		}
		mu.Lock()
		defer mu.Unlock()
		raw.Write(b)
		for _, rs := range req.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				spans = append(spans, ss.Spans...)
			}
		}
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })

	agent := node.Agent()
	agent.Stop()
	agent.Env = []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318"}
	agent.Start()
	ref := "ghcr.io/team/private:1"
	// Each has an empty disk. One that pulls again may have the manifest still:
	// its containerd collects it after a pause that depends on how long its
	// collections take.
	for _, docker := range []*lab.Docker{node.Docker(), node.Box().Docker()} {
		docker.Pull(ref, "alice", "alices-password")
		docker.Same(ref, private)
	}
	agent.Stop() // sends the last of it

	mu.Lock()
	defer mu.Unlock()
	roots, bytes := make(map[string]bool), make(map[string]int64)
	for _, s := range spans {
		if s.Name == "pull" {
			roots[hex.EncodeToString(s.SpanId)] = true
		}
	}
	names := make(map[string]int)
	for _, s := range spans {
		attrs := make(map[string]string)
		var n int64
		for _, a := range s.Attributes {
			attrs[a.Key] = a.Value.GetStringValue()
			if a.Key == "weir.bytes" {
				n = a.Value.GetIntValue()
			}
		}
		names[s.Name]++
		if s.Name == "pull" {
			if attrs["weir.registry"] != "ghcr.io" || attrs["weir.repository"] != "team/private" || !strings.HasPrefix(attrs["weir.client"], "dockerd") {
				t.Errorf("a pull: %v", attrs)
			}
			continue
		}
		if !roots[hex.EncodeToString(s.ParentSpanId)] {
			t.Errorf("%s is part of no pull", s.Name)
		}
		if s.EndTimeUnixNano < s.StartTimeUnixNano {
			t.Errorf("%s ended before it began", s.Name)
		}
		if s.Name == "blob" {
			bytes[attrs["weir.source"]] += n
		}
	}
	if names["pull"] == 0 || names["resolve"] < 2 || names["manifest"] < 2 || names["blob"] < 4 {
		t.Errorf("the spans are %v", names)
	}
	if bytes["upstream"] < 300_000 || bytes["store"] != bytes["upstream"] || len(bytes) != 2 {
		t.Errorf("the blobs' bytes are %v", bytes)
	}
	for _, secret := range w.ghcr.Secrets() {
		if strings.Contains(raw.String(), secret) {
			t.Errorf("the traces have %q, a token or a password", secret)
		}
	}
}
