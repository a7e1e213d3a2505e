package store_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
)

// readBatches reads the log from a leaf on, as "0: d1 d2 e3".
func readBatches(t *testing.T, db *store.DB, leaf int64, maxBytes int) []string {
	t.Helper()
	batches, err := db.Batches(t.Context(), leaf, 100)
	if err != nil {
		t.Fatal(err)
	}
	n, err := db.ReadEntries(t.Context(), batches, maxBytes)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, b := range batches[:n] {
		text := fmt.Sprintf("%d:", b.Leaf)
		for _, e := range b.Entries {
			kind := " d"
			if e.Event {
				kind = " e"
			}
			text += fmt.Sprint(kind, e.Record[len(e.Record)-1])
		}
		if h, err := auditlog.ParseHeader(b.Header); err != nil || h.Batch != b.ID || h.Rows != b.Rows {
			t.Errorf("batch %d: header %+v, %v", b.Leaf, h, err)
		}
		out = append(out, text)
	}
	return out
}

func TestBatches(t *testing.T) {
	db, url := openURL(t)
	w, late := db.NewLogWriter("s1", auditlog.Strict, 0), db.NewLogWriter("s2", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	t.Cleanup(late.Close)
	today := time.Now().UTC().Truncate(24 * time.Hour)
	at := func(d time.Duration, n byte) store.Decision { return decision(today.Add(d), n) }
	commit := func(w *store.LogWriter, decisions []store.Decision, events []store.Event) {
		t.Helper()
		if _, err := w.Append(t.Context(), decisions, events); err != nil {
			t.Fatal(err)
		}
	}
	if got := readBatches(t, db, 0, 1000); len(got) != 0 {
		t.Errorf("an empty log has %v", got)
	}
	if leaf, err := db.FindBatch(t.Context(), 0, today); err != nil || leaf != 0 {
		t.Errorf("an empty log begins at %d, %v", leaf, err)
	}
	commit(w, []store.Decision{at(-10*time.Hour, 1), at(-9*time.Hour, 2)}, []store.Event{event(today.Add(-9*time.Hour), 3, "change", "", "")})
	commit(w, nil, nil)
	commit(w, []store.Decision{at(2*time.Hour, 5), at(time.Hour, 4)}, nil) // the clock went back
	commit(late, []store.Decision{at(time.Hour, 6)}, nil)                  // a batch of another writer at the same time
	commit(w, nil, []store.Event{event(today.Add(3*time.Hour), 7, "change", "", "")})

	for _, c := range []struct {
		leaf     int64
		maxBytes int
		want     string
	}{
		{0, 1000, "0: d1 d2 e3, 1:, 2: d5 d4, 3: d6, 4: e7"},
		{3, 1000, "3: d6, 4: e7"},
		{5, 1000, ""},
		{0, 22, "0: d1 d2 e3, 1:, 2: d5 d4"}, // of 5, 5, 2, 5, 5, 5 and 2 bytes
		{0, 21, "0: d1 d2 e3, 1:"},
		{0, 1, "0: d1 d2 e3, 1:"},
		{3, 1, "3: d6"},
	} {
		if got := strings.Join(readBatches(t, db, c.leaf, c.maxBytes), ", "); got != c.want {
			t.Errorf("from %d, %d bytes: %q, want %q", c.leaf, c.maxBytes, got, c.want)
		}
	}

	for _, c := range []struct {
		leaf int64
		at   time.Duration
		want int64
	}{
		{0, -20 * 24 * time.Hour, 0},
		{0, -9 * time.Hour, 0},
		{0, -8 * time.Hour, 2}, // over the empty one
		{0, 2 * time.Hour, 2},
		{0, 2*time.Hour + time.Millisecond, 4},
		{3, -time.Hour, 3},
		{0, 4 * time.Hour, 5},
		{0, 400 * 24 * time.Hour, 5},
		{9, 0, 9},
	} {
		if got, err := db.FindBatch(t.Context(), c.leaf, today.Add(c.at)); err != nil || got != c.want {
			t.Errorf("from %d, at %v: %d, want %d, %v", c.leaf, c.at, got, c.want, err)
		}
	}
	if n, err := db.NextLeaf(t.Context()); err != nil || n != 5 {
		t.Errorf("the next leaf is %d, %v", n, err)
	}

	// If a day is dropped, its leaves stay.
	yesterday := today.AddDate(0, 0, -1).Format("20060102")
	for _, table := range []string{"decisions_", "events_"} {
		mustRaw(t, url, "drop table "+table+yesterday)
	}
	if got := strings.Join(readBatches(t, db, 0, 1000), ", "); got != "0:, 1:, 2: d5 d4, 3: d6, 4: e7" {
		t.Errorf("after a day was dropped: %q", got)
	}
}
