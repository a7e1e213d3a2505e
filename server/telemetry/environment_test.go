package telemetry

import (
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestVariablesAreChecked(t *testing.T) {
	for name, bad := range map[string][]string{
		"OTEL_SDK_DISABLED":                                 {"yes"},
		"OTEL_TRACES_EXPORTER":                              {"zipkin", "otlp,console"},
		"OTEL_LOGS_EXPORTER":                                {"console"},
		"OTEL_METRICS_EXPORTER":                             {"statsd"},
		"OTEL_TRACES_SAMPLER":                               {"sometimes"},
		"OTEL_TRACES_SAMPLER_ARG":                           {"1.5", "-1", "half"},
		"OTEL_PROPAGATORS":                                  {"b3", "baggage"},
		"OTEL_RESOURCE_ATTRIBUTES":                          {"team", "=x", "a=%zz"},
		"OTEL_CONFIG_FILE":                                  {"/etc/otel.yaml"},
		"OTEL_BSP_MAX_QUEUE_SIZE":                           {"0", "many", "100000000"},
		"OTEL_METRIC_EXPORT_INTERVAL":                       {"10s"},
		"OTEL_SPAN_LINK_COUNT_LIMIT":                        {"-1", "1025", "2147483647"},
		"OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT":              {"-1", "1025"},
		"OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT":                 {"-1", "65537"},
		"OTEL_EXPORTER_OTLP_ENDPOINT":                       {"localhost:4318", "ftp://x", "http://", "http://x:y:z", "http://swordfish@%"},
		"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT":                  {"collector"},
		"OTEL_EXPORTER_OTLP_PROTOCOL":                       {"http/json", "GRPC"},
		"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL":                {"thrift"},
		"OTEL_EXPORTER_OTLP_HEADERS":                        {"swordfish", "=swordfish", "a b=swordfish", "a=swordfish%0d%0ax: y"},
		"OTEL_EXPORTER_OTLP_COMPRESSION":                    {"zstd"},
		"OTEL_EXPORTER_OTLP_TIMEOUT":                        {"10s", "0"},
		"OTEL_EXPORTER_OTLP_INSECURE":                       {"1"},
		"OTEL_EXPORTER_OTLP_CERTIFICATE":                    {"/no/such/file", "/dev/null"},
		"OTEL_EXPORTER_OTLP_CLIENT_KEY":                     {"/dev/null"},
		"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": {"delta"},
	} {
		for _, v := range bad {
			t.Run(name+"="+v, func(t *testing.T) {
				t.Setenv(name, v)
				_, err := Open(t.Context(), Config{Log: quiet()})
				var bad *VariableError
				if !errors.As(err, &bad) || !strings.Contains(err.Error(), strings.TrimSuffix(name, "KEY")) {
					t.Errorf("got %v", err)
				}
				if err != nil && strings.Contains(err.Error(), "swordfish") {
					t.Errorf("the error has the value: %v", err)
				}
			})
		}
	}
}

func TestSignals(t *testing.T) {
	for _, c := range []struct{ env, want string }{
		{"", ""},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318", "traces metrics logs"},
		{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://localhost:4318", "traces"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 OTEL_LOGS_EXPORTER=none OTEL_METRICS_EXPORTER=prometheus", "traces"},
		{"OTEL_LOGS_EXPORTER=otlp", "logs"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 OTEL_SDK_DISABLED=TRUE", ""},
		{"OTEL_SDK_DISABLED=true OTEL_EXPORTER_OTLP_PROTOCOL=nonsense", ""},
		{"OTEL_EXPORTER_OTLP_HEADERS=a=b,c=d%20e OTEL_PROPAGATORS=tracecontext,baggage OTEL_TRACES_SAMPLER=traceidratio OTEL_TRACES_SAMPLER_ARG=0.01", ""},
		{"OTEL_SPAN_EVENT_COUNT_LIMIT=0 OTEL_SPAN_LINK_COUNT_LIMIT=1024 OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT=65536", ""},
		{"OTEL_PYTHON_LOG_CORRELATION=whatever OTEL_TRACES_EXPORTER=", ""},
	} {
		t.Run(c.env, func(t *testing.T) {
			for kv := range strings.FieldsSeq(c.env) {
				name, v, _ := strings.Cut(kv, "=")
				t.Setenv(name, v)
			}
			e, err := readEnvironment(false)
			if err != nil {
				t.Fatal(err)
			}
			var on []string
			for s := range signals {
				if e.signals[s].on {
					on = append(on, s.String())
				}
			}
			if got := strings.Join(on, " "); got != c.want {
				t.Errorf("on: %q, want %q", got, c.want)
			}
		})
	}
}

// Telemetry goes to another machine without TLS only if that is allowed, and then a line says so.
func TestPlaintextToAnotherMachine(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=swordfish")
	for _, variable := range []string{"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"} {
		for to, exposed := range map[string]bool{
			"http://localhost:4318": false, "http://LOCALHOST.:4318": false, "http://127.0.0.1:4318": false, "http://[::1]:4318": false, "https://collector.example.org": false,
			"http://collector.example.org": true, "http://192.0.2.1:4318": true, "HTTP://localhost.example.org": true,
		} {
			t.Run(variable+"="+to, func(t *testing.T) {
				t.Setenv(variable, to)
				plaintext, err := Check(false)
				if bad, ok := errors.AsType[*VariableError](err); ok != exposed || ok && bad.Name != variable || len(plaintext) > 0 {
					t.Errorf("not allowed: %v", err)
				}
				var text strings.Builder
				tel, err := Open(t.Context(), Config{Log: slog.New(slog.NewTextHandler(&text, nil)), AllowPlaintext: true})
				if err != nil {
					t.Fatal(err)
				}
				tel.Close()
				if n := strings.Count(text.String(), "without TLS"); n > 1 || n == 1 != exposed || strings.Contains(text.String(), "swordfish") {
					t.Errorf("allowed: %s", text.String())
				}
			})
		}
	}
}

// A variable that contradicts the scheme of the URL is refused: some libraries would obey it, and send
// credentials without TLS.
func TestInsecureContradictsTheURL(t *testing.T) {
	for _, c := range []struct{ env, bad string }{
		{"OTEL_EXPORTER_OTLP_ENDPOINT=https://collector.example.org OTEL_EXPORTER_OTLP_INSECURE=true", "OTEL_EXPORTER_OTLP_INSECURE"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=https://collector.example.org OTEL_EXPORTER_OTLP_LOGS_INSECURE=TRUE OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_EXPORTER_OTLP_LOGS_INSECURE"},
		{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=https://collector.example.org OTEL_EXPORTER_OTLP_INSECURE=true", "OTEL_EXPORTER_OTLP_INSECURE"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 OTEL_EXPORTER_OTLP_INSECURE=false", "OTEL_EXPORTER_OTLP_INSECURE"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=https://collector.example.org OTEL_EXPORTER_OTLP_INSECURE=false", ""},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 OTEL_EXPORTER_OTLP_INSECURE=true", ""},
		{"OTEL_LOGS_EXPORTER=otlp OTEL_EXPORTER_OTLP_INSECURE=true", ""},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=https://collector.example.org OTEL_TRACES_EXPORTER=none OTEL_EXPORTER_OTLP_TRACES_INSECURE=true", ""},
	} {
		t.Run(c.env, func(t *testing.T) {
			for kv := range strings.FieldsSeq(c.env) {
				name, v, _ := strings.Cut(kv, "=")
				t.Setenv(name, v)
			}
			_, err := Check(true)
			if bad, ok := errors.AsType[*VariableError](err); ok != (c.bad != "") || ok && bad.Name != c.bad {
				t.Errorf("%v, want %q", err, c.bad)
			}
		})
	}
}

// A proxy of the environment gets no telemetry, and an attempt ends in time.
func TestClientOfExporters(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "1500")
	for s, want := range map[signal]time.Duration{traces: 10 * time.Second, logs: 1500 * time.Millisecond} {
		client, err := httpClient(s)
		if err != nil {
			t.Fatal(err)
		}
		if client.Timeout != want || client.Transport.(*http.Transport).Proxy != nil {
			t.Errorf("%s: timeout %v, or a proxy", s, client.Timeout)
		}
	}
}

// Without variables there is nothing that could cost anything.
func TestNothingIsOn(t *testing.T) {
	tel, err := Open(t.Context(), Config{Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer tel.Close()
	local := quiet().Handler()
	if tel.Tracing() != nil || tel.Logger(local).Handler() != local {
		t.Error("something is on")
	}
}
