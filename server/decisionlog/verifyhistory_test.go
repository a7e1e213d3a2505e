package decisionlog_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// verifyHistory verifies the log of a database, and the stored history with it.
func verifyHistory(t *testing.T, db *store.DB) (*decisionlog.HistoryVerified, error) {
	t.Helper()
	done, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{History: true})
	var bad *decisionlog.BadLogError
	if err != nil && !errors.As(err, &bad) {
		t.Fatal(err)
	}
	return done.History, err
}

// inOrder verifies a history that must have no fault.
func inOrder(t *testing.T, db *store.DB, says string) decisionlog.HistoryVerified {
	t.Helper()
	h, err := verifyHistory(t, db)
	if err != nil {
		t.Fatalf("%s: %v", says, err)
	}
	return *h
}

// notInOrder verifies a history that must have faults with these texts.
func notInOrder(t *testing.T, db *store.DB, says string, names ...string) {
	t.Helper()
	_, err := verifyHistory(t, db)
	for _, name := range names {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v, want %q", says, err, name)
		}
	}
	t.Log(err)
}

// stateRoot records a state root, as a server does once a day.
func stateRoot(t *testing.T, s *servertest.Server) {
	t.Helper()
	there, err := s.DB.WriteStateRoot(t.Context(), decisionlog.StateRootEvents("test"))
	if err != nil || !there {
		t.Fatalf("%v, %v", there, err)
	}
}

// storedWorld starts a server and stores several versions of entities and of a bundle.
func storedWorld(t *testing.T) *servertest.Server {
	t.Helper()
	s := servertest.New(t)
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	s.MustPut(servertest.DocUser(t, "ann"), servertest.DocUser(t, "bob"), servertest.DocUser(t, "zoe"))
	s.MustPut(servertest.DocUser(t, "ann", "team"))
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies+"\n@id(\"another\") forbid (principal, action, resource);")
	s.MustPut(servertest.DocUser(t, "carol", "team"), servertest.DocUser(t, "bob", "team"))
	if _, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{
		Delete: &cedarpostv1.DeleteEntity{Uid: servertest.UID(`Doc::User::"zoe"`)},
	}}); err != nil {
		t.Fatal(err)
	}
	return s
}

// storedTables are the tables of the stored history.
var storedTables = []string{"entities", "bundles", "policies", "bundle_files", "api_keys"}

// notProven are the columns of these tables that neither events nor state roots cover, with the
// reason. No decision depends on them.
var notProven = map[string]string{
	"bundles.published_at": "when the database stored the version; shown, and nothing else",
	"api_keys.created_at":  "when the database stored the key; shown, and nothing else",
	"bundles.ruled":        "says at the insert that the server asked the rules; nothing reads it later",
}

const day = 24 * time.Hour

