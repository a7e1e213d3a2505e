package server

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// newPair writes a self-signed certificate for a name.
func newPair(t *testing.T, dir, name string) (certFile, keyFile string) {
	t.Helper()
	return WritePair(t, dir, name, time.Now().Add(time.Hour))
}

// WritePair writes a self-signed certificate that ends at a time.
func WritePair(t *testing.T, dir, name string, end time.Time) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: end}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

func TestCertificateIsReplaced(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := newPair(t, dir, "first")
	c, err := newCertificate(certFile, keyFile, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	serves := func(want string) {
		t.Helper()
		_ = c.reload()
		pair, err := c.get(nil)
		if err != nil || pair.Leaf.Subject.CommonName != want {
			t.Errorf("serves %v %v, want %s", pair.Leaf.Subject, err, want)
		}
	}
	serves("first")
	newPair(t, dir, "second")
	serves("second")
	// If a pair does not load, the one before stays in use.
	if err := os.WriteFile(keyFile, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	serves("second")
	newPair(t, dir, "third")
	serves("third")
}

// Under load, files that are broken, expired or missing do not replace the certificate. They are
// logged once for each change and counted each time.
func TestCertificateUnderLoad(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := WritePair(t, dir, "first", time.Now().AddDate(1, 0, 0))
	var logged bytes.Buffer
	c, err := newCertificate(certFile, keyFile, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c.now = func() time.Time { return now }
	registry := prometheus.NewRegistry()
	registerCertificate(registry, "server", c.end, &c.reloading)
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsConfig(c, nil, 0))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.NotFoundHandler(), ErrorLog: log.New(io.Discard, "", 0)}
	go func() { _ = srv.Serve(l) }()
	served := func() (string, error) {
		conn, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			return "", err
		}
		defer func() { _ = conn.Close() }()
		return conn.ConnectionState().PeerCertificates[0].Subject.CommonName, nil
	}
	stop := make(chan struct{})
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := served(); err != nil {
					t.Errorf("a connection failed: %v", err)
					return
				}
			}
		})
	}
	defer func() {
		close(stop)
		load.Wait()
		_ = srv.Close()
	}()

	year := time.Now().AddDate(1, 0, 0)
	write := func(name string, end time.Time) { WritePair(t, dir, name, end) }
	broken := func(file, text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		change   func()
		serves   string
		says     string // the only line that three looks write into the log; "" means none
		failures int64  // of the three looks
		warning  string
	}{
		{func() {}, "first", "", 0, ""},
		{func() { broken(certFile, "broken") }, "first", "level=ERROR msg=\"new certificate not taken up", 3, "certificate: new files are not taken up"},
		{func() { write("expired", now.Add(-time.Minute)) }, "first", "has expired at", 3, "certificate: new files are not taken up"},
		{func() { _ = os.Remove(keyFile) }, "first", "no such file", 3, "certificate: new files are not taken up"},
		{func() { write("second", year) }, "second", "level=INFO msg=\"the files of the certificate are in order again", 0, ""},
		{func() { write("third", now.Add(13*24*time.Hour)) }, "third", "level=WARN msg=\"the TLS certificate ends at", 0, ""},
		{func() { now = now.Add(14 * 24 * time.Hour) }, "third", "level=ERROR msg=\"the TLS certificate has expired at", 0, "certificate: it has expired at"},
		{func() { write("expired too", now.Add(-time.Minute)) }, "expired too", "level=ERROR msg=\"the TLS certificate has expired at", 0, "certificate: it has expired at"},
		{func() { write("fourth", year) }, "fourth", "", 0, ""},
	} {
		logged.Reset()
		before := c.failures.Load()
		step.change()
		for range 3 {
			if err := c.reload(); (err != nil) != (step.failures > 0) {
				t.Errorf("%s: %v", step.serves, err)
			}
		}
		got, err := served()
		if err != nil || got != step.serves {
			t.Errorf("%s: serves %q, %v", step.serves, got, err)
		}
		text := strings.Join(slices.DeleteFunc(strings.Split(logged.String(), "\n"), func(line string) bool {
			return strings.Contains(line, "new certificate taken up")
		}), "\n")
		if strings.Count(text, "\n") != min(len(step.says), 1) || !strings.Contains(text, step.says) {
			t.Errorf("%s: the log says\n%s\nwant %q", step.serves, text, step.says)
		}
		if n := c.failures.Load() - before; n != step.failures {
			t.Errorf("%s: %d failures, want %d", step.serves, n, step.failures)
		}
		if w := c.warning(); !strings.HasPrefix(w, step.warning) || (w == "") != (step.warning == "") {
			t.Errorf("%s: warning %q, want %q", step.serves, w, step.warning)
		}
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "cedarpost_certificate_expiry_timestamp_seconds" && int64(f.GetMetric()[0].GetGauge().GetValue()) != year.Unix() {
			t.Errorf("%v, want %d", f, year.Unix())
		}
	}
}

func TestPlaintextOnlyOnLoopback(t *testing.T) {
	for addr, ok := range map[string]bool{
		"127.0.0.1:8080": true, "localhost:1": true, "LOCALHOST:1": true, "localhost.:1": true, "[::1]:8080": true, "127.9.9.9:0": true,
		"0.0.0.0:8080": false, ":8080": false, "[::]:1": false, "10.0.0.1:1": false, "example.org:1": false, "nonsense": false,
	} {
		if err := checkPlaintext(addr); (err == nil) != ok {
			t.Errorf("%s: %v", addr, err)
		}
	}
}
