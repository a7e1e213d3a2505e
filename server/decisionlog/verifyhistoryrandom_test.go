package decisionlog_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// The verification finds no fault in random histories that the service wrote, wherever they
// begin, and finds one random change past the service.
func TestVerifyHistoryOfAnything(t *testing.T) {
	t.Parallel() // it takes long
	verifyHistoryOfAnything(t, 20)
}

// TestSoakVerifyHistoryOfAnything is the long form.
func TestSoakVerifyHistoryOfAnything(t *testing.T) {
	servertest.Soak(t)
	verifyHistoryOfAnything(t, 100)
}

func verifyHistoryOfAnything(t *testing.T, cases int) {
	// All cases use one database, which is emptied before each of them.
	url := storetest.New(t)
	conn := servertest.Session(t, url)
	rows, err := conn.Query(t.Context(), "select relname from pg_class where relnamespace = current_schema()::regnamespace and relkind in ('r', 'p') and not relispartition")
	if err != nil {
		t.Fatal(err)
	}
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || !slices.Contains(tables, "entities") || !slices.Contains(tables, "events") {
		t.Fatalf("tables %v, %v", tables, err)
	}
	x := startTampering(t, url, tables...)
	db, auditor := openEvents(t, url, decisionlog.ChangeEvents("test")), servertest.OpenAuditor(t, url)
	storetest.Check(t, cases, func(rt *rapid.T) {
		if err := x.undo(); err != nil {
			rt.Fatal(err)
		}
		drawHistory(rt, t, db, conn)
		verify := func() error {
			_, err := decisionlog.VerifyLog(t.Context(), auditor, decisionlog.Verification{History: true})
			return err
		}
		if err := verify(); err != nil {
			rt.Fatalf("unchanged: %v", err)
		}
		if what := drawTampering(rt, t, x.conn); what != "" {
			if verify() == nil {
				rt.Fatalf("not found: %s", what)
			}
		}
	})
}

// drawHistory writes random entities, bundles, keys and state roots, and sweeps.
func drawHistory(rt *rapid.T, t *testing.T, db *store.DB, conn *pgx.Conn) {
	keys, policies := 0, int64(0)
	for range rapid.IntRange(1, 12).Draw(rt, "writes") {
		switch rapid.SampledFrom([]string{"entities", "entities", "entities", "bundle", "no bundle", "key", "root", "sweep"}).Draw(rt, "write") {
		case "entities":
			var ops []store.Op
			for range rapid.IntRange(1, 4).Draw(rt, "operations") {
				e := store.Entity{UID: store.UID{Type: rapid.SampledFrom([]string{"U", "V"}).Draw(rt, "type"), ID: rapid.SampledFrom([]string{"", "a", "é \" <"}).Draw(rt, "id")}}
				e.Attrs = fmt.Appendf(nil, `{"n": %d, "a<": [true, "x\u2028"]}`, rapid.IntRange(-1, 3).Draw(rt, "n"))
				if rapid.Bool().Draw(rt, "member") {
					e.Parents = []store.UID{{Type: "G", ID: rapid.SampledFrom([]string{"", "g", "h i"}).Draw(rt, "parent")}}
				}
				ops = append(ops, store.Op{Kind: rapid.SampledFrom([]store.OpKind{store.Put, store.Put, store.Delete}).Draw(rt, "kind"), Entity: e})
			}
			if _, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, Caller: "test", PolicyRevision: policies}); err != nil {
				rt.Fatal(err)
			}
		case "bundle":
			b := store.Bundle{Name: rapid.SampledFrom([]string{"b", "c"}).Draw(rt, "bundle"), Digest: rapid.StringMatching("[a-z]{1,4}").Draw(rt, "digest")}
			p := store.Publish{Caller: "test", BaseRevision: policies}
			for _, id := range rapid.SliceOfDistinct(rapid.SampledFrom([]string{"p", "q", "r"}), rapid.ID[string]).Draw(rt, "policies") {
				b.Policies = append(b.Policies, store.Policy{ID: id, File: "f", Text: rapid.SampledFrom([]string{"x", "y"}).Draw(rt, "text")})
				p.Files = append(p.Files, store.File{Path: id, Content: []byte(rapid.SampledFrom([]string{"", "y"}).Draw(rt, "content"))})
			}
			p.Bundle = b
			made, err := db.PublishBundle(t.Context(), p)
			if err != nil {
				rt.Fatal(err)
			}
			policies = made.Revision
		case "no bundle":
			made, err := db.DeleteBundle(t.Context(), store.BundleDeletion{
				Name: rapid.SampledFrom([]string{"b", "c"}).Draw(rt, "bundle"), Caller: "test", BaseRevision: policies, Rules: func(store.PolicyState) error { return nil },
			})
			if err == nil {
				policies = made.Revision
			} else if !errors.Is(err, store.ErrNotFound) {
				rt.Fatal(err)
			}
		case "key":
			keys++
			mustKey(t, db, fmt.Sprint("key", keys))
		case "root":
			if _, err := db.WriteStateRoot(t.Context(), decisionlog.StateRootEvents("test")); err != nil {
				rt.Fatal(err)
			}
		case "sweep":
			// Only up to the newest state root, if there is one. A server records a state root
			// before it sweeps newer revisions.
			_, err := conn.Exec(t.Context(), `update revisions set at = now() - interval '100 days'
				where n <= coalesce((select max(revision) from events where kind = 'state_root'), 0)`)
			if err != nil {
				rt.Fatal(err)
			}
			if _, err := db.Sweep(t.Context(), store.MinHistoryRetention); err != nil {
				rt.Fatal(err)
			}
		}
	}
}

