package cedarpost_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/privateca"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// pairFiles writes a certificate and its key.
func pairFiles(t *testing.T, dir, name string, ca *privateca.Pair, template *x509.Certificate) (pair *privateca.Pair, cert, key string) {
	t.Helper()
	template.Subject, template.NotAfter = pkix.Name{CommonName: name}, time.Now().Add(time.Hour)
	pair, err := privateca.Issue(template, ca)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := pair.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	if err := errors.Join(os.WriteFile(cert, pair.CertPEM(), 0o600), os.WriteFile(key, secret, 0o600)); err != nil {
		t.Fatal(err)
	}
	return pair, cert, key
}

// A server that requires client certificates answers a client that has one, from files or from the
// environment. For a client without a good one, checks do not fail open: the service is not away.
func TestClientCertificate(t *testing.T) {
	dir := t.TempDir()
	ca, caFile, _ := pairFiles(t, dir, "ca", nil, &x509.Certificate{IsCA: true, BasicConstraintsValid: true})
	other, otherCA, _ := pairFiles(t, dir, "other", nil, &x509.Certificate{IsCA: true, BasicConstraintsValid: true})
	_, serverCert, serverKey := pairFiles(t, dir, "server", ca, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	template := func() *x509.Certificate {
		return &x509.Certificate{URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/orders"}}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	}
	_, cert, key := pairFiles(t, dir, "client", ca, template())
	_, wrongCert, wrongKey := pairFiles(t, dir, "wrong", other, template())

	s := startShop(t)
	secured := servertest.On(t, s.URL, func(c *server.Config) {
		c.TLSCert, c.TLSKey = serverCert, serverKey
		c.Clients = server.ClientCertificates{CA: caFile, Required: true, TrustDomains: []string{"example.org"}}
	})
	at := strings.Replace(secured.API, "http://", "https://", 1)
	start := func(change func(*cedarpost.Config)) *cedarpost.Client {
		t.Helper()
		cfg := cedarpost.Config{Servers: []string{at}, Token: secured.Token, CacheBytes: -1, Timeout: time.Minute, Log: slog.New(slog.DiscardHandler)}
		change(&cfg)
		c, err := cedarpost.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close(t.Context()) })
		return c
	}
	allows := func(c *cedarpost.Client) {
		t.Helper()
		if r, err := c.Authorize(t.Context(), view("alice", "42")); err != nil || !r.Allowed() {
			t.Errorf("allowed %v, %v", r.Allowed(), err)
		}
	}
	good := start(func(c *cedarpost.Config) { c.CAFile, c.ClientCertFile, c.ClientKeyFile = caFile, cert, key })
	allows(good)

	for about, change := range map[string]func(*cedarpost.Config){
		"no certificate":               func(c *cedarpost.Config) { c.CAFile = caFile },
		"a certificate of another CA":  func(c *cedarpost.Config) { c.CAFile, c.ClientCertFile, c.ClientKeyFile = caFile, wrongCert, wrongKey },
		"a server that is not trusted": func(c *cedarpost.Config) { c.CAFile, c.ClientCertFile, c.ClientKeyFile = otherCA, cert, key },
	} {
		c := start(change)
		check := view("alice", "42")
		check.FailOpen = "reads may go on"
		for range 10 {
			if r, err := c.Authorize(t.Context(), check); r.Allowed() || !errors.Is(err, cedarpost.ErrUnavailable) {
				t.Errorf("%s: allowed %v, %v", about, r.Allowed(), err)
			}
		}
	}

	// The files are replaced while the client runs.
	pairFiles(t, dir, "client", ca, template())
	time.Sleep(1100 * time.Millisecond) // then the next call looks at them
	allows(good)
	if err := os.WriteFile(cert, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	allows(good)

	for says, cfg := range map[string]cedarpost.Config{
		"client certificate in " + cert:      {CAFile: caFile, ClientCertFile: cert, ClientKeyFile: key},
		"needs two files":                    {ClientKeyFile: key},
		"no such file":                       {CAFile: "none"},
		"have no effect on an HTTPClient":    {CAFile: caFile, HTTPClient: &http.Client{}},
		"private key does not match":         {ClientCertFile: wrongCert, ClientKeyFile: key},
		"is not for client authentication":   {ClientCertFile: forServer(t, dir, ca), ClientKeyFile: filepath.Join(dir, "listen.key")},
		"all users of this machine may use ": {ClientCertFile: wrongCert, ClientKeyFile: open(t, wrongKey)},
	} {
		cfg.Servers, cfg.Token = []string{at}, "key"
		if _, err := cedarpost.New(cfg); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
	}

	pairFiles(t, dir, "client", ca, template())
	t.Setenv("CEDARPOST_CA", caFile)
	t.Setenv("CEDARPOST_CLIENT_CERT", cert)
	t.Setenv("CEDARPOST_CLIENT_KEY", key)
	allows(start(func(*cedarpost.Config) {}))
}

// forServer makes a certificate that is not for clients.
func forServer(t *testing.T, dir string, ca *privateca.Pair) string {
	t.Helper()
	_, cert, _ := pairFiles(t, dir, "listen", ca, &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return cert
}

// open lets all users read a file.
func open(t *testing.T, file string) string {
	t.Helper()
	name := file + ".open"
	text, err := os.ReadFile(file)
	if err == nil {
		err = errors.Join(os.WriteFile(name, text, 0o600), os.Chmod(name, 0o644))
	}
	if err != nil {
		t.Fatal(err)
	}
	return name
}
