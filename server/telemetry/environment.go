package telemetry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploggrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploghttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
)

// What the environment may ask for at most.
const (
	maxQueue = 65_536 // spans and lines in a queue or a message
	maxCount = 1_024  // attributes, events or links of a span or a line
	maxValue = 65_536 // bytes of the value of an attribute
)

// signal is one kind of telemetry.
type signal int

const (
	traces signal = iota
	metrics
	logs
	signals
)

// String returns the name in metrics and messages.
func (s signal) String() string { return [...]string{"traces", "metrics", "logs"}[s] }

// variable is the name in variables.
func (s signal) variable() string { return strings.ToUpper(s.String()) }

// environment is what the OTEL_* variables ask for. The libraries read most of them by
// themselves, and ignore values that are not valid. So readEnvironment checks all of them.
type environment struct {
	signals [signals]struct {
		on, grpc bool
	}
	plaintext []string // variables of endpoints on another machine without TLS
}

// on reports whether any signal is on.
func (e *environment) on() bool {
	return e.signals[traces].on || e.signals[metrics].on || e.signals[logs].on
}

// VariableError is the error of a variable with a value that is not valid. It does not have the
// value, which can be a secret.
type VariableError struct {
	// Name is the variable. Want says what is valid.
	Name, Want string
}

// Error implements error.
func (e *VariableError) Error() string { return e.Name + ": " + e.Want }

// rule says what is valid for a variable.
type rule struct {
	want  string
	valid func(string) bool
}

var (
	boolean   = rule{"must be true or false", func(v string) bool { return strings.EqualFold(v, "true") || strings.EqualFold(v, "false") }}
	endpoint  = rule{"must be a URL such as http://localhost:4318", func(v string) bool { return endpointOf(v) != nil }}
	protocol  = words("http/protobuf", "grpc")
	gzip      = words("gzip", "none")
	headers   = rule{"must be a list such as name=value,other=value, with values in percent-encoding", validHeaders}
	millis    = number(1, 1<<31-1, "must be a number of milliseconds of at least 1")
	queue     = number(1, maxQueue, fmt.Sprintf("must be a number from 1 to %d", maxQueue))
	limit     = number(0, maxCount, fmt.Sprintf("must be a number from 0 to %d", maxCount))
	length    = number(0, maxValue, fmt.Sprintf("must be a number from 0 to %d", maxValue))
	pairs     = rule{"must be a list such as name=value,other=value, with values in percent-encoding", validPairs}
	authority = rule{"must name a readable file with certificates in PEM", func(v string) bool {
		text, err := os.ReadFile(v)
		return err == nil && x509.NewCertPool().AppendCertsFromPEM(text)
	}}
	samplers = words("always_on", "always_off", "traceidratio", "parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio")
	ratio    = rule{"must be a number from 0 to 1", func(v string) bool {
		n, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
		return err == nil && n >= 0 && n <= 1
	}}
	propagators = rule{"must be tracecontext, or tracecontext,baggage: the server reads no other headers", func(v string) bool {
		list := strings.Split(v, ",")
		return slices.Contains(list, "tracecontext") && !slices.ContainsFunc(list, func(p string) bool { return p != "tracecontext" && p != "baggage" })
	}}
	never = rule{"is not supported: use the other OTEL_ variables", func(string) bool { return false }}
)

