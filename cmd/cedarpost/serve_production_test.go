package main

import (
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"go.yaml.in/yaml/v4"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// statements returns the statements of a script, without its comments.
func statements(sql string) (list []string) {
	for _, line := range lines(sql) {
		if !strings.HasPrefix(line, "--") {
			list = append(list, line)
		}
	}
	return list
}

// TestProduction does the steps of docker-compose.yml: an administrator makes the roles, one login
// migrates, and another one serves. Each login is refused the work of the other one.
func TestProduction(t *testing.T) {
	t.Parallel() // it takes long
	pg := storetest.NewServer(t)
	admin, err := pgx.Connect(t.Context(), pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(t.Context())
	script, err := os.ReadFile("../../scripts/compose.sql")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin.Exec(t.Context(), string(script)); err != nil {
		t.Fatal(err)
	}
	var compose struct {
		Services map[string]struct {
			Environment map[string]string
		}
	}
	text, err := os.ReadFile("../../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &compose); err != nil {
		t.Fatal(err)
	}
	as := func(service string) *shell {
		u, err := url.Parse(compose.Services[service].Environment[databaseURLEnv])
		if err != nil {
			t.Fatal(err)
		}
		here, err := url.Parse(pg.URL())
		if err != nil {
			t.Fatal(err)
		}
		u.Host = here.Host
		return newShell(databaseURLEnv + "=" + u.String())
	}
	root, migrate, serve := newShell(databaseURLEnv+"="+pg.URL()), as("migrate"), as("cedarpost")
	serving := append([]string{"serve"}, anyPort...)

	r := newShell().exits(t, 0, nil, "migrate", "--print-roles")
	if got, want := statements(r.out), statements(strings.ReplaceAll(string(script), " password 'local-only'", "")); !slices.Equal(got, want) {
		t.Errorf("migrate --print-roles prints\n%s\nscripts/compose.sql has\n%s", r.out, script)
	}

	serve.exits(t, 1, says("run cedarpost migrate"), serving...)
	serve.exits(t, 1, says("an administrator has to run", `grant cedarpost_owner to "cedarpost_serve"`), "migrate")
	migrate.exits(t, 0, says("the database is up to date"), "migrate")
	migrate.exits(t, 1, says(`grant cedarpost_app, cedarpost_writer, cedarpost_auditor to "cedarpost_migrate"`), serving...)
	root.exits(t, 1, says("not fit for production", "the login cedarpost is a superuser", "--development-database"), serving...)
	root.exits(t, 2, says("--migrate needs --development-database"), append(serving, "--migrate")...)
	serve.exits(t, 1, says("kept for 29 days, and the database keeps it for 30"), append(serving, "--decision-retention=29d")...)
	serve.exits(t, 2, says("decision-retention"), append(serving, "--decision-retention=soon")...)

	keyFile := filepath.Join(t.TempDir(), "key")
	d := serve.start(t, append(serving, "--decision-retention=0", "--bootstrap-key-file", keyFile)...)
	client := newShell("CEDARPOST_TOKEN_FILE="+keyFile, "CEDARPOST_ADMIN_URL="+d.url("admin"), "CEDARPOST_API_URL="+d.url("decision"))
	client.exits(t, 0, says("shop: published"), "apply", "../../policies/shop")
	client.exits(t, 0, says("555 entities imported"), "entities", "import", "../../policies/shop/entities.json")
	client.exits(t, 0, says("ALLOW"), ask("ViewOrder", "42")...)
	client.exits(t, 0, says("owner-views"), "decisions")

	// The login that migrates recovers an operator. The one that serves does not.
	recovered := filepath.Join(t.TempDir(), "recovered.key")
	serve.exits(t, 1, says("with the login that migrates"), "keys", "recover", "--out", recovered)
	migrate.exits(t, 0, says("of recovered, an operator of all bundles"), "keys", "recover", "--out", recovered)
	client.exits(t, 0, says("recovered", "operator for *"), "whoami", "--token-file", recovered)
	root.exits(t, 0, says("API keys"), "audit", "verify", "--history")
	if code := d.stop(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d\n%s", code, d.errs)
	}
}
