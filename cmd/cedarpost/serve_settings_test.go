package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// Flags, the environment and the file accept the same durations.
func TestDurationsHaveOneGrammar(t *testing.T) {
	t.Parallel() // it takes long
	for _, name := range []string{"max-staleness", "max-reuse", "decision-retention", "history-retention"} {
		for given, ok := range map[string]bool{
			"90d": true, "2160h": true, "100d12h": true, "5000000s": true,
			"soon": false, "90": false, "-90d": false, "+90d": false, "90d-1h": false, "1.5d": false, "d": false, "90d90": false, "106752d": false, "9999999h": false,
		} {
			want := "no database"
			if !ok {
				want = "is not a duration like 500ms, 90m, 12h, 7d, 1d12h or 2w"
			}
			if given == "106752d" || given == "9999999h" {
				want = "is too large"
			}
			file := write(t, t.TempDir(), "c.yaml", name+": "+given+"\n")
			newShell().exits(t, codeUsage, says(want), "serve", "--"+name+"="+given)
			newShell("CEDARPOST_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))+"="+given).exits(t, codeUsage, says(want), "serve")
			newShell("CEDARPOST_CONFIG="+file).exits(t, codeUsage, says(want), "serve")
		}
	}
	newShell().exits(t, codeUsage, says("is not a duration like"), "audit", "witness", "--verifier-key=x", "--state=x", "--interval=soon")
	newShell().exits(t, codeUsage, says("--interval must be at least 1s"), "audit", "witness", "--verifier-key=x", "--state=x", "--interval=0d")
	newShell().exits(t, 0, says("--max-staleness=DURATION", "--max-reuse=DURATION", "--decision-retention=DURATION"), "serve", "--help")
	newShell().exits(t, 0, says("Durations are like"), "--help")
}

// A duration is shown in the shortest form that flags take.
func TestDurationsAreShownWithDays(t *testing.T) {
	for given, want := range map[string]string{
		"2160h": "90d", "36h": "1d12h", "24h0m1s": "1d1s", "25h1m": "1d1h1m", "12h": "12h", "90m": "1h30m", "5s": "5s", "10m": "10m", "500ms": "500ms", "0": "0s",
	} {
		var s span
		if err := s.UnmarshalText([]byte(given)); err != nil || s.String() != want {
			t.Errorf("%s is shown as %v, want %s, %v", given, s, want, err)
		}
	}
}

func FuzzSpan(f *testing.F) {
	for _, seed := range []string{"90d", "1d12h", "500ms", "0", "-1h", "d", "1.5d", "106751d23h", "1µs", "", "0d0"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s span
		if s.UnmarshalText([]byte(text)) != nil {
			return
		}
		if s < 0 {
			t.Fatalf("%q is %v", text, s)
		}
		if d, err := time.ParseDuration(text); err == nil && span(d) != s {
			t.Fatalf("%q is %v, and in Go %v", text, s, d)
		}
		var again span
		if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
			t.Fatalf("%q is written as %v, which is %v, %v", text, s, again, err)
		}
	})
}

// Names that records and lines of text cannot have are refused.
func TestNamesThatCannotStandInRecords(t *testing.T) {
	for name, want := range map[string]string{
		"server 7 (Köln)": "no database", strings.Repeat("x", 255): "no database",
		"": "empty", "a\nb": "cannot be printed", "a\tb": "cannot be printed", "\x1b[31mred": "cannot be printed", "a\u202eb": "cannot be printed",
		" a": "space", "a\xff": "Unicode", strings.Repeat("x", 256): "256 bytes",
	} {
		newShell().exits(t, codeUsage, says(want), "serve", "--name="+name)
		if name != "" {
			newShell("CEDARPOST_NAME="+name).exits(t, codeUsage, says(want), "serve")
		}
	}
	file := write(t, t.TempDir(), "c.yaml", "name: \"\"\n")
	newShell("CEDARPOST_CONFIG="+file).exits(t, codeUsage, says("the name is empty", "c.yaml:1"), "serve")
	newShell("CEDARPOST_NAME=").exits(t, codeUsage, says("no database"), "serve") // an empty variable counts as not set

	key := filepath.Join(t.TempDir(), "audit.key")
	for _, name := range []string{"", "a\x1bb", "a\u202eb", "a b", "a+b", strings.Repeat("x", 256)} {
		newShell().exits(t, 1, says("cannot name a log"), "audit", "keygen", "--name="+name, key)
	}
	newShell().exits(t, 0, says("audit.example.org/x+"), "audit", "keygen", "--name=audit.example.org/x", key)
}

