package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/internal/privateca"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store/localpg"
)

// A connection that leaves this machine must verify the database's certificate and name.
func TestCheckTransport(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("HOME", dir) // the driver looks for certificates there
	ca := issueTLS(t, nil, &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true})
	root := filepath.Join(dir, "ca.pem")
	writeTLS(t, root, ca.CertPEM())
	const plain, unverified = "may be made without encryption", "does not verify the server's certificate and its name"
	for _, c := range []struct{ url, mode, says string }{
		{"postgres://u@127.0.0.1/d?sslmode=disable", "", ""},
		{"postgres://u@localhost/d", "", ""},
		{"postgres://u@LOCALHOST./d", "", ""},
		{"postgres://u@[::1]:5433/d?sslmode=disable", "", ""},
		{"host=/var/run/postgresql dbname=d", "", ""},
		{"postgres:///d?host=/var/run/postgresql", "", ""},
		{"postgres://u@db.internal/d?sslmode=verify-full", "", ""},
		{"postgres://u@10.0.0.7/d?sslmode=verify-full", "", ""},
		{"postgres://u@db.internal/d?sslrootcert=system", "", ""},
		{"postgres://u@a,b/d?sslmode=verify-full&sslrootcert=" + root, "", ""},
		{"postgres://u@db.internal/d", "verify-full", ""},
		{"postgres://u@db.internal/d", "", plain},
		{"postgres://u@db.internal/d?sslmode=disable", "verify-full", plain},
		{"postgres://u@db.internal/d?sslmode=allow", "", plain},
		{"postgres://u@db.internal/d?sslmode=prefer", "", plain},
		{"postgres://u@db.internal/d?sslmode=require", "", unverified},
		{"postgres://u@10.0.0.7/d?sslmode=require", "", unverified},
		{"postgres://u@db.internal/d?sslmode=require&sslrootcert=" + root, "", unverified},
		{"postgres://u@db.internal/d?sslmode=verify-ca&sslrootcert=" + root, "", unverified},
		{"postgres://u@localhost,db.internal/d?sslmode=disable", "", "the one to db.internal:5432 " + plain},
		{"postgres://u@localhost.example/d?sslmode=disable", "", plain},
		{"postgres://u@127.0.0.1.example/d?sslmode=disable", "", plain},
	} {
		t.Setenv("PGSSLMODE", c.mode)
		err := CheckTransport(c.url)
		if (err == nil) != (c.says == "") || err != nil && (!errors.Is(err, ErrPlaintext) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s with PGSSLMODE=%s: %v, want %q", c.url, c.mode, err, c.says)
		}
	}
	for _, bad := range []string{"postgres://u:secret@db/d?sslmode=x", "postgres://u:secret@db/d?sslmode=verify-full&sslrootcert=/none"} {
		if err := CheckTransport(bad); err == nil || errors.Is(err, ErrPlaintext) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func issueTLS(t *testing.T, ca *privateca.Pair, template *x509.Certificate) *privateca.Pair {
	t.Helper()
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	pair, err := privateca.Issue(template, ca)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

func writeTLS(t *testing.T, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(name, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// secureServer is a Postgres that accepts connections over TCP only with TLS and a certificate of
// its login.
type secureServer struct {
	t     *testing.T
	pg    *localpg.Server
	admin *pgx.Conn // without TLS, from before
	data  string
	root  string // of clients: the CA of the server
	leaf  []byte // the certificate of the server
}

func newSecureServer(t *testing.T, names ...string) *secureServer {
	t.Helper()
	dir, err := os.MkdirTemp("", "cedarpost-tls-") // the user of Postgres cannot reach t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	pg, err := localpg.Start(t.Context(), localpg.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pg.Stop(); err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(pg.ClusterDir())
	})
	s := &secureServer{t: t, pg: pg, data: filepath.Join(pg.ClusterDir(), "data"), root: filepath.Join(t.TempDir(), "ca.pem")}
	if s.admin, err = pgx.Connect(t.Context(), pg.URL()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.admin.Close(context.Background()) })
	if err := Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	s.secure(names...)
	s.give("pg_hba.conf", []byte("hostssl all all 127.0.0.1/32 cert\n"))
	for _, set := range []string{
		"ssl = on", "ssl_cert_file = 'tls.crt'", "ssl_key_file = 'tls.key'", "ssl_ca_file = 'tls.ca'",
	} {
		if _, err := s.admin.Exec(t.Context(), "alter system set "+set); err != nil {
			t.Fatal(err)
		}
	}
	s.reload()
	return s
}

// give writes a file for the server, which belongs to the server's user.
func (s *secureServer) give(name string, text []byte) {
	s.t.Helper()
	file := filepath.Join(s.data, name)
	writeTLS(s.t, file, text)
	info, err := os.Stat(s.data)
	if err != nil {
		s.t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	if err := os.Chown(file, int(owner.Uid), int(owner.Gid)); err != nil {
		s.t.Fatal(err)
	}
}

// secure makes a new CA, and certificates of it for the server, with these names, and for a client.
func (s *secureServer) secure(names ...string) {
	s.t.Helper()
	ca := issueTLS(s.t, nil, &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true})
	server := &x509.Certificate{Subject: pkix.Name{CommonName: "server"}}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			server.IPAddresses = append(server.IPAddresses, ip)
		} else {
			server.DNSNames = append(server.DNSNames, name)
		}
	}
	pair := issueTLS(s.t, ca, server)
	key, err := pair.KeyPEM()
	if err != nil {
		s.t.Fatal(err)
	}
	s.leaf = pair.Cert.Raw
	client := issueTLS(s.t, ca, &x509.Certificate{Subject: pkix.Name{CommonName: "cedarpost"}})
	clientKey, err := client.KeyPEM()
	if err != nil {
		s.t.Fatal(err)
	}
	for name, text := range map[string][]byte{"tls.crt": pair.CertPEM(), "tls.key": key, "tls.ca": ca.CertPEM()} {
		s.give(name, text)
	}
	writeTLS(s.t, s.root, ca.CertPEM())
	writeTLS(s.t, s.root+".client", client.CertPEM())
	writeTLS(s.t, s.root+".key", clientKey)
}

