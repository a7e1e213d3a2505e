package store_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// ignoreParameters makes PgBouncer drop start-up parameters that it does not know,
// without an error.
const ignoreParameters = "ignore_startup_parameters = role,synchronous_commit,search_path,statement_timeout,idle_in_transaction_session_timeout,jit,options,extra_float_digits"

// withParameter adds a parameter to the URL of a database.
func withParameter(t *testing.T, databaseURL, name, value string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set(name, value)
	u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20")
	return u.String()
}

// Answered decisions survive a crash of a database behind a pooler, whatever its own
// settings are.
func TestNothingIsLostBehindAPooler(t *testing.T) {
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	// With these settings a commit reaches the disk seconds after its answer.
	for _, sql := range []string{
		"alter system set synchronous_commit = off", "alter system set wal_writer_delay = '10s'",
		"alter system set wal_writer_flush_after = '1GB'", "select pg_reload_conf()",
	} {
		mustRaw(t, pg.URL(), sql)
	}
	db := openSmall(t, storetest.Pooler(t, pg.URL(), "pool_mode = session", ignoreParameters))
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	const decisions = 20
	for i := range decisions {
		write(t, db, put(fmt.Sprintf("User u%d", i), `{}`))
		if _, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), byte(i))}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := pg.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := count(t, pg.URL(), "select count(*) from decisions"); n != decisions {
		t.Errorf("%d of %d decisions are there after the crash", n, decisions)
	}
	if n := count(t, pg.URL(), "select count(*) from revisions"); n != decisions {
		t.Errorf("%d of %d revisions are there after the crash", n, decisions)
	}
}

// Every connection has the settings and the role that it needs, with and without a
// pooler.
func TestSessionsAreWhatTheyShouldBe(t *testing.T) {
	direct := storetest.New(t)
	for name, databaseURL := range map[string]string{
		"direct":                          direct,
		"a pooler":                        storetest.Pooler(t, direct, "pool_mode = session"),
		"a pooler that drops parameters":  storetest.Pooler(t, direct, "pool_mode = session", ignoreParameters),
		"settings of the URL":             storetest.Pooler(t, withParameter(t, direct, "search_path", "public,pg_temp"), "pool_mode = session"),
		"settings in the options":         storetest.Pooler(t, withParameter(t, direct, "options", "-c search_path=public,pg_temp"), "pool_mode = session"),
		"options, and parameters dropped": storetest.Pooler(t, withParameter(t, direct, "options", "-c search_path=public,pg_temp"), "pool_mode = session", ignoreParameters),
	} {
		t.Run(name, func(t *testing.T) {
			db := openSmall(t, databaseURL)
			w := db.NewLogWriter("s1", auditlog.Strict, 0)
			t.Cleanup(w.Close)
			if _, err := w.Append(t.Context(), nil, nil); err != nil {
				t.Fatal(err)
			}
			for part, s := range db.Sessions(t.Context(), t.Fatal, w) {
				role := map[string]string{"audit": "cedarpost_auditor", "writer": "cedarpost_writer"}[part]
				if role == "" {
					role = "cedarpost_app"
				}
				if s["role"] != role || s["synchronous_commit"] != "on" || s["statement_timeout"] != "30s" ||
					s["jit"] != "off" || s["cursor_tuple_fraction"] != "1" || s["idle_in_transaction_session_timeout"] != "1min" {
					t.Errorf("%s: %v", part, s)
				}
				if strings.Contains(databaseURL, "search_path") && s["search_path"] != "public,pg_temp" {
					t.Errorf("%s: search_path is %q", part, s["search_path"])
				}
			}
		})
	}
}