// rules has all variables but those of ofExporter.
var rules = map[string]rule{
	"OTEL_TRACES_EXPORTER":          words("otlp", "none"),
	"OTEL_LOGS_EXPORTER":            words("otlp", "none"),
	"OTEL_METRICS_EXPORTER":         words("otlp", "none", "prometheus"),
	"OTEL_TRACES_SAMPLER":           samplers,
	"OTEL_TRACES_SAMPLER_ARG":       ratio,
	"OTEL_PROPAGATORS":              propagators,
	"OTEL_RESOURCE_ATTRIBUTES":      pairs,
	"OTEL_CONFIG_FILE":              never,
	"OTEL_EXPERIMENTAL_CONFIG_FILE": never,

	"OTEL_BSP_SCHEDULE_DELAY": millis, "OTEL_BSP_EXPORT_TIMEOUT": millis, "OTEL_BSP_MAX_QUEUE_SIZE": queue, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": queue,
	"OTEL_BLRP_SCHEDULE_DELAY": millis, "OTEL_BLRP_EXPORT_TIMEOUT": millis, "OTEL_BLRP_MAX_QUEUE_SIZE": queue, "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": queue,
	"OTEL_METRIC_EXPORT_INTERVAL": millis, "OTEL_METRIC_EXPORT_TIMEOUT": millis,

	"OTEL_ATTRIBUTE_COUNT_LIMIT": limit, "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": length,
	"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": limit, "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT": length, "OTEL_SPAN_EVENT_COUNT_LIMIT": limit, "OTEL_SPAN_LINK_COUNT_LIMIT": limit,
	"OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT": limit, "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT": limit,
	"OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT": limit, "OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT": length,

	// The metrics come from Prometheus, whose counters and histograms are cumulative.
	"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE":        words("cumulative"),
	"OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": words("explicit_bucket_histogram"),
}

// ofExporter are the rules of variables that begin with OTEL_EXPORTER_OTLP_, or with
// OTEL_EXPORTER_OTLP_TRACES_ and so on for one signal.
var ofExporter = map[string]rule{
	"ENDPOINT": endpoint, "PROTOCOL": protocol, "HEADERS": headers, "COMPRESSION": gzip, "TIMEOUT": millis, "INSECURE": boolean, "CERTIFICATE": authority,
}

// value returns the value of a variable. Empty is not set, as the specification of OpenTelemetry says.
func value(name string) string { return strings.TrimSpace(os.Getenv(name)) }

// readEnvironment checks all variables that have a meaning here. It ignores other OTEL_ variables,
// which are for other programs.
func readEnvironment(allowPlaintext bool) (e environment, err error) {
	if err := check("OTEL_SDK_DISABLED", boolean); err != nil {
		return e, err
	}
	if strings.EqualFold(value("OTEL_SDK_DISABLED"), "true") {
		return e, nil
	}
	for _, name := range slices.Sorted(maps.Keys(rules)) {
		if err := check(name, rules[name]); err != nil {
			return e, err
		}
	}
	for _, of := range []string{"", "TRACES_", "METRICS_", "LOGS_"} {
		prefix := "OTEL_EXPORTER_OTLP_" + of
		for _, name := range slices.Sorted(maps.Keys(ofExporter)) {
			if err := check(prefix+name, ofExporter[name]); err != nil {
				return e, err
			}
		}
		if err := checkPair(prefix+"CLIENT_CERTIFICATE", prefix+"CLIENT_KEY"); err != nil {
			return e, err
		}
	}
	for s := range signals {
		if err := e.read(s, allowPlaintext); err != nil {
			return e, err
		}
	}
	return e, nil
}

// Check returns the error that [Open] would return because of a variable, a [*VariableError]. plaintext
// are the variables with URLs to which telemetry goes without TLS, on other machines. There are none if
// allowPlaintext is false.
func Check(allowPlaintext bool) (plaintext []string, err error) {
	e, err := readEnvironment(allowPlaintext)
	return e.plaintext, err
}

// read reads what is asked for one signal.
func (e *environment) read(s signal, allowPlaintext bool) error {
	name, to := variableOf(s, "ENDPOINT")
	exporter := value("OTEL_" + s.variable() + "_EXPORTER")
	in := &e.signals[s]
	in.on = exporter == "otlp" || exporter == "" && to != ""
	_, p := variableOf(s, "PROTOCOL")
	in.grpc = p == "grpc"
	u := endpointOf(to)
	if !in.on || u == nil {
		return nil
	}
	// Some of the libraries obey the URL, and some the variable, which then undoes https.
	if insecure, v := variableOf(s, "INSECURE"); v != "" && strings.EqualFold(v, "true") != (u.Scheme == "http") {
		return &VariableError{insecure, "contradicts the " + u.Scheme + " URL of " + name + ": leave it out"}
	}
	if u.Scheme != "http" || !otherMachine(u) || slices.Contains(e.plaintext, name) {
		return nil
	}
	if !allowPlaintext {
		return &VariableError{name, "must be a URL with https, because the collector is on another machine; or give --allow-plaintext-telemetry, if something else encrypts"}
	}
	e.plaintext = append(e.plaintext, name)
	return nil
}

