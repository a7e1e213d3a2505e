package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
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

// forms returns the texts that show a secret.
func forms(plain []byte) (list []string) {
	return []string{
		string(plain), hex.EncodeToString(plain), strings.ToUpper(hex.EncodeToString(plain)), url.QueryEscape(string(plain)),
		base64.StdEncoding.EncodeToString(plain), base64.RawURLEncoding.EncodeToString(plain), fmt.Sprintf("%d", plain),
	}
}

// Somebody who can read all logs and outputs finds no secret in them: neither of a server that logs
// everything and whose files of secrets are replaced and broken, nor of commands that fail.
func TestAttackFindSecretsInLogsAndOutputs(t *testing.T) {
	pg := storetest.NewServer(t)
	migrate := newShell(databaseURLEnv + "=" + pg.URL())
	migrate.exits(t, 0, nil, "migrate")
	dir := t.TempDir()
	login := storetest.Login(t, pg.URL(), "cedarpost_app", "cedarpost_writer", "cedarpost_auditor")
	parsed, err := url.Parse(login)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := parsed.User.Password()
	wrong := *parsed
	wrong.User = url.UserPassword(parsed.User.Username(), "wrong-password-3141592653")

	urlFile, maskFile, keyFile := write(t, dir, "url", login+"\n"), write(t, dir, "mask", hex.EncodeToString(bytes.Repeat([]byte("mask-key"), 4))+"\n"), filepath.Join(dir, "key")
	cert, tlsKey := certify(t, dir, "127.0.0.1")
	auditKey, secondAuditKey := filepath.Join(dir, "audit.key"), filepath.Join(dir, "audit2.key")
	sh := newShell("SSL_CERT_FILE=" + cert)
	sh.exits(t, 0, nil, "audit", "keygen", "--name=audit.example.org/x", auditKey)
	sh.exits(t, 0, nil, "audit", "keygen", "--name=audit.example.org/x", secondAuditKey)
	// What each file has is a secret, also after it was replaced.
	secrets := map[string][]byte{
		"password": []byte(password), "wrong password": []byte("wrong-password-3141592653"), "new password": []byte("new-password-2718281828"),
		"mask key": bytes.Repeat([]byte("mask-key"), 4), "new mask key": bytes.Repeat([]byte("other-ke"), 4),
		"wrong API key": []byte("cdp_0123456789abcdefghijklmnopqrstuvwxyzWRONG"), "API key in the environment": []byte("cdp_environment-0123456789abcdefghijklmnopq"),
	}
	for name, file := range map[string]string{"audit key": auditKey, "second audit key": secondAuditKey} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, seed, _ := strings.Cut(strings.TrimSpace(string(text)), "+x+")
		if parts := strings.Split(strings.TrimSpace(string(text)), "+"); seed == "" {
			seed = strings.Join(parts[4:], "+")
		}
		secrets[name] = []byte(seed)
	}
	pem, err := os.ReadFile(tlsKey)
	if err != nil {
		t.Fatal(err)
	}
	secrets["TLS key"] = []byte(strings.Split(string(pem), "\n")[1])

	serve := append([]string{
		"serve", "--log-level=debug", "--log-format=json", "--decision-retention=0", "--database-url-file", urlFile, "--mask-key-file", maskFile, "--tls-cert", cert, "--tls-key", tlsKey,
		"--audit-key-file", auditKey, "--audit-checkpoint-file", filepath.Join(dir, "checkpoints"), "--bootstrap-key-file", keyFile,
	}, anyPort...)
	d := sh.start(t, serve...)
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	secrets["API key"] = bytes.TrimSpace(key)

	planes := []string{"CEDARPOST_ADMIN_URL=" + d.url("admin"), "CEDARPOST_API_URL=" + d.url("decision"), "CEDARPOST_OPS_URL=" + d.url("ops")}
	client := sh.with(append(planes, "CEDARPOST_TOKEN_FILE="+keyFile)...)
	client.exits(t, 0, nil, "apply", "../../policies/shop")
	client.exits(t, 0, nil, "entities", "import", "../../policies/shop/entities.json")
	client.exits(t, 0, says("ALLOW"), ask("ViewOrder", "42")...)
	client.exits(t, 0, nil, "decisions", "export")
	client.exits(t, 0, says("change"), "events", "-o", "json")
	client.exits(t, 0, nil, "health")
	wrongKey := write(t, dir, "wrong", string(secrets["wrong API key"])+"\n")
	client.with("CEDARPOST_TOKEN_FILE="+wrongKey).exits(t, 1, says("unauthenticated"), "decisions")
	sh.with(append(planes, "CEDARPOST_TOKEN="+string(secrets["API key in the environment"]))...).exits(t, 1, says("unauthenticated", "CEDARPOST_TOKEN"), "decisions")
	client.with("CEDARPOST_ADMIN_URL=http://user:"+string(secrets["wrong password"])+"@127.0.0.1:1").run(t, "decisions")
	sh.exits(t, 1, nil, append(serve, "--database-url-file", write(t, dir, "wrong-url", wrong.String()+"\n"))...)
	sh.exits(t, 2, says("other users of this machine can see the arguments"), append([]string{"serve", "--database-url", login}, anyPort...)...)
	sh.with(databaseURLEnv+"="+wrong.String()).exits(t, 1, says("is in "+databaseURLEnv, "easily seen"), append([]string{"serve"}, anyPort...)...)
	sh.with(databaseURLEnv+"="+login+"&sslmode=nonsense").exits(t, 1, nil, "migrate")
	sh.with(databaseURLEnv+"=host=127.0.0.1 port=1 password="+password).exits(t, 2, says("a private key is given"), "audit", "verify", "--verifier-key-file", auditKey)
	sh.exits(t, 1, nil, append(serve, "--mask-key-file", auditKey)...)
	sh.exits(t, 1, nil, append(serve, "--audit-key-file", maskFile)...)
	private, err := os.ReadFile(auditKey)
	if err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 1, says("a private key is given"), append(serve, "--audit-agent=/nowhere", "--audit-agent-key", strings.TrimSpace(string(private)))...)
	sh.exits(t, 2, says("a private key is given"), "audit", "witness", "--state=x", "--verifier-key", strings.TrimSpace(string(private)))
	sh.exits(t, 1, nil, append(serve, "--tls-cert", tlsKey)...)

	// The files are replaced and broken while the server runs.
	write(t, dir, "mask", hex.EncodeToString(secrets["new mask key"])+"\n")
	if err := os.Rename(secondAuditKey, auditKey); err != nil {
		t.Fatal(err)
	}
	hup(t, d, "new mask key taken up", "new audit keys taken up")
	write(t, dir, "mask", string(secrets["new password"]))
	if err := os.Chmod(auditKey, 0o644); err != nil {
		t.Fatal(err)
	}
	hup(t, d, "cannot be used", "secret not reloaded")
	conn, err := pgx.Connect(t.Context(), pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, sql := range []string{
		"alter role " + parsed.User.Username() + " password '" + string(secrets["new password"]) + "'",
		"select pg_terminate_backend(pid) from pg_stat_activity where usename = '" + parsed.User.Username() + "'",
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the server is not ready with the old password", func() bool { return client.run(t, "health").code != 0 })
	parsed.User = url.UserPassword(parsed.User.Username(), string(secrets["new password"]))
	write(t, dir, "url", parsed.String()+"\n")
	eventually(t, "the server takes up the new password", func() bool { return client.run(t, "health").code == 0 })
	client.exits(t, 0, says("ALLOW"), ask("ViewOrder", "42")...)

	for _, path := range []string{"/metrics", "/readyz", "/livez", "/nothing"} {
		res, err := http.Get(d.url("ops") + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		sh.log.Write(body)
	}
	client.exits(t, 0, nil, "events", "-o", "json")
	if code := d.stop(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}

	output, found := sh.log.String(), 0
	if !strings.Contains(output, `"level":"DEBUG"`) && !strings.Contains(output, `"level":"INFO"`) {
		t.Fatal("the log of the server is not in the output that is searched")
	}
	for name, plain := range secrets {
		if len(plain) < 16 {
			t.Fatalf("%s is too short to be searched for: %q", name, plain)
		}
		for _, form := range forms(plain) {
			if i := strings.Index(output, form); i >= 0 {
				found++
				t.Errorf("the %s is in the output: %q", name, output[max(0, i-100):i])
			}
		}
	}
	t.Logf("attack: read all logs and outputs of a server and its commands; %d secrets in %d forms each, %d KiB of output, found: %d", len(secrets), len(forms(nil)), len(output)>>10, found)
}

// hup sends SIGHUP and waits until the log has all the texts, after the signal.
func hup(t *testing.T, d *daemon, texts ...string) {
	t.Helper()
	before := len(d.errs.String())
	if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, fmt.Sprintf("the log says %q", texts), func() bool {
		for _, text := range texts {
			if !strings.Contains(d.errs.String()[before:], text) {
				return false
			}
		}
		return true
	})
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after two minutes: %s", what)
		}
	}
}
