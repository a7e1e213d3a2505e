package store_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func event(at time.Time, n byte, kind, caller, subject string) store.Event {
	return store.Event{
		ID: idAt(at, n), At: at.UTC().Truncate(time.Millisecond), Kind: kind, Caller: caller, Server: "s1", Subject: subject,
		Revision: int64(n), RequestID: "r1", TraceID: "t1", Record: []byte{0xff, n},
	}
}

func TestEvents(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	now := time.Now()
	var written []store.Event
	for n := range byte(10) {
		at := now.Add(time.Duration(n/4) * time.Millisecond)
		if n >= 8 {
			at = now.AddDate(0, 0, 1)
		}
		e := event(at, n, "change", "shop", "bundle shop")
		if n%2 == 1 {
			e.Kind, e.Caller, e.Subject, e.Revision, e.RequestID, e.TraceID = "log_read", "", "", 0, "", ""
		}
		written = append(written, e)
	}
	if _, err := w.Append(t.Context(), nil, written[:8]); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Append(t.Context(), []store.Decision{decision(now.AddDate(0, 0, 1), 100)}, written[8:]); err != nil {
		t.Fatal(err)
	}

	var paged []store.Event
	q := store.EventQuery{Limit: 3}
	for {
		page, err := db.QueryEvents(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		paged = append(paged, page...)
		if len(page) < q.Limit {
			break
		}
		q.BeforeAt, q.BeforeID = page[2].At, page[2].ID
	}
	slices.Reverse(paged)
	if len(paged) != len(written) {
		t.Fatalf("pages have %d events, want %d", len(paged), len(written))
	}
	for i, got := range paged {
		want := written[i]
		want.CRC = store.Checksum(want.Record)
		if want.Batch, want.Pos = got.Batch, i; i >= 8 {
			want.Pos = i - 7 // after the decision
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%+v, want %+v", got, want)
		}
	}

	for name, c := range map[string]struct {
		query store.EventQuery
		want  int
	}{
		"kind":     {store.EventQuery{Kind: "change"}, 5},
		"caller":   {store.EventQuery{Caller: "shop"}, 5},
		"subject":  {store.EventQuery{Subject: "bundle shop"}, 5},
		"no kind":  {store.EventQuery{Kind: "changes"}, 0},
		"disjoint": {store.EventQuery{Kind: "log_read", Caller: "shop"}, 0},
		"from":     {store.EventQuery{From: written[8].At}, 2},
		"to":       {store.EventQuery{To: written[4].At}, 4},
		"both":     {store.EventQuery{From: written[4].At, To: written[8].At, Kind: "change"}, 2},
	} {
		c.query.Limit = 100
		got, err := db.QueryEvents(t.Context(), c.query)
		if err != nil || len(got) != c.want {
			t.Errorf("%s: %d, want %d, %v", name, len(got), c.want, err)
		}
	}
}
