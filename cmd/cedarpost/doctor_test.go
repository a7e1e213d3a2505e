package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// doctor runs doctor -o json and returns its checks by name: "STATUS: DETAIL; MEND".
func doctor(t *testing.T, sh *shell, code int, args ...string) map[string]string {
	t.Helper()
	r := sh.exits(t, code, nil, append([]string{"doctor", "-o", "json"}, args...)...)
	var got struct {
		Status string
		Checks []struct{ Check, Status, Detail, Mend string }
	}
	if err := json.Unmarshal([]byte(r.out), &got); err != nil {
		t.Fatalf("%v\n%s%s", err, r.out, r.err)
	}
	if want := map[int]string{0: "pass", codeWarnings: "warn", 1: "fail"}[code]; got.Status != want {
		t.Errorf("status %q, want %q", got.Status, want)
	}
	checks := map[string]string{}
	for _, c := range got.Checks {
		if c.Status == "fail" && strings.HasPrefix(checks[c.Check], "fail") {
			t.Errorf("%s fails twice: %s, and %+v", c.Check, checks[c.Check], c)
		}
		if (c.Status == "pass") == (c.Mend != "") || c.Detail == "" {
			t.Errorf("%+v", c)
		}
		// Of several results of one check the worst counts.
		if old := checks[c.Check]; old == "" || strings.HasPrefix(old, "pass") {
			checks[c.Check] = c.Status + ": " + c.Detail + "; " + c.Mend
		}
	}
	return checks
}

// wants compares the checks that do not pass with those that are expected, by name and a part of
// their text.
func wants(t *testing.T, checks map[string]string, want map[string]string) {
	t.Helper()
	for check, text := range checks {
		if part, expected := want[check]; !expected && !strings.HasPrefix(text, "pass: ") || expected && !strings.Contains(text, part) {
			t.Errorf("%s: %s, want %q", check, text, part)
		}
	}
	for check, part := range want {
		if checks[check] == "" {
			t.Errorf("there is no check %s, want %q", check, part)
		}
	}
}

