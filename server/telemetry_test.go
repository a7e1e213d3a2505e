package server_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	trace "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/server/telemetry"
	"github.com/cedarpost/cedarpost/server/telemetry/telemetrytest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// traced starts a server with the shop, and with the telemetry that the environment asks for. All of its statements
// and log lines are part of it.
func traced(t *testing.T, more ...func(*server.Config)) (*servertest.Server, *telemetry.Telemetry) {
	t.Helper()
	local := slog.New(slog.NewTextHandler(io.Discard, nil))
	tel, err := telemetry.Open(t.Context(), telemetry.Config{Version: "1.2.3", Name: "test", Log: local, Level: slog.LevelInfo})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tel.Close)
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), Server: "test", Event: decisionlog.ChangeEvents("test"), TracerProvider: tel.Tracing()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	s := servertest.On(t, url, func(c *server.Config) {
		c.DB, c.TracerProvider, c.Log = db, tel.Tracing(), tel.Logger(local.Handler())
		c.Collectors = append(c.Collectors, tel.Failures()...)
		for _, set := range more {
			set(c)
		}
	})
	s.MustLoadShop()
	return s, tel
}

// A trace of one call from the client through the engine to the commit.
func TestTraceOfOneCall(t *testing.T) {
	out := telemetrytest.New(t)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", out.URL)
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=tiger%2D5512")
	t.Setenv("OTEL_METRICS_EXPORTER", "none")
	t.Setenv("OTEL_TRACES_SAMPLER", "always_on")
	s, tel := traced(t)
	client, err := cedarpost.New(cedarpost.Config{Servers: []string{s.API}, Token: s.Token, TracerProvider: tel.Tracing()})
	if err != nil {
		t.Fatal(err)
	}
	askShop(t, s, "bob") // connects the log
	result, err := client.Authorize(t.Context(), cedarpost.Check{
		Principal: cedarpost.UID("Shop::User", "zebra-7731"), Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: cedarpost.UID("Shop::Order", "giraffe-9942"),
		Context: map[string]any{"mfa": true}, AllFields: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	// Questions that fail must not say more than others.
	if _, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`Shop::User::"zebra-7731"`), Action: servertest.UID(`Shop::Action::"NoSuch"`), Resource: servertest.UID(`Shop::Order::"giraffe-9942"`)}); err == nil {
		t.Fatal("an action that does not exist")
	}
	record, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: result.DecisionID()})
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	tel.Close()

	id := record.GetDecision().GetTraceId()
	tree := out.Tree(id)
	t.Logf("trace %s of decision %s:\n%s", id, result.DecisionID(), tree)
	shape := regexp.MustCompile(`(?m) \d+\.\d+ms.*$`).ReplaceAllString(tree, "")
	for _, want := range []string{
		"cedarpost.Authorize\n  cedarpost.v1.AuthorizationService/Authorize\n    load\n",
		"\n      batch start\n", "\n    decide\n    record\n      commit\n        append_batch\n",
	} {
		if !strings.Contains(shape, want) {
			t.Errorf("the trace has no %q:\n%s", want, shape)
		}
	}
	for _, want := range []string{"rpc.system=connect_rpc", "rpc.service=cedarpost.v1.AuthorizationService", "rpc.method=Authorize", "cedarpost.caller=bootstrap", "cedarpost.checks=1", "cedarpost.batch="} {
		if !strings.Contains(tree, want) {
			t.Errorf("the trace has no %s", want)
		}
	}
	spans := map[string]*trace.Span{}
	statement := false
	for _, span := range out.Spans() {
		if hex.EncodeToString(span.TraceId) == id {
			spans[span.Name] = span
			statement = statement || strings.Contains(telemetrytest.Attribute(span.Attributes, "db.query.text"), "$1")
		}
	}
	if !statement {
		t.Error("no span has the text of a statement")
	}
	if call, load := spans["cedarpost.v1.AuthorizationService/Authorize"], spans["load"]; call.GetStartTimeUnixNano() >= load.GetStartTimeUnixNano() || call.Kind != trace.Span_SPAN_KIND_SERVER {
		t.Error("the call does not begin before its first stage, or is not that of a server")
	}
	linked := func(from, to string) bool {
		for _, l := range spans[from].GetLinks() {
			if bytes.Equal(l.SpanId, spans[to].GetSpanId()) {
				return true
			}
		}
		return false
	}
	if !linked("commit", "record") || !linked("record", "commit") {
		t.Error("record and commit have no links to each other")
	}
	if got := out.About("service.name") + " " + out.About("service.version") + " " + out.About("service.instance.id"); got != "cedarpost 1.2.3 test" {
		t.Errorf("the resource is %s", got)
	}
	for _, key := range out.Headers("X-Api-Key") {
		if key != "tiger-5512" {
			t.Errorf("header %q", key)
		}
	}
	neverSent(t, out, s.Token, "zebra-7731", "giraffe-9942", "tiger")
	if len(out.Lines()) == 0 {
		t.Error("no log line came")
	}
}

