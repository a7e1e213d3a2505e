package main

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// Each start is in the log, with what is different from the start before of the same name.
func TestStartsAreRecorded(t *testing.T) {
	pg := storetest.NewServer(t)
	key := t.TempDir() + "/key"
	sh := newShell(databaseURLEnv+"="+pg.URL(), "CEDARPOST_DEVELOPMENT_DATABASE=true", "CEDARPOST_BOOTSTRAP_KEY_FILE="+key)
	sh.exits(t, 0, nil, "migrate")
	type started struct {
		EventID, Subject string
		ServerStarted    struct {
			Version, SettingsDigest, PreviousEventID string
			Settings                                 map[string]string
			Differences                              []struct{ Name, Before, After string }
		}
	}
	// newest starts a server, returns the newest start in the log, and stops the server.
	newest := func(args ...string) (got started) {
		t.Helper()
		d := sh.start(t, append(append([]string{"serve"}, anyPort...), args...)...)
		r := sh.with("CEDARPOST_TOKEN_FILE="+key, "CEDARPOST_ADMIN_URL="+d.url("admin")).exits(t, 0, nil, "events", "--kind", "server_started", "--limit=1", "-o", "json")
		line, _, _ := strings.Cut(r.out, "\n")
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatalf("%v\n%s", err, r.out)
		}
		if strings.Contains(r.out, pg.URL()) {
			t.Errorf("the log has the URL of the database: %s", r.out)
		}
		d.stop(t, syscall.SIGTERM)
		return got
	}
	one := newest("--name=one")
	if s := one.ServerStarted; one.Subject != "one" || s.Version == "" || len(s.SettingsDigest) != 64 || s.PreviousEventID != "" || len(s.Differences) != 0 ||
		s.Settings["max-staleness"] != "5s" || !strings.HasPrefix(s.Settings["database-url"], "postgres://cedarpost@127.0.0.1:") {
		t.Errorf("%+v", one)
	}
	other := newest("--name=two", "--rate-limit=7")
	if s := other.ServerStarted; s.PreviousEventID != "" || s.SettingsDigest == one.ServerStarted.SettingsDigest {
		t.Errorf("a server of another name is compared: %+v", other)
	}
	again := newest("--name=one")
	if s := again.ServerStarted; s.PreviousEventID != one.EventID || len(s.Differences) != 0 || s.SettingsDigest != one.ServerStarted.SettingsDigest {
		t.Errorf("%+v", again)
	}
	changed := newest("--name=one", "--max-staleness=1s", "--cors-origin=https://a.example https://b.example")
	if s := changed.ServerStarted; s.PreviousEventID != again.EventID || len(s.Differences) != 2 || s.SettingsDigest == one.ServerStarted.SettingsDigest ||
		s.Differences[0] != (struct{ Name, Before, After string }{"cors-origin", "", "https://a.example https://b.example"}) ||
		s.Differences[1] != (struct{ Name, Before, After string }{"max-staleness", "5s", "1s"}) {
		t.Errorf("%+v", changed)
	}
}

// What is shown of settings has no secret of the URL.
func TestWithoutSecrets(t *testing.T) {
	for text, want := range map[string]string{
		"": "",
		"postgres://u:hunter2@h:5432/db?sslmode=disable&password=hunter2": "postgres://u@h:5432/db",
		"postgresql://h/db":                         "postgresql://h/db",
		"host=h password=hunter2":                   "(a connection string)",
		"postgres:///db?host=/tmp&password=hunter2": "(a connection string)",
		"postgres://u:hunter2@%zz":                  "(a connection string)",
		"u:hunter2@h/db":                            "(a connection string)",
	} {
		if got := withoutSecrets(text); got != want {
			t.Errorf("%q is shown as %q, want %q", text, got, want)
		}
	}
	for text, want := range map[string]bool{
		"postgres://u:p@h/db": true, "postgres://u@h/db?password=p": true, "host=h password = p": true, "password=p": true,
		"postgres://u@h/db": false, "host=h user=u": false, "": false, "host=nopassword=x": false,
	} {
		if hasPassword(text) != want {
			t.Errorf("%q has a password: %v", text, !want)
		}
	}
}