// drawTampering changes one row that was not swept, and returns the statement; "" if there is
// no such row. conn must run no triggers.
func drawTampering(rt *rapid.T, t *testing.T, conn *pgx.Conn) string {
	columns := map[string][]string{
		"entities": {"id = id || 'x'", `attrs = attrs || '{"x": 1}'`, `tags = '{"x": 1}'`, "parents = array_append(parents, 'G x')"},
		"bundles":  {"name = name || 'x'", "version = version + 100", "digest = digest || 'x'", "schema = 'x'", "fields = 'x'", "owners = '{x}'"},
		"policies": {"id = id || 'x'", "text = 'z'", "file = 'z'", "line = line + 1"}, "bundle_files": {"path = path || 'x'", `content = '\x00'`},
		"api_keys": {"id = id || 'x'", "name = name || 'x'", `hash = hash || '\x00'`, "revoked_at = now()"},
	}
	table := rapid.SampledFrom([]string{"entities", "bundles", "policies", "bundle_files", "api_keys"}).Draw(rt, "table")
	needed := "true"
	if table == "entities" {
		needed = "(until is null or until > (select oldest from history))"
	}
	var n int
	if err := conn.QueryRow(t.Context(), "select count(*) from "+table+" where "+needed).Scan(&n); err != nil {
		rt.Fatal(err)
	}
	if n == 0 {
		return ""
	}
	row := fmt.Sprintf("ctid = (select ctid from %s where %s order by ctid offset %d limit 1)", table, needed, rapid.IntRange(0, n-1).Draw(rt, "row"))
	var sql string
	switch how := rapid.SampledFrom([]string{"delete", "update", "until"}).Draw(rt, "how"); {
	case how == "delete":
		sql = "delete from " + table + " where " + row
	case how == "until" && table != "api_keys":
		sql = fmt.Sprintf("update %s set until = coalesce(until, (select n from revision)) + 1 where %s", table, row)
	default:
		sql = fmt.Sprintf("update %s set %s where %s", table, rapid.SampledFrom(columns[table]).Draw(rt, "column"), row)
	}
	tag, err := conn.Exec(t.Context(), sql)
	if err != nil || tag.RowsAffected() != 1 {
		rt.Fatalf("%s: %v, %v", sql, tag, err)
	}
	return sql
}
