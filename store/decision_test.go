package store_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// idAt makes a UUIDv7 of a time.
func idAt(at time.Time, n byte) uuid.UUID {
	id := uuid.Must(uuid.NewV7())
	ms := at.UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (8 * (5 - i)))
	}
	// Clear the rest of the time, so that n alone decides their order.
	id[6], id[7] = 0x70, 0
	id[8] = 0x80
	id[9] = n
	return id
}

func decision(at time.Time, n byte) store.Decision {
	return store.Decision{
		ID: idAt(at, n), At: at.UTC().Truncate(time.Millisecond), Revision: 7, Caller: "shop", Server: "s1",
		Principal: uid("User alice"), Action: uid("Action view"), Resource: uid(fmt.Sprintf("Order %d", n)),
		Allowed: true, Policies: []string{"shop/a", "shop/ü b"}, RequestID: "r1", TraceID: "t1",
		Fields: []string{"+id", "-total"}, Masked: [][]byte{{1, 2}, {3}}, Record: []byte{0, 1, 2, 0xff, n},
	}
}

// same compares what was written with what was read, which has a batch too.
func same(got, wrote store.Decision) bool {
	a, b := got, wrote
	b.Batch, b.Pos, b.CRC = a.Batch, a.Pos, a.CRC
	return slices.Equal(a.Policies, b.Policies) && bytes.Equal(a.Record, b.Record) &&
		fmt.Sprint(a) == fmt.Sprint(b) && a.At.Equal(b.At)
}

