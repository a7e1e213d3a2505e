package store_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
)

// The callers of some actions are counted from a time on, over parts of the time and over days. Without
// time to read, nothing is counted, and that is said.
func TestAskers(t *testing.T) {
	db, url := openURL(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	now := time.Now()
	mustRaw(t, url, "select create_log_partitions($1::date, 4)", now.UTC().AddDate(0, 0, -4).Format(time.DateOnly))
	n := byte(0)
	ask := func(ago time.Duration, caller, action string) {
		t.Helper()
		d := decision(now.Add(-ago), n)
		n++
		d.Revision, d.Caller, d.Action = 0, caller, uid(action)
		if _, err := w.Append(t.Context(), []store.Decision{d}, nil); err != nil {
			t.Fatal(err)
		}
	}
	const hour = time.Hour
	ask(0, "shop", "Action view")
	ask(hour-time.Second, "shop", "Action view")
	ask(hour, "crm", "Action view")
	ask(0, "shop", "Action edit")
	ask(0, "shop", "Other view") // of another namespace
	ask(0, "shop", "Action print")
	ask(3*24*hour, "shop", "Action view")
	ask(3*24*hour, "old", "Action edit")
	asked := []store.UID{uid("Action view"), uid("Action edit"), uid("Action never")}
	to := now.Add(time.Second)
	for _, c := range []struct {
		ago  time.Duration
		want string
	}{
		{time.Minute, "[{Action edit shop 1} {Action view shop 1}]"},
		{2 * hour, "[{Action view shop 2} {Action view crm 1} {Action edit shop 1}]"},
		{7 * 24 * hour, "[{Action view shop 3} {Action view crm 1} {Action edit old 1} {Action edit shop 1}]"},
	} {
		from := now.Add(-c.ago)
		found, err := db.Askers(t.Context(), asked, from, to, time.Minute)
		got := ""
		for _, a := range found.List {
			got += fmt.Sprintf(" {%s %s %s %d}", a.Action.Type, a.Action.ID, a.Caller, a.Count)
		}
		if got = "[" + got[min(1, len(got)):] + "]"; err != nil || got != c.want || !found.Since.Equal(from) {
			t.Errorf("%v: %s since %v, %v, want %s", c.ago, got, found.Since, err, c.want)
		}
	}
	found, err := db.Askers(t.Context(), asked, now.Add(-hour), to, 0)
	if err != nil || len(found.List) != 0 || !found.Since.Equal(to) {
		t.Errorf("without time: %+v, %v", found, err)
	}
}
