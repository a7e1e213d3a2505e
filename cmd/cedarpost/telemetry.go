package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/cedarpost/cedarpost/internal/recentlog"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/telemetry"
	"github.com/cedarpost/cedarpost/store"
)

// telemetryHelp is the part about telemetry in the long help of serve.
const telemetryHelp = `Traces, metrics and log lines go to an OpenTelemetry collector if the standard variables ask for it: OTEL_EXPORTER_OTLP_ENDPOINT for all three, OTEL_TRACES_SAMPLER for how many calls are traced. docs/operations.md, section Telemetry, has all of them.`

// surviveClosedPipe makes writes to stdout or stderr fail if their reader is gone. Without it such a write
// ends the process with SIGPIPE.
func surviveClosedPipe() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// observed is the telemetry of a serving process.
type observed struct {
	*telemetry.Telemetry
	log   *slog.Logger
	lines *telemetry.Lines
}

// observe begins the log of the process, and the telemetry that the environment asks for. The caller
// closes it.
func (f *listenFlags) observe(ctx context.Context, stderr io.Writer) (*observed, error) {
	surviveClosedPipe()
	o := &observed{lines: telemetry.NewLines(stderr)}
	local := f.logger(o.lines).Handler()
	// The server gives the newest warnings and errors to support-bundle, also those from before it was made,
	// and those about the telemetry.
	recent := recentlog.Wrap(local)
	version, _ := buildVersion()
	var err error
	o.Telemetry, err = telemetry.Open(ctx, telemetry.Config{Version: version, Name: f.name(), Log: slog.New(recent), Level: f.level(), AllowPlaintext: f.PlainTelemetry})
	if err != nil {
		o.lines.Close()
		return nil, misuse("%w", err)
	}
	o.log = slog.New(recent.Around(o.Logger(local).Handler()))
	return o, nil
}

// Close sends what is left of the telemetry, and writes what is left of the log. Both are bounded.
func (o *observed) Close() {
	o.Telemetry.Close()
	o.lines.Close()
}

// open opens a database whose statements are traced.
func (o *observed) open(ctx context.Context, c store.Config) (*store.DB, error) {
	c.TracerProvider = o.Tracing()
	return store.Open(ctx, c)
}

// configure gives a server what it reports with.
func (o *observed) configure(c *server.Config) {
	c.TracerProvider = o.Tracing()
	c.Collectors = append(append(c.Collectors, o.Failures()...), o.lines.Lost())
}
