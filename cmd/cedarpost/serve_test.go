package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestServe(t *testing.T) {
	t.Parallel() // it takes long
	pg := storetest.NewServer(t)
	dir := t.TempDir()
	urlFile := write(t, dir, "url", pg.URL()+"\n")
	keyFile := filepath.Join(dir, "key")
	serve := append([]string{"serve", "--development-database", "--bootstrap-key-file", keyFile, "--database-url-file", urlFile}, anyPort...)
	sh := newShell()

	sh.exits(t, 1, says("run cedarpost migrate"), serve...)
	sh.exits(t, 0, says("migrated", "the database is up to date"), "migrate", "--database-url-file", urlFile)
	d := sh.start(t, serve...)
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	client := sh.with("CEDARPOST_TOKEN_FILE="+keyFile, "CEDARPOST_ADMIN_URL="+d.url("admin"), "CEDARPOST_API_URL="+d.url("decision"), "CEDARPOST_OPS_URL="+d.url("ops"))
	client.exits(t, 0, says("ready"), "health")
	client.exits(t, 0, says("shop: published", "version      1"), "apply", "../../policies/shop")
	client.exits(t, 0, says("555 entities imported"), "entities", "import", "../../policies/shop/entities.json")
	client.exits(t, 0, says("ALLOW"), ask("ViewOrder", "42")...)

	t.Run("damaged rows", testDamagedRows(client, pg.URL()))

	// dev makes a key of its own on a database that has one.
	devDir := t.TempDir()
	dev := sh.start(t, append([]string{"dev", "--data", devDir, "--database-url-file", urlFile}, anyPort...)...)
	newShell(readEnv(t, filepath.Join(devDir, "dev.env"))...).exits(t, 0, says("shop"), "bundles")
	dev.stop(t, syscall.SIGTERM)

	if err := pg.Kill(); err != nil {
		t.Fatal(err)
	}
	client.exits(t, 1, says("unavailable"), ask("ViewOrder", "42")...)
	deadline := time.Now().Add(2 * time.Minute)
	for client.run(t, "health").code == 0 {
		if time.Now().After(deadline) {
			t.Fatal("still ready without a database")
		}
		time.Sleep(100 * time.Millisecond)
	}
	if code := d.stop(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d\n%s", code, d.errs)
	}
	if strings.Contains(sh.log.String(), strings.TrimSpace(string(key))) {
		t.Error("some output shows the key")
	}
}

// testDamagedRows damages one row. All outputs show it as damaged, and show all other rows.
func testDamagedRows(sh *shell, databaseURL string) func(*testing.T) {
	return func(t *testing.T) {
		var ids []string
		for range 3 {
			r := sh.exits(t, 0, nil, ask("ViewOrder", "42", "-o", "json")...)
			var got struct{ DecisionID string }
			if err := json.Unmarshal([]byte(r.out), &got); err != nil {
				t.Fatal(err)
			}
			ids = append(ids, got.DecisionID)
		}
		conn, err := pgx.Connect(t.Context(), databaseURL)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		for _, sql := range []string{
			"set session_replication_role = replica",
			`update decisions set record = '\xff' where decision_id = '` + ids[1] + "'",
			`update events set record = '\xff' where event_id = (select event_id from events where kind = 'change' limit 1)`,
		} {
			if _, err := conn.Exec(t.Context(), sql); err != nil {
				t.Fatal(err)
			}
		}
		r := sh.exits(t, 0, says("DAMAGED", "its record was altered", ids[0], ids[1], ids[2], "1 row is damaged"), "decisions")
		if n := strings.Count(r.out, "ALLOW"); n != 3 {
			t.Errorf("%d whole ones\n%s", n, r.out)
		}
		sh.exits(t, 0, says(`"damaged":"its record was altered"`, ids[0], ids[1], ids[2]), "decisions", "-o", "json")
		sh.exits(t, 1, says("data_loss", "its record was altered"), "decisions", "get", ids[1])
		sh.exits(t, 0, says("ALLOW"), "decisions", "get", ids[2])
		sh.exits(t, 1, says("data_loss", "its record was altered"), "decisions", "replay", ids[1])
		sh.exits(t, 1, says("4 decisions replayed: 3 equal, 0 different, 0 not replayable, 1 damaged", ids[1]), "decisions", "replay", "--since", "1h")
		sh.exits(t, 1, says(`"damaged":[{"decisionId":"`+ids[1]), "decisions", "replay", "--since", "1h", "-o", "json")
		sh.exits(t, 0, says("4 decisions since"), "decisions", "count", "--by", "outcome")
		sh.exits(t, 0, says("DAMAGED", "change"), "events", "--kind", "change", "-o", "text")
		sh.exits(t, 0, says(`"damaged":"its record was altered"`), "decisions", "export")
		sh.exits(t, 0, says(",damaged,"), "decisions", "export", "--format", "csv")
		sh.exits(t, 0, says(`"event_code":"damaged"`), "decisions", "export", "--format", "ocsf")

		out := &syncBuffer{}
		cmd := exec.Command(binary, "decisions", "--follow", "--decision", "deny", "--since", "1h")
		cmd.Env, cmd.Stdout, cmd.Stderr = sh.env, out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); !strings.Contains(out.String(), ids[1]) && time.Now().Before(deadline); {
			time.Sleep(50 * time.Millisecond)
		}
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "DAMAGED") || strings.Contains(out.String(), "ALLOW") {
			t.Errorf("%v\n%s", err, out.String())
		}
	}
}