// neverSent searches all that was received.
func neverSent(t *testing.T, out *telemetrytest.Receiver, secrets ...string) {
	t.Helper()
	raw := out.Raw()
	if len(raw) < 1000 {
		t.Errorf("only %d bytes came", len(raw))
	}
	for _, s := range secrets {
		if bytes.Contains(raw, []byte(s)) {
			t.Errorf("%s was sent", s)
		}
	}
}

// The metrics of OTLP have the names of /metrics, and the same exemplars.
func TestMetricsHaveOneSetOfNames(t *testing.T) {
	out := telemetrytest.New(t)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", out.URL)
	t.Setenv("OTEL_LOGS_EXPORTER", "none")
	s, tel := traced(t)
	askShop(t, s, "alice")
	text, kind := scrape(t, s.Ops, "application/openmetrics-text; version=1.0.0")
	if !strings.HasPrefix(kind, "application/openmetrics-text") {
		t.Errorf("scraped as %s", kind)
	}
	exemplar := regexp.MustCompile(`cedarpost_stage_seconds_bucket\{stage="record",le="[^"]+"\} 1 # \{[^}]*trace_id="([0-9a-f]{32})"`).FindStringSubmatch(text)
	if exemplar == nil {
		t.Fatalf("no exemplar of a stage in\n%s", text)
	}
	want := `cedarpost_decisions_total{action="Shop::Action::\"ViewOrder\"",decision="allow",denied_at=""} 1`
	if !strings.Contains(text, want) {
		t.Errorf("no line %s", want)
	}
	tel.SendMetrics(s.Metrics)
	tel.Close()
	sent := out.Metrics()
	plain, _ := scrape(t, s.Ops, "text/plain")
	names := regexp.MustCompile(`(?m)^# TYPE (\S+) `).FindAllStringSubmatch(plain, -1)
	if len(names) < 50 {
		t.Fatalf("only %d metrics", len(names))
	}
	for _, n := range names {
		if sent[n[1]] == nil {
			t.Errorf("%s is in /metrics, and was not sent", n[1])
		}
		delete(sent, n[1])
	}
	for name := range sent {
		t.Errorf("%s was sent, and is not in /metrics", name)
	}
	if !bytes.Contains(out.Raw(), mustHex(t, exemplar[1])) {
		t.Error("the trace of the exemplar was not sent")
	}
	for _, m := range out.Metrics() {
		for _, p := range m.GetHistogram().GetDataPoints() {
			for _, e := range p.Exemplars {
				if len(e.TraceId) != 16 || len(e.SpanId) != 8 {
					t.Errorf("%s: an exemplar with a trace id of %d bytes, which collectors refuse", m.Name, len(e.TraceId))
				}
			}
		}
	}
	neverSent(t, out, s.Token, "alice")
}

func mustHex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func askShop(t *testing.T, s *servertest.Server, user string) {
	t.Helper()
	if _, err := s.Authorization.Authorize(t.Context(), servertest.AskShop(user, "ViewOrder", "42", false)); err != nil {
		t.Fatal(err)
	}
}

// scrape asks for the metrics in a format.
func scrape(t *testing.T, ops, accept string) (text, kind string) {
	t.Helper()
	r := send(t, http.MethodGet, ops+"/metrics", "Accept", accept)
	return r.body, r.header.Get("Content-Type")
}

