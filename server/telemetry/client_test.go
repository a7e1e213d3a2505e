package telemetry_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/internal/privateca"
	"github.com/cedarpost/cedarpost/server/telemetry"
)

// sendAll sends one span, one line and the metrics, and returns what was logged about it.
func sendAll(t *testing.T) (text string) {
	t.Helper()
	var out strings.Builder
	tel, err := telemetry.Open(t.Context(), telemetry.Config{Log: slog.New(slog.NewTextHandler(&out, nil))})
	if err != nil {
		t.Fatal(err)
	}
	_, span := tel.Tracing().Tracer("test").Start(t.Context(), "span")
	span.End()
	tel.Logger(slog.DiscardHandler).Info("line")
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: "gauge"})
	registry := prometheus.NewRegistry()
	registry.MustRegister(gauge)
	tel.SendMetrics(registry)
	tel.Close()
	return out.String()
}

// A collector cannot send telemetry elsewhere, and neither can a proxy of the environment get it.
func TestAttackRedirectedTelemetry(t *testing.T) {
	var elsewhere atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	defer other.Close()
	for _, code := range []int{http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect} {
		var asked atomic.Int32
		collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			http.Redirect(w, r, other.URL+r.URL.Path, code)
		}))
		t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
		t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=swordfish")
		text := sendAll(t)
		collector.Close()
		if asked.Load() < 3 || elsewhere.Load() != 0 {
			t.Errorf("%d: %d requests to the collector, %d elsewhere", code, asked.Load(), elsewhere.Load())
		}
		for _, signal := range []string{"traces", "metrics", "logs"} {
			if !strings.Contains(text, "signal="+signal) {
				t.Errorf("%d: no failure of %s in %s", code, signal, text)
			}
		}
	}
}

// The variables of TLS have effect: the CA of the collector, and the client certificate that it asks for.
// Those of one signal go before those of all.
func TestTelemetryOverTLS(t *testing.T) {
	var mu sync.Mutex
	got := map[string]int{} // by path, the requests with a client certificate
	collector := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		got[r.URL.Path] += len(r.TLS.PeerCertificates)
	}))
	collector.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	collector.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	collector.StartTLS()
	defer collector.Close()
	dir := t.TempDir()
	file := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	own := collector.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(own.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := file("cert.pem", "CERTIFICATE", own.Certificate[0])
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
	t.Setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", cert)
	t.Setenv("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", cert)
	t.Setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", file("key.pem", "PRIVATE KEY", key))
	if text := sendAll(t); text != "" {
		t.Error(text)
	}
	if got["/v1/traces"] != 1 || got["/v1/metrics"] != 1 || got["/v1/logs"] != 1 {
		t.Errorf("came with a client certificate: %v", got)
	}
	stranger, err := privateca.Issue(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", file("stranger.pem", "CERTIFICATE", stranger.Cert.Raw))
	if text := sendAll(t); !strings.Contains(text, "signal=traces") || strings.Contains(text, "signal=logs") || strings.Contains(text, "signal=metrics") {
		t.Errorf("traces with another CA: %s", text)
	}
}
