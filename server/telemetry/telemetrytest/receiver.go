// Package telemetrytest is a collector for tests: it receives OTLP over HTTP, with the messages of
// OpenTelemetry, and shows what came. It exists so that tests see what leaves the process, down
// to the bytes.
package telemetrytest

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	colmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	coltrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// Receiver is a running receiver.
type Receiver struct {
	// URL is for OTEL_EXPORTER_OTLP_ENDPOINT.
	URL string

	mu      sync.Mutex
	raw     bytes.Buffer // all that came, headers too, uncompressed
	headers []http.Header
	spans   []*trace.Span
	metrics map[string]*metrics.Metric // the newest of each name
	lines   []*logs.LogRecord
	about   []*common.KeyValue // the newest resource
}

// New starts a receiver that ends with the test.
func New(t testing.TB) *Receiver {
	t.Helper()
	r := &Receiver{metrics: map[string]*metrics.Metric{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/traces", func(w http.ResponseWriter, req *http.Request) {
		in := &coltrace.ExportTraceServiceRequest{}
		r.receive(t, w, req, in, &coltrace.ExportTraceServiceResponse{}, func() {
			for _, resource := range in.ResourceSpans {
				r.about = resource.GetResource().GetAttributes()
				for _, scope := range resource.ScopeSpans {
					r.spans = append(r.spans, scope.Spans...)
				}
			}
		})
	})
	mux.HandleFunc("POST /v1/metrics", func(w http.ResponseWriter, req *http.Request) {
		in := &colmetrics.ExportMetricsServiceRequest{}
		r.receive(t, w, req, in, &colmetrics.ExportMetricsServiceResponse{}, func() {
			for _, resource := range in.ResourceMetrics {
				for _, scope := range resource.ScopeMetrics {
					for _, m := range scope.Metrics {
						r.metrics[m.Name] = m
					}
				}
			}
		})
	})
	mux.HandleFunc("POST /v1/logs", func(w http.ResponseWriter, req *http.Request) {
		in := &collogs.ExportLogsServiceRequest{}
		r.receive(t, w, req, in, &collogs.ExportLogsServiceResponse{}, func() {
			for _, resource := range in.ResourceLogs {
				for _, scope := range resource.ScopeLogs {
					r.lines = append(r.lines, scope.LogRecords...)
				}
			}
		})
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	r.URL = s.URL
	return r
}

// receive reads one message, and lets note take what is in it.
func (r *Receiver) receive(t testing.TB, w http.ResponseWriter, req *http.Request, in, answer proto.Message, note func()) {
	var body io.Reader = req.Body
	var err error
	if req.Header.Get("Content-Encoding") == "gzip" {
		if body, err = gzip.NewReader(req.Body); err != nil {
			t.Error(err)
			return
		}
	}
	text, err := io.ReadAll(body)
	if err == nil {
		err = proto.Unmarshal(text, in)
	}
	if err != nil {
		t.Error(err)
		http.Error(w, "malformed", http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.raw.Write(text)
	r.headers = append(r.headers, req.Header.Clone())
	note()
	out, _ := proto.Marshal(answer)
	w.Header().Set("Content-Type", "application/x-protobuf")
	_, _ = w.Write(out)
}

// Raw returns the bytes of all bodies that came.
func (r *Receiver) Raw() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.raw.Bytes())
}

// Headers returns the values of a header of all messages that came.
func (r *Receiver) Headers(name string) (list []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.headers {
		list = append(list, h.Get(name))
	}
	return list
}

// Spans returns the spans that came.
func (r *Receiver) Spans() []*trace.Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.spans)
}

// Metrics returns the newest metric of each name.
func (r *Receiver) Metrics() map[string]*metrics.Metric {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := map[string]*metrics.Metric{}
	for name, m := range r.metrics {
		list[name] = m
	}
	return list
}

// Lines returns the log lines that came.
func (r *Receiver) Lines() []*logs.LogRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.lines)
}

// About returns an attribute of the resource that sends traces.
func (r *Receiver) About(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Attribute(r.about, name)
}

// Attribute returns an attribute as text, or "".
func Attribute(list []*common.KeyValue, name string) string {
	for _, a := range list {
		if a.Key == name {
			switch v := a.Value.Value.(type) {
			case *common.AnyValue_StringValue:
				return v.StringValue
			case *common.AnyValue_IntValue:
				return fmt.Sprint(v.IntValue)
			default:
				return a.Value.String()
			}
		}
	}
	return ""
}

// Tree prints the spans of a trace (its id in hexadecimal), each below its parent, in the order of their start.
func (r *Receiver) Tree(traceID string) string {
	children := map[string][]*trace.Span{}
	ids := map[string]bool{}
	for _, s := range r.Spans() {
		if hex.EncodeToString(s.TraceId) == traceID {
			children[string(s.ParentSpanId)] = append(children[string(s.ParentSpanId)], s)
			ids[string(s.SpanId)] = true
		}
	}
	var out strings.Builder
	var show func(parent string, depth int)
	show = func(parent string, depth int) {
		list := children[parent]
		slices.SortStableFunc(list, func(a, b *trace.Span) int { return int(int64(a.StartTimeUnixNano) - int64(b.StartTimeUnixNano)) })
		for _, s := range list {
			fmt.Fprintf(&out, "%s%s %.2fms", strings.Repeat("  ", depth), s.Name, float64(s.EndTimeUnixNano-s.StartTimeUnixNano)/1e6)
			for _, a := range s.Attributes {
				if v := Attribute(s.Attributes, a.Key); a.Key != "db.query.text" {
					fmt.Fprintf(&out, " %s=%s", a.Key, v)
				}
			}
			if len(s.Links) > 0 {
				fmt.Fprintf(&out, " links=%d", len(s.Links))
			}
			out.WriteString("\n")
			show(string(s.SpanId), depth+1)
		}
	}
	for parent := range children {
		if !ids[parent] {
			show(parent, 0)
		}
	}
	return out.String()
}