// Calls above the rate of their caller make no spans, whatever the caller samples.
func TestRefusedCallsMakeNoSpans(t *testing.T) {
	out := telemetrytest.New(t)
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", out.URL+"/v1/traces")
	s, tel := traced(t, func(c *server.Config) { c.RateLimit = 0.001 }) // a burst of 100, and next to nothing after it
	served, refused := 0, 0
	for refused < 50 {
		status, _, text := post(t, s.API+cedarpostv1connect.AuthorizationServiceGetRevisionProcedure, s.Token, "application/json", []byte("{}"),
			"Traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
		switch status {
		case http.StatusOK:
			served++
		case http.StatusTooManyRequests:
			refused++
		default:
			t.Fatalf("%d %s", status, text)
		}
	}
	s.Stop()
	tel.Close()
	spans := 0
	for _, span := range out.Spans() {
		if span.Name == "cedarpost.v1.AuthorizationService/GetRevision" {
			spans++
		}
	}
	if spans != served || served == 0 {
		t.Errorf("%d spans of %d calls that were served, and %d that were not", spans, served, refused)
	}
}

// A short tracestate is in the spans of a call, and a long one is not: a caller must not fill the messages
// in which the spans of all callers are sent.
func TestLongTraceStateIsDropped(t *testing.T) {
	out := telemetrytest.New(t)
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", out.URL+"/v1/traces")
	s, tel := traced(t)
	ask := func(id, state string) {
		body := []byte(`{"principal":{"type":"Shop::User","id":"bob"},"action":{"type":"Shop::Action","id":"ViewOrder"},"resource":{"type":"Shop::Order","id":"42"},"context":{"mfa":true}}`)
		if status, _, text := post(t, s.API+cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, s.Token, "application/json", body, "Traceparent", "00-"+id+"-00f067aa0ba902b7-01", "Tracestate", state); status != http.StatusOK {
			t.Fatalf("%d %s", status, text)
		}
	}
	const short, long = "4bf92f3577b34da6a3ce929d0e0e4736", "4bf92f3577b34da6a3ce929d0e0e4737"
	ask(short, "vendor=value")
	many := make([]string, 31)
	for i := range many {
		many[i] = fmt.Sprintf("m%d=%s", i, strings.Repeat("y", 240))
	}
	ask(long, strings.Join(many, ","))
	s.Stop()
	tel.Close()
	states := map[string]string{}
	for _, span := range out.Spans() {
		if id := hex.EncodeToString(span.TraceId); span.TraceState != "" || states[id] == "" {
			states[id] = span.TraceState
		}
	}
	for id, want := range map[string]string{short: "vendor=value", long: ""} {
		if got, ok := states[id]; !ok || got != want {
			t.Errorf("%s: tracestate %.40q, %v, want %q", id, got, ok, want)
		}
	}
}

// A collector that is away, or that takes connections and never answers, delays no call, and nothing
// grows: what does not fit into the queue is dropped. A Prometheus that asks often delays no call either.
func TestCollectorIsAway(t *testing.T) {
	hangs, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hangs.Close()
	go func() {
		for {
			c, err := hangs.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = c.Close() })
		}
	}()
	gone, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = gone.Close()
	for name, l := range map[string]net.Listener{"away": gone, "never answers": hangs} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+l.Addr().String())
			t.Setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
			t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
			t.Setenv("OTEL_METRIC_EXPORT_INTERVAL", "1")
			s, tel := traced(t)
			tel.SendMetrics(s.Metrics)
			for i := range 200 {
				askShop(t, s, fmt.Sprint("user", i))
				if i%10 == 0 {
					scrape(t, s.Ops, "application/openmetrics-text") // a Prometheus that asks often
				}
			}
			if name == "away" {
				servertest.Eventually(t, "a failure is counted", func() bool {
					text, _ := scrape(t, s.Ops, "text/plain")
					return regexp.MustCompile(`cedarpost_telemetry_failures_total\{signal="(traces|metrics)"\} [1-9]`).MatchString(text)
				})
			}
			servertest.Eventually(t, "spans that are dropped are counted", func() bool {
				text, _ := scrape(t, s.Ops, "text/plain")
				return regexp.MustCompile(`cedarpost_telemetry_dropped_total\{signal="traces"\} [1-9]`).MatchString(text)
			})
			s.Stop()
			ended := make(chan struct{})
			go func() { tel.Close(); close(ended) }()
			select {
			case <-ended:
			case <-time.After(time.Minute): // five seconds on a machine that is not busy
				t.Error("Close does not end")
			}
		})
	}
}