// Everything that connects refuses a pooler that gives one session to several clients.
func TestSharedSessionsAreRefused(t *testing.T) {
	direct := storetest.New(t)
	for name, settings := range map[string][]string{
		"transaction pooling":                         {"pool_mode = transaction"},
		"transaction pooling, the longest idle first": {"pool_mode = transaction", "server_round_robin = 1"},
		"transaction pooling, parameters dropped":     {"pool_mode = transaction", ignoreParameters},
		"statement pooling":                           {"pool_mode = statement"},
		"sessions that are not reset":                 {"pool_mode = session", "server_reset_query ="},
	} {
		t.Run(name, func(t *testing.T) {
			databaseURL := storetest.Pooler(t, direct, settings...)
			for what, open := range map[string]func(context.Context) error{
				"open": func(ctx context.Context) error {
					db, err := store.Open(ctx, store.Config{DatabaseURL: secret.New(databaseURL)})
					if err == nil {
						db.Close()
					}
					return err
				},
				"open as an auditor": func(ctx context.Context) error {
					db, err := store.OpenAuditor(ctx, databaseURL)
					if err == nil {
						db.Close()
					}
					return err
				},
				"migrate": func(ctx context.Context) error { return store.Migrate(ctx, databaseURL, nil) },
			} {
				if err := open(t.Context()); !errors.Is(err, store.ErrPooler) || !strings.Contains(err.Error(), "not supported yet") {
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
}

// Reads do not use a standby behind such a pooler.
func TestStandbyBehindAPooler(t *testing.T) {
	direct := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(direct), ReadURLs: []secret.Secret{secret.New(storetest.Pooler(t, direct, "pool_mode = transaction"))}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	write(t, db, put("User a", `{}`))
	at, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if found, err := db.LoadEntitiesAt(t.Context(), at, uids("User a"), anyWeight); err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	if s := db.Standbys()[0]; s.Reads != 0 {
		t.Errorf("%+v", s)
	}
}

// A commit waits for the disk even if the session lost its settings: the configuration of
// a pooler can change while a server runs. The triggers are deferred, so they see the setting that
// the commit has.
func TestEachCommitIsSynchronous(t *testing.T) {
	databaseURL := storetest.New(t)
	mustRaw(t, databaseURL, `
		create table seen (setting text);
		grant insert on seen to public;
		create function see() returns trigger language plpgsql as
			$$ begin insert into seen values (current_setting('synchronous_commit')); return null; end $$;
		create constraint trigger see after insert on revisions deferrable initially deferred for each row execute function see();
		create constraint trigger see after insert on decisions deferrable initially deferred for each row execute function see()`)
	db := openSmall(t, databaseURL)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	if _, err := w.Append(t.Context(), nil, nil); err != nil {
		t.Fatal(err)
	}
	db.InEachSession(t.Context(), t.Fatal, w, "set synchronous_commit = off")
	write(t, db, put("User a", `{}`))
	if _, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), 1)}, nil); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, databaseURL, `do $$ begin assert (select array_agg(setting) from seen) = '{on,on}', (select array_agg(setting) from seen); end $$`)
}

// If a pooler gives the session of a log writer to another client, an append fails and
// the writer connects again.
func TestRecorderLosesItsSession(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	if _, err := w.Append(t.Context(), nil, nil); err != nil {
		t.Fatal(err)
	}
	db.InEachSession(t.Context(), t.Fatal, w, "deallocate all")
	if _, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), 1)}, nil); !errors.Is(err, store.ErrPooler) {
		t.Errorf("%v", err)
	}
	if _, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), 2)}, nil); err != nil {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	for text, want := range map[string]map[string]string{
		"":                              {},
		" -c a=b ":                      {"a": "b"},
		"-ca=b --work-mem=4MB":          {"a": "b", "work_mem": "4MB"},
		`-c search_path=a,\ b -c x=\\y`: {"search_path": "a, b", "x": `\y`},
		"-c a=1 -c A=2":                 {"a": "2"},
		"--a=b=c":                       {"a": "b=c"},
		"-c a=":                         {"a": ""},
	} {
		if got, err := store.ParseOptions(text); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"a=b", "-c", "-c a", "-p 5432", "--", "--=b", "-c =b", "-F"} {
		if got, err := store.ParseOptions(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// Options are read as Postgres reads them.
func FuzzOptions(f *testing.F) {
	f.Add("a", "b c")
	f.Add("search_path", `x\y , "z"`)
	escape := strings.NewReplacer(`\`, `\\`, " ", `\ `, "\t", "\\\t", "\n", "\\\n", "\v", "\\\v", "\f", "\\\f", "\r", "\\\r")
	f.Fuzz(func(t *testing.T, name, value string) {
		got, err := store.ParseOptions("-c " + escape.Replace(name+"="+value))
		key, rest, _ := strings.Cut(name+"="+value, "=")
		if key == "" {
			if err == nil {
				t.Errorf("%q: %v", name, got)
			}
			return
		}
		if err != nil || !maps.Equal(got, map[string]string{strings.ToLower(key): rest}) {
			t.Errorf("%q = %q: %q, %v", name, value, got, err)
		}
		_, _ = store.ParseOptions(name + value)
	})
}
