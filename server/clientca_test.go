package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/internal/clienttls"
	"github.com/cedarpost/cedarpost/internal/privateca"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func issue(t *testing.T, ca *privateca.Pair, template *x509.Certificate) *privateca.Pair {
	t.Helper()
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().AddDate(1, 0, 0)
	}
	pair, err := privateca.Issue(template, ca)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

func newCA(t *testing.T, name string, end time.Time) *privateca.Pair {
	t.Helper()
	return issue(t, nil, &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, NotAfter: end})
}

// clientOf makes a client's certificate that ends at a time.
func clientOf(t *testing.T, ca *privateca.Pair, end time.Time) *tls.Certificate {
	t.Helper()
	pair := issue(t, ca, &x509.Certificate{
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/orders"}}, NotAfter: end,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return &tls.Certificate{Certificate: [][]byte{pair.Cert.Raw}, PrivateKey: pair.Key, Leaf: pair.Cert}
}

// tlsFiles are the files of a server.
type tlsFiles struct {
	t               *testing.T
	cert, key, ca   string
	servers         *privateca.Pair // the CA of the server's certificates
	roots           *x509.CertPool
	clientCertFiles ClientCertificates
}

func newTLSFiles(t *testing.T) *tlsFiles {
	t.Helper()
	dir := t.TempDir()
	f := &tlsFiles{
		t: t, cert: filepath.Join(dir, "server.pem"), key: filepath.Join(dir, "server.key"), ca: filepath.Join(dir, "clients.pem"),
		servers: newCA(t, "servers", time.Time{}), roots: x509.NewCertPool(),
	}
	f.roots.AddCert(f.servers.Cert)
	f.clientCertFiles = ClientCertificates{CA: f.ca, TrustDomains: []string{"example.org"}}
	return f
}

func (f *tlsFiles) write(name string, text []byte) {
	f.t.Helper()
	if err := os.WriteFile(name, text, 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// pair returns a new certificate for the server, and its key.
func (f *tlsFiles) pair(end time.Time) (cert, key []byte) {
	f.t.Helper()
	pair := issue(f.t, f.servers, &x509.Certificate{IPAddresses: []net.IP{{127, 0, 0, 1}}, NotAfter: end})
	key, err := pair.KeyPEM()
	if err != nil {
		f.t.Fatal(err)
	}
	return pair.CertPEM(), key
}

func (f *tlsFiles) writePair(end time.Time) {
	f.t.Helper()
	cert, key := f.pair(end)
	f.write(f.cert, cert)
	f.write(f.key, key)
}

func (f *tlsFiles) writeCAs(list ...*privateca.Pair) {
	f.t.Helper()
	var text []byte
	for _, ca := range list {
		text = append(text, ca.CertPEM()...)
	}
	f.write(f.ca, text)
}

// secured is a running server with TLS.
type secured struct {
	*Server
	addr, key string
	stop      func()
}

// start starts a server. before is called before it runs.
func (f *tlsFiles) start(log io.Writer, before func(*Server), change func(*Config)) *secured {
	f.t.Helper()
	db, err := store.Open(f.t.Context(), store.Config{DatabaseURL: secret.New(storetest.New(f.t)), Event: decisionlog.ChangeEvents("tls")})
	if err != nil {
		f.t.Fatal(err)
	}
	keyFile := filepath.Join(f.t.TempDir(), "key")
	if _, err := access.BootstrapKey(f.t.Context(), db, keyFile, true); err != nil {
		f.t.Fatal(err)
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		f.t.Fatal(err)
	}
	config := Config{
		DB: db, Name: "tls", Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0", MaskKey: secret.New(strings.Repeat("k", 32)),
		TLSCert: f.cert, TLSKey: f.key, Clients: f.clientCertFiles, Log: slog.New(slog.NewTextHandler(log, nil)),
		MaxStaleness: time.Minute, DecisionTimeout: time.Minute, // a busy machine is slow
	}
	if change != nil {
		change(&config)
	}
	s, err := New(f.t.Context(), config)
	if err != nil {
		f.t.Fatal(err)
	}
	if before != nil {
		before(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			f.t.Error(err)
		}
	})
	f.t.Cleanup(func() {
		stop()
		db.Close()
	})
	return &secured{s, s.Addr("decision"), strings.TrimSpace(string(key)), stop}
}

// httpClient is a client that presents a certificate, unless it is nil.
func (f *tlsFiles) httpClient(cert *tls.Certificate, change func(*http.Transport)) *http.Client {
	config := &tls.Config{RootCAs: f.roots}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	if change != nil {
		change(transport)
	}
	f.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// call asks for the revision with the API key. It returns the status of the answer.
func (s *secured) call(ctx context.Context, client *http.Client) (status int, text string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+s.addr+cedarpostv1connect.AuthorizationServiceGetRevisionProcedure, strings.NewReader("{}"))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+s.key)
	res, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, strings.TrimSpace(string(body)), err
}

// The certificate of the server and the CAs of clients are replaced again and again, sometimes by
// broken files, while clients of all kinds call. No call fails.
func TestCertificatesAreReplacedUnderLoad(t *testing.T) {
	for _, required := range []bool{false, true} {
		t.Run(fmt.Sprintf("required=%v", required), func(t *testing.T) {
			f := newTLSFiles(t)
			f.clientCertFiles.Required = required
			f.writePair(time.Time{})
			old, next := newCA(t, "old", time.Time{}), newCA(t, "next", time.Time{})
			f.writeCAs(old)
			var log syncedLog
			s := f.start(&log, nil, nil)

			// worker is a client; its certificate can be replaced, as the Go client does.
			type worker struct {
				name   string
				change func(*http.Transport)
				client atomic.Pointer[http.Client]
				calls  atomic.Int64
			}
			http1 := func(tr *http.Transport) { tr.ForceAttemptHTTP2 = false }
			workers := []*worker{
				{name: "HTTP/2"},
				{name: "HTTP/1.1", change: http1},
				{name: "a connection for each call", change: func(tr *http.Transport) { tr.DisableKeepAlives = true }},
				{name: "TLS 1.2, sessions resumed", change: func(tr *http.Transport) {
					http1(tr)
					tr.DisableKeepAlives = true
					tr.TLSClientConfig.MaxVersion = tls.VersionTLS12
					tr.TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(4)
				}},
			}
			present := func(ca *privateca.Pair) {
				for _, w := range workers {
					before := w.client.Swap(f.httpClient(clientOf(t, ca, time.Time{}), w.change))
					if before != nil {
						before.CloseIdleConnections()
					}
				}
			}
			present(old)
			if !required {
				w := &worker{name: "without a certificate"}
				w.client.Store(f.httpClient(nil, nil))
				workers = append(workers, w)
			}
			stop := make(chan struct{})
			var failed atomic.Int64
			var group sync.WaitGroup
			for _, w := range workers {
				group.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
						}
						status, text, err := s.call(context.Background(), w.client.Load())
						if err != nil || status != http.StatusOK {
							failed.Add(1)
							t.Errorf("%s: %d %s %v", w.name, status, text, err)
							return
						}
						w.calls.Add(1)
					}
				})
			}
			// each waits until each worker has made another call that began after now: one was perhaps on its way.
			each := func() {
				t.Helper()
				for _, w := range workers {
					from := w.calls.Load()
					for deadline := time.Now().Add(time.Minute); w.calls.Load() < from+2 && failed.Load() == 0; time.Sleep(time.Millisecond) {
						if time.Now().After(deadline) {
							t.Fatalf("%s does not call", w.name)
						}
					}
				}
			}
			swaps, refused := 0, 0
			swap := func(ok bool) {
				t.Helper()
				if err := errors.Join(s.cert.reload(), s.clients.reload()); (err == nil) != ok {
					t.Errorf("reload %d: %v", swaps+refused, err)
				}
				if ok {
					swaps++
				} else {
					refused++
				}
				each()
			}
			each()
			for range 2 {
				f.writePair(time.Time{})
				swap(true)
				cert, key := f.pair(time.Time{})
				f.write(f.key, key) // the certificate is still the one before
				swap(false)
				f.write(f.cert, cert)
				f.writeCAs(old, next)
				swap(true)
				present(next)
				each() // all calls that began with the certificate before have ended
				f.write(f.ca, []byte("broken"))
				swap(false)
				f.writeCAs(next)
				swap(true)
				f.write(f.ca, cert) // not that of a CA
				swap(false)
				f.write(f.ca, bytes.Repeat(next.CertPEM(), 2))
				swap(true)
				old, next = next, newCA(t, "next", time.Time{})
			}
			close(stop)
			group.Wait()
			calls := int64(0)
			for _, w := range workers {
				calls += w.calls.Load()
			}
			t.Logf("%d calls of %d clients, %d swaps and %d broken sets of files: %d failed calls", calls, len(workers), swaps, refused, failed.Load())
			for _, text := range []string{"new certificate not taken up, the one before it is served", "new client CAs not taken up, those before stay in use", "the files of the client CAs are in order again"} {
				if !strings.Contains(log.String(), text) {
					t.Errorf("the log does not say %q", text)
				}
			}
		})
	}
}

