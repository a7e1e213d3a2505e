package decisionlog

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// Background tasks report their outcome: nil while the database is available, and an error
// otherwise.
func TestTasksAreReported(t *testing.T) {
	t.Parallel() // it takes long
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(pg.URL())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	outcomes := make(chan error, 1)
	var task string
	r := startRecorder(t, Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler), mergeEvery: time.Hour, Task: func(name string, err error) {
		if name == task {
			outcomes <- err
		}
	}})
	noted := NewNoted(r)
	signer, err := NewSigner(r, Signing{})
	if err != nil {
		t.Fatal(err)
	}
	work := map[string]func(){
		TaskNoted: func() {
			noted.AuthenticationFailure("10.0.0.1:1", "p", "no key")
			noted.record(t.Context(), noted.due(true), true)
		},
		TaskMergeKeys: func() {
			r.unmerged.Store(true) // as after a commit
			r.mergeOnce(t.Context())
		},
		TaskWatchLog: func() {
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { defer close(ended); signer.WatchLog(ctx) }()
			err := <-outcomes
			cancel()
			<-ended
			outcomes <- err
		},
	}
	for _, there := range []bool{true, false} {
		if !there {
			if err := pg.Stop(); err != nil {
				t.Fatal(err)
			}
		}
		for name, do := range work {
			task = name
			do()
			if err := <-outcomes; (err == nil) != there {
				t.Errorf("%s: %v; the database is available: %v", name, err, there)
			}
		}
	}
}

// logged returns how many events of a kind a database has, the sum of their counts, and the bytes
// of the tables of events with their indexes.
func logged(t *testing.T, db *store.DB, kind cedarpostv1.EventRecord_Kind) (list []*cedarpostv1.EventRecord, total, bytes int64) {
	t.Helper()
	for q := (store.EventQuery{Kind: EventKind(kind), Limit: 500}); ; {
		rows, err := db.QueryEvents(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range rows {
			e := ReadEvent(row)
			list = append(list, e)
			total += e.GetAuthenticationFailure().GetCount() + e.GetPublishRefused().GetCount() + e.GetProbing().GetCount() + e.GetRefusedRight().GetCount()
			bytes += int64(len(row.Record))
			q.BeforeAt, q.BeforeID = row.At, row.ID
		}
		if len(rows) < q.Limit {
			return list, total, bytes
		}
	}
}

// A caller that makes up actions to be refused fills neither the log nor the memory, and each refusal
// counts.
func TestAttackMadeUpRefusals(t *testing.T) {
	t.Parallel()
	n, db, now := newNoted(t)
	const calls = 10_000
	ctx := WithCall(t.Context(), Call{Caller: "mallory", Procedure: "p"})
	tickOften(t, n, now, 10, func(tick int) {
		for i := range calls / 10 {
			n.RefusedRight(ctx, "p", fmt.Sprintf(`Made::Action::"%d-%d"`, tick, i))
		}
		for _, g := range n.groups {
			if len(g.seen) > notedSubjects+1 {
				t.Fatalf("%d refusals are counted apart", len(g.seen))
			}
		}
	})
	*now = now.Add(time.Hour)
	n.record(t.Context(), n.due(true), true)
	list, total, _ := logged(t, db, cedarpostv1.EventRecord_REFUSED_RIGHT)
	t.Logf("refusals of made-up actions: %d calls counted in %d events", total, len(list))
	if total != calls || len(list) > notedBurst+2*notedPerMinute+20 {
		t.Errorf("%d calls in %d events", total, len(list))
	}
}

// tickOften lets an hour pass in ticks of Noted.Run, and calls fn before each tick.
func tickOften(t *testing.T, n *Noted, now *time.Time, ticks int, fn func(tick int)) {
	t.Helper()
	for i := range ticks {
		fn(i)
		n.record(t.Context(), n.new(), false)
		*now = now.Add(notedInterval)
		n.record(t.Context(), n.due(false), true)
	}
}

func newNoted(t *testing.T) (*Noted, *store.DB, *time.Time) {
	t.Helper()
	db := storetest.Open(t)
	n := NewNoted(startRecorder(t, Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler), Task: func(_ string, err error) {
		if err != nil {
			t.Error(err)
		}
	}}))
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	n.now = func() time.Time { return now }
	return n, db, &now
}

// An attacker that fails to authenticate from a hundred thousand addresses for an hour adds a
// bounded number of events to the log. No failure is left out of their counts. Few addresses are
// named one by one, and more by their networks.
func TestAttackFailuresFromManyAddresses(t *testing.T) {
	const kind, hour, addresses = cedarpostv1.EventRecord_AUTHENTICATION_FAILURE, 360, 100_000
	n, db, now := newNoted(t)
	for i := range 3 {
		n.AuthenticationFailure(fmt.Sprintf("192.0.2.%d:1", i), "p", "unknown key")
	}
	n.record(t.Context(), n.new(), false)
	if list, total, _ := logged(t, db, kind); len(list) != 3 || total != 3 {
		t.Fatalf("3 addresses: %d events, %d failures", len(list), total)
	}
	sent := int64(3)
	tickOften(t, n, now, hour, func(tick int) {
		for i := range addresses / hour {
			at := tick*(addresses/hour) + i
			peer := fmt.Sprintf("[2001:db8:%x:%x::%x]:1", at%7, at>>3, at)
			if at%2 == 0 {
				peer = fmt.Sprintf("10.%d.%d.%d:1", at>>16&255, at>>8&255, at&255)
			}
			n.AuthenticationFailure(peer, "p", "unknown key")
			sent++
		}
	})
	n.record(t.Context(), n.due(true), true)
	list, total, bytes := logged(t, db, kind)
	most := notedBurst + hour/6*(notedPerMinute+1) + notedSubjects
	subjects := map[string]int{}
	for _, e := range list {
		switch s := e.GetSubject(); {
		case s == others || strings.HasSuffix(s, "/24") || strings.HasSuffix(s, "/64"):
			subjects[s[max(0, len(s)-3):]]++
		default:
			subjects["address"]++
		}
	}
	if len(list) > most || total != sent || bytes > 300*int64(most) || subjects["ers"] == 0 || subjects["/24"] == 0 || subjects["/64"] == 0 || subjects["address"] == 0 {
		t.Errorf("%d events of %d bytes, %d failures of %d, %v", len(list), bytes, total, sent, subjects)
	}
	t.Logf("%d failures from %d addresses in an hour: %d events (at most %d), %d bytes of records, %v", sent, addresses, len(list), most, bytes, subjects)
}