// The verification finds and names each change past the service: of each column, except those
// listed above, and of rows that are removed or added.
func TestVerifyHistoryFindsEachColumn(t *testing.T) {
	t.Parallel() // it takes long
	s := storedWorld(t)
	db := servertest.OpenAuditor(t, s.URL)
	newest := inOrder(t, db, "unchanged").Newest
	s.Stop()
	x := startTampering(t, s.URL, append(slices.Clone(storedTables), "revision")...)
	tables := map[string]string{"entities": "Doc::User", "bundles": "bundle doc", "policies": "bundle doc", "bundle_files": "bundle doc", "api_keys": "API key"}
	rows, err := servertest.Session(t, s.URL).Query(t.Context(), `
		select table_name, column_name, data_type || case when data_type = 'ARRAY' then udt_name else '' end
		from information_schema.columns
		where table_schema = current_schema() and table_name = any($1)
		order by table_name, ordinal_position`, storedTables)
	if err != nil {
		t.Fatal(err)
	}
	type column struct{ Table, Name, Type string }
	columns, err := pgx.CollectRows(rows, pgx.RowToStructByPos[column])
	if err != nil || len(columns) < 35 {
		t.Fatalf("%d columns, %v", len(columns), err)
	}
	values := map[string]string{
		"jsonb": `%s || '{"x": 1}'`, "text": "%s || 'x'", "ARRAY_text": "array_append(%s, 'Doc::User x')", "bytea": `%s || '\x01'`,
		"bigint": "coalesce(%s, 0) + 100", "integer": "%s + 1", "timestamp with time zone": "now()",
	}
	for _, c := range columns {
		name := c.Table + "." + c.Name
		if notProven[name] != "" {
			continue
		}
		value := values[c.Type]
		switch {
		case value == "":
			t.Fatalf("%s: no other value for the type %s", name, c.Type)
		case c.Name == "since":
			value = "0"
		case c.Name == "until":
			value = fmt.Sprintf("coalesce(%%[1]s, %d) + 1", newest)
		case strings.Contains(value, "%"):
			value = strings.Replace(value, "%s", "%[1]s", 1)
		}
		if strings.Contains(value, "%") {
			value = fmt.Sprintf(value, c.Name)
		}
		// In a current row and, if there is one, in an ended row.
		for _, which := range []string{"desc", "asc"} {
			t.Run(name+" "+which, func(t *testing.T) {
				ended, order := "until", "ctid"
				if c.Table == "api_keys" {
					ended = "revoked_at"
				}
				if c.Table == "entities" {
					order = "type desc, ctid" // a user, and no grant
				}
				x.do(t, fmt.Sprintf("update %[1]s set %[2]s = %[3]s where ctid = (select ctid from %[1]s order by %[4]s %[5]s, %[6]s limit 1)", c.Table, c.Name, value, ended, which, order))
				notInOrder(t, db, name+" = "+value, tables[c.Table], "revision ")
			})
		}
	}
	for name, c := range map[string]struct{ sql, want string }{
		"an entity that is gone":        {`delete from entities where id = 'carol'`, `Doc::User::"carol"`},
		"a version that is gone":        {`delete from entities where id = 'ann' and until is not null`, `Doc::User::"ann"`},
		"a bundle that is gone":         {`delete from bundles where until is null`, "bundle doc"},
		"a version of a bundle gone":    {`delete from bundles where until is not null`, "bundle doc"},
		"a policy that is gone":         {`delete from policies where id = 'another'`, "bundle doc"},
		"a file that is gone":           {`delete from bundle_files where until is null and path = 'policies.cedar'`, "bundle doc"},
		"a key that is gone":            {`delete from api_keys`, "API key"},
		"a key that is revoked":         {`update api_keys set revoked_at = now()`, "API key"},
		"an entity of before all":       {`insert into entities (type, id, attrs, tags, parents, since) values ('Doc::User', 'eve', '{}', '{}', '{}', 0)`, `"eve"`},
		"an entity beside others":       {`insert into entities (type, id, attrs, tags, parents, since) select type, 'eve', attrs, tags, parents, since from entities where id = 'carol'`, `"eve"`},
		"an entity of another revision": {`insert into entities (type, id, attrs, tags, parents, since) values ('Doc::User', 'eve', '{}', '{}', '{}', 1)`, `"eve"`},
		"an entity of tomorrow":         {`insert into entities (type, id, attrs, tags, parents, since) values ('Doc::User', 'eve', '{}', '{}', '{}', 1000)`, `"eve"`},
		"a revision without an event": {`with n as (update revision set n = n + 1 returning n)
			insert into entities (type, id, attrs, tags, parents, since) select 'Doc::User', 'eve', '{}', '{}', '{}', n from n`, `"eve"`},
		"a bundle that is new":   {`insert into bundles select 'evil', version, digest, description, owners, on_forbid_error, namespaces, schema, fields, policies, published_by, published_at, since, until from bundles`, "bundle evil"},
		"a policy that is new":   {`insert into policies (bundle, id, file, line, text, since) values ('doc', 'evil', 'policies.cedar', 1, 'permit (principal, action, resource);', 2)`, "bundle doc"},
		"a file that is new":     {`insert into bundle_files (bundle, path, content, since) values ('doc', 'evil.cedar', '', 0)`, "bundle doc"},
		"a key that is new":      {`insert into api_keys (id, name, hash) values ('evil', 'evil', 'evil')`, "API key evil"},
		"a key of a revision":    {`insert into api_keys (id, name, hash, since) values ('evil', 'evil', 'evil', 3)`, "API key evil"},
		"a parent without a gap": {`update entities set parents = array['Doc::User'] where id = 'carol'`, `Doc::User::"carol"`},
		"a parent that is null":  {`update entities set parents = array[null]::text[] where id = 'carol'`, `Doc::User::"carol"`},
	} {
		t.Run(name, func(t *testing.T) {
			x.do(t, c.sql)
			notInOrder(t, db, c.sql, c.want, "revision ")
		})
	}
	inOrder(t, db, "after all changes were undone")
}