func TestDecisions(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	now := time.Now()
	var written []store.Decision
	for n := range byte(20) {
		// Several have the same millisecond, and some are of another day.
		d := decision(now.Add(time.Duration(n/4)*time.Millisecond), n)
		if n >= 16 {
			d = decision(now.AddDate(0, 0, 1), n)
		}
		if n%2 == 1 {
			d.Allowed, d.DeniedAt, d.Policies, d.RequestID, d.TraceID = false, int16(n%3)+1, []string{}, "", ""
			d.Principal = uid("User bob")
		}
		written = append(written, d)
	}
	if _, err := w.Append(t.Context(), written[:1], nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Append(t.Context(), written[1:], nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range written {
		got, err := db.GetDecision(t.Context(), want.ID)
		if err != nil || !same(got, want) {
			t.Fatalf("%+v, want %+v, %v", got, want, err)
		}
	}
	for _, at := range []time.Time{now, now.AddDate(-10, 0, 0)} {
		if _, err := db.GetDecision(t.Context(), idAt(at, 200)); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("got %v", err)
		}
	}

	// Pages, newest first.
	var paged []byte
	q := store.DecisionQuery{Limit: 3}
	for {
		page, err := db.QueryDecisions(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range page {
			paged = append(paged, d.Record[4])
			q.BeforeAt, q.BeforeID = d.At, d.ID
		}
		if len(page) < q.Limit {
			break
		}
	}
	slices.Reverse(paged)
	for i, n := range paged {
		if int(n) != i || len(paged) != len(written) {
			t.Fatalf("pages are of %v", paged)
		}
	}

	yes, no := true, false
	alice, order3, view, none := uid("User alice"), uid("Order 3"), uid("Action view"), uid("Action none")
	for name, c := range map[string]struct {
		query store.DecisionQuery
		want  int
	}{
		"all":          {store.DecisionQuery{}, 20},
		"principal":    {store.DecisionQuery{Principal: &alice}, 10},
		"resource":     {store.DecisionQuery{Resource: &order3}, 1},
		"action":       {store.DecisionQuery{Action: &view}, 20},
		"other action": {store.DecisionQuery{Action: &none}, 0},
		"allowed":      {store.DecisionQuery{Allowed: &yes}, 10},
		"denied":       {store.DecisionQuery{Allowed: &no}, 10},
		"at field":     {store.DecisionQuery{DeniedAt: 3}, 3},
		"policy":       {store.DecisionQuery{Policy: "shop/ü b"}, 10},
		"caller":       {store.DecisionQuery{Caller: "shop"}, 20},
		"no caller":    {store.DecisionQuery{Caller: "other"}, 0},
		"request":      {store.DecisionQuery{RequestID: "r1"}, 10},
		"trace":        {store.DecisionQuery{TraceID: "t1"}, 10},
		"no trace":     {store.DecisionQuery{TraceID: "t2"}, 0},
		"revision":     {store.DecisionQuery{Revision: 7}, 20},
		"no revision":  {store.DecisionQuery{Revision: 8}, 0},
		"permitted":    {store.DecisionQuery{Field: "id"}, 20},
		"who saw it":   {store.DecisionQuery{PermittedField: "id"}, 20},
		"saw it not":   {store.DecisionQuery{DeniedField: "id"}, 0},
		"was denied":   {store.DecisionQuery{DeniedField: "total"}, 20},
		"saw no total": {store.DecisionQuery{PermittedField: "total"}, 0},
		"field denied": {store.DecisionQuery{Field: "total"}, 20},
		"half a field": {store.DecisionQuery{Field: "tota"}, 0},
		"a sign":       {store.DecisionQuery{Field: "+id"}, 0},
		"masked":       {store.DecisionQuery{Masked: []byte{3}}, 20},
		"not masked":   {store.DecisionQuery{Masked: []byte{1}}, 0},
		"from":         {store.DecisionQuery{From: now.Add(time.Hour)}, 4},
		"to":           {store.DecisionQuery{To: written[4].At}, 4},
		"both":         {store.DecisionQuery{From: written[4].At, To: written[8].At, Principal: &alice}, 2},
	} {
		c.query.Limit = 100
		got, err := db.QueryDecisions(t.Context(), c.query)
		if err != nil || len(got) != c.want {
			t.Errorf("%s: %d, want %d, %v", name, len(got), c.want, err)
		}
	}
}

func TestDecisionLogIsAppendOnly(t *testing.T) {
	db, url := openURL(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	d := decision(time.Now(), 1)
	if _, err := w.Append(t.Context(), []store.Decision{d}, nil); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"decisions", "decisions_" + d.At.Format("20060102")} {
		for _, sql := range []string{"update %s set allowed = false", "delete from %s", "truncate %s"} {
			err := raw(t, url, fmt.Sprintf(sql, table))
			var pgErr *pgconn.PgError
			if !errors.As(err, &pgErr) || !strings.Contains(pgErr.Message, "append-only") {
				t.Errorf(sql+": %v", table, err)
			}
		}
	}
	if got, err := db.GetDecision(t.Context(), d.ID); err != nil || !same(got, d) {
		t.Errorf("%+v, %v", got, err)
	}
	// All or none, and the writer goes on after an error.
	next := decision(time.Now(), 2)
	var pgErr *pgconn.PgError
	if _, err := w.Append(t.Context(), []store.Decision{next, d}, nil); !errors.As(err, &pgErr) || pgErr.Code != "23505" {
		t.Errorf("the same id twice: %v", err)
	}
	if _, err := db.GetDecision(t.Context(), next.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("half a batch was written: %v", err)
	}
	mustRaw(t, url, `select pg_terminate_backend(pid) from pg_stat_activity
		where datname = current_database() and pid <> pg_backend_pid()`)
	if _, err := w.Append(t.Context(), []store.Decision{next}, nil); err != nil {
		if _, err := w.Append(t.Context(), []store.Decision{next}, nil); err != nil {
			t.Errorf("does not connect again: %v", err)
		}
	}
}

func TestPartitions(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	now := time.Now()
	ready := func(day time.Time) bool {
		ready, _, err := db.PartitionsReady(t.Context(), day)
		if err != nil {
			t.Fatal(err)
		}
		return ready[0]
	}
	if !ready(now.AddDate(0, 0, -1)) || !ready(now.AddDate(0, 0, 7)) || ready(now.AddDate(0, 0, 8)) {
		t.Error("a migrated database is not ready for a week")
	}
	far := decision(now.AddDate(0, 0, 40), 1)
	if _, err := w.Append(t.Context(), []store.Decision{far}, nil); !errors.Is(err, store.ErrNoPartition) {
		t.Errorf("got %v", err)
	}
	errs := make(chan error)
	for range 4 {
		go func() { errs <- db.EnsurePartitions(t.Context(), far.At) }()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if _, err := w.Append(t.Context(), []store.Decision{far}, nil); err != nil || !ready(far.At) {
		t.Errorf("got %v", err)
	}
	// Near midnight, and in a time zone with another date.
	midnight := time.Date(far.At.Year(), far.At.Month(), far.At.Day(), 0, 0, 0, 0, time.UTC).In(time.FixedZone("", -5*3600))
	for i, at := range []time.Time{midnight, midnight.Add(-time.Millisecond)} {
		d := decision(at, byte(10+i))
		if _, err := w.Append(t.Context(), []store.Decision{d}, nil); err != nil || !ready(at) {
			t.Errorf("%v: %v", at, err)
		}
		if got, err := db.GetDecision(t.Context(), d.ID); err != nil || !same(got, d) {
			t.Errorf("%+v, %v", got, err)
		}
	}
}

// The longest names that the contract allows fit into the indexes. Otherwise the decision
// could not be recorded.
func TestLongestNames(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	long := func(n int) string { // does not compress
		var b strings.Builder
		for b.Len() < n {
			b.WriteString(rand.Text())
		}
		return b.String()[:n]
	}
	d := decision(time.Now(), 1)
	d.Allowed, d.DeniedAt, d.RequestID = false, 2, long(128)
	d.Principal, d.Action, d.Resource = store.UID{Type: long(512), ID: long(1024)}, store.UID{Type: long(512), ID: long(1024)}, store.UID{Type: long(512), ID: long(1024)}
	if _, err := w.Append(t.Context(), []store.Decision{d}, nil); err != nil {
		t.Fatal(err)
	}
	got, err := db.QueryDecisions(t.Context(), store.DecisionQuery{Principal: &d.Principal, Resource: &d.Resource, DeniedAt: 2, Limit: 1})
	if err != nil || len(got) != 1 || !same(got[0], d) {
		t.Errorf("%d, %v", len(got), err)
	}
}
