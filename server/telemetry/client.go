package telemetry

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

const (
	defaultSendTimeout = 10 * time.Second // as the specification of OpenTelemetry says
	dialTimeout        = 10 * time.Second
	idleTimeout        = 90 * time.Second
)

// httpClient returns the client that sends a signal over HTTP. That of the libraries follows redirects,
// with the body and with headers that hold credentials, and uses a proxy of the environment; this one
// does neither. Because the libraries leave a client that is given to them as it is, the variables of
// TLS and of the timeout are applied here.
//
// Private addresses are not refused: collectors usually have one, and only the operator chooses it.
func httpClient(s signal) (*http.Client, error) {
	config, err := tlsConfig(s)
	if err != nil {
		return nil, err
	}
	timeout := defaultSendTimeout
	if _, v := variableOf(s, "TIMEOUT"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			return nil, err
		}
		timeout = time.Duration(n) * time.Millisecond
	}
	return &http.Client{
		Timeout:       timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			Proxy:                 nil, // not from the environment
			DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSClientConfig:       config,
			TLSHandshakeTimeout:   dialTimeout,
			ForceAttemptHTTP2:     true,
			MaxIdleConnsPerHost:   1,
			IdleConnTimeout:       idleTimeout,
			ExpectContinueTimeout: time.Second,
		},
	}, nil
}

// tlsConfig returns what the variables say about TLS.
func tlsConfig(s signal) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if _, file := variableOf(s, "CERTIFICATE"); file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		config.RootCAs.AppendCertsFromPEM(text)
	}
	for _, prefix := range prefixesOf(s) { // a certificate and its key are from the same pair
		file := value(prefix + "CLIENT_CERTIFICATE")
		if file == "" {
			continue
		}
		cert, err := tls.LoadX509KeyPair(file, value(prefix+"CLIENT_KEY"))
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{cert}
		break
	}
	return config, nil
}

// prefixesOf returns how variables of the exporter of a signal begin. The first one that is set counts.
func prefixesOf(s signal) []string {
	return []string{"OTEL_EXPORTER_OTLP_" + s.variable() + "_", "OTEL_EXPORTER_OTLP_"}
}

// variableOf returns the variable of an exporter that counts for a signal, and its value; empty: none is set.
func variableOf(s signal, name string) (full, v string) {
	for _, prefix := range prefixesOf(s) {
		if v = value(prefix + name); v != "" {
			return prefix + name, v
		}
	}
	return "", ""
}
