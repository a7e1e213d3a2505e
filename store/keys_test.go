package store_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/migrations"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A query by principal or resource finds exactly their decisions, also if others have the same id or
// the same type, and whether or not the index was merged since they were recorded.
func TestDecisionsOfPrincipalAndResource(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	names := rapid.Custom(func(t *rapid.T) store.UID {
		return store.UID{Type: rapid.SampledFrom([]string{"User", "Robot", "Über::User", "User "}).Draw(t, "type"), ID: rapid.SampledFrom([]string{"", "a", "b", "ä", " a"}).Draw(t, "id")}
	})
	var all []store.Decision
	storetest.Check(t, 20, func(t *rapid.T) {
		var rows []store.Decision
		for range rapid.IntRange(1, 20).Draw(t, "rows") {
			d := decision(time.Now(), 0)
			d.ID, d.Principal, d.Resource = uuid.Must(uuid.NewV7()), names.Draw(t, "principal"), names.Draw(t, "resource")
			rows = append(rows, d)
		}
		if _, err := w.Append(context.Background(), rows, nil); err != nil {
			t.Fatal(err)
		}
		all = append(all, rows...)
		if rapid.Bool().Draw(t, "merge") {
			if err := db.MergeLogKeys(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		q := store.DecisionQuery{Limit: len(all) + 1}
		principal, resource := names.Draw(t, "asked principal"), names.Draw(t, "asked resource")
		by := rapid.IntRange(1, 3).Draw(t, "by")
		if by&1 != 0 {
			q.Principal = &principal
		}
		if by&2 != 0 {
			q.Resource = &resource
		}
		var want []uuid.UUID
		for _, d := range all {
			if (by&1 == 0 || d.Principal == principal) && (by&2 == 0 || d.Resource == resource) {
				want = append(want, d.ID)
			}
		}
		found, err := db.QueryDecisions(context.Background(), q)
		if err != nil {
			t.Fatal(err)
		}
		var got []uuid.UUID
		for _, d := range found {
			got = append(got, d.ID)
		}
		order := func(a, b uuid.UUID) int { return strings.Compare(a.String(), b.String()) }
		slices.SortFunc(got, order)
		slices.SortFunc(want, order)
		if !slices.Equal(got, want) {
			t.Fatalf("%d decisions of %v and %v, want %d", len(got), q.Principal, q.Resource, len(want))
		}
		counts, err := db.CountDecisions(context.Background(), q, store.ByOutcome)
		if err != nil || len(want) > 0 && counts[0].Total != int64(len(want)) {
			t.Fatalf("%v, %v, want %d", counts, err, len(want))
		}
	})
}

// keysOf is the index of today's partition by principal and resource.
const keysOf = `(
	select indexrelid::regclass from pg_inherits join pg_index on indexrelid = inhrelid
	where inhparent = 'decisions_keys'::regclass
	  and indrelid = to_regclass('decisions_' || to_char(now() at time zone 'UTC', 'YYYYMMDD')))`

// Queries by principal and by resource read the index, and find in it what is not merged.
func TestKeysAreIndexed(t *testing.T) {
	db, url := openURL(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	var rows []store.Decision
	for i := range 3000 {
		d := decision(time.Now(), 0)
		d.ID, d.Principal, d.Resource = uuid.Must(uuid.NewV7()), uid(fmt.Sprint("User ", i%500)), uid(fmt.Sprint("Order ", i))
		rows = append(rows, d)
	}
	half := len(rows) / 2
	if _, err := w.Append(t.Context(), rows[:half], nil); err != nil {
		t.Fatal(err)
	}
	if err := db.MergeLogKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, url, "do $$ begin assert (select gin_clean_pending_list("+keysOf+") = 0), 'a merge leaves something to merge'; end $$")
	if _, err := w.Append(t.Context(), rows[half:], nil); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, url, "analyze decisions")
	principal, resource := uid("User 7"), uid("Order 2999")
	for name, c := range map[string]struct {
		query store.DecisionQuery
		want  int
	}{
		"principal": {store.DecisionQuery{Principal: &principal, Limit: 100}, 6},
		"resource":  {store.DecisionQuery{Resource: &resource, Limit: 100}, 1},
	} {
		plan, err := db.Explain(t.Context(), c.query, 0)
		if err != nil {
			t.Fatal(err)
		}
		if text := strings.Join(plan, "\n"); !strings.Contains(text, "Bitmap Index Scan on decisions_") {
			t.Errorf("by %s:\n%s", name, text)
		}
		if found, err := db.QueryDecisions(t.Context(), c.query); err != nil || len(found) != c.want {
			t.Errorf("by %s: %d, want %d, %v", name, len(found), c.want, err)
		}
	}
	mustRaw(t, url, "do $$ begin assert (select gin_clean_pending_list("+keysOf+") > 0), 'an append merges'; end $$")
}

// Migrate indexes a log that has rows before it changes the schema, and replaces an index that an
// interrupted call has left.
func TestMigrateIndexesTheLog(t *testing.T) {
	server := storetest.NewServer(t)
	url := server.URL()
	mustRaw(t, url, store.Roles())
	if _, err := newProvider(t, url, "cedarpost_owner", migrations.FS).UpTo(t.Context(), 14); err != nil {
		t.Fatal(err)
	}
	// Two rows of yesterday, in a batch of the form of that time, and one of today without one.
	mustRaw(t, url, `
		select create_log_partitions((now() at time zone 'UTC')::date - 1, 3);
		with d as (
			insert into decisions (decision_id, at, revision, caller, server, principal_type, principal_id, action_type, action_id,
			                       resource_type, resource_id, allowed, policies, fields, masked, record, batch, pos, crc)
			select gen_random_uuid(), date_trunc('day', now() at time zone 'UTC') at time zone 'UTC' - interval '1 hour', 0, 'c', 's', 'User', 'a' || n, 'Action', 'v', 'Order', 'o', true, '{}', '{}', '{}', '\x01',
			       '00000000-0000-0000-0000-00000000000a', n, 0
			from generate_series(0, 1) as n
			returning at)
		select log_append('00000000-0000-0000-0000-00000000000a', gen_random_uuid(), 0, 2, 'header', min(at)::date, min(at), max(at)) from d`)
	yesterday := "decisions_" + time.Now().UTC().AddDate(0, 0, -1).Format("20060102")
	mustRaw(t, url, "set role cedarpost_owner; create index "+yesterday+"_keys on "+yesterday+" (at)")
	mustRaw(t, url, "update pg_index set indisvalid = false where indexrelid = '"+yesterday+"_keys'::regclass")
	var logged strings.Builder
	if err := store.Migrate(t.Context(), url, slog.New(slog.NewTextHandler(&logged, nil))); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(logged.String(), "partition="+yesterday) {
		t.Errorf("the log of migrate:\n%s", &logged)
	}
	mustRaw(t, url, fmt.Sprintf(`do $$ begin
		assert (select bool_and(indisvalid) and count(*) = 1 from pg_index join pg_class on oid = indexrelid
		        where indrelid = '%[1]s'::regclass and relname = '%[1]s_keys' and pg_get_indexdef(oid) like '%% USING gin %%'), 'valid';
		assert (select count(*) = 1 from pg_inherits where inhparent = 'decisions_keys'::regclass and inhrelid = '%[1]s_keys'::regclass), 'attached';
		assert (select count(*) = 1 from pg_index join pg_class on oid = indexrelid where indrelid = '%[1]s'::regclass and pg_get_indexdef(oid) like '%% USING gin %%'), 'once';
	end $$`, yesterday))
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	principal := uid("User a1")
	if found, err := db.QueryDecisions(t.Context(), store.DecisionQuery{Principal: &principal, Limit: 10}); err != nil || len(found) != 1 || found[0].Pos != 1 {
		t.Errorf("%v, %v", found, err)
	}
}