// reload makes the server read its files, and waits until new connections get its certificate. That
// is the last thing that it reads.
func (s *secureServer) reload() {
	s.t.Helper()
	if _, err := s.admin.Exec(s.t.Context(), "select pg_reload_conf()"); err != nil {
		s.t.Fatal(err)
	}
	config, err := pgx.ParseConfig(s.url("require", "", "", ""))
	if err != nil {
		s.t.Fatal(err)
	}
	served := false
	config.TLSConfig.VerifyConnection = func(state tls.ConnectionState) error {
		served = bytes.Equal(state.PeerCertificates[0].Raw, s.leaf)
		return errors.New("only looks")
	}
	for deadline := time.Now().Add(time.Minute); !served && time.Now().Before(deadline); {
		_, err = pgx.ConnectConfig(s.t.Context(), config)
	}
	if !served {
		s.t.Fatalf("the server does not use its new certificate: %v", err)
	}
}

// url returns the URL with settings of TLS.
func (s *secureServer) url(mode, root, cert, key string) string {
	u, err := url.Parse(s.pg.URL())
	if err != nil {
		s.t.Fatal(err)
	}
	values := url.Values{"sslmode": {mode}}
	for name, value := range map[string]string{"sslrootcert": root, "sslcert": cert, "sslkey": key} {
		if value != "" {
			values.Set(name, value)
		}
	}
	u.RawQuery = values.Encode()
	return u.String()
}

// The database is reached with sslmode=verify-full and a client certificate. Another CA, another name
// and a missing certificate are refused. Certificates are replaced while the store is open.
func TestTLSToPostgres(t *testing.T) {
	s := newSecureServer(t, "127.0.0.1")
	good := s.url("verify-full", s.root, s.root+".client", s.root+".key")
	foreign := filepath.Join(t.TempDir(), "foreign.pem")
	writeTLS(t, foreign, issueTLS(t, nil, &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true}).CertPEM())
	for url, says := range map[string]string{
		s.url("verify-full", foreign, s.root+".client", s.root+".key"): "x509: certificate signed by unknown authority",
		s.url("verify-full", s.root, "", ""):                           "connection requires a valid client certificate",
		s.url("verify-full", s.root+"x", "", ""):                       "no such file",
		s.url("verify-full", s.root, s.root+".client", ""):             `both "sslcert" and "sslkey" are required`,
		s.url("disable", "", "", ""):                                   "no encryption",
	} {
		if db, err := Open(t.Context(), Config{DatabaseURL: secret.New(url)}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
			if err == nil {
				db.Close()
			}
		}
	}
	if err := Migrate(t.Context(), good, nil); err != nil {
		t.Fatal(err)
	}
	db, err := Open(t.Context(), Config{DatabaseURL: secret.New(good)})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	connects := func() error {
		db.pool.Reset()
		conn, err := db.pool.Acquire(t.Context())
		if err != nil {
			return err
		}
		defer conn.Release()
		secure, ok := conn.Conn().PgConn().Conn().(*tls.Conn)
		if !ok || secure.ConnectionState().Version != tls.VersionTLS13 {
			return fmt.Errorf("the connection is a %T without TLS 1.3", conn.Conn().PgConn().Conn())
		}
		return nil
	}
	if err := connects(); err != nil {
		t.Error(err)
	}
	if end, trouble := db.TLSFiles(); trouble != "" || time.Until(end) > time.Hour || time.Until(end) < time.Minute {
		t.Errorf("ends at %v, %q", end, trouble)
	}
	// New files for both, with another CA.
	s.secure("127.0.0.1")
	s.reload()
	if err := connects(); err != nil {
		t.Errorf("after all certificates were replaced: %v", err)
	}
	// Files that cannot be used leave those before in use.
	writeTLS(t, s.root, []byte("broken"))
	if err := connects(); err != nil {
		t.Errorf("with a broken file: %v", err)
	}
	if _, trouble := db.TLSFiles(); trouble == "" {
		t.Error("nobody is told of the broken file")
	}
	// Another name.
	s.secure("db.example")
	s.reload()
	if err := connects(); err == nil || !strings.Contains(err.Error(), "x509: cannot validate certificate for 127.0.0.1") {
		t.Errorf("another name: %v", err)
	}
	if _, trouble := db.TLSFiles(); trouble != "" {
		t.Error(trouble)
	}
}