// A server that requires certificates refuses connections without one of its CAs, and records that.
// An open connection is refused from when its CA is removed. Where certificates are optional, the
// API key counts.
func TestAttackClientCertificateRequired(t *testing.T) {
	f := newTLSFiles(t)
	f.clientCertFiles.Required = true
	f.writePair(time.Time{})
	ca, foreign := newCA(t, "ca", time.Time{}), newCA(t, "ca", time.Time{})
	f.writeCAs(ca)
	s := f.start(io.Discard, nil, nil)
	refused := 0
	for about, cert := range map[string]*tls.Certificate{
		"none": nil, "another CA": clientOf(t, foreign, time.Time{}), "expired": clientOf(t, ca, time.Now().Add(-time.Minute)),
	} {
		client := f.httpClient(cert, nil)
		if cert != nil { // send it although the server did not ask for this CA
			client = f.httpClient(nil, func(tr *http.Transport) {
				tr.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
			})
		}
		if status, text, err := s.call(t.Context(), client); err == nil {
			t.Errorf("%s: %d %s", about, status, text)
			continue
		}
		refused++
	}
	// Our own clients can tell that from a server that is away, although they learn of it only after
	// their handshake.
	rootFile := filepath.Join(t.TempDir(), "ca.pem")
	f.write(rootFile, f.servers.CertPEM())
	unknown := 0
	for range 60 {
		transport, err := clienttls.New(clienttls.Files{CA: rootFile}, func(c *tls.Config) *http.Transport {
			return &http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: true}
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		client := &http.Client{Transport: transport}
		_, _, err = s.call(t.Context(), client)
		for err != nil && strings.Contains(err.Error(), "http2: client conn is closed") {
			_, _, err = s.call(t.Context(), client) // the connection ended before the call used it
		}
		if op, ok := errors.AsType[*net.OpError](err); !errors.Is(err, clienttls.ErrRefused) && (!ok || op.Op != "remote error") {
			t.Errorf("a client without a certificate gets %v", err)
			unknown++
		}
		transport.CloseIdleConnections()
	}
	t.Logf("own clients without a certificate that cannot tell why they are refused: %d of 60", unknown)
	open := f.httpClient(clientOf(t, ca, time.Time{}), nil)
	if status, text, err := s.call(t.Context(), open); status != http.StatusOK {
		t.Errorf("%d %s %v", status, text, err)
	}
	f.writeCAs(foreign)
	if err := s.clients.reload(); err != nil {
		t.Error(err)
	}
	if status, text, err := s.call(t.Context(), open); status != http.StatusUnauthorized || !strings.Contains(text, "connect again") {
		t.Errorf("an open connection whose CA was removed: %d %s %v", status, text, err)
	} else {
		refused++
	}
	if status, text, err := s.call(t.Context(), open); err == nil {
		t.Errorf("another connection: %d %s", status, text)
	} else {
		refused++
	}
	s.stop()
	events, err := s.cfg.DB.QueryEvents(t.Context(), store.EventQuery{Kind: "authentication_failure", Limit: 100})
	if err != nil {
		t.Fatal(err)
	}
	recorded := int64(0)
	for _, row := range events {
		if failure := decisionlog.ReadEvent(row).GetAuthenticationFailure(); failure.Reason == "client certificate refused in the TLS handshake" {
			recorded += failure.Count
		}
	}
	if recorded < 3 { // a client may try again
		t.Errorf("%d handshakes with refused certificates are recorded: %v", recorded, events)
	}
	t.Logf("calls with a valid API key and without a valid client certificate: %d of 5 refused, %d recorded", refused, recorded)

	f.clientCertFiles.Required = false
	f.writeCAs(ca)
	s = f.start(io.Discard, nil, nil)
	open = f.httpClient(clientOf(t, ca, time.Time{}), nil)
	for _, client := range []*http.Client{open, f.httpClient(nil, nil)} {
		if status, text, err := s.call(t.Context(), client); status != http.StatusOK {
			t.Errorf("optional: %d %s %v", status, text, err)
		}
	}
	f.writeCAs(foreign)
	if err := s.clients.reload(); err != nil {
		t.Error(err)
	}
	if status, text, err := s.call(t.Context(), open); status != http.StatusOK {
		t.Errorf("optional, and the CA was removed: %d %s %v", status, text, err)
	}
}

// A connection whose client certificate ends soon is closed after a call, and the call does not fail.
func TestConnectionEndsBeforeItsCertificate(t *testing.T) {
	f := newTLSFiles(t)
	f.writePair(time.Time{})
	ca := newCA(t, "ca", time.Time{})
	f.writeCAs(ca)
	end := time.Now().Add(time.Hour)
	var ahead atomic.Int64
	s := f.start(io.Discard, func(s *Server) {
		s.clients.now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	}, nil)
	for _, http2 := range []bool{false, true} {
		client := f.httpClient(clientOf(t, ca, end), func(tr *http.Transport) { tr.ForceAttemptHTTP2 = http2 })
		reused := func() bool {
			t.Helper()
			again := false
			ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { again = info.Reused }})
			if status, text, err := s.call(ctx, client); err != nil || status != http.StatusOK {
				t.Fatalf("%d %s %v", status, text, err)
			}
			return again
		}
		ahead.Store(0)
		if first, second := reused(), reused(); first || !second {
			t.Errorf("long before the end: %v, %v", first, second)
		}
		ahead.Store(int64(time.Hour - renewBefore/2))
		if last := reused(); !last {
			t.Error("the connection was closed before it could answer")
		}
		if after := reused(); after {
			t.Error("the connection stays open although its certificate ends soon")
		}
		client.CloseIdleConnections()
	}
}