// doctor checks each setting of serve and what belongs to it. Everything passes in a production
// that is set up as the documents say, and each thing that is broken is named, with its own exit code.
func TestDoctor(t *testing.T) {
	t.Parallel() // it takes long
	pg := storetest.NewServer(t)
	admin, err := pgx.Connect(t.Context(), pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(t.Context())
	must := func(sql string) {
		t.Helper()
		if _, err := admin.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	root := newShell(databaseURLEnv + "=" + pg.URL())
	urlFile := write(t, dir, "url", pg.URL()+"\n")
	mask := write(t, dir, "mask", strings.Repeat("ab", 32)+"\n")
	cert, key := certify(t, dir, "127.0.0.1") // for an hour
	audit, checkpoints := filepath.Join(dir, "audit.key"), filepath.Join(dir, "checkpoints")
	sh := newShell()
	verifier := strings.TrimSpace(sh.exits(t, 0, nil, "audit", "keygen", "--name=audit.example.org/x", audit).out)
	good := []string{
		"--database-url-file", urlFile, "--mask-key-file", mask, "--tls-cert", cert, "--tls-key", key, "--rate-limit=1000",
		"--audit-key-file", audit, "--audit-checkpoint-file", checkpoints, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0",
	}
	with := func(more ...string) []string { return append(slices.Clone(good), more...) }

	wants(t, doctor(t, sh, 1, good...), map[string]string{"database": "run cedarpost migrate", "certificate": "warn: "})
	root.exits(t, 0, nil, "migrate")
	login := storetest.Login(t, pg.URL(), "cedarpost_app", "cedarpost_writer", "cedarpost_auditor")
	write(t, dir, "url", login+"\n")
	must("revoke connect, temporary on database " + pgx.Identifier{admin.Config().Database}.Sanitize() + " from public")
	must("grant connect on database " + pgx.Identifier{admin.Config().Database}.Sanitize() + " to cedarpost_app")
	unsigned := map[string]string{"certificate": "warn: ", "log signing": "no checkpoint was signed", "witness": "no checkpoint", "operators": "no API key; start serve with --bootstrap-key-file FILE"}
	wants(t, doctor(t, sh, codeWarnings, good...), unsigned)
	unsigned["operators"] = "no API key; start serve, which makes the first key and writes it to " + dir
	wants(t, doctor(t, sh, codeWarnings, with("--bootstrap-key-file", filepath.Join(dir, "key"))...), unsigned)

	// A server runs and signs, and a witness has its checkpoints. All checks pass but the one of the
	// certificate, which ends soon.
	keyFile, state := filepath.Join(dir, "key"), filepath.Join(dir, "witness")
	d := sh.with("SSL_CERT_FILE="+cert).start(t, append([]string{"serve", "--bootstrap-key-file", keyFile}, good...)...)
	client := sh.with("SSL_CERT_FILE="+cert, "CEDARPOST_TOKEN_FILE="+keyFile, "CEDARPOST_ADMIN_URL="+d.url("admin"))
	eventually(t, "the witness has a checkpoint", func() bool {
		return client.run(t, "audit", "witness", "--once", "--verifier-key", verifier, "--state", state).code == 0
	})
	// The first key is replaced by that of another operator, and its file is forgotten.
	client.exits(t, 0, nil, "keys", "create", "ann", "--role=operator", "--bundle=*", "--out", filepath.Join(dir, "ann"))
	client.exits(t, 0, nil, "keys", "create", "guest", "--expires=1h", "--out", filepath.Join(dir, "guest"))
	if checks := doctor(t, sh, codeWarnings, good...); !strings.Contains(checks["first key"], "warn: ") {
		t.Errorf("%v", checks)
	}
	client.with("CEDARPOST_TOKEN_FILE="+filepath.Join(dir, "ann")).exits(t, 0, says("no more"), "keys", "revoke", "bootstrap", "--grants")
	d.stop(t, syscall.SIGTERM)                                                        // so that nothing is waiting for a checkpoint for long
	must("set session_replication_role = replica; update checkpoints set at = now()") // without triggers
	wants(t, doctor(t, sh, codeWarnings, with("--witness-state", state)...), map[string]string{"certificate": "warn: "})
	wants(t, doctor(t, sh, codeWarnings, with("--witness-state", state, "--bootstrap-key-file", keyFile)...), map[string]string{
		"certificate": "warn: ", "bootstrap-key-file": "warn: " + keyFile + ": the key in this file was revoked",
	})
	must("update api_keys set expires_at = now() where name = 'guest'")
	wants(t, doctor(t, sh, codeWarnings, with("--witness-state", state)...), map[string]string{"certificate": "warn: ", "API keys": " of guest; cedarpost keys revoke --id ID"})
	must("update api_keys set expires_at = null where name = 'guest'")
	if checks := doctor(t, sh, codeWarnings, with("--witness-state", state)...); !strings.Contains(checks["max-staleness"], "pass: 5s") || !strings.Contains(checks["decision-retention"], "pass: 90d;") || !strings.Contains(checks["database-url"], "not set") {
		t.Errorf("%v", checks)
	}
	r := sh.exits(t, codeWarnings, says("pass  partitions", "warn  certificate", "mend: renew it", " 0 failed"), append([]string{"doctor"}, with("--witness-state", state)...)...)
	password := strings.TrimSpace(strings.SplitN(strings.SplitN(login, "@", 2)[0], ":", 3)[2])
	if strings.Contains(r.out+r.err, password) {
		t.Error("doctor shows the password")
	}

	for name, c := range map[string]struct {
		code int
		args []string
		want map[string]string
	}{
		"plaintext": {1, []string{"--listen=127.0.0.1:0", "--admin-listen=0.0.0.0:0", "--rate-limit=0", "--database-url-file", urlFile}, map[string]string{
			"admin-listen": "fail: --admin-listen: 0.0.0.0:0 is open to other machines", "mask-key-file": "warn", "audit-key-file": "warn", "rate-limit": "warn", "witness": "warn",
		}},
		"development": {codeWarnings, with("--development-database", "--pprof", "--record-mode=buffered", "--allow-plaintext", "--witness-state", state), map[string]string{
			"certificate": "warn", "development-database": "warn", "pprof": "warn", "record-mode": "warn", "allow-plaintext": "no effect",
		}},
		"exposed": {1, with("--pprof", "--ops-listen=0.0.0.0:0", "--cors-origin=*", "--decision-retention=1d", "--witness-state", filepath.Join(dir, "none")), map[string]string{
			"certificate": "warn", "pprof": "fail: ", "ops-listen": "without authentication", "cors-origin": `"*"`, "decision-retention": "fail: the log is to be kept for 1 days", "witness": "fail: ",
		}},
		"bad issuers": {1, with("--issuers-file", write(t, dir, "issuers.yaml", "nonsense: true\n"), "--witness-state", state), map[string]string{
			"certificate": "warn", "issuers-file": "fail: ",
		}},
		"client CA without a use": {1, with("--client-ca", cert, "--witness-state", state), map[string]string{"certificate": "warn", "client-ca": "has no effect"}},
		"client names without CA": {1, with("--client-trust-domain=example.org", "--witness-state", state), map[string]string{"certificate": "warn", "client-ca": "need their CAs"}},
		"bad trust domain": {1, with("--client-ca", cert, "--client-trust-domain=Exa", "--witness-state", state), map[string]string{
			"certificate": "warn", "client-trust-domain": `"Exa" is not a trust domain`,
		}},
		"no client CA": {1, with("--client-ca", mask, "--client-dns-names", "--witness-state", state), map[string]string{"certificate": "warn", "client-ca": "fail: " + mask}},
		"no agent": {1, with("--audit-agent", filepath.Join(dir, "no.sock"), "--audit-agent-key", verifier, "--witness-state", state), map[string]string{
			"certificate": "warn", "audit keys": "ssh-agent",
		}},
		"old and open files": {1, with("--max-secret-age=10d", "--witness-state", state), map[string]string{
			"certificate": "warn", "mask-key-file": "fail: ", "audit-key-file": "warn: " + audit + " is 11 days old",
		}},
		"database away": {1, with("--database-url-file", write(t, dir, "away", "postgres://u:hunter22222222@127.0.0.1:1/x\n"), "--witness-state", state), map[string]string{
			"certificate": "warn", "database": "fail: ",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "old and open files" {
				old := time.Now().Add(-11*24*time.Hour - time.Minute)
				if err := os.Chtimes(audit, old, old); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(mask, 0o644); err != nil {
					t.Fatal(err)
				}
				defer func() {
					_ = os.Chmod(mask, 0o600)
					_ = os.Chtimes(audit, time.Now(), time.Now())
				}()
			}
			wants(t, doctor(t, sh, c.code, c.args...), c.want)
		})
	}
	wants(t, doctor(t, root, 1, "--witness-state", state), map[string]string{
		"database-roles": "fail: ", "database-url": "a password of the database is in " + databaseURLEnv, "mask-key-file": "warn", "audit-key-file": "warn", "rate-limit": "pass: 10000",
	})

	// serve refuses what is not safe.
	for _, args := range [][]string{
		{"--listen=0.0.0.0:0"}, {"--admin-listen=[::]:0"}, {"--pprof", "--ops-listen=0.0.0.0:0"}, {"--cors-origin=https://*.example.org"}, {"--migrate"},
		{"--audit-key-file", audit}, {"--audit-agent=x", "--audit-agent-key", verifier}, {"--database-url", login},
	} {
		sh.exits(t, codeUsage, nil, append([]string{"serve", "--database-url-file", urlFile, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0"}, args...)...)
	}
	sh.exits(t, codeUsage, says("no database"), "serve")
	if checks := doctor(t, newShell(), 1); !strings.Contains(checks["database-url"], "no database") {
		t.Errorf("%v", checks)
	}
}