func check(name string, r rule) error {
	if v := value(name); v != "" && !r.valid(v) {
		return &VariableError{name, r.want}
	}
	return nil
}

// checkPair checks the variables of a client certificate and its key.
func checkPair(cert, key string) error {
	c, k := value(cert), value(key)
	switch {
	case c == "" && k == "":
		return nil
	case c == "":
		return &VariableError{cert, "is missing, and " + key + " is set"}
	case k == "":
		return &VariableError{key, "is missing, and " + cert + " is set"}
	}
	if _, err := tls.LoadX509KeyPair(c, k); err != nil {
		return &VariableError{cert, "and " + key + " must name readable files with a certificate and its key in PEM"}
	}
	return nil
}

func words(list ...string) rule {
	want := "must be " + list[0]
	if last := len(list) - 1; last > 0 {
		want = "must be " + strings.Join(list[:last], ", ") + " or " + list[last]
	}
	return rule{want, func(v string) bool { return slices.Contains(list, v) }}
}

func number(least, most int, want string) rule {
	return rule{want, func(v string) bool {
		n, err := strconv.Atoi(v)
		return err == nil && n >= least && n <= most
	}}
}

// endpointOf returns the URL of an endpoint, or nil if it is not valid.
func endpointOf(v string) *url.URL {
	u, err := url.Parse(v)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return nil
	}
	return u
}

func validHeaders(v string) bool {
	for _, pair := range strings.Split(v, ",") {
		name, text, ok := strings.Cut(pair, "=")
		name = strings.TrimSpace(name)
		if !ok || name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r) }) {
			return false
		}
		text, err := url.PathUnescape(text)
		if err != nil || strings.ContainsAny(text, "\r\n\x00") {
			return false
		}
	}
	return true
}

func validPairs(v string) bool {
	for _, pair := range strings.Split(v, ",") {
		name, text, ok := strings.Cut(pair, "=")
		if _, err := url.PathUnescape(text); !ok || strings.TrimSpace(name) == "" || err != nil {
			return false
		}
	}
	return true
}

// The exporters read all other variables by themselves. gRPC has no redirects.

func (e *environment) newSpanExporter(ctx context.Context) (sdktrace.SpanExporter, error) {
	if e.signals[traces].grpc {
		return otlptracegrpc.New(ctx, otlptracegrpc.WithDialOption(grpc.WithNoProxy()))
	}
	client, err := httpClient(traces)
	if err != nil {
		return nil, err
	}
	return otlptracehttp.New(ctx, otlptracehttp.WithHTTPClient(client))
}

func (e *environment) newMetricExporter(ctx context.Context) (sdkmetric.Exporter, error) {
	if e.signals[metrics].grpc {
		return otlpmetricgrpc.New(ctx, otlpmetricgrpc.WithDialOption(grpc.WithNoProxy()))
	}
	client, err := httpClient(metrics)
	if err != nil {
		return nil, err
	}
	return otlpmetrichttp.New(ctx, otlpmetrichttp.WithHTTPClient(client))
}

func (e *environment) newLogExporter(ctx context.Context) (sdklog.Exporter, error) {
	if e.signals[logs].grpc {
		return otlploggrpc.New(ctx, otlploggrpc.WithDialOption(grpc.WithNoProxy()))
	}
	client, err := httpClient(logs)
	if err != nil {
		return nil, err
	}
	return otlploghttp.New(ctx, otlploghttp.WithHTTPClient(client))
}