// What is wrong with CAs of clients is in the log, again each day, in readiness and in metrics.
func TestClientCAsThatEnd(t *testing.T) {
	f := newTLSFiles(t)
	f.writePair(time.Time{})
	cert, err := newCertificate(f.cert, f.key, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	f.writeCAs(newCA(t, "short", now.AddDate(0, 0, 20)), newCA(t, "long", now.AddDate(0, 0, 60)))
	f.clientCertFiles.Required = true
	var logged bytes.Buffer
	c, err := newClientCAs(f.clientCertFiles, cert != nil, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	c.now = func() time.Time { return now }
	for _, step := range []struct {
		days    int // from the step before
		says    string
		warning string
	}{
		{0, "", ""},
		{7, "level=WARN msg=\"the client CA CN=short ends at ", ""},
		{0, "", ""},
		{1, "level=WARN msg=\"the client CA CN=short ends at ", ""},
		{13, "level=WARN msg=\"the client CA CN=short has expired at ", ""},
		{30, "CN=short has expired at", ""},
		{0, "", ""},
		{10, "level=ERROR msg=\"the client CA CN=short has expired", "client CAs: no client CA is valid: CN=long has expired at "},
	} {
		logged.Reset()
		now = now.AddDate(0, 0, step.days)
		if err := c.reload(); err != nil {
			t.Error(err)
		}
		if text := logged.String(); strings.Count(text, "\n") != min(1, len(step.says)) || !strings.Contains(text, step.says) {
			t.Errorf("after %d days: %q, want %q", step.days, text, step.says)
		}
		if w := c.warning(); !strings.HasPrefix(w, step.warning) || (w == "") != (step.warning == "") {
			t.Errorf("after %d days: warning %q, want %q", step.days, w, step.warning)
		}
	}
	registry := prometheus.NewRegistry()
	registerCertificate(registry, "server", cert.end, &cert.reloading)
	registerCertificate(registry, "client_ca", c.end, &c.reloading)
	families, err := registry.Gather()
	if err != nil || len(families) != 2 || len(families[0].GetMetric()) != 2 || len(families[1].GetMetric()) != 2 {
		t.Errorf("%v, %v", families, err)
	}
	f.writeCAs(newCA(t, "new", now.AddDate(1, 0, 0)))
	logged.Reset()
	if err := c.reload(); err != nil || c.warning() != "" || !strings.Contains(logged.String(), "new client CAs taken up") {
		t.Errorf("%v, %q, %q", err, c.warning(), logged.String())
	}
	// CAs that have expired do not replace one that is valid.
	f.writeCAs(newCA(t, "past", now.AddDate(0, 0, -1)))
	if err := c.reload(); err == nil || !strings.Contains(err.Error(), "no CA in "+f.ca+" is valid: CN=past has expired at ") || c.err() != nil {
		t.Errorf("%v, %v", err, c.err())
	}
}

func TestClientCertificatesNeedEachOther(t *testing.T) {
	f := newTLSFiles(t)
	f.writePair(time.Time{})
	cert, err := newCertificate(f.cert, f.key, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f.writeCAs(newCA(t, "ca", time.Time{}))
	for _, c := range []struct {
		config ClientCertificates
		cert   *certificate
		says   string
	}{
		{ClientCertificates{}, nil, ""},
		{ClientCertificates{}, cert, ""},
		{ClientCertificates{CA: f.ca, DNSNames: true}, cert, ""},
		{ClientCertificates{CA: f.ca, Required: true}, cert, ""},
		{ClientCertificates{CA: f.ca, DNSNames: true}, nil, "need TLS"},
		{ClientCertificates{CA: f.ca}, cert, "it has no effect"},
		{ClientCertificates{DNSNames: true}, cert, "need their CAs in a file"},
		{ClientCertificates{Required: true}, cert, "need their CAs in a file"},
		{ClientCertificates{CA: f.ca, TrustDomains: []string{"a b"}}, cert, `"a b" is not a trust domain`},
		{ClientCertificates{CA: f.cert, DNSNames: true}, cert, "is not that of a CA"},
		{ClientCertificates{CA: f.key, DNSNames: true}, cert, `there is a "PRIVATE KEY"`},
		{ClientCertificates{CA: f.ca + "x", DNSNames: true}, cert, "no such file"},
	} {
		_, err := newClientCAs(c.config, c.cert != nil, slog.New(slog.DiscardHandler))
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v, want %q", c.config, err, c.says)
		}
		if _, ok := errors.AsType[*decisionlog.ConfigError](err); err != nil && !ok {
			t.Errorf("%+v: %v names no setting", c.config, err)
		}
	}
}