// After a sweep of the history, the verification begins at a later state root.
func TestVerifyHistoryFromAStateRoot(t *testing.T) {
	t.Parallel() // it takes long
	s := storedWorld(t)
	db := servertest.OpenAuditor(t, s.URL)
	before := inOrder(t, db, "without a root")
	if before.Base != 0 || before.Revisions != before.Newest || before.NotProvable != 0 || before.Keys != 1 {
		t.Errorf("%+v", before)
	}
	stateRoot(t, s)
	s.MustPut(servertest.DocUser(t, "dave"))
	after := inOrder(t, db, "with a root")
	if after.Base != before.Newest || after.Revisions != before.Newest+1 {
		t.Errorf("%+v", after)
	}

	// Sweep all but the newest two revisions.
	conn := servertest.Session(t, s.URL)
	servertest.MustExec(t, conn, fmt.Sprintf("update revisions set at = now() - interval '100 days' where n <= %d", before.Newest))
	if swept, err := s.DB.Sweep(t.Context(), store.MinHistoryRetention); err != nil || swept.Oldest != before.Newest {
		t.Fatalf("%+v, %v", swept, err)
	}
	swept := inOrder(t, db, "swept")
	if swept.Base != before.Newest || swept.Revisions != 1 || swept.NotProvable != 0 {
		t.Errorf("%+v", swept)
	}
	s.MustPut(servertest.DocUser(t, "dave", "team"))
	s.Stop()
	x := startTampering(t, s.URL, append(slices.Clone(storedTables), "history")...)
	for _, c := range []struct{ sql, want string }{
		{`update entities set attrs = '{"x": 1}' where id = 'ann'`, "state root"},
		{`delete from entities where id = 'ann'`, "state root"},
		{`insert into entities (type, id, attrs, tags, parents, since) values ('Doc::User', 'eve', '{}', '{}', '{}', 1)`, "state root"},
		{`update policies set text = 'permit (principal, action, resource);' where until is null`, "state root"},
		{`update bundles set on_forbid_error = 'x' where until is null`, "state root"},
		{`update api_keys set hash = 'x'`, "API key"},
		{`insert into api_keys (id, name, hash) values ('evil', 'evil', 'evil')`, "API keys evil"},
		{`update entities set attrs = '{"x": 1}' where id = 'dave' and until is null`, `Doc::User::"dave"`},
		{`update entities set attrs = '{"x": 1}' where id = 'dave' and until is not null`, `Doc::User::"dave"`},
		{`update history set oldest = 9`, "no state root"},
	} {
		t.Run(c.sql, func(t *testing.T) {
			x.do(t, c.sql)
			notInOrder(t, db, c.sql, c.want, "revision ")
		})
	}
	inOrder(t, db, "after all changes were undone")
}

// backdated makes events of changes with another time.
func backdated(t *testing.T, at time.Time) func(context.Context, store.Changed) (store.Event, error) {
	return func(ctx context.Context, c store.Changed) (store.Event, error) {
		e, err := decisionlog.ChangeEvents("test")(ctx, c)
		var rec cedarpostv1.EventRecord
		if err == nil {
			err = proto.Unmarshal(e.Record, &rec)
		}
		if err != nil {
			return e, err
		}
		e.ID = servertest.DecisionAt(at).ID
		rec.EventId, rec.Time = e.ID.String(), timestamppb.New(at.Truncate(time.Millisecond))
		e.Record, err = proto.Marshal(&rec)
		return e, err
	}
}