// What one caller does neither hides what others do nor fills the log.
func TestAttackProbing(t *testing.T) {
	const kind = cedarpostv1.EventRecord_PROBING
	n, db, now := newNoted(t)
	ctx := func(caller string) context.Context { return WithCall(t.Context(), Call{Caller: caller, TraceID: "t"}) }
	long := strings.Repeat("ü", 100_000)
	tickOften(t, n, now, 60, func(tick int) {
		for i := range 1000 {
			n.Probing(ctx("attacker"), ProbingInvalid, fmt.Sprintf("User::%q", fmt.Sprint(tick, i)), long)
		}
		if tick%6 == 0 {
			n.Probing(ctx("honest"), ProbingExplained, `User::"bob"`, "Read")
		}
	})
	n.record(t.Context(), n.due(true), true)
	list, total, bytes := logged(t, db, kind)
	honest := int64(0)
	for _, e := range list {
		p := e.GetProbing()
		if e.GetCaller() == "honest" {
			honest += p.GetCount()
			if p.GetReason() != ProbingExplained || p.GetPrincipal() != `User::"bob"` || p.GetExample() != "Read" || e.GetTraceId() != "t" {
				t.Errorf("%v", e)
			}
		}
		if len(p.GetExample()) > maxNotedText || p.GetLast().AsTime().Before(p.GetFirst().AsTime()) {
			t.Errorf("%v", e)
		}
	}
	most := 2*(notedBurst+10*(notedPerMinute+1)) + notedSubjects
	if len(list) > most || honest != 10 || total != 60_000+honest {
		t.Errorf("%d events, %d of the honest caller, %d in all", len(list), honest, total)
	}
	t.Logf("60000 invalid questions in 10 minutes: %d events (at most %d), %d bytes of records", len(list), most, bytes)
}

// What goes on is recorded again after 10 s, 20 s, 40 s and then each minute; what has ended is
// forgotten.
func TestNotedInterval(t *testing.T) {
	const kind = cedarpostv1.EventRecord_AUTHENTICATION_FAILURE
	n, db, now := newNoted(t)
	var at []int
	before := 0
	tickOften(t, n, now, 30, func(tick int) {
		if list, _, _ := logged(t, db, kind); len(list) != before {
			at, before = append(at, tick), len(list)
		}
		n.AuthenticationFailure("192.0.2.1:1", "p", "unknown key")
	})
	if got := fmt.Sprint(at); got != "[1 2 4 8 14 20 26]" {
		t.Errorf("recorded before ticks %s", got)
	}
	tickOften(t, n, now, 60, func(int) {})
	if _, total, _ := logged(t, db, kind); total != 30 || len(n.groups) != 0 {
		t.Errorf("%d failures, %d groups", total, len(n.groups))
	}
}

// No count is lost, the keys in memory are bounded, and no caller gets more events than its share.
// This holds for notes, records and failed records in any order.
func TestNotedCounts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := NewNoted(nil)
		now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
		began := now
		n.now = func() time.Time { return now }
		sent, recorded, events := 0, int64(0), map[string]int{}
		steps := rapid.IntRange(1, 200).Draw(t, "steps")
		for range steps {
			var list map[notedKey]noted
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0:
				for range rapid.IntRange(1, 300).Draw(t, "times") {
					caller := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "caller")
					n.Probing(WithCall(context.Background(), Call{Caller: caller}), ProbingCostly, fmt.Sprint(rapid.IntRange(0, 500).Draw(t, "principal")), "")
					sent++
				}
			case 1:
				list = n.new()
			case 2:
				now = now.Add(notedInterval)
				list = n.due(false)
			case 3:
				now = now.Add(time.Duration(rapid.IntRange(1, 600).Draw(t, "seconds")) * time.Second)
			}
			if rapid.IntRange(0, 4).Draw(t, "failed") == 0 {
				n.putBack(list)
				continue
			}
			for key, c := range list {
				recorded += c.count
				events[key.caller]++
			}
		}
		for _, c := range n.due(true) {
			recorded += c.count
		}
		if recorded != int64(sent) {
			t.Fatalf("%d of %d are recorded", recorded, sent)
		}
		for caller, count := range events {
			if most := notedBurst + int(now.Sub(began).Minutes()*(notedPerMinute+1)) + 2; count > most {
				t.Fatalf("%s has %d events, at most %d", caller, count, most)
			}
		}
		for _, g := range n.groups {
			if len(g.seen) > notedSubjects+1 {
				t.Fatalf("%d subjects", len(g.seen))
			}
		}
	})
}
