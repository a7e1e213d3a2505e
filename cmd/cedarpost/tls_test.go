package main

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/privateca"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// commands returns the arguments of the commands that a text shows, without their first word.
func commands(text string) (list [][]string) {
	for _, line := range lines(strings.ReplaceAll(text, "\\\n", "")) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "cedarpost "); ok {
			list = append(list, strings.Fields(rest))
		}
	}
	return list
}

func readCert(t *testing.T, file string) *x509.Certificate {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(text)
	if block == nil || len(rest) > 0 {
		t.Fatalf("%s: %s", file, text)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// The commands that tls init prints work with the certificates that it makes.
func TestTLSInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "tls")
	at := func(name string) string { return filepath.Join(dir, name) }
	sh := newShell()
	sh.exits(t, 0, says("spiffe://cedarpost.internal/app", "spiffe://cedarpost.internal/orders.v2"), "tls", "init", "--client=app", "--client=orders.v2", dir)
	for name, mode := range map[string]os.FileMode{
		"ca.pem": 0o644, "ca.key": 0o600, "server.pem": 0o644, "server.key": 0o600, "app.pem": 0o644, "app.key": 0o600, "orders.v2.pem": 0o644, "orders.v2.key": 0o600,
	} {
		if info, err := os.Stat(at(name)); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	before, err := os.ReadFile(at("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 1, says(at("ca.pem")+" exists", "no file is overwritten"), "tls", "init", dir)
	if err := os.Remove(at("ca.pem")); err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 1, says(at("ca.key")+" exists"), "tls", "init", dir)
	if after, err := os.ReadFile(at("ca.key")); err != nil || string(after) != string(before) {
		t.Error("the key of the CA was overwritten")
	}
	other := filepath.Join(t.TempDir(), "other")
	for _, args := range [][]string{
		{"--client=a/b"}, {"--client=ca"}, {"--client=Server"}, {"--client=a", "--client=A"}, {"--client=.."}, {"--trust-domain=A b"},
	} {
		r := sh.run(t, append([]string{"tls", "init", other}, args...)...)
		if _, err := os.Stat(other); r.code != codeUsage || !os.IsNotExist(err) {
			t.Errorf("%v: exit code %d, %s%v", args, r.code, r.err, err)
		}
	}

	made := sh.exits(t, 0, nil, "tls", "init", "--client=app", "--trust-domain=example.org", other)
	dir = other
	ca, server, app := readCert(t, at("ca.pem")), readCert(t, at("server.pem")), readCert(t, at("app.pem"))
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	for _, name := range []string{"localhost", "127.0.0.1", "::1"} {
		if _, err := server.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := app.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil || app.URIs[0].String() != "spiffe://example.org/app" {
		t.Errorf("%v, %v", app.URIs, err)
	}
	for about, life := range map[*x509.Certificate]time.Duration{ca: 365 * 24 * time.Hour, server: 30 * 24 * time.Hour, app: 30 * 24 * time.Hour} {
		if got := about.NotAfter.Sub(about.NotBefore) - time.Minute; got != life {
			t.Errorf("%s lives for %v", about.Subject, got)
		}
	}
	// The CA cannot sign for others.
	pair, err := tls.LoadX509KeyPair(at("ca.pem"), at("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	forged, err := privateca.Issue(&x509.Certificate{DNSNames: []string{"example.com"}, NotAfter: time.Now().Add(time.Hour)}, &privateca.Pair{Cert: ca, Key: pair.PrivateKey.(*ecdsa.PrivateKey)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := forged.Cert.Verify(x509.VerifyOptions{Roots: roots}); err == nil {
		t.Error("the CA can sign for any name")
	}

	list := commands(made.out)
	if len(list) != 3 || list[0][0] != "serve" || list[1][0] != "whoami" || list[2][0] != "grants" {
		t.Fatalf("it prints\n%s", made.out)
	}
	keyFile := filepath.Join(t.TempDir(), "key")
	sh = newShell(databaseURLEnv+"="+storetest.NewServer(t).URL(), "CEDARPOST_BOOTSTRAP_KEY_FILE="+keyFile)
	serve := append(append(list[0], "--migrate", "--development-database", "--require-client-cert"), anyPort...)
	d := sh.start(t, serve...)
	call := slices.Clone(list[1])
	i := slices.Index(call, "https://localhost:8081")
	call[i] = strings.Replace(d.url("admin"), "127.0.0.1", "localhost", 1)
	sh = newShell("CEDARPOST_TOKEN_FILE=" + keyFile)
	sh.exits(t, 0, nil, call...)
	newShell().exits(t, 0, says("spiffe://example.org/app"), call...) // without a key and without a role

	// The environment, and what is said about wrong files.
	url := "CEDARPOST_ADMIN_URL=" + call[i]
	good := sh.with(url, "CEDARPOST_CA="+at("ca.pem"), "CEDARPOST_CLIENT_CERT="+at("app.pem"), "CEDARPOST_CLIENT_KEY="+at("app.key"))
	good.exits(t, 0, nil, "bundles")
	sh.with(url).exits(t, 1, says("--ca can name a file with the CAs to trust"), "bundles")
	sh.with(url, "CEDARPOST_CA="+at("ca.pem")).exits(t, 1, says("wants a client certificate: give --client-cert and --client-key"), "bundles")
	sh.with(strings.Replace(url, "https:", "http:", 1)).exits(t, 1, says("with https://"), "bundles")
	sh.with(url).exits(t, codeUsage, says("--client-key"), "bundles", "--client-cert="+at("app.pem"))
	good.exits(t, 1, says("--ca: ", at("server.key")), "bundles", "--ca="+at("server.key"))
	good.exits(t, 1, says("--client-cert: ", "not for client authentication"), "bundles", "--client-cert="+at("server.pem"), "--client-key="+at("server.key"))
	good.exits(t, 1, says("--client-cert: ", "does not match"), "bundles", "--client-key="+at("server.key"))
	foreign := filepath.Join(t.TempDir(), "foreign")
	sh.exits(t, 0, nil, "tls", "init", foreign)
	good.exits(t, 1, says("does not accept the client certificate in "+filepath.Join(foreign, "app.pem")), "bundles",
		"--client-cert="+filepath.Join(foreign, "app.pem"), "--client-key="+filepath.Join(foreign, "app.key"))

	// Settings that need each other.
	base := slices.Clip(append([]string{"serve", "--development-database"}, anyPort...))
	withTLS := slices.Clip(append(base, "--tls-cert="+at("server.pem"), "--tls-key="+at("server.key")))
	sh = newShell(d.shell.env...)
	sh.exits(t, 1, says("--client-ca: ", "give --tls-cert"), append(base, "--client-ca="+at("ca.pem"), "--client-dns-names")...)
	sh.exits(t, 1, says("--client-ca: ", "has no effect"), append(withTLS, "--client-ca="+at("ca.pem"))...)
	sh.exits(t, 1, says("--tls-cert: ", "not for servers"), append(base, "--tls-cert="+at("app.pem"), "--tls-key="+at("app.key"))...)
	sh.exits(t, 1, says("--client-ca: ", "need their CAs"), append(withTLS, "--require-client-cert")...)
	sh.exits(t, 1, says("--client-trust-domain: ", `"A"`), append(withTLS, "--client-ca="+at("ca.pem"), "--client-trust-domain=A")...)
	sh.exits(t, codeUsage, says("--tls-min-version"), append(withTLS, "--tls-min-version=1.1")...)
	for version, ok := range map[string]bool{"1.2": true, "1.3": false} {
		d := sh.start(t, append(withTLS, "--tls-min-version="+version)...)
		conn, err := tls.Dial("tcp", strings.TrimPrefix(d.url("decision"), "https://"), &tls.Config{RootCAs: roots, MaxVersion: tls.VersionTLS12})
		if (err == nil) != ok {
			t.Errorf("TLS 1.2 with --tls-min-version=%s: %v", version, err)
		}
		if err == nil {
			_ = conn.Close()
		}
	}
}