// certify writes a certificate for 127.0.0.1 and its key.
func certify(t *testing.T, dir, name string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, dir, "tls.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))),
		write(t, dir, "tls.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})))
}

// On SIGHUP the server reads the certificate again and logs it. If the files do not load, or others
// may read the key, the old certificate stays.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	cert, key := certify(t, dir, "first")
	sh := newShell("CEDARPOST_DATABASE_URL=" + storetest.NewServer(t).URL())
	serve := append([]string{"serve", "--migrate", "--development-database", "--tls-cert=" + cert, "--tls-key=" + key}, anyPort...)
	d := sh.start(t, serve...)
	address, err := url.Parse(d.url("decision"))
	if err != nil {
		t.Fatal(err)
	}
	reload := func(says, serves string) {
		t.Helper()
		before := len(d.errs.String())
		if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(2 * time.Minute); !strings.Contains(d.errs.String()[before:], "reloaded"); time.Sleep(5 * time.Millisecond) {
			select {
			case <-d.dead:
				t.Fatalf("SIGHUP ended the server\n%s", d.errs)
			default:
			}
			if time.Now().After(deadline) {
				t.Fatalf("no word of the reload\n%s", d.errs)
			}
		}
		if said := d.errs.String()[before:]; !strings.Contains(said, says) || !strings.Contains(said, cert) {
			t.Errorf("does not say %q\n%s", says, said)
		} else if n := strings.Count(said, "reloaded"); n != 1 {
			t.Errorf("%d lines for one SIGHUP\n%s", n, said)
		}
		conn, err := tls.Dial("tcp", address.Host, &tls.Config{InsecureSkipVerify: true}) // only looks at it
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if got := conn.ConnectionState().PeerCertificates[0].Subject.CommonName; got != serves {
			t.Errorf("serves %s, want %s", got, serves)
		}
	}
	reload("TLS certificate reloaded", "first")
	certify(t, dir, "second")
	reload("TLS certificate reloaded", "second")
	if err := os.Chmod(key, 0o604); err != nil { // before the new files are there, or the server loads them
		t.Fatal(err)
	}
	certify(t, dir, "third")
	reload("not reloaded, the old one stays in use", "second")
	sh.exits(t, 1, says("TLS: "+key, "all users of this machine"), serve...)
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	reload("TLS certificate reloaded", "third")
	write(t, dir, "tls.crt", "broken")
	reload("not reloaded, the old one stays in use", "third")

	// Every other file with a secret is refused as well, if others may read it.
	secret := write(t, dir, "secret", "x\n")
	if err := os.Chmod(secret, 0o644); err != nil {
		t.Fatal(err)
	}
	plain := append([]string{"serve", "--development-database"}, anyPort...)
	for _, args := range [][]string{
		append(plain, "--audit-key-file="+secret, "--audit-checkpoint-file="+filepath.Join(dir, "checkpoints")),
		append(plain, "--mask-key-file="+secret), append(plain, "--bootstrap-key-file="+secret),
		append(plain, "--read-database-urls-file="+secret),
		{"bundles", "--token-file=" + secret},
	} {
		sh.exits(t, 1, says(secret, "all users of this machine"), args...)
	}
	newShell().exits(t, 1, says(secret, "all users of this machine"), "migrate", "--database-url-file="+secret)
}

// The SQL in the docs makes a second database in a cluster. The logins of each database cannot use
// the other one.
func TestSecondDatabaseInOneCluster(t *testing.T) {
	pg := storetest.NewServer(t)
	text, err := os.ReadFile("../../docs/deployment.md")
	if err != nil {
		t.Fatal(err)
	}
	_, second, _ := strings.Cut(string(text), "```sql\n")
	second, _, _ = strings.Cut(second, "```")
	first := newShell().exits(t, 0, nil, "migrate", "--print-roles").out
	in := func(database, user string) string {
		u, err := url.Parse(pg.URL())
		if err != nil {
			t.Fatal(err)
		}
		u.Path = "/" + database
		if user != "" {
			u.User = url.UserPassword(user, "secret")
		}
		return u.String()
	}
	run := func(database, sql string) {
		t.Helper()
		conn, err := pgx.Connect(t.Context(), in(database, ""))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		for _, statement := range statements(sql) {
			if _, err := conn.Exec(t.Context(), statement); err != nil {
				t.Fatalf("%s: %v", statement, err)
			}
		}
	}
	for _, name := range []string{"first", "billing"} {
		run("postgres", "create database "+name)
	}
	run("first", first)
	run("billing", second)
	run("first", "revoke connect on database first from public;\ngrant connect on database first to cedarpost_migrate, cedarpost_serve;")
	for _, login := range []string{"cedarpost_migrate", "cedarpost_serve", "billing_migrate", "billing_serve"} {
		run("postgres", "alter role "+login+" password 'secret'")
	}
	for database, logins := range map[string]string{"first": "cedarpost", "billing": "billing"} {
		newShell(databaseURLEnv+"="+in(database, logins+"_migrate")).exits(t, 0, says("up to date"), "migrate")
		d := newShell(databaseURLEnv+"="+in(database, logins+"_serve")).start(t, append([]string{"serve", "--development-database"}, anyPort...)...)
		if code := d.stop(t, syscall.SIGTERM); code != 0 {
			t.Errorf("%s: exit code %d\n%s", database, code, d.errs)
		}
	}
	for database, other := range map[string]string{"first": "billing", "billing": "cedarpost"} {
		newShell(databaseURLEnv+"="+in(database, other+"_migrate")).exits(t, 1, says("permission denied for database"), "migrate")
		newShell(databaseURLEnv+"="+in(database, other+"_serve")).exits(t, 1, says("permission denied for database"), "serve", "--development-database")
	}
}

func TestHistoryRetention(t *testing.T) {
	for given, says := range map[string]string{
		"47h": "48h or more", "1d": "48h or more", "-1h": "not a duration like", "soon": "not a duration like", "d": "not a duration like",
		"48h": "no database", "2d": "no database", "0": "no database",
	} {
		newShell().exits(t, 2, []string{says}, "serve", "--history-retention="+given)
		newShell("CEDARPOST_HISTORY_RETENTION="+given).exits(t, 2, []string{says}, "serve")
	}
	for _, c := range []struct{ keep, want string }{{"0", "-1ns"}, {"90d", "2160h0m0s"}} {
		var s span
		if err := s.UnmarshalText([]byte(c.keep)); err != nil || neverAtZero(s).String() != c.want {
			t.Errorf("%s: %v, %v", c.keep, neverAtZero(s), err)
		}
	}
}