// openEvents opens a store that makes the events of changes with event.
func openEvents(t *testing.T, url string, event func(context.Context, store.Changed) (store.Event, error)) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), Server: "test", Event: event, MaxConns: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}

// putStored writes entities of type U, and returns the revision.
func putStored(t *testing.T, db *store.DB, attrs string, ids ...string) int64 {
	t.Helper()
	var ops []store.Op
	for _, id := range ids {
		ops = append(ops, store.Op{Kind: store.Put, Entity: store.Entity{UID: store.UID{Type: "U", ID: id}, Attrs: []byte(attrs)}})
	}
	r, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, Caller: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return r.Revision
}

// Before a server drops a day of the log, it records a state root that replaces the events of
// that day.
func TestVerifyHistoryAfterADroppedDay(t *testing.T) {
	t.Parallel() // it takes long
	url := storetest.New(t)
	conn := servertest.Session(t, url)
	old := time.Now().UTC().Truncate(day).Add(day/2).AddDate(0, 0, -50)
	servertest.MustExec(t, conn, fmt.Sprintf("select create_log_partitions('%s', 1)", old.Format(time.DateOnly)))
	past := openEvents(t, url, backdated(t, old))
	putStored(t, past, `{"n": 1}`, "a", "b")
	putStored(t, past, `{"n": 2}`, "b")
	past.Close()
	login := storetest.Login(t, url, "cedarpost_app", "cedarpost_writer", "cedarpost_auditor")
	keep := func(c *server.Config) { c.DecisionRetention = 40 * day }
	servers := []*servertest.Server{
		servertest.On(t, login, keep, func(c *server.Config) { c.FirstHousekeeping = time.Millisecond }), servertest.On(t, login, keep, func(c *server.Config) { c.FirstHousekeeping = time.Millisecond }),
	}
	count := func(sql string) (n int) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), sql).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	servertest.Eventually(t, "the day is dropped", func() bool {
		return count("select count(*) from pg_class where relname = 'events_"+old.Format("20060102")+"'") == 0
	})
	const leaf = "select seq::int from audit_batches join events on events.batch = audit_batches.batch where kind = "
	if root, drop := count(leaf+"'state_root'"), count(leaf+"'retention_drop'"); root > drop {
		t.Errorf("the day was dropped in batch %d, before the state root in batch %d", drop, root)
	}
	for _, s := range servers {
		if n := servertest.TaskFailures(t, s); n != 0 {
			t.Errorf("%d failures", n)
		}
		s.Stop()
	}
	now := openEvents(t, url, decisionlog.ChangeEvents("test"))
	putStored(t, now, `{"n": 3}`, "b")
	now.Close()
	db := servertest.OpenAuditor(t, url)
	h := inOrder(t, db, "after the drop")
	if h.NotProvable != 2 || h.Base < 3 || h.Base+1 != h.Newest && h.Base+2 != h.Newest || h.Revisions != h.Newest-2 {
		t.Errorf("%+v", h)
	}
	x := startTampering(t, url, "entities", "events")
	for sql, want := range map[string]string{
		`update entities set attrs = '{"n": 9}' where id = 'a'`:                   "state root",
		`update entities set attrs = '{"n": 9}' where id = 'b' and since = 2`:     `U::"b"`,
		`update entities set attrs = '{"n": 9}' where id = 'b' and until is null`: `U::"b"`,
		`update entities set until = (select n from revision) - 1 where id = 'a'`: `U::"a"`,
		`update events set kind = 'change' where kind = 'state_root'`:             "column kind",
		`delete from events where kind = 'state_root'`:                            "no state root",
	} {
		t.Run(sql, func(t *testing.T) {
			x.do(t, sql)
			notInOrder(t, db, sql, want)
		})
	}
	inOrder(t, db, "after all changes were undone")
}

