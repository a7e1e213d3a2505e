package server_test

import (
	"fmt"
	"net"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A real collector takes all that is sent, over HTTP and over gRPC. make telemetry builds it, and runs
// this test.
func TestRealCollector(t *testing.T) {
	program := os.Getenv("CEDARPOST_OTELCOL")
	if program == "" {
		t.Skip("make telemetry runs it")
	}
	for _, protocol := range []string{"http/protobuf", "grpc"} {
		t.Run(protocol, func(t *testing.T) {
			to, text := startCollector(t, program, protocol)
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", to)
			t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
			t.Setenv("OTEL_TRACES_SAMPLER", "always_on")
			s, tel := traced(t)
			tel.SendMetrics(s.Metrics)
			askShop(t, s, "bob")
			client, err := cedarpost.New(cedarpost.Config{Servers: []string{s.API}, Token: s.Token, TracerProvider: tel.Tracing()})
			if err != nil {
				t.Fatal(err)
			}
			result, err := client.Authorize(t.Context(), cedarpost.Check{
				Principal: cedarpost.UID("Shop::User", "zebra-7731"), Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: cedarpost.UID("Shop::Order", "42"), Context: map[string]any{"mfa": true},
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := client.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.Stop()
			tel.Close()
			failures := prometheus.NewPedanticRegistry()
			failures.MustRegister(tel.Failures()...)
			families, err := failures.Gather()
			if err != nil || len(families) != 2 { // dropped and failures
				t.Fatalf("%v, %v", families, err)
			}
			for _, family := range families {
				for _, m := range family.GetMetric() {
					if m.GetCounter().GetValue() > 0 {
						t.Errorf("%s of %v", family.GetName(), m.GetLabel())
					}
				}
			}
			got := text()
			trace := traceOf(got, "cedarpost.Authorize")
			t.Logf("the trace of decision %s, as the collector printed it:\n%s", result.DecisionID(), trace)
			for _, want := range []string{"cedarpost.v1.AuthorizationService/Authorize", "load", "decide", "record", "commit", "append_batch"} {
				if !strings.Contains(trace, " "+want+"\n") {
					t.Errorf("the collector has no span %s", want)
				}
			}
			for _, want := range []string{"cedarpost_decisions_total", "cedarpost_stage_seconds", "Exemplar #0", "service.name: Str(cedarpost)", "LogRecord #0"} {
				if !strings.Contains(got, want) {
					t.Errorf("the collector did not print %s", want)
				}
			}
			if strings.Contains(got, "zebra-7731") {
				t.Error("the principal was sent")
			}
		})
	}
}

// startCollector runs a collector. text stops it, and returns what it printed.
func startCollector(t *testing.T, program, protocol string) (endpoint string, text func() string) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	name, _, _ := strings.Cut(protocol, "/")
	config := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
receivers: {otlp: {protocols: {%s: {endpoint: "%s"}}}}
exporters: {debug: {verbosity: detailed}}
service:
  telemetry: {metrics: {level: none}}
  pipelines:
    traces: {receivers: [otlp], exporters: [debug]}
    metrics: {receivers: [otlp], exporters: [debug]}
    logs: {receivers: [otlp], exporters: [debug]}
`, name, l.Addr()), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	file, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := osexec.Command(program, "--config", config)
	cmd.Stdout, cmd.Stderr = file, file
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end := func() {
		if !ended {
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait()
		}
		ended = true
	}
	t.Cleanup(end)
	read := func() string {
		printed, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		return string(printed)
	}
	servertest.Eventually(t, "the collector is ready", func() bool { return strings.Contains(read(), "Everything is ready") })
	return "http://" + l.Addr().String(), func() string { end(); return read() }
}

// traceOf returns the spans, as the debug exporter prints them, of the trace that has a span of that name.
func traceOf(printed, name string) string {
	field := func(span, name string) string {
		m := regexp.MustCompile(`(?m)^    ` + name + ` *: (.*)$`).FindStringSubmatch(span)
		if m == nil {
			return ""
		}
		return m[1]
	}
	var spans []string
	id := ""
	for _, part := range regexp.MustCompile(`(?m)^Span #\d+$`).Split(printed, -1) {
		spans = append(spans, part)
		if field(part, "Name") == name {
			id = field(part, "Trace ID")
		}
	}
	var out strings.Builder
	var show func(parent, indent string)
	show = func(parent, indent string) {
		for _, span := range spans {
			if field(span, "Trace ID") == id && strings.TrimSpace(field(span, "Parent ID")) == parent {
				fmt.Fprintf(&out, "%s %s\n", indent, field(span, "Name"))
				show(strings.TrimSpace(field(span, "ID")), indent+"  ")
			}
		}
	}
	if id != "" {
		show("", "")
	}
	return "trace " + id + "\n" + out.String()
}
