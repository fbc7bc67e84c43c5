// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"
)

// wantsTraces says whether traces are configured: by OpenTelemetry's own variables
// and no flag, since those also say where to and how ("OpenTelemetry Protocol
// Exporter" and "General SDK Configuration" of its specification). Without an
// endpoint there are none, although the specification has a default for it.
func wantsTraces(getenv func(string) string) bool {
	if strings.EqualFold(getenv("OTEL_SDK_DISABLED"), "true") {
		return false
	}
	switch getenv("OTEL_TRACES_EXPORTER") {
	case "otlp":
		return true
	case "":
		return getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != ""
	}
	return false
}

// newTraces makes what sends traces, over HTTP. It returns nil when none are
// configured. Spans are sent in the background, and dropped when they can't be: no pull
// waits for them.
func newTraces(ctx context.Context, version string, log *slog.Logger) (*sdktrace.TracerProvider, error) {
	if !wantsTraces(os.Getenv) {
		return nil, nil
	}
	var once sync.Once
	// Once, since there is one every few seconds when there is any; and not what
	// the library says, which may have an endpoint with a password in it.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(error) {
		once.Do(func() { log.Warn("traces can't be sent; see OTEL_EXPORTER_OTLP_ENDPOINT and what listens there") })
	}))
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("sending traces: %w; see the OTEL_ variables", err)
	}
	about, err := resource.New(ctx, resource.WithHost(), resource.WithAttributes(semconv.ServiceName("weir"), semconv.ServiceVersion(version)), resource.WithFromEnv())
	if err != nil {
		log.Warn("OTEL_RESOURCE_ATTRIBUTES can't be read as a whole", "err", err)
	}
	return sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(about)), nil
}

// flushTime is how long an ending agent may take to send the last spans.
const flushTime = 2 * time.Second