// The login of a server can append false events. The verification finds those that contradict
// the stored data.
func TestVerifyHistoryFindsForgedEvents(t *testing.T) {
	t.Parallel() // it takes long
	url := storetest.New(t)
	db := openEvents(t, url, decisionlog.ChangeEvents("test"))
	putStored(t, db, `{"n": 1}`, "a")
	newest := putStored(t, db, `{"n": 2}`, "a")
	x, auditor := startTampering(t, url, "audit_batches", "events"), servertest.OpenAuditor(t, url)
	for says, c := range map[string]struct {
		rec  *cedarpostv1.EventRecord
		want string
	}{
		"a change again":       {&cedarpostv1.EventRecord{Revision: newest, Detail: &cedarpostv1.EventRecord_Change{Change: &cedarpostv1.Change{EntityCount: 1}}}, "another event of it"},
		"a change to come":     {&cedarpostv1.EventRecord{Revision: newest + 1, Detail: &cedarpostv1.EventRecord_Change{Change: &cedarpostv1.Change{EntityCount: 1}}}, "the newest is 2"},
		"a root of the past":   {&cedarpostv1.EventRecord{Revision: 1, Detail: &cedarpostv1.EventRecord_StateRoot{StateRoot: &cedarpostv1.StateRoot{Revision: 1}}}, "state root"},
		"a root of two states": {&cedarpostv1.EventRecord{Revision: 1, Detail: &cedarpostv1.EventRecord_StateRoot{StateRoot: &cedarpostv1.StateRoot{Revision: 2}}}, "its event of 1"},
	} {
		t.Run(says, func(t *testing.T) {
			x.undoAfter(t)
			w := db.NewLogWriter("test", auditlog.Strict, 0)
			defer w.Close()
			c.rec.Kind = cedarpostv1.EventRecord_CHANGE
			if c.rec.GetStateRoot() != nil {
				c.rec.Kind = cedarpostv1.EventRecord_STATE_ROOT
			}
			id := uuid.Must(uuid.NewV7())
			c.rec.EventId, c.rec.Time = id.String(), timestamppb.New(time.Unix(id.Time().UnixTime()).Truncate(time.Millisecond))
			record, err := proto.Marshal(c.rec)
			if err != nil {
				t.Fatal(err)
			}
			e := store.Event{ID: id, Kind: strings.ToLower(c.rec.Kind.String()), Revision: c.rec.Revision, Record: record}
			if _, err := w.Append(t.Context(), nil, []store.Event{e}); err != nil {
				t.Fatal(err)
			}
			notInOrder(t, auditor, says, c.want, "revision ")
		})
	}
	inOrder(t, auditor, "after all changes were undone")
}

// A state root covers earlier changes whose events do not have a digest of all that they
// stored, as those of an older version of the server.
func TestVerifyHistoryOfOlderEvents(t *testing.T) {
	url := storetest.New(t)
	db := openEvents(t, url, func(ctx context.Context, c store.Changed) (store.Event, error) {
		c.Stored = nil
		if c.Kind == store.KindKey {
			c.After = nil
		}
		return decisionlog.ChangeEvents("test")(ctx, c)
	})
	auditor := servertest.OpenAuditor(t, url)
	mustKey(t, db, "old")
	notInOrder(t, auditor, "a key", "API key old", "revision 1")
	there, err := db.WriteStateRoot(t.Context(), decisionlog.StateRootEvents("test"))
	if err != nil || !there {
		t.Fatal(there, err)
	}
	inOrder(t, auditor, "a key before a root")
	if _, err := db.PublishBundle(t.Context(), store.Publish{Bundle: store.Bundle{Name: "b", Digest: "d"}, Caller: "test"}); err != nil {
		t.Fatal(err)
	}
	notInOrder(t, auditor, "a bundle", "bundle b", "revision 2")
}

func mustKey(t *testing.T, db *store.DB, id string) {
	t.Helper()
	hash := sha256.Sum256([]byte(id))
	if err := db.CreateKey(t.Context(), store.Key{ID: id, Name: id, Hash: hash[:]}, "test"); err != nil {
		t.Fatal(err)
	}
}
